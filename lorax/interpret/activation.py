"""What a method sees of a use: the activation that entered it and the one that left it, with their axes named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from lorax.interpret.contraction import absorb, arrange
from lorax.interpret.weight import Expression, Factor, Label, Output, Term, cast


@dataclasses.dataclass(frozen=True)
class Activation:
    """An array of which some axes are the weight's (fan-in or fan-out, stack), the others batch and positions.

    Attributes:
      array: the array.
      axes: its labels, as in `lorax.interpret.weight`.
      summed: the weight's axes that a product with one of the method's arrays sums over.
      positions: the label of the sequence axis, the last of the activation's own; None where there is none.
    """

    array: Any
    axes: tuple[Label, ...]
    summed: frozenset[Label]
    positions: Label | None

    def __matmul__(self, other: Expression) -> Activation:
        """Contract with an array of the method: over the weight's axes that both have, or over their bond."""
        factors = _cast(other, self.array.dtype)
        theirs = {a for f in factors for a in f.axes}
        array, axes = absorb(self.array, self.axes, factors, self.summed & theirs & set(self.axes))
        return dataclasses.replace(self, array=array, axes=axes)

    def __add__(self, other: Activation | Expression) -> Activation:
        """Add another activation, or an array of the method that spans some of the axes."""
        if isinstance(other, Expression):
            (factor,) = _cast(other, self.array.dtype)
            array, axes = factor.array, factor.axes
        else:
            array, axes = other.array, other.axes
        arranged = arrange(array, axes, self.axes, self.array.shape)
        return dataclasses.replace(self, array=lax.add(self.array, cast(arranged, self.array.dtype)))

    def map(self, fn: Callable[[Any], Any]) -> Activation:
        """Apply an elementwise function."""
        return dataclasses.replace(self, array=fn(self.array))

    def with_first_positions(self, values: Expression, mask: Expression | None = None) -> Activation:
        """Replace the first positions; `values` spans them along a bond, and the weight's axes.

        An activation that has no more positions than that is left alone: a decoder's later tokens. Of values with a
        `mask`, bools over the bond, those count that it marks, which are the first ones.

        Raises:
          ValueError: the activation has no sequence axis.
        """
        (factor,) = _cast(values, self.array.dtype)
        (bond,) = [a for a in factor.axes if isinstance(a, str)]
        count = factor.array.shape[factor.axes.index(bond)]
        if self.positions is None:
            raise ValueError(f"{count} positions are to be replaced, and the activation has no axis of positions")
        at = self.axes.index(self.positions)
        there = self.array.shape[at]
        if mask is None and there <= count:
            return self
        first = lax.slice_in_dim(self.array, 0, min(count, there), axis=at)
        axes = tuple(self.positions if a == bond else a for a in factor.axes)
        new = lax.slice_in_dim(factor.array, 0, min(count, there), axis=axes.index(self.positions))
        new = cast(arrange(new, axes, self.axes, first.shape), self.array.dtype)
        if mask is not None:
            marks = mask.terms[0].factors[0].array
            is_new = marks[:there] & (jnp.sum(marks) < there)
            new = jnp.where(lax.expand_dims(is_new, range(1, self.array.ndim - at)), new, first)
        return dataclasses.replace(self, array=lax.dynamic_update_slice_in_dim(self.array, new, 0, at))


def _cast(expression: Expression, dtype: Any) -> list[Factor]:
    (term,) = expression.terms
    return [Factor(cast(f.array, dtype), f.axes) for f in term.factors]


def apply_outputs(
    outputs: Sequence[Output], y: Any, y_axes: Sequence[Label], x: Any = None, x_axes: Sequence[Label] = ()
) -> Any:
    """Return the output of a use after what the methods do to it.

    Args:
      outputs: of the weight.
      y: the output.
      y_axes: its labels: ints are the weight's fan-out and stacked axes, tuples the activation's own.
      x: the activation that entered the use; None for a lookup.
      x_axes: its labels.
    """
    own = [a for a in y_axes if isinstance(a, tuple)]
    positions = own[-1] if own else None
    of_the_weight = lambda axes, others: frozenset(a for a in axes if isinstance(a, int) and a not in others)
    shape, dtype = y.shape, y.dtype
    for output in outputs:
        arrays = {n: Expression((Term((f,)),)) for n, f in zip(output.names, output.factors, strict=True)}
        entering = Activation(x, tuple(x_axes), of_the_weight(x_axes, y_axes), positions)
        leaving = Activation(y, tuple(y_axes), of_the_weight(y_axes, x_axes), positions)
        made = output.method.output(leaving, entering, **arrays).array
        assert made.shape == shape, f"{type(output.method).__name__}.output changed the shape {shape} to {made.shape}"
        made = cast(made, dtype)
        y = jnp.where(output.is_present[0].array, made, y) if output.is_present else made
    return y
