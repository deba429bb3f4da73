"""Rules for primitives that move a weight's axes or scale it: the weight stays a sum of products.

The base array goes through the very equation that the plain function has; every other array goes through the same
change restricted to the axes it spans. A rule returns NotImplemented where the change does not restrict, and the
caller then continues with the dense weight.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax import compat
from lorax.interpret import deferred
from lorax.interpret.weight import Factor, Output, Part, Term, Weight, rebuild, relabelled

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


def _rule(*primitives: Any) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        for p in primitives:
            if p is not None:
                assert p not in RULES, p
                RULES[p] = rule
        return rule

    return add


class _Declined(Exception):  # raised inside a factor's change, turned into NotImplemented
    pass


def _moved(
    ctx: Any,
    eqn: Any,
    operands: Sequence[Any],
    change: Callable[[Factor], Factor],
    sources: Sequence[Sequence[int]],
    **changes: Any,
) -> Any:
    """Apply an equation with one adapted operand: `sources` names the old axes each new axis comes from."""
    (i,) = [i for i, x in enumerate(operands) if isinstance(x, Weight)]
    weight = operands[i]
    try:
        partial = [change(f) for f in weight.partial_factors()]
    except _Declined:
        return NotImplemented
    (base,) = deferred.bind(eqn, [*operands[:i], weight.base, *operands[i + 1 :]])
    origins = tuple(frozenset().union(*(weight.origins[a] for a in old)) for old in sources)
    return [rebuild(weight, base, partial, origins=origins, **changes)]


def _relabelled(f: Factor, new_label: dict[int, int]) -> Factor:
    """Rename weight axes; those that vanish have size one and are dropped."""
    gone = [i for i, a in enumerate(f.axes) if isinstance(a, int) and a not in new_label]
    array = lax.squeeze(f.array, gone) if gone else f.array
    kept = [a for i, a in enumerate(f.axes) if i not in gone]
    return Factor(array, relabelled(kept, lambda a: new_label[a]))


def _whole(f: Factor, axes: Iterable[int]) -> Factor:
    """Repeat an array that spans a part of an axis along all of it."""
    array, labels = f.array, list(f.axes)
    for i, a in enumerate(labels):
        if isinstance(a, Part) and a.axis in axes:
            shape, other = list(array.shape), a.sizes[1 - a.which]
            at = i + 1 - a.which  # where the other part goes: behind the slow one, before the fast one
            array = lax.broadcast_in_dim(
                array, (*shape[:at], other, *shape[at:]), [k + (k >= at) for k in range(len(shape))]
            )
            array = lax.reshape(array, (*shape[:i], a.sizes[0] * a.sizes[1], *shape[i + 1 :]))
            labels[i] = a.axis
    return Factor(array, tuple(labels))


def _along(f: Factor, changes: dict[int, Callable[[Any, int], Any]]) -> Factor:
    """Change an array along each of the weight axes that it spans."""
    array = f.array
    for i, a in enumerate(f.axes):
        if a in changes:
            array = changes[a](array, i)
    return Factor(array, f.axes)


def _cuts_outputs(weight: Weight, axes: Iterable[int]) -> bool:
    """Tell whether an axis belongs to those that a method's output acts on as a whole."""
    return any(_cuts(o, weight, axes) for o in weight.outputs)


def _is_whole(weight: Weight, axes: Iterable[int]) -> bool:
    """Tell whether axes are changed as a whole: not of those that outputs act on, nor in parts."""
    return not _cuts_outputs(weight, axes) and weight.cuts().keys().isdisjoint(axes)


def _cuts(output: Output, weight: Weight, axes: Iterable[int]) -> bool:
    return any(not output.over.isdisjoint(weight.origins[a]) for a in axes)


def _identity(n: int) -> list[tuple[int, ...]]:
    return [(i,) for i in range(n)]


