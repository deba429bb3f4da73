"""What a scan over rescaled weights keeps for its backward pass.

The gradient of a gain (DoRA's magnitude) is the sum of cotangent times product, so that the product before the gain has
to be kept. What JAX keeps of the model as it is, is mostly made of such products by elementwise operations: a rotated
query, a sum with the residual stream. Kept instead, the products cost nothing, and what follows elementwise from them,
or from the scan's inputs, is computed again in the backward pass; all else is kept as JAX would. Outside of a scan XLA
finds this by itself; a scan's residuals are arrays that it cannot compute again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxprs_in_params

from lorax import compat
from lorax.interpret.weight import Weight

_ARITHMETIC = (
    "abs add add_any ceil clamp complex conj convert_element_type div floor imag integer_pow max min mul neg "
    "one_minus_square real reduce_precision rem round select_n sign square stop_gradient sub"
)
_LAYOUT = "broadcast_in_dim concatenate copy iota pad reshape rev slice split squeeze stack tile transpose unstack"
# With what is done to indices and packed codes, so that a base that is dequantised for a product is not kept either.
_LOOKUPS = (
    "and bitcast_convert_type dynamic_slice gather not or shift_left shift_right_arithmetic shift_right_logical xor"
)
_COMPUTED_AGAIN = frozenset(f"{_ARITHMETIC} {_LAYOUT} {_LOOKUPS}".split())
_COMPARISONS = frozenset(("eq", "ne", "lt", "le", "gt", "ge"))
_CALLS = (compat.jit_p, compat.closed_call_p, compat.custom_jvp_call_p)


_NAME = "lorax_kept"
_ROUNDED = ("bfloat16", "float16", "float32", "float64")  # the inexact dtypes of which `jax.checkpoint` keeps residuals


def kept(x: Any) -> Any:
    """Mark an array that is kept if the backward pass reads it."""
    return checkpoint_name(x, _NAME)


class Followed:
    """The arrays of a scan's body that follow, by what is computed again, from a rescaled product or an input alone.

    A scan keeps its inputs as they are.
    """

    def __init__(self, inputs: Sequence[Any]) -> None:
        self._arrays = {id(x): x for x in inputs}  # held, so that an id stays its own

    def mark(self, eqn: Any, values: Sequence[Any], outs: Sequence[Any]) -> Sequence[Any]:
        """Return an equation's outputs, those marked that are to be kept.

        Args:
          eqn: the equation.
          values: its operands, weights or arrays.
          outs: its outputs, likewise.
        """
        weights = [x for x in values if isinstance(x, Weight)]
        is_dear = not weights and _is_kept(eqn)  # and so kept without a mark
        is_cheap = not weights and not is_dear
        if any(w.gains for w in weights) or (is_cheap and any(id(x) in self._arrays for x in values)):
            self._arrays.update((id(x), x) for x in outs if not isinstance(x, Weight))
        elif not is_dear:
            is_float = lambda x: not isinstance(x, Weight) and jnp.issubdtype(jnp.result_type(x), jnp.floating)
            return [kept(x) if is_float(x) else x for x in outs]
        return outs


def keeps(primitive: Any, *avals: Any, **params: Any) -> bool:
    """Policy of `jax.checkpoint`: keep what is marked, and all but what a few elementwise operations make of it.

    Comparisons of floats are kept: of one byte an element, they are where dropout ends.
    """
    if primitive is compat.name_p:
        return params["name"] == _NAME
    if primitive in _CALLS:
        return any(_is_kept(e) for body in jaxprs_in_params(params) for e in body.eqns)
    if primitive.name in _COMPARISONS:
        return jnp.issubdtype(avals[0].dtype, jnp.floating)
    return primitive.name not in _COMPUTED_AGAIN


def _is_kept(eqn: Any) -> bool:
    return keeps(eqn.primitive, *(v.aval for v in eqn.invars), **eqn.params)


def is_left_to_us(jaxpr: Any) -> bool:
    """Whether a scan's body does not say what it keeps, by a `jax.checkpoint`, and can be computed again.

    That it cannot be with effects, which run once, nor with complex numbers, which JAX then fails to round.
    """
    inner, _ = compat.open_jaxpr(jaxpr)
    effects = [e for e in inner.effects if type(e).__name__ != "NamedAxisEffect"]  # of collectives: no effect at all
    return not effects and not _is_settled(inner)


def _is_settled(jaxpr: Any) -> bool:
    found = (v.aval for v in (*jaxpr.invars, *jaxpr.constvars, *(v for e in jaxpr.eqns for v in e.outvars)))
    dtypes = {aval.dtype for aval in found if hasattr(aval, "dtype")}
    if any(jnp.issubdtype(d, jnp.inexact) and d not in _ROUNDED for d in dtypes):
        return True
    return any(e.primitive is compat.remat_p or any(map(_is_settled, jaxprs_in_params(e.params))) for e in jaxpr.eqns)
