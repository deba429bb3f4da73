"""What methods with a pair of factors share: rank, scaling, dropout, dtype and how the factors start."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lorax.interpret.weight import Expression, Factor, Term
from lorax.methods.base import Arrays, Method
from lorax.methods.initializers import find
from lorax.methods.settings import check
from lorax.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(Method):
    """Settings of a method with factors `A` (stacked and fan-in axes, rank) and `B` (stacked axes, rank, fan-out).

    Attributes:
      rank: width of the product, at least 1.
      alpha: numerator of the scaling; None means `rank`, which makes the scaling 1 (√rank if rank-stabilised).
      rank_stabilized: scale by `alpha/√rank` (Kalajdzievski 2023, arXiv:2312.03732) and not by `alpha/rank`.
      dropout: probability of dropping an entry of `x` on its way into `A`, when `adapted` is given an `rng`. An
        embedding's lookup, and a weight that has to be built, have none.
      dtype: dtype of the factors; products are computed in the dtype that the function casts its weight to.
      initializer: how the factors start, see `lorax.methods.initializers`.
    """

    rank: int = 8
    alpha: float | None = None
    rank_stabilized: bool = False
    dropout: float = 0.0
    dtype: Any = "float32"
    initializer: str = "uniform"

    starts = ("alpha", "rank_stabilized", "initializer")

    def __post_init__(self) -> None:
        check(self)
        try:
            find(self.initializer)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {error}") from None

    @property
    def scaling(self) -> float:
        """The factor `s` in front of `A·B`."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def factors(self, key: jax.Array, site: Site, base: Any) -> tuple[Arrays, Arrays]:
        """Return the factors `a` and `b` as they start, and what stays fixed: `scale`, and where `A·B` does not start
        at zero the factors `a0` and `b0` of the product that is subtracted.
        """  # noqa: D205
        start = find(self.initializer)
        a, b = start(key, site, base, self.rank, self.scaling)
        a, b = a.astype(self.dtype), b.astype(self.dtype)
        fixed = {"scale": jnp.asarray(self.scaling, jnp.float32)}
        if start.is_subtracted:  # copies: a step may donate the factors
            fixed |= {"a0": jnp.copy(a), "b0": jnp.copy(b)}
        return {"a": a, "b": b}, fixed

    def update(
        self, a: Expression, b: Expression, scale: Expression, a0: Expression | None, b0: Expression | None
    ) -> Expression:
        """`s·A·B`, less the initial product where there is one: a part of the base, so that it has no dropout."""
        product = lambda a, b: a * scale @ b
        if a0 is None or b0 is None:
            return product(a, b).with_dropout(self.dropout)
        if self.dropout:
            return product(a, b).with_dropout(self.dropout) - product(a0, b0)
        return product(_side_by_side(a, a0), _side_by_side(b, b0, sign=-1))  # of twice the rank


def _side_by_side(array: Expression, initial: Expression, sign: int = 1) -> Expression:
    (x,), (x0,) = array.terms[0].factors, initial.terms[0].factors
    both = jnp.concatenate([x.array, sign * x0.array.astype(x.array.dtype)], x.axes.index("R"))
    return Expression((Term((Factor(both, x.axes),)),))
