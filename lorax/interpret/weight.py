"""An adapted weight as a sum of products of labelled arrays, and the arithmetic on it.

`W + s·A·B` is two terms: the base array alone, and the product of a scalar, `A` and `B`. Every array says which axes
of the weight it spans; an axis that only the arrays share (the rank) carries a name and is summed over. A weight is
thus never built: moving its axes moves the axes of its arrays, a product with an activation contracts the activation
with one array after another, and the dense weight is the same product without an activation. Methods, layout rules
and uses know nothing of each other.

Labels: an int is an axis of the weight in its present layout, a `Part` one of two that such an axis is cut into, a
string a bond that is summed over, a tuple a free axis of an activation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax.interpret.deferred import Deferred, force

Label = Any
Origin = frozenset[tuple[str, int]]  # (leaf path, axis of that leaf)


@dataclasses.dataclass(frozen=True)
class Part:
    """The label of one of two parts that an axis is cut into: the first counts slowly, the second fast."""

    axis: int
    which: int
    sizes: tuple[int, int]

    @property
    def size(self) -> int:
        """The size of this part."""
        return self.sizes[self.which]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factor:
    """An array and, for each of its axes, the weight's axis or the bond that it spans."""

    array: Any
    axes: tuple[Label, ...] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """A product of factors, summed over their bonds.

    `dropout` acts on the activation that enters it, at the rate that it says, or that the array in `rate` does; it
    draws by the name of its source.
    """

    factors: tuple[Factor, ...]
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
    source: str = dataclasses.field(default="", metadata={"static": True})
    rate: tuple[Factor, ...] = ()

    def times(self, *factors: Factor) -> Term:
        """Multiply by further factors."""
        return dataclasses.replace(self, factors=(*self.factors, *factors))


