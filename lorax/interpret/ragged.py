"""The rule for ragged products: rows of several groups, each with a weight of its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lorax import compat
from lorax.interpret.context import Context
from lorax.interpret.deferred import Deferred, force
from lorax.interpret.evaluate import densify
from lorax.interpret.uses import compute_dtype, entering, record, rescale
from lorax.interpret.weight import Factor, Term, Weight, cast


def ragged_dot(ctx: Context, eqn: Any, operands: Sequence[Any]) -> Any:
    """`ragged_dot`, one weight a group of rows: two ragged products of the rank's width, vectors row by row."""
    x, weight, sizes = operands
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    ((x_contract, w_contract), (x_batch, _)) = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    if not isinstance(weight, Weight) or x_batch or len(weight.shape) != 3 or len(groups) != 1:
        return NotImplemented
    x = densify(ctx, x, str(eqn.primitive))
    (g,), (k,) = groups, w_contract
    (n,) = {0, 1, 2} - {g, k}
    record(ctx, eqn, "grouped", weight, (k,), (n,), (g,))
    terms = [thin for term in weight.terms[1:] if (thin := _Thin.of(term, k, n))]
    plain = tuple(x_contract) == (x.ndim - 1,) == (1,)
    if len(terms) < len(weight.terms) - 1 or weight.outputs or not (plain or weight.is_bare):
        return NotImplemented
    if not weight.has_gains_within([k], [n]):
        return NotImplemented
    dtype = compute_dtype(weight, x)
    rows = _Rows(x.shape[0], sizes, g, numbers.lhs_ragged_dimensions, eqn.params["precision"])
    base_gains = weight.terms[0].factors[1:]
    inner = lambda x, factors: rows.scaled(x, [f for f in factors if k in f.axes], k)
    x = inner(x, weight.gains)
    binds = eqn.primitive.get_bind_params(eqn.params)
    product = lambda base, x: eqn.primitive.bind(x, force(base), sizes, **binds)
    product = jax.checkpoint(product) if isinstance(weight.base, Deferred) else product
    y = product(weight.base, inner(x, base_gains))
    y = rows.scaled(y, [f for f in base_gains if k not in f.axes], n)
    for term, thin in zip(weight.terms[1:], terms, strict=True):
        h = rows.scaled(entering(ctx, cast(x, dtype), term), thin.before, k)
        h = rows.times(h, thin.a, k, thin.bonds)
        h = rows.scaled(h, thin.between, thin.bonds)
        z = rows.times(h, thin.b, thin.bonds, n)
        y = y + cast(rows.scaled(z, thin.after, n), y.dtype)
    for gain in weight.gains:
        if k not in gain.axes:
            y = rescale(y, rows.vectors(gain, n))
    return [y]


class _Thin(NamedTuple):
    """A term as the ragged product takes it: a matrix into the bonds, one out of them, and vectors around them."""

    a: Factor
    b: Factor
    bonds: tuple[str, ...]
    before: list[Factor]
    between: list[Factor]
    after: list[Factor]

    @classmethod
    def of(cls, term: Term, k: int, n: int) -> _Thin | None:
        """Sort a term's factors; None where it is no such product."""
        bonds = lambda f: {a for a in f.axes if isinstance(a, str)}
        into = [f for f in term.factors if k in f.axes and bonds(f)]
        out = [f for f in term.factors if n in f.axes and bonds(f)]
        if len(into) != 1 or len(out) != 1 or into[0] is out[0] or bonds(into[0]) != bonds(out[0]):
            return None
        rest = [f for f in term.factors if f is not into[0] and f is not out[0]]
        if any((k in f.axes) + (n in f.axes) + bool(bonds(f)) > 1 for f in rest):
            return None
        return cls(
            into[0],
            out[0],
            tuple(sorted(bonds(into[0]))),
            [f for f in rest if k in f.axes],
            [f for f in rest if k not in f.axes and n not in f.axes],
            [f for f in rest if n in f.axes],
        )


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows that belong to groups, and products with what each group has of its own."""

    count: int
    sizes: Any
    g: int
    ragged: Any
    precision: Any

    def vectors(self, f: Factor, inner: Any) -> Any:
        """Return each row's own vector along `inner`, an axis or the bonds, flattened."""
        inner = inner if isinstance(inner, tuple) else (inner,)
        missing = [a for a in inner if a not in f.axes]
        order = [f.axes.index(a) for a in (self.g, *inner) if a in f.axes]
        array = lax.transpose(f.array, order)
        if missing and len(missing) < len(inner):
            at = [k + (self.g in f.axes) for k, a in enumerate(inner) if a in missing]
            array = lax.expand_dims(array, at)
        lead = array.shape[:1] if self.g in f.axes else (1,)
        array = lax.reshape(array, (*lead, math.prod(array.shape[len(lead) if self.g in f.axes else 0 :])))
        if self.g not in f.axes:
            return array
        ends = jnp.cumsum(self.sizes)
        group = jnp.searchsorted(ends, jnp.arange(self.count, dtype=ends.dtype), side="right")
        return jnp.take(array, jnp.minimum(group, array.shape[0] - 1), axis=0)

    def scaled(self, x: Any, factors: Sequence[Factor], inner: Any) -> Any:
        """Multiply each row by its vectors along `inner`."""
        for f in factors:
            x = x * cast(self.vectors(f, inner), x.dtype)
        return x

    def times(self, x: Any, f: Factor, enters: Any, leaves: Any) -> Any:
        """Multiply each row by its group's matrix, or by the one that all groups share."""
        sides = [a if isinstance(a, tuple) else (a,) for a in (enters, leaves)]
        lead = (self.g,) if self.g in f.axes else ()
        array = lax.transpose(cast(f.array, x.dtype), [f.axes.index(a) for a in (*lead, *sides[0], *sides[1])])
        cut = len(lead) + len(sides[0])
        sizes = (math.prod(array.shape[len(lead) : cut]), math.prod(array.shape[cut:]))
        array = lax.reshape(array, (*array.shape[: len(lead)], *sizes))
        if not lead:
            return lax.dot_general(x, array, (((1,), (0,)), ((), ())), precision=self.precision)
        numbers = lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((1,), (1,)), ((), ())), lhs_ragged_dimensions=self.ragged, rhs_group_dimensions=(0,)
        )
        return lax.ragged_dot_general(x, array, self.sizes, numbers, precision=self.precision)


RULES = {compat.ragged_dot_p: ragged_dot}
