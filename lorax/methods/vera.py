"""VeRA: two random projections shared by all sites of one shape, and a trained vector on either side of the second."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lorax.interpret.weight import Expression
from lorax.methods.base import Arrays, Method, register
from lorax.methods.settings import check
from lorax.sites import Site


@register
class VeRA(Method):
    """Vector-based random matrix adaptation, Kopiczko et al. 2023 (arXiv:2310.11454, section 3.1).

    `h = x·W + ((x·A)·Λ_d·B)·Λ_b` with `A` (fan-in × rank) and `B` (rank × fan-out) random and frozen, `d` (rank) and
    `b` (fan-out) trained: `d + fan_out` numbers a layer. `A` and `B` follow from the seed, the rank and the site's
    shape, and an adapter holds them once for all sites of that shape and all their layers or experts.

    As in PEFT both are Kaiming uniform, `A ~ U(±√(6/fan_in))` and `B ~ U(±√(6/rank))`; a row that is looked up is a
    fan-in of 1.

    Attributes:
      rank: width of the projections; it costs compute and hardly any parameters, so it is larger than LoRA's.
      d_initial: what `d` starts at; `b` starts at zero.
      projection_seed: what `A` and `B` are drawn from.
      dropout: probability of dropping an entry of `x` on its way into `A`, when `adapted` is given an `rng`.
      dtype: dtype of all arrays.
    """

    rank: int = 256
    d_initial: float = 0.1
    projection_seed: int = 0
    dropout: float = 0.0
    dtype: Any = "float32"

    arrays = {"d": "SR", "b": "SO", "shared_a": "IR", "shared_b": "RO"}
    sizes = ("rank",)
    starts = ("d_initial", "projection_seed")

    def __post_init__(self) -> None:
        check(self)
        if not isinstance(self.projection_seed, int) or isinstance(self.projection_seed, bool):
            raise ValueError(f"VeRA: projection_seed is {self.projection_seed!r}; it has to be a whole number")
        if not math.isfinite(self.d_initial) or not self.d_initial:
            raise ValueError(f"VeRA: d_initial is {self.d_initial!r}; from 0 neither d nor b would get a gradient")

    def init(self, key: jax.Array, site: Site, base: Any) -> tuple[Arrays, Arrays]:
        """Return the two vectors; nothing in them is random."""
        d = jnp.full(site.dims("SR", R=self.rank), self.d_initial, self.dtype)
        return {"d": d, "b": jnp.zeros(site.dims("SO"), self.dtype)}, {}

    def shared(self, site: Site) -> tuple[str, Callable[[], Arrays]]:
        """Return the name and the maker of the projections, alike for all sites of one shape."""
        fan_in, fan_out = site.dims("I"), site.dims("O")
        inputs = 1 if site.kind == "embedding" else site.size("I")
        size = lambda dims: "x".join(map(str, dims))
        name = f"VeRA/{self.projection_seed}/{self.dtype}/{size(fan_in)}/{self.rank}/{size(fan_out)}/{inputs}"

        def make() -> Arrays:
            keys = jax.random.split(jax.random.key(self.projection_seed, impl="threefry2x32"))
            return {
                "shared_a": _kaiming(keys[0], (*fan_in, self.rank), inputs).astype(self.dtype),
                "shared_b": _kaiming(keys[1], (self.rank, *fan_out), self.rank).astype(self.dtype),
            }

        return name, make

    def weight(
        self, w: Expression, *, d: Expression, b: Expression, shared_a: Expression, shared_b: Expression
    ) -> Expression:
        """`W + A·Λ_d·B·Λ_b`."""
        return w + (shared_a * d @ shared_b * b).with_dropout(self.dropout)


def _kaiming(key: jax.Array, shape: tuple[int, ...], inputs: int) -> jax.Array:
    bound = math.sqrt(6 / inputs)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