@dataclasses.dataclass(frozen=True)
class Expression:
    """A sum of terms: what a method's `weight` computes with.

    `+` adds, `*` and `@` multiply (axes of one weight side by side, bonds summed over), a Python or array scalar
    scales. `gains` multiply the whole sum.
    """

    terms: tuple[Term, ...]
    gains: tuple[Factor, ...] = ()

    def __add__(self, other: Expression) -> Expression:
        return Expression(self._spread() + other._spread())

    def __mul__(self, other: Expression | float | jax.Array) -> Expression:
        if not isinstance(other, Expression):
            other = Expression((Term((Factor(jnp.asarray(other), ()),)),))
        pairs = ((s, t) for s in self._spread() for t in other._spread())
        return Expression(tuple(Term(s.factors + t.factors, max(s.dropout, t.dropout)) for s, t in pairs))

    __matmul__ = __rmul__ = __mul__

    def __neg__(self) -> Expression:
        return self * -1.0

    def __sub__(self, other: Expression) -> Expression:
        return self + -other

    def with_dropout(self, rate: float) -> Expression:
        """Return the expression with dropout on the activation that enters it, during training only."""
        return Expression(tuple(Term(t.factors, rate) for t in self.terms), self.gains)

    def rescaled(self, gain: Expression) -> Expression:
        """Multiply the whole sum by a gain that is nowhere zero.

        The value is that of `*`. The gain is applied to the sum of the products, and its derivative is taken from the
        result, which most functions keep anyway, so that no product has to be kept for it.
        """
        (term,) = gain.terms
        return Expression(self.terms, (*self.gains, *term.factors))

    def _spread(self) -> tuple[Term, ...]:
        return tuple(t.times(*self.gains) for t in self.terms)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a method does to the result of a use that leaves the axes `over` of the leaf free.

    A bool in `is_present` says whether it does.
    """

    factors: tuple[Factor, ...]
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    method: Any = dataclasses.field(metadata={"static": True})
    over: Origin = dataclasses.field(metadata={"static": True})
    is_present: tuple[Factor, ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pending:
    """A method that has yet to say what the weight is: what it derives from the base is derived layer by layer."""

    factors: tuple[Factor, ...]
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    method: Any = dataclasses.field(metadata={"static": True})
    site: Any = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight in the layout that the traced function has given it so far.

    The first factor of the first term spans all axes: it is the base, in exactly the layout and dtype that the plain
    function would have at this point. The gains multiply the sum of the terms. `origins` says which leaf axes each
    axis comes from, `lookups` which leaf axes were indexed away by data: with a batch of indices (True) or a single
    one (False). The outputs are no part of the weight: they act where it is used. A weight that is pending is the
    base alone, in the leaf's layout but for leading axes that scans have taken.
    """

    terms: tuple[Term, ...]
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    origins: tuple[Origin, ...] = dataclasses.field(metadata={"static": True})
    paths: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    lookups: frozenset[tuple[str, int, bool]] = dataclasses.field(metadata={"static": True})
    gains: tuple[Factor, ...] = ()
    outputs: tuple[Output, ...] = ()
    pending: Pending | None = None

    @property
    def base(self) -> Any:
        """The base array in the present layout."""
        return self.terms[0].factors[0].array

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def is_plain(self) -> bool:
        """Whether nothing but one array over all axes is left: an ordinary array."""
        return self.is_bare and not isinstance(self.base, Deferred)

    @property
    def is_bare(self) -> bool:
        """Whether it is the base alone, quantised or not."""
        changes = self.gains or self.outputs or self.pending
        return len(self.terms) == 1 and len(self.terms[0].factors) == 1 and not changes

    def factors(self) -> list[Factor]:
        """Return all factors, the base first."""
        return [
            *(f for t in self.terms for f in (*t.factors, *t.rate)),
            *self.gains,
            *(f for output in self.outputs for f in (*output.factors, *output.is_present)),
            *(self.pending.factors if self.pending else ()),
        ]

    def partial_factors(self) -> list[Factor]:
        """Return all factors but the base."""
        return self.factors()[1:]

    def with_factors(self, factors: Iterable[Factor], **changes: Any) -> Weight:
        """Return the weight with all factors replaced, in the order of `factors()`."""
        rest = iter(factors)
        take = lambda old: tuple(next(rest) for _ in old)
        return dataclasses.replace(
            self,
            terms=tuple(dataclasses.replace(t, factors=take(t.factors), rate=take(t.rate)) for t in self.terms),
            gains=take(self.gains),
            outputs=tuple(
                dataclasses.replace(o, factors=take(o.factors), is_present=take(o.is_present)) for o in self.outputs
            ),
            pending=self.pending and dataclasses.replace(self.pending, factors=take(self.pending.factors)),
            **changes,
        )

    def cuts(self) -> dict[int, tuple[int, int]]:
        """Return the axes that some array spans a part of, and the sizes of their parts."""
        return {a.axis: a.sizes for f in self.factors() for a in f.axes if isinstance(a, Part)}

    def has_gains_within(self, *sides: Sequence[int]) -> bool:
        """Tell whether each gain varies within one of several sets of axes, such as those that a use contracts."""
        gains = (*self.terms[0].factors[1:], *self.gains)
        return all(sum(not set(side).isdisjoint(f.axes) for side in sides) < 2 for f in gains)

    def at_rate(self, rate: Factor) -> Weight:
        """Return the weight with an array that says the rate of its dropout."""
        rated = (dataclasses.replace(t, rate=(rate,)) if t.dropout else t for t in self.terms)
        return dataclasses.replace(self, terms=tuple(rated))

    def where(self, is_present: Any, base: Any) -> Weight:
        """Return the weight where a bool is true, and the base where it is not; its arrays then get no gradient."""
        flag = Factor(is_present.astype(jnp.float32), ())
        gains = lambda factors: tuple(Factor(jnp.where(is_present, f.array, 1), f.axes) for f in factors)
        head, *base_gains = self.terms[0].factors
        if head.array is not base:  # the method puts another weight in its place
            head = Factor(jnp.where(is_present, force(head.array), cast(force(base), head.array.dtype)), head.axes)
        first = dataclasses.replace(self.terms[0], factors=(head, *gains(base_gains)))
        return dataclasses.replace(
            self,
            terms=(first, *(t.times(flag) for t in self.terms[1:])),
            gains=gains(self.gains),
            outputs=tuple(dataclasses.replace(o, is_present=(Factor(is_present, ()),)) for o in self.outputs),
        )

    def settled(self) -> Weight:
        """Return the weight with what its method makes of the base."""
        if self.pending is None:
            return self
        arrays = {n: f.array for n, f in zip(self.pending.names, self.pending.factors, strict=True)}
        site = self.pending.site.without_leading(len(self.pending.site.shape) - self.ndim)
        made = self.pending.method.build(site, self.base, arrays)
        over = lambda output: frozenset().union(*(self.origins[a] for _, a in output.over))
        outputs = tuple(dataclasses.replace(o, over=over(o)) for o in made.outputs)
        return dataclasses.replace(made, outputs=outputs, origins=self.origins, lookups=self.lookups)