@_rule(
    compat.convert_element_type_p,
    compat.copy_p,
    compat.optimization_barrier_p,
    compat.sharding_constraint_p,
    compat.device_put_p,
    compat.name_p,
    compat.pvary_p,
)
def _keep(ctx: Any, eqn: Any, operands: Sequence[Any]) -> Any:
    """Identity on values: only the base goes through; its new dtype is the one to compute in."""
    if any(not jnp.issubdtype(v.aval.dtype, jnp.floating) for v in eqn.outvars):
        return NotImplemented
    outs = deferred.bind(eqn, [x.base if isinstance(x, Weight) else x for x in operands])
    return [
        rebuild(x, out, x.partial_factors()) if isinstance(x, Weight) else out
        for x, out in zip(operands, outs, strict=True)
    ]


@_rule(compat.reshard_p)
def _reshard(ctx: Any, eqn: Any, operands: Sequence[Any]) -> Any:
    """Every array goes where its weight does: to another split, or to where the mesh's axes are of another kind."""
    to = eqn.params["dst_sharding"]
    entries = dict(enumerate([*to.spec, *[None] * (len(operands[0].shape) - len(to.spec))]))

    def change(f: Factor) -> Factor:
        spec = jax.P(*(entries.get(a) for a in f.axes))
        return Factor(jax.sharding.reshard(f.array, jax.sharding.NamedSharding(to.mesh, spec)), f.axes)

    return _moved(ctx, eqn, operands, change, _identity(len(operands[0].shape)))


@_rule(compat.stop_gradient_p)
def _stop_gradient(ctx: Any, eqn: Any, operands: Sequence[Any]) -> Any:
    (weight,) = operands
    return [jax.tree.map(lax.stop_gradient, weight)]


@_rule(compat.transpose_p)
def _transpose(ctx: Any, eqn: Any, operands: Sequence[Any]) -> Any:
    perm = eqn.params["permutation"]
    new = {old: i for i, old in enumerate(perm)}
    return _moved(ctx, eqn, operands, lambda f: _relabelled(f, new), [(p,) for p in perm])


@_rule(compat.squeeze_p)
def _squeeze(ctx: Any, eqn: Any, operands: Sequence[Any]) -> Any:
    n = len(operands[0].shape)
    kept = [i for i in range(n) if i not in {d % n for d in eqn.params["dimensions"]}]
    new = {old: i for i, old in enumerate(kept)}
    return _moved(ctx, eqn, operands, lambda f: _relabelled(f, new), [(k,) for k in kept])


@_rule(compat.broadcast_in_dim_p)
def _broadcast_in_dim(ctx: Any, eqn: Any, operands: Sequence[Any]) -> Any:
    if not isinstance(operands[0], Weight):
        return NotImplemented
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    new = {old: i for old, i in enumerate(dims) if operands[0].shape[old] == shape[i]}
    sources = [tuple(old for old, j in new.items() if i == j) for i in range(len(shape))]  # a repeated one is none
    return _moved(ctx, eqn, operands, lambda f: _relabelled(f, new), sources)


@_rule(compat.reshape_p)
def _reshape(ctx: Any, eqn: Any, operands: Sequence[Any]) -> Any:
    old, new = operands[0].shape, tuple(eqn.params["new_sizes"])
    if eqn.params["dimensions"] is not None or 0 in old or len(operands) > 1:
        return NotImplemented
    parts = _reshape_groups(old, new)
    sources: list[tuple[int, ...]] = [()] * len(new)
    for a, b in parts:
        for j in b:
            sources[j] = tuple(i for i in a if old[i] > 1 or len(a) == 1) if new[j] > 1 or len(b) == 1 else ()

    def change(f: Factor) -> Factor:
        order: list[int] = []
        sizes: list[int] = []
        labels: list[Any] = []
        for a, b in parts:
            mine = [f.axes.index(i) for i in a if i in f.axes]
            if {i for i in a if old[i] > 1} - set(f.axes):
                if any(jnp.shape(f.array)[m] > 1 for m in mine):
                    raise _Declined  # joins an axis that this array spans with one that it does not
                order += mine
            else:
                order += mine
                kept = [j for j in b if mine]
                sizes += [new[j] for j in kept]
                labels += kept
        bonds = [i for i, label in enumerate(f.axes) if isinstance(label, str)]
        array = lax.transpose(f.array, [*order, *bonds])
        sizes += [jnp.shape(f.array)[i] for i in bonds]
        return Factor(lax.reshape(array, sizes), (*labels, *(f.axes[i] for i in bonds)))

    return _moved(ctx, eqn, operands, change, sources)


