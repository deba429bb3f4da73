"""How much two adapters of one base have to do with each other, without building what they add to the weights.

Axes: S stacked layers or experts, I fan-in, O fan-out (each flattened), R rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax.adapter import Adapter
from lorax.analysis.subspaces import directions, subspace_map
from lorax.analysis.updates import delta_matrices, factors, has_weight, replicated


def inner_product(a: Adapter, b: Adapter, path: str, params: Any = None) -> jax.Array:
    """Return `⟨ΔW_a, ΔW_b⟩ = tr(ΔW_aᵀ·ΔW_b)` of a weight, of factors as the sum of `(A_aᵀ·A_b) ∘ (B_a·B_bᵀ)`.

    Args:
      a: an adapter.
      b: another one, or the same, for the squared norm.
      path: the weight's path, adapted by both.
      params: the base, for methods whose update is no product of factors or that derive from it.

    Returns:
      One number a layer, [S].

    Raises:
      ValueError: as `factors`, or the base is needed and not given.
    """
    first, second = factors(a, path, params), factors(b, path, params)
    if first is not None and second is not None:
        (a_SxIxR, b_SxRxO), (a_SxIxQ, b_SxQxO) = first, second
        inputs_SxRxQ = _product(jnp.swapaxes(a_SxIxR, 1, 2), a_SxIxQ)
        return jnp.sum(inputs_SxRxQ * _product(b_SxRxO, jnp.swapaxes(b_SxQxO, 1, 2)), axis=(1, 2))
    if params is None:
        kinds = " and ".join(sorted({type(adapter.methods[path]).__name__ for adapter in (a, b)}))
        raise ValueError(f"{path}: an update of {kinds} is no product of two factors: give the params")
    return jnp.sum(delta_matrices(params, a, path) * delta_matrices(params, b, path), axis=(1, 2))


def cosines(a: Adapter, b: Adapter, params: Any = None) -> dict[str, jax.Array]:
    """Return the cosine between two adapters' updates of each weight that both adapt.

    Near 0 they add up without touching each other; negative, each undoes a part of the other. Where one of them adds
    nothing it is 0.

    Args:
      a: an adapter.
      b: another one of the same base.
      params: the base, as for `inner_product`.

    Returns:
      By path one number a layer, [S].
    """
    return {
        path: _cosine(*(inner_product(x, y, path, params) for x, y in ((a, b), (a, a), (b, b))))
        for path in _changed(a)
        if path in _changed(b)
    }


def cosine(a: Adapter, b: Adapter, params: Any = None) -> jax.Array:
    """Return the cosine between all that two adapters add to weights, those that only one of them adapts included.

    Args:
      a: an adapter.
      b: another one of the same base.
      params: the base, as for `inner_product`.

    >>> import lorax
    >>> fn, params = lambda p, x: x @ p["kernel"], {"kernel": jnp.eye(8)}
    >>> spec = lorax.Spec({"kernel": lorax.LoRA(rank=2)})
    >>> adapter = lorax.init(jax.random.key(0), spec, lorax.trace(fn, params, jnp.ones((1, 8))), params)
    >>> moved = adapter.replace(params=jax.tree.map(lambda x: x + 1, adapter.params))
    >>> opposite = moved.replace(params={"kernel": {**moved.params["kernel"], "b": -moved.params["kernel"]["b"]}})
    >>> round(float(cosine(moved, opposite)), 4), float(cosine(moved, adapter))
    (-1.0, 0.0)
    """
    total = lambda x, y: sum(
        (jnp.sum(inner_product(x, y, path, params)) for path in _changed(x) if path in _changed(y)), jnp.zeros(())
    )
    return _cosine(total(a, b), total(a, a), total(b, b))


def overlap(a: Adapter, b: Adapter, side: str = "input", params: Any = None) -> dict[str, jax.Array]:
    """Return how much of the smaller of two updates' subspaces lies in the other, `φ` over all directions.

    Args:
      a: an adapter.
      b: another one of the same base.
      side: `input`, what the updates read, or `output`, what they write.
      params: the base, as for `inner_product`.

    Returns:
      By path one number a layer, [S], between 0 and 1; see `subspace_similarity` for what chance gives.
    """
    sides = lambda path: (directions(adapter, path, side, params) for adapter in (a, b))
    both = [path for path in _changed(a) if path in _changed(b) and a.sites[path].is_adaptable]
    return {path: subspace_map(*sides(path))[:, -1, -1] for path in both}


def o_lora_penalty(previous: Iterable[Adapter], new: Adapter) -> jax.Array:
    """Return O-LoRA's penalty, the sum of `|A_prevᵀ·A_new|` over earlier tasks and weights.

    Wang et al. 2023 (arXiv:2310.14152, section 3.2) keep the inputs of each task's update orthogonal to those of the
    tasks before; the paper squares the entries, its code takes absolute values, as here. Add it to the loss:
    differentiable in `new`, whose `A` has to be trained.

    Args:
      previous: the adapters of earlier tasks, held fixed.
      new: the one that is trained.

    Raises:
      ValueError: an adapter has no weight with a factor `a` in common with the new one.

    >>> import lorax
    >>> fn, params = lambda p, x: x @ p["kernel"], {"kernel": jnp.eye(4)}
    >>> sites = lorax.trace(fn, params, jnp.ones((1, 4)))
    >>> adapter = lorax.init(jax.random.key(0), lorax.Spec({"kernel": lorax.LoRA(rank=1)}), sites, params)
    >>> along = lambda *a: adapter.replace(params={"kernel": {"a": jnp.array(a)[:, None], "b": jnp.ones((1, 4))}})
    >>> first, second = along(1.0, 0.0, 0.0, 0.0), along(-2.0, 1.0, 0.0, 0.0)
    >>> o_lora_penalty([first], second).item(), o_lora_penalty([first], along(0.0, 1.0, 0.0, 0.0)).item()
    (2.0, 0.0)
    """
    total = jnp.zeros(())
    for number, adapter in enumerate(previous):
        both = [path for path, arrays in new.params.items() if "a" in arrays and "a" in adapter.params.get(path, {})]
        if not both:
            raise ValueError(f"o_lora_penalty: adapter {number} trains no factor 'a' that the new one trains too")
        for path in both:
            before, now = (_inputs(x, path) for x in (adapter, new))
            total += jnp.sum(jnp.abs(_product(jnp.swapaxes(lax.stop_gradient(before), 1, 2), now)))
    return total


def _changed(adapter: Adapter) -> list[str]:
    return [site.path for site, method in adapter.plan.entries if has_weight(method)]


def _inputs(adapter: Adapter, path: str) -> jax.Array:
    """Return `A` [S, I, R]."""
    site, a = adapter.sites[path], replicated(adapter.params[path]["a"])
    return a.reshape(site.size("S"), site.size("I"), -1)


def _cosine(product: jax.Array, square: jax.Array, other: jax.Array) -> jax.Array:
    norms = jnp.sqrt(square) * jnp.sqrt(other)
    return jnp.where(norms > 0, product / jnp.where(norms > 0, norms, 1), 0)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)
