"""LoRA and rsLoRA: `W + s·A·B`, with `s = α/r` or `α/√r`."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from lorax.interpret.weight import Expression
from lorax.methods.base import Arrays, Method, register
from lorax.sites import Site

INITIALIZERS = ("uniform", "normal", "orthogonal")


@register
class LoRA(Method):
    """Low-rank adaptation, Hu et al. 2021 (arXiv:2106.09685, section 4.1): `h = x·W + s·(x·A)·B`.

    `A` has the stacked and fan-in axes and `rank`, `B` has the stacked axes, `rank` and the fan-out axes. `B` starts
    at zero; of an embedding `A` does, and `B` is standard normal (as in PEFT).

    Attributes:
      rank: width of the product, at least 1.
      alpha: numerator of the scaling; None means `rank`, which makes the scaling 1 (√rank if rank-stabilised).
      rank_stabilized: scale by `alpha/√rank` (Kalajdzievski 2023, arXiv:2312.03732) and not by `alpha/rank`.
      dropout: probability of dropping an entry of `x` on its way into `A`, when `adapted` is given an `rng`. An
        embedding's lookup, and a weight that has to be built, have none.
      dtype: dtype of the factors; products are computed in the dtype that the function casts its weight to.
      initializer: of `A`: `uniform` on ±1/√fan_in (PEFT's default), `normal` with standard deviation 1/rank, or
        `orthogonal` columns (rows, where the rank is above the fan-in) in each layer.
    """

    rank: int = 8
    alpha: float | None = None
    rank_stabilized: bool = False
    dropout: float = 0.0
    dtype: Any = "float32"
    initializer: str = "uniform"

    arrays = {"a": "SIR", "b": "SRO", "scale": ""}

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"LoRA: rank is {self.rank!r}; it has to be a whole number of at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA: dropout is {self.dropout!r}; it has to lie in [0, 1)")
        if self.initializer not in INITIALIZERS:
            raise ValueError(f"LoRA: initializer is {self.initializer!r}; known are {', '.join(INITIALIZERS)}")
        if not jnp.issubdtype(jnp.dtype(self.dtype), jnp.floating):
            raise ValueError(f"LoRA: dtype is {self.dtype!r}; factors have to be floating point")
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)

    @property
    def scaling(self) -> float:
        """The factor `s` in front of `A·B`."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def init(self, key: jax.Array, site: Site, base: Any) -> tuple[Arrays, Arrays]:
        """Draw `A`, set `B` to zero (of an embedding the other way round)."""
        a_shape, b_shape = site.dims("SIR", R=self.rank), site.dims("SRO", R=self.rank)
        state = {"scale": jnp.asarray(self.scaling, jnp.float32)}
        if site.kind == "embedding":
            return {"a": jnp.zeros(a_shape, self.dtype), "b": jax.random.normal(key, b_shape, self.dtype)}, state
        return {"a": self._draw(key, a_shape, site), "b": jnp.zeros(b_shape, self.dtype)}, state

    def _draw(self, key: jax.Array, shape: tuple[int, ...], site: Site) -> jax.Array:
        if self.initializer == "normal":
            return jax.random.normal(key, shape, self.dtype) / self.rank
        if self.initializer == "orthogonal":
            keys = jax.random.split(key, site.size("S"))
            one = lambda k: jax.nn.initializers.orthogonal()(k, (site.size("I"), self.rank), jnp.float32)
            return jax.vmap(one)(keys).reshape(shape).astype(self.dtype)
        bound = 1 / math.sqrt(site.size("I"))
        return jax.random.uniform(key, shape, self.dtype, -bound, bound)

    def weight(self, w: Expression, *, a: Expression, b: Expression, scale: Expression) -> Expression:
        """`W + s·A·B`."""
        return w + (a * scale @ b).with_dropout(self.dropout)