def _reshape_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pair the smallest runs of old and new axes of equal size."""
    groups, rest = [], (list(enumerate(old)), list(enumerate(new)))
    while any(rest):
        taken = [side.pop(0)] if (side := rest[0]) else [], [side.pop(0)] if (side := rest[1]) else []
        while (p := math.prod(n for _, n in taken[0])) != (q := math.prod(n for _, n in taken[1])):
            smaller = int(p > q)
            taken[smaller].append(rest[smaller].pop(0))
        groups.append(tuple([i for i, _ in side] for side in taken))
    return groups


@_rule(compat.slice_p)
def _slice(ctx: Any, eqn: Any, operands: Sequence[Any]) -> Any:
    (weight,) = operands
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    changes = {
        i: (lambda x, ax, s=s, e=e, t=t: lax.slice_in_dim(x, s, e, t, ax))
        for i, (s, e, t) in enumerate(zip(starts, limits, strides, strict=True))
        if (s, e, t) != (0, weight.shape[i], 1)
    }
    if not _is_whole(weight, changes):
        return NotImplemented
    return _moved(ctx, eqn, operands, lambda f: _along(f, changes), _identity(len(starts)))


@_rule(compat.dynamic_slice_p)
def _dynamic_slice(ctx: Any, eqn: Any, operands: Sequence[Any]) -> Any:
    weight, *starts = operands
    if not isinstance(weight, Weight):
        return NotImplemented
    sizes = eqn.params["slice_sizes"]
    cut = [i for i, n in enumerate(sizes) if n != weight.shape[i]]
    changes = {i: (lambda x, ax, s=starts[i], n=sizes[i]: lax.dynamic_slice_in_dim(x, s, n, ax)) for i in cut}
    indexed = frozenset((*o, False) for i in cut if sizes[i] == 1 for o in weight.origins[i])
    if not _is_whole(weight, cut):
        return NotImplemented
    return _moved(
        ctx,
        eqn,
        operands,
        lambda f: _along(f, changes),
        _identity(len(sizes)),
        lookups=weight.lookups | indexed,
    )


@_rule(compat.rev_p)
def _rev(ctx: Any, eqn: Any, operands: Sequence[Any]) -> Any:
    changes = {d: (lambda x, ax: lax.rev(x, (ax,))) for d in eqn.params["dimensions"]}
    if not _is_whole(operands[0], changes):
        return NotImplemented
    return _moved(ctx, eqn, operands, lambda f: _along(f, changes), _identity(len(operands[0].shape)))


def _pieces(ctx: Any, eqn: Any, weight: Weight, axis: int, sizes: Sequence[int], bases: Sequence[Any]) -> list[Weight]:
    outs, start = [], 0
    for base, n in zip(bases, sizes, strict=True):
        changes = {axis: lambda x, ax, s=start, n=n: lax.slice_in_dim(x, s, s + n, axis=ax)}
        outs.append(rebuild(weight, base, [_along(f, changes) for f in weight.partial_factors()]))
        start += n
    return outs


@_rule(compat.split_p)
def _split(ctx: Any, eqn: Any, operands: Sequence[Any]) -> Any:
    (weight,) = operands
    if not _is_whole(weight, [eqn.params["axis"]]):
        return NotImplemented
    bases = deferred.bind(eqn, [weight.base])
    return _pieces(ctx, eqn, weight, eqn.params["axis"], [int(n) for n in eqn.params["sizes"]], bases)


@_rule(compat.unstack_p)
def _unstack(ctx: Any, eqn: Any, operands: Sequence[Any]) -> Any:
    (weight,) = operands
    axis = eqn.params["axis"]
    if not _is_whole(weight, [axis]):
        return NotImplemented
    bases = deferred.bind(eqn, [weight.base])
    slices = [_expanded(b, axis) for b in bases]
    pieces = _pieces(ctx, eqn, weight, axis, [1] * len(bases), slices)
    return [_without(w, axis, base) for w, base in zip(pieces, bases, strict=True)]


def _without(weight: Weight, axis: int, base: Any) -> Weight:
    """Drop an axis of size one, which the base has lost already."""
    kept = [i for i in range(len(weight.shape)) if i != axis]
    new = {old: i for i, old in enumerate(kept)}
    partial = [_relabelled(f, new) for f in weight.partial_factors()]
    origins = tuple(weight.origins[i] for i in kept)
    return rebuild(weight, base, partial, origins=origins)


@_rule(compat.mul_p, compat.div_p)
def _scale(ctx: Any, eqn: Any, operands: Sequence[Any]) -> Any:
    """Multiply by a scalar or by a vector along axes that one array of each product spans."""
    w, v = operands
    if isinstance(w, Weight) == isinstance(v, Weight) or (eqn.primitive is compat.div_p and isinstance(v, Weight)):
        return NotImplemented
    weight, v = (w, v) if isinstance(w, Weight) else (v, w)
    (out,) = eqn.outvars
    if out.aval.shape != weight.shape or not jnp.issubdtype(out.aval.dtype, jnp.floating):
        return NotImplemented
    axes = [i for i, n in enumerate(jnp.shape(v)) if n > 1]
    if ctx.tracing and not all(ctx.fixed) and len(axes) == sum(n > 1 for n in weight.shape):
        return NotImplemented  # an activation that is scaled, whatever the shapes
    op = lax.div if eqn.primitive is compat.div_p else lax.mul

    def scaled(f: Factor) -> Factor:
        order = sorted(range(len(axes)), key=lambda i: f.axes.index(axes[i]))
        s = lax.transpose(jnp.reshape(v, [jnp.shape(v)[a] for a in axes]), order).astype(f.array.dtype)
        where = [f.axes.index(axes[i]) for i in order]
        return Factor(op(f.array, lax.broadcast_in_dim(s, jnp.shape(f.array), where)), f.axes)

    terms = [weight.terms[0]]
    for term in weight.terms[1:]:
        fit = [i for i, f in enumerate(term.factors) if set(axes) <= set(f.axes)]
        if not fit:
            return NotImplemented
        i = min(fit, key=lambda i: jnp.size(term.factors[i].array))
        factors = (*term.factors[:i], scaled(term.factors[i]), *term.factors[i + 1 :])
        terms.append(dataclasses.replace(term, factors=factors))
    (base,) = deferred.bind(eqn, [x.base if isinstance(x, Weight) else x for x in operands])
    made = dataclasses.replace(weight, terms=tuple(terms))
    return [rebuild(made, base, made.partial_factors())]


@_rule(compat.neg_p)
def _neg(ctx: Any, eqn: Any, operands: Sequence[Any]) -> Any:
    (weight,) = operands
    (base,) = deferred.bind(eqn, [weight.base])
    negated = lambda f, *rest: (Factor(-f.array, f.axes), *rest)
    terms = (dataclasses.replace(t, factors=negated(*t.factors)) for t in weight.terms[1:])
    made = dataclasses.replace(weight, terms=(weight.terms[0], *terms))
    return [rebuild(made, base, made.partial_factors())]


@_rule(compat.stack_p)
def _stack(ctx: Any, eqn: Any, operands: Sequence[Any]) -> Any:
    axis = eqn.params["axis"]
    return _joined(ctx, eqn, [_with_axis(x, axis) for x in operands], operands, axis)


def _expanded(x: Any, axis: int) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a base with one more axis, which nothing has to compute."""
    return jax.ShapeDtypeStruct((*x.shape[:axis], 1, *x.shape[axis:]), x.dtype)


