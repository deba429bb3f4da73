"""LoHa: the elementwise product of two low-rank updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax.interpret.weight import Expression
from lorax.methods.base import Arrays, register
from lorax.methods.lowrank import LowRank
from lorax.sites import Site


@register
class LoHa(LowRank):
    """Low-rank Hadamard product, Hyeon-Woo et al. 2022 (arXiv:2108.06098, section 2), as in LyCORIS and PEFT.

    `W + s·(A₁·B₁)∘(A₂·B₂)`, an update of rank up to `rank²` from two pairs of rank `rank`. It equals `(A₁⊙A₂)·(B₁⊙B₂)`
    with row-wise products of the factors, and is evaluated so: two thin products of width `rank²`.

    The initial values are PEFT's: `B₁` of standard deviation 1, `A₂` of 0.1, `A₁` of 1 and `B₂` zero. The settings are
    those of `LoRA` but for the initialiser.
    """

    arrays = {
        **{"a1": "SIR", "b1": "SRO", "a2": "SIQ", "b2": "SQO", "scale": "S"},
        **{"a": "SIRQ", "b": "SRQO"},
    }
    sizes = ("rank",)

    def init(self, key: jax.Array, site: Site, base: Any) -> tuple[Arrays, Arrays]:
        """Draw three factors; the fourth is zero."""
        keys, n = jax.random.split(key, 3), self.rank
        draw = lambda key, dims, std: std * jax.random.normal(key, site.dims(dims, R=n, Q=n), self.dtype)
        trained = {
            "a1": draw(keys[0], "SIR", 1.0),
            "b1": draw(keys[1], "SRO", 1.0),
            "a2": draw(keys[2], "SIQ", 0.1),
            "b2": jnp.zeros(site.dims("SQO", Q=n), self.dtype),
        }
        return trained, {"scale": jnp.asarray(self.scaling, jnp.float32)}

    def derive(self, site: Site, base: Any, arrays: Mapping[str, Any]) -> Arrays:
        """Return the row-wise products of the factors."""
        bonds = {"R": self.rank, "Q": self.rank}

        def product(dims: str, first: str, second: str) -> jax.Array:
            wanted, shape = site.axes(dims), site.dims(dims, **bonds)
            put = lambda name: lax.broadcast_in_dim(
                arrays[name], shape, [wanted.index(a) for a in site.axes(self.arrays[name])]
            )
            return put(first) * put(second)

        return {"a": product("SIRQ", "a1", "a2"), "b": product("SRQO", "b1", "b2")}

    def weight(
        self, w: Expression, *, a: Expression, b: Expression, scale: Expression, **factors: Expression
    ) -> Expression:
        """`W + s·(A₁·B₁)∘(A₂·B₂)`."""
        return w + self.update(a, b, scale, None, None)
