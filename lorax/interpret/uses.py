"""The rule for products with a weight: the base product as it was, plus thin products with the other arrays.

`y = x·W + ((x·A)·s)·B` for dot_general with the weight on either side, any contracted and batch axes. The backward pass
is autodiff's of this chain, which associates rank-first by itself, so that forward mode, `vmap`, `remat` and higher
derivatives need nothing more.
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
from lorax.interpret import residuals
from lorax.interpret.activation import apply_outputs
from lorax.interpret.context import Context, Use
from lorax.interpret.contraction import absorb, arrange, axis_specs, dense, laid_out
from lorax.interpret.deferred import Deferred, force, witness
from lorax.interpret.evaluate import densify
from lorax.interpret.weight import Factor, Output, Part, Term, Weight, cast, in_parts, promoted, sizes_in_parts

RULES: dict[Any, Any] = {}


def compute_dtype(weight: Weight, x: Any) -> Any:
    """The dtype of the thin products: the weight's own after the function's casts; never below 16 bits."""
    dtype = jnp.dtype(weight.dtype)
    return dtype if dtype.itemsize >= 2 else promoted(x.dtype, jnp.bfloat16)


def _cast(f: Factor, dtype: Any) -> Factor:
    return f if f.array.dtype == dtype else Factor(cast(f.array, dtype), f.axes)


def _origins(weight: Weight, axes: Sequence[int]) -> frozenset[tuple[str, int]]:
    return frozenset().union(*(weight.origins[a] for a in axes))


def record(
    ctx: Context, eqn: Any, kind: str, weight: Weight, contracted: Any, free: Any, batch: Any, reason: str = ""
) -> None:
    """Tell the context of a use: which of the leaf's axes it contracts, leaves free, and batches."""
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


def entering(ctx: Context, x: Any, term: Term) -> Any:
    """The activation that enters a product, with the method's dropout when an `rng` was given."""
    return _dropped(x, term, ctx.key_here(term.source) if term.dropout else None)


def _dropped(x: Any, term: Term, key: Any) -> Any:
    if key is None:
        return x
    rate = term.rate[0].array if term.rate else term.dropout
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype)).astype(x.dtype)


def as_activation(ctx: Context, x: Any, contracted: Sequence[int], batch: Sequence[int], eqn: Any) -> Any:
    """Turn rows that were looked up, or a vector, into the activation they are; a picked expert still is a weight."""
    if not isinstance(x, Weight) or not x.lookups:
        return x
    free = [a for a in range(len(x.shape)) if a not in (*contracted, *batch)]
    return x if _origins(x, contracted) and _origins(x, free) else densify(ctx, x, str(eqn.primitive))


def dot_general(ctx: Context, eqn: Any, operands: Sequence[Any]) -> Any:
    """`dot_general` with the weight as either operand; a product of two weights takes both dense."""
    numbers = contract, batch = _hashable(eqn.params["dimension_numbers"])
    operands = [as_activation(ctx, x, contract[i], batch[i], eqn) for i, x in enumerate(operands)]
    sides = [i for i, x in enumerate(operands) if isinstance(x, Weight)]
    reason = "" if len(sides) == 1 else "a product of two parameters"
    for i in sides if ctx.record else ():
        free = [a for a in range(operands[i].ndim) if a not in (*contract[i], *batch[i])]
        record(ctx, eqn, "linear", operands[i], contract[i], free, batch[i], reason)
    if len(sides) != 1:
        return compat.bind(eqn, [dense(x) if isinstance(x, Weight) else x for x in operands])
    (side,) = sides
    weight, x = operands[side], operands[1 - side]
    if weight.is_plain:
        return compat.bind(eqn, [weight.base if i == side else x for i in range(2)])
    free = [a for a in range(weight.ndim) if a not in (*contract[side], *batch[side])]
    if not weight.has_gains_within(contract[side], free):
        return NotImplemented  # one that scales neither what enters nor what leaves
    labels, y_labels, block = _labels(side, numbers, len(x.shape), weight.ndim)
    is_split = compat.is_partitioned(x) or compat.is_partitioned(witness(weight.base))
    thin, thin_labels, wanted = (x, labels, y_labels) if is_split else _as_rows(ctx, x, labels, y_labels, block)
    if cuts := weight.cuts():
        if compat.explicit_mesh(x):
            return NotImplemented
        thin = lax.reshape(thin, sizes_in_parts(thin_labels, thin.shape, cuts))
        thin_labels, wanted = in_parts(thin_labels, cuts), in_parts(wanted, cuts)
    dtype = compute_dtype(weight, x)
    base, *gains = weight.terms[0].factors
    terms = weight.terms[1:]
    keys = [ctx.key_here(t.source) if t.dropout else None for t in terms]
    params = tuple({**eqn.params, "dimension_numbers": numbers}.items())
    plan = _Plan(eqn.primitive, params, side, labels, y_labels, thin_labels, wanted, dtype)
    outputs = acting(weight, free)
    return [adapted_dot(base.array, x, thin, gains, terms, keys, weight.gains, outputs, plan=plan)]


