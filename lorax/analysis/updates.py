"""What an adapter adds to a weight: as two factors where it is a sum of low-rank products, else as the difference.

Axes: S stacked layers or experts, I fan-in, O fan-out (each flattened), R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax import compat, paths
from lorax.adapter import Adapter, base_leaves
from lorax.interpret.contraction import dense
from lorax.interpret.weight import Factor, Label, Part, Term, Weight, cast, promoted
from lorax.methods import Method
from lorax.methods.initializers import leaf_of, matrices
from lorax.sites import Site

Factors = tuple[jax.Array, jax.Array]


def factors(adapter: Adapter, path: str, params: Any = None) -> Factors | None:
    """Return the update of a weight as two factors, `ΔW = A·B` in every layer, without building it.

    That is `s·A` and `B` of LoRA, the same of AdaLoRA with its weights, of VeRA with its vectors, of LoHa with rank²
    columns, of PiSSA and OLoRA with twice the rank since they subtract where they started: whatever a method's `weight`
    adds as products of arrays that span the fan-in or the fan-out, but not both.

    Args:
      adapter: the adapter.
      path: the weight's path.
      params: the base; needed where the method derives something before it adds (LoRA-FA, LoHa, DoRA).

    Returns:
      `A` [S, I, R] and `B` [S, R, O], float32 or wider; None where the update is no such sum: DoRA, (IA)³, LoKr, Full.

    Raises:
      ValueError: the path is not adapted, its method has no merged weight, or the base is needed and not given.

    >>> import lorax
    >>> fn, params = lambda p, x: x @ p["kernel"], {"kernel": jnp.eye(8)}
    >>> spec = lorax.Spec({"kernel": lorax.LoRA(rank=2, alpha=6)})
    >>> adapter = lorax.init(jax.random.key(0), spec, lorax.trace(fn, params, jnp.ones((1, 8))), params)
    >>> a, b = factors(adapter, "kernel")
    >>> a.shape, b.shape, bool(jnp.all(a[0] == 3 * adapter.params["kernel"]["a"]))
    ((1, 8, 2), (1, 2, 8), True)
    """
    site, weight, base = _weight(adapter, path, params)
    return _factors(site, weight, base)


def delta(params: Any, adapter: Adapter, path: str) -> jax.Array:
    """Return what the adapter adds to a weight, `ΔW`, in the leaf's layout and float32 or wider.

    The product of the factors where there are any, so that nothing cancels, else the merged weight less the base.

    Args:
      params: the base, quantised or not.
      adapter: the adapter.
      path: the weight's path.

    Raises:
      ValueError: as `factors`.
    """
    site, weight, base = _weight(adapter, path, params)
    if (pair := _factors(site, weight, base)) is None:
        return dense(weight) - base
    return leaf_of(site, jnp.matmul(*pair, precision=lax.Precision.HIGHEST))


def delta_matrices(params: Any, adapter: Adapter, path: str) -> jax.Array:
    """Return `ΔW` as matrices [S, I, O]."""
    return matrices(adapter.sites[path], delta(params, adapter, path))


def replicated(x: jax.Array) -> jax.Array:
    """Return an array whole on every device, where types say how it is split: a decomposition needs it so."""
    mesh = compat.explicit_mesh(x)
    return x if mesh is None else jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, jax.P()))


def has_weight(method: Method) -> bool:
    """Tell whether a method changes a weight, besides whatever else it does; LoRA with a bias does."""
    return type(method).weight is not Method.weight


def _weight(adapter: Adapter, path: str, params: Any) -> tuple[Site, Weight, Any]:
    """Return the site, its weight as an expression, and the base in that, in float32 or wider."""
    if path not in adapter.methods:
        near = ", ".join(paths.nearest(path, adapter.methods)) or "there are none"
        raise ValueError(f"{path}: the adapter adapts no such leaf. Nearest: {near}")
    site, method = adapter.sites[path], adapter.methods[path]
    if not has_weight(method):
        raise ValueError(f"{path}: {type(method).__name__} has no merged weight: it changes outputs, and no weight")
    if params is not None:
        leaf = base_leaves(params, [site])[0][path]
        leaf = jnp.asarray(leaf.dequantize() if paths.is_quantized(leaf) else leaf)
        base = cast(leaf, promoted(leaf.dtype, jnp.float32))
    elif method.derives:
        raise ValueError(f"{path}: {type(method).__name__} needs the base to say what it adds to it: give the params")
    else:  # `weight` is an expression of it and looks at no value
        base = jax.ShapeDtypeStruct(site.shape, promoted(jnp.dtype(site.dtype), jnp.float32))
    return site, method.leaf(site, base, adapter.arrays(path)).settled(), base


def _factors(site: Site, weight: Weight, base: Any) -> Factors | None:
    """Return the factors of all terms side by side, if the weight is the base plus products of two sides."""
    is_sum = weight.base is base and len(weight.terms[0].factors) == 1 and not weight.gains
    pairs = [_sides(site, term) for term in weight.terms[1:]] if is_sum else []
    found = [pair for pair in pairs if pair is not None]
    if not found or len(found) < len(pairs):
        return None
    return jnp.concatenate([a for a, _ in found], axis=2), jnp.concatenate([b for _, b in found], axis=1)


def _sides(site: Site, term: Term) -> Factors | None:
    """Return a product of arrays as two: those of the fan-out, and all others."""
    fan_in, fan_out = set(site.axes("I")), set(site.axes("O"))
    last = [f for f in term.factors if fan_out & set(f.axes)]
    first = [f for f in term.factors if not fan_out & set(f.axes)]
    if any(fan_in & set(f.axes) for f in last) or any(isinstance(a, Part) for f in term.factors for a in f.axes):
        return None
    names = [
        {a: n for f in side for a, n in zip(f.axes, f.array.shape, strict=True) if isinstance(a, str)}
        for side in (first, last)
    ]
    bonds = [a for a in names[0] if a in names[1]]
    a = _product(site, first, (*site.axes("SI"), *bonds))
    b = _product(site, last, (*site.axes("S"), *bonds, *site.axes("O")))
    stack, fan_in_size, fan_out_size = (site.size(side) for side in "SIO")
    return a.reshape(stack, fan_in_size, -1), b.reshape(stack, -1, fan_out_size)


def _product(site: Site, side: Sequence[Factor], wanted: Sequence[Label]) -> jax.Array:
    """Multiply arrays, summed over the labels that are not wanted; along one that none of them has, all is alike."""
    missing = [a for a in wanted if not any(a in f.axes for f in side)]
    ones = Factor(jnp.ones([site.shape[a] for a in missing]), tuple(missing))
    labels = list(dict.fromkeys(a for f in (*side, ones) for a in f.axes))
    dtype = promoted(*(f.array.dtype for f in side), jnp.float32)
    arrays = [cast(replicated(f.array), dtype) for f in (*side, ones)]
    operands = [
        x for array, f in zip(arrays, (*side, ones), strict=True) for x in (array, [*map(labels.index, f.axes)])
    ]
    return jnp.einsum(*operands, [labels.index(a) for a in wanted], precision=lax.Precision.HIGHEST)
