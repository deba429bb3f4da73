"""Merged weights: the reference semantics of every method, and their inverse."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax import compat
from lorax.adapter import Adapter, base_leaves
from lorax.interpret.weight import dense, rebuild


def merge(params: Any, adapter: Adapter) -> Any:
    """Return the params with every adapted leaf replaced by its merged weight, in the leaf's dtype.

    `fn(merge(params, adapter), x)` is what `adapt(fn)(params, adapter, x)` means.

    Args:
      params: the base; never changed.
      adapter: the adapter.

    Returns:
      A plain pytree shaped like `params`.

    Raises:
      ValueError: the adapter belongs to other params, one of its methods has no merged weight, or it holds a number
        that is not finite.
    """
    leaves, tree = base_leaves(params, adapter.sites)
    _refuse_unmergeable(adapter)
    _refuse_non_finite(adapter)
    for site, method in adapter.plan.entries:
        leaves[site.path] = dense(method.leaf(site, leaves[site.path], adapter.arrays(site.path)))
    return jax.tree.unflatten(tree, list(leaves.values()))


def unmerge(merged: Any, adapter: Adapter) -> Any:
    """Return the base that `merge` made `merged` from, up to round-off in the leaves' dtype.

    In bfloat16 a merge followed by an unmerge changes several percent of the weights in their last bit: keep the base
    where it has to be exact.

    Raises:
      ValueError: the adapter belongs to other params, or one of its methods has no inverse.
    """
    leaves, tree = base_leaves(merged, adapter.sites)
    _refuse_unmergeable(adapter)
    _refuse_non_finite(adapter)
    weights = {
        site.path: method.leaf(site, leaves[site.path], adapter.arrays(site.path))
        for site, method in adapter.plan.entries
    }
    lost = [s.path for s, m in adapter.plan.entries if not m.is_invertible]
    if lost:
        kinds = sorted({type(m).__name__ for _, m in adapter.plan.entries if not m.is_invertible})
        raise ValueError(f"{', '.join(kinds)} cannot be unmerged, at {', '.join(lost)}: keep the base instead")
    for path, weight in weights.items():
        # W' = g∘W + Δ: the update alone is the weight at W = 0.
        gains, update = weight.terms[0].factors[1:], weight.terms[1:]
        zero = rebuild(
            weight, jnp.zeros_like(weight.base, jnp.promote_types(weight.dtype, jnp.float32)), weight.partial_factors()
        )
        base = leaves[path] - (dense(zero) if update else 0)
        if gains:
            ones = rebuild(weight, jnp.ones_like(zero.base), weight.partial_factors())
            base = base / (dense(ones) - dense(zero))
        leaves[path] = base.astype(leaves[path].dtype)
    return jax.tree.unflatten(tree, list(leaves.values()))


def _refuse_unmergeable(adapter: Adapter) -> None:
    entries = [(site.path, type(method).__name__) for site, method in adapter.plan.entries if not method.is_mergeable]
    if entries:
        listed, kinds = ", ".join(path for path, _ in entries), ", ".join(sorted({kind for _, kind in entries}))
        raise ValueError(f"{kinds} has no merged weight, at {listed}: keep the adapter, or leave these out of its spec")


def _refuse_non_finite(adapter: Adapter) -> None:
    for partition in (adapter.params, adapter.state):
        for path, arrays in partition.items():
            for name, x in arrays.items():
                if compat.is_traced(x) or not getattr(x, "is_fully_addressable", True):
                    continue
                if not np.isfinite(np.asarray(x, np.float32)).all():
                    raise ValueError(f"{path}: the adapter's {name!r} holds NaN or infinity; it cannot be merged")
