"""Rules for products with a weight: the base product as it was, plus thin products with the other arrays.

`y = x·W + ((x·A)·s)·B` for dot_general with the weight on either side, any contracted and batch axes; convolution;
ragged_dot. The backward pass is autodiff's of this chain, which associates rank-first by itself, so that forward mode,
`vmap`, `remat` and higher derivatives need nothing more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lorax import compat
from lorax.interpret.context import Context, Use
from lorax.interpret.evaluate import densify
from lorax.interpret.weight import Factor, Term, Weight, absorb, arrange, cast, dense

RULES: dict[Any, Any] = {}


def _compute_dtype(weight: Weight, x: Any) -> Any:
    """The dtype of the thin products: the weight's own after the function's casts; never below 16 bits."""
    dtype = jnp.dtype(weight.dtype)
    return dtype if dtype.itemsize >= 2 else jnp.promote_types(x.dtype, jnp.bfloat16)


def _cast(f: Factor, dtype: Any) -> Factor:
    return f if f.array.dtype == dtype else Factor(cast(f.array, dtype), f.axes)


def _origins(weight: Weight, axes: Sequence[int]) -> frozenset[tuple[str, int]]:
    return frozenset().union(*(weight.origins[a] for a in axes))


def _record(
    ctx: Context, eqn: Any, kind: str, weight: Weight, contracted: Any, free: Any, batch: Any, reason: str = ""
) -> None:
    if ctx.record is not None:
        use = Use(
            paths=weight.paths,
            kind=kind,
            primitive=str(eqn.primitive),
            contracted=_origins(weight, contracted),
            free=_origins(weight, free),
            batch=_origins(weight, batch),
            factored=not reason,
            reason=reason,
            equation=id(eqn),
        )
        ctx.record(use)


def _entering(ctx: Context, x: Any, term: Term) -> Any:
    """The activation that enters a product, with the method's dropout when an `rng` was given."""
    return _dropped(x, term.dropout, ctx.next_key() if term.dropout else None)


def _dropped(x: Any, rate: float, key: Any) -> Any:
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype)).astype(x.dtype)


def _activation(ctx: Context, x: Any, contracted: Sequence[int], batch: Sequence[int], eqn: Any) -> Any:
    """Turn rows that were looked up, or a vector, into the activation they are; a picked expert still is a weight."""
    if not isinstance(x, Weight) or not x.lookups:
        return x
    free = [a for a in range(len(x.shape)) if a not in (*contracted, *batch)]
    return x if _origins(x, contracted) and _origins(x, free) else densify(ctx, x, str(eqn.primitive))


def dot_general(ctx: Context, eqn: Any, operands: Sequence[Any]) -> Any:
    """`dot_general` with the weight as either operand; a product of two weights takes both dense."""
    numbers = contract, batch = _hashable(eqn.params["dimension_numbers"])
    operands = [_activation(ctx, x, contract[i], batch[i], eqn) for i, x in enumerate(operands)]
    sides = [i for i, x in enumerate(operands) if isinstance(x, Weight)]
    reason = "" if len(sides) == 1 else "a product of two parameters"
    for i in sides if ctx.record else ():
        free = [a for a in range(operands[i].ndim) if a not in (*contract[i], *batch[i])]
        _record(ctx, eqn, "linear", operands[i], contract[i], free, batch[i], reason)
    if len(sides) != 1:
        return compat.bind(eqn, [dense(x) if isinstance(x, Weight) else x for x in operands])
    (side,) = sides
    weight, x = operands[side], operands[1 - side]
    if weight.is_plain:
        return compat.bind(eqn, [weight.base if i == side else x for i in range(2)])
    labels, y_labels, block = _labels(side, numbers, len(x.shape), weight.ndim)
    is_split = compat.is_partitioned(x) or compat.is_partitioned(weight.base)
    thin, thin_labels, wanted = (x, labels, y_labels) if is_split else _as_rows(ctx, x, labels, y_labels, block)
    dtype = _compute_dtype(weight, x)
    base, *gains = weight.terms[0].factors
    terms = weight.terms[1:]
    keys = [ctx.next_key() if t.dropout else None for t in terms]
    params = tuple({**eqn.params, "dimension_numbers": numbers}.items())
    plan = _Plan(eqn.primitive, params, side, labels, y_labels, thin_labels, wanted, dtype)
    return [adapted_dot(base.array, x, thin, gains, terms, keys, plan=plan)]