def leaf_weight(path: str, base: Any, expression: Expression, outputs: tuple[Output, ...] = ()) -> Weight:
    """Return a leaf's adapted weight in the leaf's own layout."""
    axes = tuple(range(len(base.shape)))
    terms = list(expression.terms)
    whole = [(t, f) for t, term in enumerate(terms) for f, factor in enumerate(term.factors) if factor.axes == axes]
    if not whole:
        raise ValueError(f"{path}: the method's weight has no term that contains the base weight")
    at, i = whole[0]
    first = terms.pop(at)
    factors = list(first.factors)
    head = Factor(cast(factors.pop(i).array, base.dtype), axes)
    return Weight(
        (
            dataclasses.replace(first, factors=(head, *_as_gains(factors))),
            *(
                dataclasses.replace(t, factors=tuple(map(_forced, t.factors)), source=f"{path} {i}")
                for i, t in enumerate(terms)
            ),
        ),
        tuple(base.shape),
        base.dtype,
        tuple(frozenset({(path, i)}) for i in axes),
        (path,),
        frozenset(),
        _as_gains(expression.gains),
        outputs,
    )


def _forced(f: Factor) -> Factor:
    """Dequantise a base that stands elsewhere than first in a sum of products."""
    return Factor(force(f.array), f.axes)


def _as_gains(factors: Sequence[Factor]) -> tuple[Factor, ...]:
    """Sum what multiplies a whole weight over its bonds, so that each gain is an array over axes of the weight."""
    is_bound = lambda f: any(isinstance(a, str) for a in f.axes)
    vectors = [_forced(f) for f in factors if not is_bound(f)]
    bound = [_forced(f) for f in factors if is_bound(f)]
    if not bound:
        return tuple(vectors)
    labels = list(dict.fromkeys(a for f in bound for a in f.axes))
    free = [a for a in labels if not isinstance(a, str)]
    operands = [x for f in bound for x in (f.array, [labels.index(a) for a in f.axes])]
    gain = jnp.einsum(*operands, [labels.index(a) for a in free], precision=lax.Precision.HIGHEST)
    return (*vectors, Factor(gain, tuple(free)))


def quantized_weight(path: str, node: Any) -> Weight:
    """Return the weight of a quantised leaf that is not adapted."""
    base = Deferred(node)
    return leaf_weight(path, base, Expression((Term((Factor(base, tuple(range(base.ndim))),)),)))


def rebuild(weight: Weight, base: Any, partial: Iterable[Factor], **changes: Any) -> Weight:
    """Return the weight with its base array and its other factors replaced, in order."""
    full = Factor(base, tuple(range(base.ndim)))
    return weight.with_factors([full, *partial], **{"shape": tuple(base.shape), "dtype": base.dtype, **changes})


def relabelled(axes: Sequence[Label], new: Callable[[int], int]) -> tuple[Label, ...]:
    """Rename the weight's axes in an array's labels."""
    one = lambda a: Part(new(a.axis), a.which, a.sizes) if isinstance(a, Part) else new(a) if isinstance(a, int) else a
    return tuple(one(a) for a in axes)


def in_parts(labels: Sequence[Label], cuts: Mapping[int, tuple[int, int]]) -> tuple[Label, ...]:
    """Return the labels with each axis that is cut replaced by its two parts."""
    parts = lambda a: (Part(a, 0, cuts[a]), Part(a, 1, cuts[a])) if isinstance(a, int) and a in cuts else (a,)
    return tuple(b for a in labels for b in parts(a))


def cast(x: Any, dtype: Any) -> Any:
    """Convert an array's dtype, without an equation where there is nothing to do."""
    return x if x.dtype == dtype else lax.convert_element_type(x, dtype)


def promoted(*dtypes: Any) -> Any:
    """Return the dtype to compute in: JAX's promotion, to which 8-bit floats, that have none, come as bfloat16."""
    is_narrow = lambda dtype: jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 2
    return functools.reduce(jnp.promote_types, [jnp.bfloat16 if is_narrow(d) else d for d in dtypes])


def sizes_in_parts(axes: Sequence[Label], shape: Sequence[int], cuts: Mapping[int, tuple[int, int]]) -> list[int]:
    """Return the shape of an array after `in_parts`."""
    return [
        m for a, n in zip(axes, shape, strict=True) for m in (cuts[a] if isinstance(a, int) and a in cuts else (n,))
    ]