def _with_axis(x: Any, axis: int) -> Any:
    """Give a weight an axis of size one; what becomes of its base is told by the shape alone."""
    if not isinstance(x, Weight):
        return _expanded(x, axis)
    new = {i: i + (i >= axis) for i in range(len(x.shape))}
    origins = (*x.origins[:axis], frozenset(), *x.origins[axis:])
    partial = [_relabelled(f, new) for f in x.partial_factors()]
    return rebuild(x, _expanded(x, axis), partial, origins=origins)


@_rule(compat.concatenate_p)
def _concatenate(ctx: Any, eqn: Any, operands: Sequence[Any]) -> Any:
    return _joined(ctx, eqn, operands, operands, eqn.params["dimension"])


def _joined(ctx: Any, eqn: Any, parts: Sequence[Any], operands: Sequence[Any], axis: int) -> Any:
    """Join weights along an axis: each product keeps to its own part, zero elsewhere, and each gain, one elsewhere.

    A weight with outputs, or with gains that would span all of its axes then, does not join others, and a parameter
    that is joined to an activation (a class token) is no weight.
    """
    weights = [p for p in parts if isinstance(p, Weight)]
    if any(w.outputs for w in weights) or (ctx.tracing and not all(ctx.fixed)):
        return NotImplemented
    (base,) = deferred.bind(eqn, [x.base if isinstance(x, Weight) else x for x in operands])
    sizes = [p.shape[axis] for p in parts]
    total = base.shape[axis]
    spans = [(sum(sizes[:i]), size, total) for i, size in enumerate(sizes)]
    of_weights = [(p, span) for p, span in zip(parts, spans, strict=True) if isinstance(p, Weight)]
    n = base.ndim
    whole = Factor(base, tuple(range(n)))
    try:
        base_gains = _joined_gains([(w.terms[0].factors[1:], span) for w, span in of_weights], axis, n)
        gains = _joined_gains([(w.gains, span) for w, span in of_weights], axis, n)
    except _Declined:
        return NotImplemented
    return [
        Weight(
            (Term((whole, *base_gains)), *(_placed(t, axis, span) for w, span in of_weights for t in w.terms[1:])),
            tuple(base.shape),
            base.dtype,
            tuple(frozenset().union(*(w.origins[i] for w in weights)) for i in range(n)),
            tuple(dict.fromkeys(p for w in weights for p in w.paths)),
            frozenset().union(*(w.lookups for w in weights)),
            gains,
        )
    ]