class _Plan(NamedTuple):
    """What is static about the products of an activation with an adapted weight's arrays."""

    primitive: Any  # of the base product
    params: tuple[tuple[str, Any], ...]
    side: int  # which operand the weight is
    x_labels: tuple[Any, ...]
    y_labels: tuple[Any, ...]
    thin_labels: tuple[Any, ...]  # of the activation that enters the thin products
    wanted: tuple[Any, ...]  # of their results
    dtype: Any  # of the thin products


@functools.partial(jax.jit, static_argnames="plan")
def adapted_dot(
    base: Any, x: Any, thin: Any, gains: Sequence[Factor], terms: Sequence[Term], keys: Sequence[Any], *, plan: _Plan
) -> Any:
    """Return the base product, scaled by the gains, plus the thin products with the other terms.

    A function of its own in the program, because a model has few different ones: each is traced, differentiated and
    lowered once, whatever the number of layers.
    """
    params = dict(plan.params)
    contracted = frozenset(params["dimension_numbers"][0][plan.side])
    precision = params["precision"]
    if isinstance(precision, tuple) and plan.side == 0:
        precision = precision[::-1]
    inner = [_cast(f, plan.dtype) for f in gains if not contracted.isdisjoint(f.axes)]
    if inner:  # a scale along contracted axes belongs on the activation
        x = cast(absorb(cast(x, plan.dtype), plan.x_labels, inner, ())[0], x.dtype)
    y = plan.primitive.bind(*((base, x) if plan.side == 0 else (x, base)), **params)
    typeof_y = jax.typeof(y)
    specs = _label_specs(base, x, plan.x_labels, y, plan.y_labels)
    kept = lambda z: cast(z, typeof_y.dtype) if specs is None else jax.sharding.reshard(z, typeof_y.sharding)
    outer = [_cast(f, y.dtype) for f in gains if contracted.isdisjoint(f.axes)]
    if outer:
        z, z_axes = absorb(y, plan.y_labels, outer, (), specs=specs)
        y = kept(arrange(z, z_axes, plan.y_labels, y.shape))
    thin = cast(thin, plan.dtype)
    for term, key in zip(terms, keys, strict=True):
        factors = [_cast(f, plan.dtype) for f in term.factors]
        entering = _dropped(thin, term.dropout, key)
        z, z_axes = absorb(entering, plan.thin_labels, factors, contracted, precision=precision, specs=specs)
        if z_axes != plan.wanted:
            sizes = {**dict(enumerate(base.shape)), **dict(zip(z_axes, z.shape, strict=True))}
            z = arrange(z, z_axes, plan.wanted, [sizes[a] for a in plan.wanted])
        y = lax.add(y, kept(cast(lax.reshape(z, y.shape), y.dtype)))
    return y


def _hashable(dimension_numbers: Any) -> Any:
    return tuple(tuple(tuple(int(a) for a in axes) for axes in pair) for pair in dimension_numbers)


@functools.lru_cache(maxsize=4096)
def _labels(
    side: int, dimension_numbers: Any, x_ndim: int, w_ndim: int
) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[int, int] | None]:
    """Name the axes of a dot_general's activation and of its output by the weight's; find the activation's free block.

    Returns:
      The activation's labels, the output's, and the first and last + 1 of the activation's free axes if there are
      several side by side.
    """
    contract, batch = dimension_numbers
    labels: list[Any] = [("x", i) for i in range(x_ndim)]
    for pair in (contract, batch):
        for a, i in zip(pair[side], pair[1 - side], strict=True):
            labels[i] = a
    w_free = [a for a in range(w_ndim) if a not in (*contract[side], *batch[side])]
    x_free = [i for i, a in enumerate(labels) if isinstance(a, tuple)]
    named = [labels[i] for i in x_free]
    wanted = [*batch[side], *(w_free if side == 0 else named), *(named if side == 0 else w_free)]
    together = len(x_free) > 1 and x_free[-1] - x_free[0] == len(x_free) - 1
    return tuple(labels), tuple(wanted), (x_free[0], x_free[-1] + 1) if together else None


