"""Products of labelled arrays: an activation with one array after another, and a weight without an activation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax import compat
from lorax.interpret.deferred import Deferred
from lorax.interpret.weight import Factor, Label, Part, Weight, cast, in_parts, promoted, rebuild, sizes_in_parts


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
    accumulate: Any = None,
) -> tuple[Any, tuple[Label, ...]]:
    """Contract an activation with a product of factors, one after another.

    Args:
      x: the activation.
      x_axes: its labels.
      factors: the factors, of its dtype.
      contracted: the weight axes to sum over.
      precision: of the products.
      specs: the mesh axes of each label, where sharding is explicit in types.
      accumulate: dtype of the products; None is that of the activation.

    Returns:
      The product and its labels.
    """
    x_axes = tuple(x_axes)
    steps, rest = contraction(x_axes, tuple(f.axes for f in factors), frozenset(contracted))
    for step in steps:
        f, x_axes = factors[step.factor], step.out_axes
        array = f.array if specs is None else laid_out(f.array, f.axes, specs)
        if step.scale is not None:
            inner, missing = step.scale
            if f.axes:
                array = lax.expand_dims(lax.transpose(array, inner), missing)
            x = lax.mul(x, cast(array, x.dtype))
        else:
            sharding = None if specs is None else _sharding(specs, x_axes)
            x = lax.dot_general(
                x,
                array,
                step.dims,
                precision=precision,
                preferred_element_type=accumulate or x.dtype,
                out_sharding=sharding,
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
    weight = weight.settled()
    if isinstance(weight.base, Deferred):
        weight = rebuild(weight, weight.base.force(), weight.partial_factors())
    if len(weight.terms) == 1 and len(weight.terms[0].factors) == 1 and not weight.gains:
        return weight.base
    whole = tuple(range(weight.ndim))
    base_specs = axis_specs((weight.base, whole))
    total = None
    for term in weight.terms:
        cuts = weight.cuts() if any(isinstance(a, Part) for f in term.factors for a in f.axes) else {}
        wanted = in_parts(whole, cuts)
        shape = [a.size if isinstance(a, Part) else weight.shape[a] for a in wanted]
        # An axis that is split over devices cannot be reshaped: what has parts is put together first.
        specs = {"mesh": base_specs["mesh"]} if base_specs and cuts else base_specs
        first = max(term.factors, key=lambda f: len(f.axes))
        rest = sorted((f for f in term.factors if f is not first), key=lambda f: len(f.axes))  # scalars first
        dtype = promoted(*(f.array.dtype for f in term.factors))
        start = cast(first.array if specs is None else laid_out(first.array, first.axes, specs), dtype)
        rest = [Factor(cast(f.array, dtype), f.axes) for f in rest]
        x, x_axes = absorb(start, first.axes, rest, (), precision=lax.Precision.HIGHEST, specs=specs)
        x_axes, x = in_parts(x_axes, cuts), lax.reshape(x, sizes_in_parts(x_axes, x.shape, cuts)) if cuts else x
        x = arrange(x, x_axes, wanted, shape)
        x = laid_out(lax.reshape(x, weight.shape), whole, base_specs) if cuts else x
        total = x if total is None else total + x
    assert total is not None
    for gain in weight.gains:
        total = total * arrange(gain.array, gain.axes, range(weight.ndim), weight.shape)
    return cast(total, weight.dtype)


def axis_specs(*arrays: tuple[Any, Sequence[Label]]) -> dict[Label, Any] | None:
    """Return the mesh and what it splits each label over, by the arrays' types; None where those do not say."""
    if compat.explicit_mesh(arrays[0][0]) is None:
        return None
    specs: dict[Label, Any] = {}
    for array, axes in arrays:
        typeof = jax.typeof(array)
        specs |= {"mesh": typeof.sharding.mesh, **dict(zip(axes, typeof.sharding.spec, strict=True))}
    return specs


def _sharding(specs: dict[Label, Any], axes: Sequence[Label]) -> Any:
    used: set[str] = set()
    entries = []
    for a in axes:  # a mesh axis can split one axis of an array only
        entry = specs.get(a)
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        entries.append(None if used & set(names) else entry)
        used |= set(names)
    return jax.sharding.NamedSharding(specs["mesh"], jax.P(*entries))


def laid_out(array: Any, axes: Sequence[Label], specs: dict[Label, Any] | None) -> Any:
    """Return an array split over the mesh as its labels are, where sharding is explicit in types."""
    if specs is None or not axes:
        return array
    axes = [a if n != 1 else "one" for a, n in zip(axes, jnp.shape(array), strict=True)]
    return jax.sharding.reshard(array, _sharding(specs, axes))
