"""An adapted weight as a sum of products of labelled arrays, and the arithmetic on it.

`W + s·A·B` is two terms: the base array alone, and the product of a scalar, `A` and `B`. Every array says which axes
of the weight it spans; an axis that only the arrays share (the rank) carries a name and is summed over. A weight is
thus never built: moving its axes moves the axes of its arrays, a product with an activation contracts the activation
with one array after another, and the dense weight is the same product without an activation. Methods, layout rules
and uses know nothing of each other.

Labels: an int is an axis of the weight in its present layout, a string a bond that is summed over, a tuple a free
axis of an activation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax import compat

Label = Any
Origin = frozenset[tuple[str, int]]  # (leaf path, axis of that leaf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factor:
    """An array and, for each of its axes, the weight's axis or the bond that it spans."""

    array: Any
    axes: tuple[Label, ...] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """A product of factors, summed over their bonds. `dropout` acts on the activation that enters it."""

    factors: tuple[Factor, ...]
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Expression:
    """A sum of terms: what a method's `weight` computes with.

    `+` adds, `*` and `@` multiply (axes of one weight side by side, bonds summed over), a Python or array scalar
    scales.
    """

    terms: tuple[Term, ...]

    def __add__(self, other: Expression) -> Expression:
        return Expression(self.terms + other.terms)

    def __mul__(self, other: Expression | float | jax.Array) -> Expression:
        if not isinstance(other, Expression):
            other = Expression((Term((Factor(jnp.asarray(other), ()),)),))
        return Expression(
            tuple(Term(s.factors + t.factors, max(s.dropout, t.dropout)) for s in self.terms for t in other.terms)
        )

    __matmul__ = __rmul__ = __mul__

    def __neg__(self) -> Expression:
        return self * -1.0

    def __sub__(self, other: Expression) -> Expression:
        return self + -other

    def with_dropout(self, rate: float) -> Expression:
        """Return the expression with dropout on the activation that enters it, during training only."""
        return Expression(tuple(Term(t.factors, rate) for t in self.terms))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight in the layout that the traced function has given it so far.

    The first factor of the first term spans all axes: it is the base, in exactly the layout and dtype that the plain
    function would have at this point. `origins` says which leaf axes each axis comes from, `lookups` which leaf axes
    were indexed away by data: with a batch of indices (True) or a single one (False).
    """

    terms: tuple[Term, ...]
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    origins: tuple[Origin, ...] = dataclasses.field(metadata={"static": True})
    paths: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    lookups: frozenset[tuple[str, int, bool]] = dataclasses.field(metadata={"static": True})

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
        return len(self.terms) == 1 and len(self.terms[0].factors) == 1

    def partial_factors(self) -> list[Factor]:
        """Return all factors but the base."""
        return [f for t in self.terms for f in t.factors][1:]


def leaf_weight(path: str, base: Any, expression: Expression) -> Weight:
    """Return a leaf's adapted weight in the leaf's own layout."""
    axes = tuple(range(len(base.shape)))
    terms = list(expression.terms)
    whole = [(t, f) for t, term in enumerate(terms) for f, factor in enumerate(term.factors) if factor.axes == axes]
    if not whole:
        raise ValueError(f"{path}: the method's weight has no term that contains the base weight")
    at, i = whole[0]
    first = terms.pop(at)
    factors = list(first.factors)
    head = Term((Factor(cast(factors.pop(i).array, base.dtype), axes), *factors), first.dropout)
    return Weight(
        (head, *terms),
        tuple(base.shape),
        base.dtype,
        tuple(frozenset({(path, i)}) for i in axes),
        (path,),
        frozenset(),
    )


def rebuild(weight: Weight, base: Any, partial: Iterable[Factor], **changes: Any) -> Weight:
    """Return the weight with its base array and its other factors replaced, in order."""
    rest = iter(partial)
    full = Factor(base, tuple(range(jnp.ndim(base))))
    terms = []
    for i, term in enumerate(weight.terms):
        kept = [full if i == j == 0 else next(rest) for j in range(len(term.factors))]
        terms.append(Term(tuple(kept), term.dropout))
    return dataclasses.replace(weight, terms=tuple(terms), **{"shape": jnp.shape(base), "dtype": base.dtype, **changes})


def cast(x: Any, dtype: Any) -> Any:
    """Convert an array's dtype, without an equation where there is nothing to do."""
    return x if x.dtype == dtype else lax.convert_element_type(x, dtype)


@dataclasses.dataclass(frozen=True)
class Step:
    """One factor met by an activation: a scale along existing axes, or a product that sums over some."""

    factor: int
    out_axes: tuple[Label, ...]
    scale: tuple[tuple[int, ...], tuple[int, ...]] | None  # the factor's axes in the activation's order; axes it lacks
    dims: Any  # dot_general's dimension numbers