def _as_rows(
    ctx: Context, x: Any, labels: tuple[Any, ...], wanted: tuple[Any, ...], block: tuple[int, int] | None
) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
    """Join an activation's free axes into rows for the thin products.

    Autodiff then gives `dA = xᵀ·(dy·Bᵀ)` and `dB = (x·A)ᵀ·dy` as products of matrices. Over several axes XLA first
    transposes `x` and `dy`: a fifth of a decoder's step on a CPU, see experiments/bench/backward_forms.py. Not on a
    mesh, where the compiler would have to gather an activation that is split along both batch and sequence.
    """
    if block is None:
        return x, labels, wanted
    first, last = block
    shape = (*x.shape[:first], math.prod(x.shape[first:last]), *x.shape[last:])
    rows = ctx.once(("rows", block), x, lambda: lax.reshape(x, shape))
    at = wanted.index(labels[first])
    n = last - first
    return rows, (*labels[:first], ("rows",), *labels[last:]), (*wanted[:at], ("rows",), *wanted[at + n :])


def _label_specs(base: Any, x: Any, labels: Sequence[Any], y: Any, wanted: Sequence[Any]) -> Any:
    """Mesh axes of every label where shardings are part of types: an axis is split as it is on x, y or the base."""
    mesh = compat.explicit_mesh(y)
    if mesh is None:
        return None
    spec = lambda array, names: dict(zip(names, jax.typeof(array).sharding.spec, strict=True))
    return {"mesh": mesh, **spec(base, range(base.ndim)), **spec(y, wanted), **spec(x, labels)}


def convolution(ctx: Context, eqn: Any, operands: Sequence[Any]) -> Any:
    """`conv_general_dilated`: a convolution to `rank` channels, then a product over the rank.

    In a grouped convolution `A` is shared by the groups and `B` is each group's own.
    """
    params = eqn.params
    numbers = params["dimension_numbers"]
    x = _activation(ctx, operands[0], numbers.lhs_spec[1:], (), eqn)
    weight = operands[1]
    out_axis, in_axis, *spatial = numbers.rhs_spec
    contracted = (in_axis, *spatial)
    plain_x, is_kernel = not isinstance(x, Weight), isinstance(weight, Weight)
    for it, spec, reason in (
        (x, numbers.lhs_spec, "the input of a convolution"),
        (weight, numbers.rhs_spec, "" if plain_x else "a product of two parameters"),
    ):
        if isinstance(it, Weight):
            why = reason or ("batch groups in a convolution" if params["batch_group_count"] != 1 else "")
            _record(ctx, eqn, "conv", it, spec[1:], spec[:1], (), why)
    if not (plain_x and is_kernel) or params["batch_group_count"] != 1:
        return NotImplemented
    groups = params["feature_group_count"]
    sized = {a for a in contracted if weight.shape[a] > 1}
    feature = numbers.out_spec[1]
    dtype = _compute_dtype(weight, x)
    (out,) = eqn.outvars
    for term in weight.terms[1:]:
        if not any(_convolves(f, sized, out_axis) for f in term.factors):
            return NotImplemented
    if any(set(f.axes) - {out_axis} for f in weight.terms[0].factors[1:]):
        return NotImplemented

    (y,) = compat.bind(eqn, [x, weight.base])
    for f in weight.terms[0].factors[1:]:
        gain = f.array.astype(y.dtype)
        y = y * (gain if not f.axes else lax.broadcast_in_dim(gain, y.shape, (feature,)))
    for term in weight.terms[1:]:
        first = next(f for f in term.factors if _convolves(f, sized, out_axis))
        rest = [f for f in term.factors if f is not first]
        bonds = [a for a in first.axes if isinstance(a, str)]
        channels = [jnp.shape(first.array)[first.axes.index(b)] for b in bonds]
        one = arrange(
            first.array, first.axes, [*contracted, *bonds], [*(weight.shape[a] for a in contracted), *channels]
        )
        one = lax.reshape(one, [*one.shape[: len(contracted)], math.prod(channels)])
        one = jnp.tile(one, [1] * len(contracted) + [groups]).astype(dtype)
        kernel = lax.transpose(one, [[*contracted, out_axis].index(a) for a in range(len(weight.shape))])
        h = lax.conv_general_dilated(
            _entering(ctx, x.astype(dtype), term),
            kernel,
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            numbers,
            feature_group_count=groups,
            precision=params["precision"],
        )
        h = lax.reshape(h, [*h.shape[:feature], groups, *channels, *h.shape[feature + 1 :]])
        labels = [*(("x", i) for i in range(feature)), "group", *bonds, *(("x", i) for i in range(feature, h.ndim))]
        labels = labels[: h.ndim]
        z, z_axes = absorb(
            h, [("g",) if a == "group" else a for a in labels], _grouped(rest, out_axis, groups, dtype), ()
        )
        per_group = weight.shape[out_axis] // groups
        free = [a for a in labels if isinstance(a, tuple)]
        wanted = [*free[:feature], ("g",), out_axis, *free[feature:]]
        shape = [*out.aval.shape[:feature], groups, per_group, *out.aval.shape[feature + 1 :]]
        y = y + lax.reshape(arrange(z, z_axes, wanted, shape), out.aval.shape).astype(y.dtype)
    return [y]


