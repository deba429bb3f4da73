"""The triplets of an adapter's AdaLoRA sites: which there are, how orthogonal their vectors, how good each one is.

Axes: S stack, I fan-in, O fan-out, R rank. A stack's every layer is a weight of its own with R triplets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lorax import compat
from lorax.adapter import Adapter, Plan
from lorax.methods.adalora import AdaLoRA
from lorax.sites import Site

FACTORS = ("a", "e", "b")


@dataclasses.dataclass(frozen=True, eq=False)
class Triplets:
    """The triplets of one site.

    Attributes:
      site: the site.
      method: how many there are, and how many shall be left.
      is_adapted: bools of the stack's shape: a layer whose scale is zero is not adapted and has no part in the budget.
      mask: bools S×R, the triplets that there are, of a member of `lorax.stack`; None is all.
      budget: triplets a layer at the end; traced where there is a mask.
    """

    site: Site
    method: AdaLoRA
    is_adapted: np.ndarray
    mask: Any = None
    budget: Any = 0

    @property
    def path(self) -> str:
        """The site's path."""
        return self.site.path

    @property
    def weights(self) -> Any:
        """The number of weights: layers of the stack that are adapted."""
        return int(np.sum(self.is_adapted)) if self.mask is None else jnp.sum(jnp.any(self.mask, axis=-1))

    def fan_axes(self, name: str) -> tuple[int, ...]:
        """Return the axes of `A` along the fan-in, or those of `B` along the fan-out."""
        stacked = len(self.site.stack)
        if name == "a":
            return tuple(range(stacked, stacked + len(self.site.fan_in)))
        return tuple(range(stacked + 1, stacked + 1 + len(self.site.fan_out)))

    def defect(self, name: str, x: jax.Array) -> jax.Array:
        """Return the sum over the layers of `‖AᵀA − 1‖`, or of `‖B·Bᵀ − 1‖`, in the Frobenius norm.

        Args:
          name: `a` or `b`.
          x: that array.
        """
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        fan, stacked = self.fan_axes(name), tuple(range(len(self.site.stack)))
        sharding = None
        if mesh := compat.explicit_mesh(x):
            spec = jax.typeof(x).sharding.spec
            sharding = jax.sharding.NamedSharding(mesh, jax.P(*spec[: len(stacked)], None, None))
        dims = ((fan, fan), (stacked, stacked))
        gram_SxRxR = lax.dot_general(x, x, dims, precision=lax.Precision.HIGHEST, out_sharding=sharding)
        one_RxR = jnp.eye(self.method.rank, dtype=x.dtype)
        one_SxRxR = one_RxR if self.mask is None else one_RxR * self.mask[..., None]
        squared_S = jnp.sum((gram_SxRxR - one_SxRxR) ** 2, axis=(-2, -1))
        # The root has no derivative at zero, where the norm is least: its subgradient there is 0.
        is_some_S = self.is_adapted & (squared_S > 0)
        return jnp.sum(jnp.where(is_some_S, jnp.sqrt(jnp.where(is_some_S, squared_S, 1)), 0))

    def score(self, importance: Mapping[str, jax.Array]) -> jax.Array:
        """Return `s(e) + mean s(A) + mean s(B)`, of shape S×R; -inf where there is no triplet."""
        means = [jnp.mean(importance[name], axis=self.fan_axes(name)) for name in ("a", "b")]
        scores_SxR = importance["e"] + means[0] + means[1]
        is_there = self.is_adapted[..., None] if self.mask is None else self.is_adapted[..., None] & self.mask
        return jnp.where(is_there, scores_SxR, -jnp.inf)


