"""The rule for convolutions: `A` as a convolution to few channels, `B` as a product over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from lorax import compat
from lorax.interpret.activation import apply_outputs
from lorax.interpret.context import Context
from lorax.interpret.contraction import absorb, arrange
from lorax.interpret.uses import acting, along, as_activation, base_product, compute_dtype, entering, record, rescale
from lorax.interpret.weight import Factor, Weight, cast


def convolution(ctx: Context, eqn: Any, operands: Sequence[Any]) -> Any:
    """`conv_general_dilated`: a convolution to `rank` channels, then a product over the rank.

    In a grouped convolution `A` is shared by the groups and `B` is each group's own.
    """
    params = eqn.params
    numbers = params["dimension_numbers"]
    x = as_activation(ctx, operands[0], numbers.lhs_spec[1:], (), eqn)
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
            record(ctx, eqn, "conv", it, spec[1:], spec[:1], (), why)
    if not (plain_x and is_kernel) or params["batch_group_count"] != 1:
        return NotImplemented
    groups = params["feature_group_count"]
    sized = {a for a in contracted if weight.shape[a] > 1}
    feature = numbers.out_spec[1]
    dtype = compute_dtype(weight, x)
    (out,) = eqn.outvars
    firsts = [next((f for f in t.factors if _convolves(f, sized, out_axis)), None) for t in weight.terms[1:]]
    rests = [[f for f in t.factors if f is not first] for t, first in zip(weight.terms[1:], firsts, strict=True)]
    if None in firsts or any(not set(contracted).isdisjoint(f.axes) for rest in rests for f in rest):
        return NotImplemented
    if any(set(f.axes) - {out_axis} for f in (*weight.terms[0].factors[1:], *weight.gains)):
        return NotImplemented

    y = base_product(eqn.primitive, eqn.primitive.get_bind_params(eqn.params), weight.base, x, 1)
    y_labels = tuple(out_axis if i == feature else ("x", i) for i in range(y.ndim))
    for f in weight.terms[0].factors[1:]:
        y = y * cast(along(f, y_labels, y.shape), y.dtype)
    for term, first, rest in zip(weight.terms[1:], firsts, rests, strict=True):
        assert first is not None
        bonds = [a for a in first.axes if isinstance(a, str)]
        channels = [jnp.shape(first.array)[first.axes.index(b)] for b in bonds]
        one = arrange(
            first.array, first.axes, [*contracted, *bonds], [*(weight.shape[a] for a in contracted), *channels]
        )
        one = lax.reshape(one, [*one.shape[: len(contracted)], math.prod(channels)])
        one = jnp.tile(one, [1] * len(contracted) + [groups]).astype(dtype)
        kernel = lax.transpose(one, [[*contracted, out_axis].index(a) for a in range(len(weight.shape))])
        h = lax.conv_general_dilated(
            entering(ctx, x.astype(dtype), term),
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
    for gain in weight.gains:
        y = rescale(y, along(gain, y_labels, y.shape))
    lhs = (*numbers.lhs_spec[:1], numbers.lhs_spec[1])
    x_labels = tuple(in_axis if i == lhs[1] else ("x", i) for i in range(x.ndim))
    return [apply_outputs(acting(weight, [out_axis]), y, y_labels, x, x_labels)]


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


RULES = {compat.conv_general_dilated_p: convolution}