Span = tuple[int, int, int]  # where a part of a joined axis starts, its size, and the size of the axis


def _padded(f: Factor, axis: int, span: Span, value: float) -> Factor:
    """Extend an array along a joined axis."""
    start, size, total = span
    config = [(start, total - start - size, 0) if a == axis else (0, 0, 0) for a in f.axes]
    return Factor(lax.pad(f.array, jnp.asarray(value, f.array.dtype), config), f.axes)


def _repeated(f: Factor, axis: int, size: int) -> Factor:
    """Let an array that is constant along an axis span it."""
    return Factor(jnp.broadcast_to(f.array, (size, *jnp.shape(f.array))), (axis, *f.axes))


def _placed(term: Term, axis: int, span: Span) -> Term:
    """Extend one array of a product by zeros along an axis; the others span it unchanged or not at all."""
    factors = list(term.factors)
    if not any(axis in f.axes for f in factors):  # constant along the axis: put it where a later reshape may join it
        neighbours = [a for f in factors for a in f.axes if a in (axis - 1, axis + 1)]
        i = next((i for i, f in enumerate(factors) if neighbours and max(neighbours) in f.axes), 0)
        factors[i] = _repeated(factors[i], axis, span[1])
    extended = tuple(_padded(f, axis, span, 0) if axis in f.axes else f for f in factors)
    return dataclasses.replace(term, factors=extended)


def _joined_gains(parts: Sequence[tuple[Sequence[Factor], Span]], axis: int, n_axes: int) -> tuple[Factor, ...]:
    """Join gains, the first of each part to one, the second to another and so on."""
    joined = []
    for k in range(max(len(gains) for gains, _ in parts)):
        mine = []
        for gains, span in parts:
            if k < len(gains):
                f = gains[k] if axis in gains[k].axes else _repeated(gains[k], axis, span[1])
                order = sorted(range(len(f.axes)), key=lambda i: f.axes[i])
                f = Factor(lax.transpose(f.array, order), tuple(f.axes[i] for i in order))
                mine.append(_padded(f, axis, span, 1))
        if len(mine[0].axes) == n_axes > 1 or len({f.axes for f in mine}) > 1:
            raise _Declined
        joined.append(Factor(functools.reduce(jnp.multiply, [f.array for f in mine]), mine[0].axes))
    return tuple(joined)