def _convolves(f: Factor, sized: set[int], out_axis: int) -> bool:
    return sized <= set(f.axes) and out_axis not in f.axes


def _grouped(factors: Sequence[Factor], out_axis: int, groups: int, dtype: Any) -> list[Factor]:
    """Split the output channels of each array into groups and channels of a group."""
    split = []
    for f in factors:
        array, axes = f.array.astype(dtype), f.axes
        if out_axis in axes:
            i = axes.index(out_axis)
            n = array.shape[i]
            array = lax.reshape(array, [*array.shape[:i], groups, n // groups, *array.shape[i + 1 :]])
            axes = (*axes[:i], ("g",), out_axis, *axes[i + 1 :])
        split.append(Factor(array, axes))
    return split


def ragged_dot(ctx: Context, eqn: Any, operands: Sequence[Any]) -> Any:
    """`ragged_dot`, one weight a group of rows: two ragged products of the rank's width."""
    x, weight, sizes = operands
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    ((x_contract, w_contract), (x_batch, _)) = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    if not isinstance(weight, Weight) or x_batch or len(weight.shape) != 3 or len(groups) != 1:
        return NotImplemented
    x = densify(ctx, x, str(eqn.primitive))
    (g,), (k,) = groups, w_contract
    (n,) = {0, 1, 2} - {g, k}
    dtype = _compute_dtype(weight, x)
    _record(ctx, eqn, "grouped", weight, (k,), (n,), (g,))
    (y,) = compat.bind(eqn, [x, weight.base, sizes])
    out_dtype = y.dtype

    def step(x: Any, axis: int, f: Factor, enters: Any, leaves: Any) -> Any:
        order = [f.axes.index(a) for a in (g, enters, leaves)]
        return lax.ragged_dot_general(
            x,
            lax.transpose(f.array.astype(dtype), order),
            sizes,
            lax.RaggedDotDimensionNumbers(
                dot_dimension_numbers=(((axis,), (1,)), ((), ())),
                lhs_ragged_dimensions=numbers.lhs_ragged_dimensions,
                rhs_group_dimensions=(0,),
            ),
            precision=eqn.params["precision"],
        )

    if len(weight.terms[0].factors) > 1:
        return NotImplemented
    for term in weight.terms[1:]:
        scalars = [f for f in term.factors if not f.axes]
        thin = [f for f in term.factors if f.axes]
        shapes = [tuple(sorted(a for a in f.axes if isinstance(a, int))) for f in thin]
        if len(thin) != 2 or sorted(shapes) != sorted([tuple(sorted((g, k))), tuple(sorted((g, n)))]):
            return NotImplemented
        a, b = thin if k in thin[0].axes else thin[::-1]
        (bond,) = [label for label in a.axes if isinstance(label, str)]
        entering = _entering(ctx, x.astype(dtype), term)
        if x_contract[0] != x.ndim - 1:
            return NotImplemented
        h = step(entering, x_contract[0], a, k, bond)
        for s in scalars:
            h = h * s.array.astype(dtype)
        y = y + step(h, h.ndim - 1, b, bond, n).astype(out_dtype)
    return [y]


RULES.update(
    {
        compat.dot_general_p: dot_general,
        compat.conv_general_dilated_p: convolution,
        compat.ragged_dot_p: ragged_dot,
    }
)