@functools.lru_cache(maxsize=4096)
def contraction(
    x_axes: tuple[Label, ...], factors: tuple[tuple[Label, ...], ...], contracted: frozenset[Label]
) -> tuple[tuple[Step, ...], tuple[int, ...]]:
    """Plan the contraction of an activation with a product of factors; a model has few different ones.

    The activation meets those that it shares a contracted axis with first, and no two factors are multiplied with each
    other, so that `x·A·B` costs two thin products whatever the axes are. A bond is summed when its last factor is met.

    Returns:
      The steps, and the axes of the last output that no factor varies along and that are left to sum over.
    """
    order = sorted(range(len(factors)), key=lambda i: not contracted.intersection(factors[i]))
    steps = []
    for at, i in enumerate(order):
        f_axes = factors[i]
        later = {a for j in order[at + 1 :] for a in factors[j]}
        summed = {a for a in (*x_axes, *f_axes) if (a in contracted or isinstance(a, str)) and a not in later}
        if all(a in x_axes and a not in summed for a in f_axes):
            inner = sorted(range(len(f_axes)), key=lambda k: x_axes.index(f_axes[k]))
            missing = tuple(k for k, a in enumerate(x_axes) if a not in f_axes)
            steps.append(Step(i, x_axes, (tuple(inner), missing), None))
            continue
        shared = [a for a in x_axes if a in f_axes]
        dims = tuple(
            tuple(tuple(axes.index(a) for a in shared if (a in summed) == is_summed) for axes in (x_axes, f_axes))
            for is_summed in (True, False)
        )
        x_axes = (
            *(a for a in shared if a not in summed),
            *(a for a in x_axes if a not in shared),
            *(a for a in f_axes if a not in shared),
        )
        steps.append(Step(i, x_axes, None, dims))
    return tuple(steps), tuple(k for k, a in enumerate(x_axes) if a in contracted)


def absorb(
    x: Any,
    x_axes: Sequence[Label],
    factors: Sequence[Factor],
    contracted: Collection[Label],
    *,
    precision: Any = None,
    specs: dict[Label, Any] | None = None,
) -> tuple[Any, tuple[Label, ...]]:
    """Contract an activation with a product of factors, one after another.

    Args:
      x: the activation.
      x_axes: its labels.
      factors: the factors, of its dtype.
      contracted: the weight axes to sum over.
      precision: of the products.
      specs: the mesh axes of each label, where sharding is explicit in types.

    Returns:
      The product and its labels.
    """
    x_axes = tuple(x_axes)
    steps, rest = contraction(x_axes, tuple(f.axes for f in factors), frozenset(contracted))
    for step in steps:
        f, x_axes = factors[step.factor], step.out_axes
        array = f.array if specs is None else _laid_out(f.array, f.axes, specs)
        if step.scale is not None:
            inner, missing = step.scale
            if f.axes:
                array = lax.expand_dims(lax.transpose(array, inner), missing)
            x = lax.mul(x, cast(array, x.dtype))
        else:
            sharding = None if specs is None else _sharding(specs, x_axes)
            x = lax.dot_general(
                x, array, step.dims, precision=precision, preferred_element_type=x.dtype, out_sharding=sharding
            )
    if rest:
        x, x_axes = jnp.sum(x, axis=rest), tuple(a for k, a in enumerate(x_axes) if k not in rest)
    return x, x_axes


def arrange(x: Any, x_axes: Sequence[Label], wanted: Sequence[Label], shape: Sequence[int]) -> Any:
    """Transpose to the wanted labels and broadcast along those that are missing."""
    assert set(x_axes) <= set(wanted), (x_axes, wanted)
    order = [x_axes.index(a) for a in wanted if a in x_axes]
    if order != sorted(order):
        x = lax.transpose(x, order)
    present = [i for i, a in enumerate(wanted) if a in x_axes]
    return x if len(present) == len(shape) else lax.broadcast_in_dim(x, tuple(shape), present)


def dense(weight: Weight) -> Any:
    """Return the weight as one array: the reference that every faster path has to agree with."""
    if weight.is_plain:
        return weight.base
    wanted = range(len(weight.shape))
    specs = _specs(weight) if compat.explicit_mesh(weight.base) else None
    total = None
    for term in weight.terms:
        first = max(term.factors, key=lambda f: len(f.axes))
        rest = sorted((f for f in term.factors if f is not first), key=lambda f: len(f.axes))  # scalars first
        dtype = functools.reduce(jnp.promote_types, [f.array.dtype for f in term.factors])
        start = cast(first.array if specs is None else _laid_out(first.array, first.axes, specs), dtype)
        rest = [Factor(cast(f.array, dtype), f.axes) for f in rest]
        x, x_axes = absorb(start, first.axes, rest, (), precision=lax.Precision.HIGHEST, specs=specs)
        x = arrange(x, x_axes, wanted, weight.shape)
        total = x if total is None else total + x
    assert total is not None
    return cast(total, weight.dtype)


def _specs(weight: Weight) -> dict[Label, Any]:
    typeof = jax.typeof(weight.base)
    return {"mesh": typeof.sharding.mesh, **dict(enumerate(typeof.sharding.spec))}


def _sharding(specs: dict[Label, Any], axes: Sequence[Label]) -> Any:
    used: set[str] = set()
    entries = []
    for a in axes:  # a mesh axis can split one axis of an array only
        entry = specs.get(a)
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        entries.append(None if used & set(names) else entry)
        used |= set(names)
    return jax.sharding.NamedSharding(specs["mesh"], jax.P(*entries))


def _laid_out(array: Any, axes: Sequence[Label], specs: dict[Label, Any] | None) -> Any:
    if specs is None or not axes:
        return array
    axes = [a if n != 1 else "one" for a, n in zip(axes, jnp.shape(array), strict=True)]
    return jax.sharding.reshard(array, _sharding(specs, axes))