def acting(weight: Weight, free: Sequence[int]) -> list[Output]:
    """Return the outputs that are about the axes that a use leaves free."""
    return [o for o in weight.outputs if o.over == _origins(weight, free)]


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
    base: Any,
    x: Any,
    thin: Any,
    base_gains: Sequence[Factor],
    terms: Sequence[Term],
    keys: Sequence[Any],
    gains: Sequence[Factor],
    outputs: Sequence[Output],
    *,
    plan: _Plan,
) -> Any:
    """Return the base product, scaled by its gains, plus the thin products with the other terms, scaled by the gains.

    A function of its own in the program, because a model has few different ones: each is traced, differentiated and
    lowered once, whatever the number of layers.
    """
    params = dict(plan.params)
    contracted = frozenset(params["dimension_numbers"][0][plan.side])
    parts = frozenset(a for a in plan.thin_labels if isinstance(a, Part) and a.axis in contracted)
    precision = params["precision"]
    if isinstance(precision, tuple) and plan.side == 0:
        precision = precision[::-1]
    entered = x

    def scaled(x: Any, labels: tuple[Any, ...], factors: Sequence[Factor]) -> Any:  # along contracted axes
        inner = [_cast(f, plan.dtype) for f in factors if not contracted.isdisjoint(f.axes)]
        return cast(absorb(cast(x, plan.dtype), labels, inner, ())[0], x.dtype) if inner else x

    x, thin = scaled(x, plan.x_labels, (*base_gains, *gains)), scaled(thin, plan.thin_labels, gains)
    y = base_product(plan.primitive, params, base, x, plan.side)
    typeof_y = jax.typeof(y)
    specs = axis_specs((y, plan.y_labels), (x, plan.x_labels))
    if specs is not None:  # an axis is split as it is on the activation, the output or the base
        specs = {**dict(enumerate(jax.eval_shape(force, base).sharding.spec)), **specs}
    kept = lambda z: cast(z, typeof_y.dtype) if specs is None else jax.sharding.reshard(z, typeof_y.sharding)
    outer = [_cast(f, y.dtype) for f in base_gains if contracted.isdisjoint(f.axes)]
    if outer:
        z, z_axes = absorb(y, plan.y_labels, outer, (), specs=specs)
        y = kept(arrange(z, z_axes, plan.y_labels, y.shape))
    thin = cast(thin, plan.dtype)
    for term, key in zip(terms, keys, strict=True):
        factors = [_cast(f, plan.dtype) for f in term.factors]
        entering = _dropped(thin, term, key)
        z, z_axes = absorb(entering, plan.thin_labels, factors, contracted | parts, precision=precision, specs=specs)
        if z_axes != plan.wanted:
            sizes = {**dict(enumerate(base.shape)), **{a: a.size for a in plan.wanted if isinstance(a, Part)}}
            sizes.update(zip(z_axes, z.shape, strict=True))
            z = arrange(z, z_axes, plan.wanted, [sizes[a] for a in plan.wanted])
        y = lax.add(y, kept(cast(lax.reshape(z, y.shape), y.dtype)))
    for gain in gains:
        if contracted.isdisjoint(gain.axes):
            gain = Factor(laid_out(gain.array, gain.axes, specs), gain.axes)
            y = kept(rescale(y, along(gain, plan.y_labels, y.shape)))
    return apply_outputs(outputs, y, plan.y_labels, entered, plan.x_labels)


def along(gain: Factor, labels: Sequence[Any], shape: Sequence[int]) -> Any:
    """Return a gain's array with an axis for each label, of size one where it does not vary."""
    sizes = [n if a in gain.axes else 1 for a, n in zip(labels, shape, strict=True)]
    return arrange(gain.array, gain.axes, labels, sizes)


def base_product(primitive: Any, params: dict[str, Any], base: Any, x: Any, side: int) -> Any:
    """Bind the product with the base; a quantised one is dequantised for it, and again in the backward pass."""

    def product(base: Any, x: Any) -> Any:
        base = force(base)
        return primitive.bind(*((base, x) if side == 0 else (x, base)), **params)

    return jax.checkpoint(product)(base, x) if isinstance(base, Deferred) else product(base, x)


@jax.custom_jvp
def rescale(y: Any, gain: Any) -> Any:
    """Multiply by a gain that is nowhere zero, with axes of size one where it does not vary.

    The derivative with respect to the gain is written as a product of matrices, whose transpose is the contraction
    `Σ ct∘y`: of an elementwise product and a sum, XLA keeps a further copy of the output from the forward pass on (a
    quarter more temporary memory of a decoder's step). In a scan `residuals` sees to what is kept.
    """
    return cast(cast(y, promoted(y.dtype, gain.dtype)) * gain, y.dtype)


@rescale.defjvp
def _rescale_jvp(primals: Any, tangents: Any) -> Any:
    (y, gain), (dy, dgain) = primals, tangents
    y = residuals.kept(y)
    wide = promoted(y.dtype, gain.dtype)
    change = _by_columns(cast(y, wide), cast(dgain, wide))
    return rescale(y, gain), cast(cast(dy, wide) * gain + change, y.dtype)


def _by_columns(y: Any, gain: Any) -> Any:
    """`y · gain` as a product of rows with a column each, if the gain varies along the last axes and no others."""
    first = next((i for i, n in enumerate(gain.shape) if n > 1), gain.ndim)
    if not first or gain.shape[first:] != y.shape[first:] or first == gain.ndim or compat.is_partitioned(y):
        return y * gain
    columns = math.prod(y.shape[first:])
    rows = lax.reshape(y, (y.size // columns, columns))
    product = lax.dot_general(rows, lax.reshape(gain, (columns,)), (([], []), ([1], [0])))
    return lax.reshape(lax.transpose(product, (1, 0)), y.shape)


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


RULES[compat.dot_general_p] = dot_general

CUT = {compat.dot_general_p}  # an activation is cut along with the weight
