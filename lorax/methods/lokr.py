"""LoKr: a Kronecker product of a small matrix and a low-rank one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax.interpret.weight import Expression, Part
from lorax.methods.base import Arrays, register
from lorax.methods.lowrank import LowRank
from lorax.sites import Site


@register
class LoKr(LowRank):
    """Low-rank Kronecker product, Yeh et al. 2023 (LyCORIS, arXiv:2309.14859, section 3): `W + s·C ⊗ (A·B)`.

    Fan-in and fan-out are each cut into two numbers, `m ≤ n`; `C` has the first of each, `A` and `B` the second. A
    product with an activation takes `A`, `C` and `B` one after another: `n·r + m·r` numbers an input, no weight is
    built. `C` starts at zero, `A` and `B` as in PEFT. The settings are those of `LoRA` but for the initialiser, and

    Attributes:
      factor: the largest `m`; -1 takes the two numbers as near to each other as the shape allows.
    """

    factor: int = -1

    arrays = {"c": "", "a": "", "b": "", "scale": "S"}
    sizes = ("rank",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor != -1 and self.factor < 1:
            raise ValueError(f"LoKr: factor is {self.factor!r}; it has to be -1 or at least 1")

    def axes(self, site: Site, name: str) -> tuple[Any, ...]:
        """Return the axes of an array: parts of fan-in and fan-out."""
        if name not in ("a", "b", "c"):
            return super().axes(site, name)
        (high_in, low_in), (high_out, low_out) = (self._cut(site, side) for side in (site.fan_in, site.fan_out))
        return (*site.stack, *{"c": (*high_in, *high_out), "a": (*low_in, "R"), "b": ("R", *low_out)}[name])

    def _cut(self, site: Site, side: Sequence[int]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Cut the axes of one side into those of the small matrix and those of the large one."""
        total = math.prod(site.shape[a] for a in side)
        limit = math.isqrt(total) if self.factor == -1 else min(self.factor, total)
        best, cut = 1, (0, 1)  # the axis that is cut, and how much of it goes to the small matrix
        before = 1
        for i, axis in enumerate(side):
            n = site.shape[axis]
            for high in range(2, n + 1):
                if n % high == 0 and best < before * high <= limit:
                    best, cut = before * high, (i, high)
            before *= n
        i, high = cut
        axis, low = side[i], site.shape[side[i]] // cut[1]
        whole = ((), (axis,)) if high == 1 else ((axis,), ()) if low == 1 else None
        first, rest = whole or ((Part(axis, 0, (high, low)),), (Part(axis, 1, (high, low)),))
        return (*side[:i], *first), (*rest, *side[i + 1 :])

    def init(self, key: jax.Array, site: Site, base: Any) -> tuple[Arrays, Arrays]:
        """`C` zero, `A` and `B` uniform on ±1/√fan."""
        shape = lambda name: tuple(self.rank if a == "R" else _size(site, a) for a in self.axes(site, name))
        keys = jax.random.split(key)

        def uniform(key: jax.Array, name: str, fan: int) -> jax.Array:
            return jax.random.uniform(key, shape(name), self.dtype, -1, 1) / math.sqrt(fan)

        fan_in = math.prod(_size(site, a) for a in self._cut(site, site.fan_in)[1])
        trained = {
            "c": jnp.zeros(shape("c"), self.dtype),
            "a": uniform(keys[0], "a", fan_in),
            "b": uniform(keys[1], "b", self.rank),
        }
        return trained, {"scale": jnp.asarray(self.scaling, jnp.float32)}

    def weight(self, w: Expression, *, a: Expression, b: Expression, c: Expression, scale: Expression) -> Expression:
        """`W + s·C ⊗ (A·B)`."""
        return w + (a * scale @ c @ b).with_dropout(self.dropout)


def _size(site: Site, axis: Any) -> int:
    return axis.size if isinstance(axis, Part) else site.shape[axis]
