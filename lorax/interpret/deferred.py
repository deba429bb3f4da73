"""A quantised weight on its way to a product: dequantised at the use, in the forward and again in the backward pass.

The operations that the function applies to the weight before it uses it are kept and not run, so that no
full-precision copy of it outlives one product.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from lorax import compat


@dataclasses.dataclass(frozen=True)
class Step:
    """An equation to run on the dequantised weight, which is its operand number `at`."""

    primitive: Any
    items: tuple[tuple[str, Any], ...]
    at: int
    operands: int  # how many others it has
    shape: tuple[int, ...]
    dtype: Any

    @property
    def params(self) -> dict[str, Any]:
        """The equation's parameters."""
        return dict(self.items)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Combined:
    """What an equation makes of several quantised weights, such as their concatenation, in the place of a node."""

    values: tuple[Any, ...]  # the equation's operands
    step: Step = dataclasses.field(metadata={"static": True})
    stack: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})  # no axes to slice it along

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return self.step.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the result."""
        return self.step.dtype

    @property
    def codes(self) -> Any:
        """The first array of codes."""
        return next(witness(x) for x in self.values if isinstance(x, Deferred))

    def dequantize(self) -> Any:
        """Return the result."""
        (x,) = compat.bind(self.step, [force(x) for x in self.values])
        return x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Deferred:
    """A quantised node and the equations that turn what it stands for into the weight in its present layout."""

    node: Any
    operands: tuple[Any, ...] = ()
    steps: tuple[Step, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the present layout."""
        moves = [s for s in self.steps if s.primitive is not compat.convert_element_type_p]
        return moves[-1].shape if moves else tuple(self.node.shape)

    @property
    def ndim(self) -> int:
        """The number of axes in the present layout."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """The dtype after the function's casts."""
        return self.steps[-1].dtype if self.steps else self.node.dtype

    @property
    def is_sliceable(self) -> bool:
        """Whether a slice along the first axis is the same slice of the quantised arrays."""
        casts = all(s.primitive is compat.convert_element_type_p for s in self.steps)
        return casts and len(self.node.stack) > 0

    def force(self) -> Any:
        """Return the weight as an array."""
        x, operands = self.node.dequantize(), list(self.operands)
        for step in self.steps:
            others = [operands.pop(0) for _ in range(step.operands)]
            (x,) = compat.bind(step, [*others[: step.at], x, *others[step.at :]])
        return x


def witness(x: Any) -> Any:
    """Return an array that lives where a base does, for its mesh."""
    return x.node.codes if isinstance(x, Deferred) else x


def force(x: Any) -> Any:
    """Return an array for a base that may be deferred."""
    return x.force() if isinstance(x, Deferred) else x


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Run an equation, or keep it for later where an operand is deferred."""
    at = [i for i, x in enumerate(values) if isinstance(x, Deferred)]
    if not at:
        return compat.bind(eqn, values)
    if eqn.primitive is compat.optimization_barrier_p:  # an identity
        rest = iter(compat.bind(eqn, plain) if (plain := [x for x in values if not isinstance(x, Deferred)]) else ())
        return [x if isinstance(x, Deferred) else next(rest) for x in values]
    if len(values) == 1 and (pieces := _pieces_of_the_stack(eqn, values[0])) is not None:
        return pieces
    items = tuple(eqn.params.items())
    if len(eqn.outvars) > 1 or not _is_hashable(items):
        return compat.bind(eqn, [force(x) for x in values])
    i, out = at[0], eqn.outvars[0].aval
    step = Step(eqn.primitive, items, i, len(values) - 1, tuple(out.shape), out.dtype)
    if len(at) > 1:
        return [Deferred(Combined(tuple(values), step))]
    others = [*values[:i], *values[i + 1 :]]
    base = values[i]
    if (sliced := _of_the_stack(eqn, base, others)) is not None:
        return [sliced]
    return [Deferred(base.node, (*base.operands, *others), (*base.steps, step))]


def _is_hashable(items: Any) -> bool:
    try:
        hash(items)
    except TypeError:
        return False
    return True


def _of_the_stack(eqn: Any, base: Deferred, others: Sequence[Any]) -> Deferred | None:
    """Pick layers out of the quantised arrays themselves, where an equation does no more than that."""
    if not base.is_sliceable:
        return None
    shape, stacked = base.shape, range(len(base.node.stack))
    params = eqn.params
    changes: dict[int, Callable[[Any], Any]] = {}
    if eqn.primitive is compat.slice_p:
        cut = zip(params["start_indices"], params["limit_indices"], params["strides"] or (1,) * len(shape), strict=True)
        for axis, (start, limit, stride) in enumerate(cut):
            if (start, limit, stride) != (0, shape[axis], 1):
                changes[axis] = lambda x, a=axis, s=start, e=limit, t=stride: lax.slice_in_dim(x, s, e, t, a)
    elif eqn.primitive is compat.dynamic_slice_p:
        for axis, n in enumerate(params["slice_sizes"]):
            if n != shape[axis]:
                changes[axis] = lambda x, a=axis, n=n: lax.dynamic_slice_in_dim(x, others[a], n, a)
    elif eqn.primitive is compat.squeeze_p:
        axes = sorted((d % len(shape) for d in params["dimensions"]), reverse=True)
        changes = {a: lambda x, a=a: lax.squeeze(x, (a,)) for a in axes}
    if not changes or not set(changes) <= set(stacked):
        return None
    node = base.node
    for change in changes.values():
        node = jax.tree.map(change, node)
    return dataclasses.replace(base, node=node)


def _pieces_of_the_stack(eqn: Any, base: Deferred) -> list[Any] | None:
    """Cut a stack into its layers, or into several stacks, as the quantised arrays that they are."""
    axis = eqn.params.get("axis")
    if eqn.primitive not in (compat.split_p, compat.unstack_p) or not base.is_sliceable:
        return None
    if axis not in range(len(base.node.stack)):
        return None
    if eqn.primitive is compat.unstack_p:
        cuts = [lambda x, i=i: lax.index_in_dim(x, i, axis, keepdims=False) for i in range(base.shape[axis])]
    else:
        ends = list(itertools.accumulate(eqn.params["sizes"]))
        cuts = [
            lambda x, start=end - n, end=end: lax.slice_in_dim(x, start, end, axis=axis)
            for n, end in zip(eqn.params["sizes"], ends, strict=True)
        ]
    return [dataclasses.replace(base, node=jax.tree.map(cut, base.node)) for cut in cuts]