def triplets(adapter: Adapter) -> list[Triplets]:
    """Return the triplets of every AdaLoRA site.

    Raises:
      ValueError: there is none.
    """
    found = []
    for site, method in adapter.plan.entries:
        if isinstance(method, AdaLoRA):
            state = adapter.state[site.path]
            mask, budget = state.get("mask"), state.get("budget", method.budget)
            if mask is not None and mask.ndim != len(site.stack) + 1:
                raise ValueError(
                    f"{site.path}: a stack's members have budgets of their own; use lorax.optim.stacked("
                    "lambda adapter: lorax.optim.adalora(optax.adam(1e-3), adapter, ...), stack)"
                )
            found.append(Triplets(site, method, _is_adapted(site, state["scale"]), mask, budget))
    if not found:
        kinds = ", ".join(sorted({type(m).__name__ for _, m in adapter.plan.entries})) or "nothing"
        raise ValueError(f"no site of the adapter has AdaLoRA; it has {kinds}. Use the inner optimiser as it is")
    return found


def _is_adapted(site: Site, scale: Any) -> np.ndarray:
    if jnp.ndim(scale) == 0 or isinstance(scale, jax.ShapeDtypeStruct) or compat.is_traced(scale):
        return np.ones(site.dims("S"), bool)
    return np.asarray(scale) != 0


def penalty(found: Sequence[Triplets], params: Any) -> jax.Array:
    """Return the mean of `‖PᵀP − 1‖` over the factors `P` of all weights."""
    total = sum(t.defect(name, params[t.path][name]) for t in found for name in ("a", "b"))
    return jnp.asarray(total) / (2 * jnp.maximum(1, sum(t.weights for t in found)))


def best(found: Sequence[Triplets], scores: Sequence[jax.Array], budget: Any) -> dict[str, jax.Array]:
    """Return, for each site, which of its triplets (S×R) are among the `budget` best of all; the first win a draw.

    Args:
      found: the sites.
      scores: the scores of each site's triplets, S×R.
      budget: how many to keep, a number or an int array.
    """
    flat = jnp.concatenate([_whole(s).reshape(-1) for s in scores])
    # A stable descending sort: a triplet's place in it is its rank among all.
    order = jnp.argsort(-flat, stable=True)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(flat.size, dtype=order.dtype))
    is_kept = (place < budget) & (flat > -jnp.inf)
    parts = jnp.split(is_kept, np.cumsum([s.size for s in scores])[:-1])
    return {t.path: part.reshape(s.shape) for t, s, part in zip(found, scores, parts, strict=True)}


def _whole(x: jax.Array) -> jax.Array:
    """Gather an array whose type says how it is split: scores are few, and sorted all together."""
    mesh = compat.explicit_mesh(x)
    return x if mesh is None else jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, jax.P()))


def orthogonality(adapter: Adapter) -> jax.Array:
    """Return AdaLoRA's regulariser, the mean of `‖AᵀA − 1‖` and `‖B·Bᵀ − 1‖` over all weights (Frobenius norms).

    As in PEFT: a mean of norms, where the paper has a sum of their squares (arXiv:2303.10512, section 3.1). For a
    report only: `lorax.optim.adalora` adds the regulariser's gradient itself, so that the loss to be differentiated is
    the task's. The loss that PEFT reports is the task's plus `orthogonal_weight * orthogonality(adapter)`.

    Args:
      adapter: an adapter with AdaLoRA sites.

    Returns:
      A float32 scalar, 0 for orthonormal factors.

    Raises:
      ValueError: no site has AdaLoRA.
    """
    return penalty(triplets(adapter), adapter.params)


def live_ranks(adapter: Adapter) -> dict[str, jax.Array]:
    """Return how many triplets are in use: `e ≠ 0`, an int for each layer of the stack, for each AdaLoRA path."""
    return {t.path: jnp.sum(adapter.params[t.path]["e"] != 0, axis=-1) for t in triplets(adapter)}


def budgets(found: Sequence[Triplets]) -> tuple[Any, Any]:
    """Return the number of triplets at the start and at the end; traced for a member of a stack."""
    start = sum(t.weights * t.method.rank if t.mask is None else jnp.sum(t.mask) for t in found)
    return start, sum(t.weights * t.budget for t in found)


def budgets_of(plan: Plan) -> tuple[int, int]:
    """Return the same of a plan, all of whose layers are adapted."""
    weights = [(site.size("S"), method) for site, method in plan.entries if isinstance(method, AdaLoRA)]
    return sum(n * method.rank for n, method in weights), sum(n * method.budget for n, method in weights)