@_rule(compat.gather_p)
def _gather(ctx: Any, eqn: Any, operands: Sequence[Any]) -> Any:
    """Look up rows, or pick a layer or an expert: each array is indexed along those of the axes that it spans.

    The result still is a product: `W[i] + s·A[i]·B`. Read by anything but another layout rule or a use, it is the
    embedding lookup, whose dense form has an activation's size.
    """
    weight, indices = operands
    if not isinstance(weight, Weight) or isinstance(indices, Weight):
        return NotImplemented
    numbers = eqn.params["dimension_numbers"]
    sizes = eqn.params["slice_sizes"]
    n_out = len(eqn.outvars[0].aval.shape)
    offsets = list(numbers.offset_dims)
    batch = [i for i in range(n_out) if i not in offsets]
    hidden = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    windows = dict(zip([i for i in range(len(weight.shape)) if i not in hidden], offsets, strict=True))
    batching = dict(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True))
    indexed = [a for a in numbers.start_index_map if weight.shape[a] > 1]
    if any(sizes[a] != weight.shape[a] for a in windows if a not in indexed):
        return NotImplemented
    if batch:  # rows of a tied embedding are no output of its product
        kept = tuple(o for o in weight.outputs if not _cuts(o, weight, indexed))
        weight = dataclasses.replace(weight, outputs=kept)
        operands = [weight, indices]
    elif _cuts_outputs(weight, indexed):
        return NotImplemented

    def change(f: Factor) -> Factor:
        f = _whole(f, indexed)
        mine = [a for a in numbers.start_index_map if a in f.axes]
        lots = [a for a in batching if a in f.axes]
        if not mine and not lots:
            return _relabelled(f, windows)
        window = [i for i, a in enumerate(f.axes) if a not in hidden]
        columns = [numbers.start_index_map.index(a) for a in mine]
        picked = (
            jnp.take(indices, jnp.asarray(columns, "int32"), axis=-1)
            if len(mine) < len(numbers.start_index_map)
            else indices
        )
        out_axes = [*batch, *relabelled([f.axes[i] for i in window], lambda a: windows[a])]
        out = lax.gather(
            f.array,
            picked,
            lax.GatherDimensionNumbers(
                offset_dims=tuple(range(len(batch), len(out_axes))),
                collapsed_slice_dims=tuple(i for i, a in enumerate(f.axes) if a in numbers.collapsed_slice_dims),
                start_index_map=tuple(f.axes.index(a) for a in mine),
                operand_batching_dims=tuple(f.axes.index(a) for a in lots),
                start_indices_batching_dims=tuple(batching[a] for a in lots),
            ),
            tuple(sizes[a] if isinstance(a, int) else n for a, n in zip(f.axes, jnp.shape(f.array), strict=True)),
            mode=eqn.params["mode"],
            fill_value=0,  # beyond the table the base alone says what comes out
        )
        return Factor(out, tuple(out_axes))

    sources: list[tuple[int, ...]] = [()] * n_out
    for old, new in windows.items():
        sources[new] = (old,)
    looked_up = frozenset((*o, bool(batch)) for a in indexed if sizes[a] == 1 for o in weight.origins[a])
    return _moved(ctx, eqn, operands, change, sources, lookups=weight.lookups | looked_up)


# Rules for which an axis may be cut into parts: they rename axes, keep them as they are, or decline by themselves.
CUT = {
    *(
        compat.slice_p,
        compat.dynamic_slice_p,
        compat.split_p,
        compat.unstack_p,
        compat.rev_p,
        compat.broadcast_in_dim_p,
    ),
    *(compat.transpose_p, compat.squeeze_p, compat.stop_gradient_p, compat.convert_element_type_p, compat.copy_p),
    *(compat.gather_p, compat.optimization_barrier_p, compat.device_put_p, compat.name_p, compat.pvary_p),
    compat.reshard_p,
}
