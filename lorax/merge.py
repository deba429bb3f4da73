"""Merged weights: the reference semantics of every method, and their inverse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax import compat, paths
from lorax.adapter import Adapter, base_leaves
from lorax.interpret.contraction import dense
from lorax.interpret.weight import Factor, Weight, promoted


def merge(params: Any, adapter: Adapter) -> Any:
    """Return the params with every adapted leaf replaced by its merged weight, in the leaf's dtype.

    `fn(merge(params, adapter), x)` is what `adapt(fn)(params, adapter, x)` means.

    Args:
      params: the base; never changed.
      adapter: the adapter.

    Returns:
      A plain pytree shaped like `params`. Quantised leaves, adapted or not, come out in the precision that they stand
      for; `merge_quantized` keeps their formats.

    Raises:
      ValueError: the adapter belongs to other params, one of its methods has no merged weight, or it holds a number
        that is not finite.
    """
    leaves, tree = base_leaves(params, adapter.sites)
    leaves.update(_merged(leaves, adapter))
    plain = [x.dequantize() if paths.is_quantized(x) else x for x in leaves.values()]
    return jax.tree.unflatten(tree, plain)


def merge_quantized(params: Any, adapter: Adapter) -> tuple[Any, dict[str, float]]:
    """Merge into a quantised base, and quantise the merged weights again.

    Args:
      params: the base; never changed.
      adapter: the adapter.

    Returns:
      The params, in which an adapted leaf that was quantised is so again, in its own format, and the others are as
      `merge` leaves them or as they were; and, for each path that was quantised again, what that lost: the norm of the
      difference to the merged weight over the norm of the merged weight (Frobenius).

    Raises:
      ValueError: as `merge`.
    """
    leaves, tree = base_leaves(params, adapter.sites)
    errors = {}
    for path, merged in _merged(leaves, adapter).items():
        if paths.is_quantized(leaves[path]):
            leaves[path], errors[path] = _requantized(leaves[path], merged)
        else:
            leaves[path] = merged
    return jax.tree.unflatten(tree, list(leaves.values())), {p: float(e) for p, e in errors.items()}


@jax.jit
def _requantized(node: Any, merged: jax.Array) -> tuple[Any, jax.Array]:
    made = node.with_values(merged)
    merged = merged.astype(jnp.float32)
    lost = jnp.linalg.norm((made.dequantize() - merged).ravel()) / jnp.linalg.norm(merged.ravel())
    return made, lost


def _merged(leaves: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    _refuse_unmergeable(adapter)
    _refuse_non_finite(adapter)
    return {
        site.path: dense(method.leaf(site, leaves[site.path], adapter.arrays(site.path)))
        for site, method in adapter.plan.entries
    }


def unmerge(merged: Any, adapter: Adapter) -> Any:
    """Return the base that `merge` made `merged` from, up to round-off in the leaves' dtype.

    In bfloat16 a merge followed by an unmerge changes several percent of the weights in their last bit: keep the base
    where it has to be exact.

    Raises:
      ValueError: the adapter belongs to other params, one of its methods has no inverse, or `merged` is quantised.
    """
    leaves, tree = base_leaves(merged, adapter.sites)
    if quantised := [s.path for s in adapter.sites if paths.is_quantized(leaves[s.path])]:
        raise ValueError(f"{', '.join(quantised)}: a quantised weight has lost the base's bits; keep the base instead")
    _refuse_unmergeable(adapter)
    _refuse_non_finite(adapter)
    weights = {
        site.path: method.leaf(site, leaves[site.path], adapter.arrays(site.path)).settled()
        for site, method in adapter.plan.entries
    }
    lost = [s.path for s, m in adapter.plan.entries if not m.is_invertible]
    if lost:
        kinds = sorted({type(m).__name__ for _, m in adapter.plan.entries if not m.is_invertible})
        raise ValueError(f"{', '.join(kinds)} cannot be unmerged, at {', '.join(lost)}: keep the base instead")
    for path, weight in weights.items():
        # W' = g∘W + Δ: the update alone is the weight at W = 0, and with the gain the weight at W = 1.
        dtype = promoted(weight.dtype, jnp.float32)
        at_zero = dense(_with_base(weight, jnp.zeros_like(weight.base, dtype)))
        base = leaves[path].astype(dtype) - (at_zero if weight.terms[1:] else 0)
        if sum(f.array is weight.base for f in weight.factors()) > 1 or weight.terms[0].factors[1:] or weight.gains:
            base = base / (dense(_with_base(weight, jnp.ones_like(weight.base, dtype))) - at_zero)
        leaves[path] = base.astype(leaves[path].dtype)
    return jax.tree.unflatten(tree, list(leaves.values()))


def _with_base(weight: Weight, base: Any) -> Weight:
    """Return the weight with another base, wherever the method's expression has it."""
    factors = [Factor(base, f.axes) if f.array is weight.base else f for f in weight.factors()]
    return weight.with_factors(factors, dtype=base.dtype)


def _refuse_unmergeable(adapter: Adapter) -> None:
    entries = [(site.path, type(method).__name__) for site, method in adapter.plan.entries if not method.is_mergeable]
    if entries:
        listed, kinds = ", ".join(path for path, _ in entries), ", ".join(sorted({kind for _, kind in entries}))
        raise ValueError(
            f"{kinds} has no merged weight, at {listed}: it adds to the output what no weight would (LoRA's bias, a "
            "bottleneck, a prefix); keep the adapter, or leave these out of its spec"
        )


def _refuse_non_finite(adapter: Adapter) -> None:
    for partition in (adapter.params, adapter.state):
        for path, arrays in partition.items():
            for name, x in arrays.items():
                if compat.is_traced(x) or not getattr(x, "is_fully_addressable", True):
                    continue
                if not np.isfinite(np.asarray(x, np.float32)).all():
                    raise ValueError(f"{path}: the adapter's {name!r} holds NaN or infinity; it cannot be merged")
