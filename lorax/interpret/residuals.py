"""What a scan over rescaled weights keeps for its backward pass.

The gradient of a gain (DoRA's magnitude) is the sum of cotangent times product, so that the product before the gain has
to be kept. What JAX keeps of the model as it is, is mostly made of such products by elementwise operations: a rotated
query, a sum with the residual stream. Kept instead, the products cost nothing, and the rest follows from them again in
the backward pass. Outside of a scan XLA finds this by itself; a scan's residuals are arrays that it cannot compute
again.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxprs_in_params

from lorax import compat

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


def kept(y: Any) -> Any:
    """Mark a product whose gain has a gradient."""
    return checkpoint_name(y, "lorax_rescaled")


def keeps(primitive: Any, *avals: Any, **params: Any) -> bool:
    """Policy of `jax.checkpoint`: keep all but what a few elementwise operations make of what is kept.

    Comparisons of floats are kept: of one byte an element, they are where dropout ends.
    """
    if primitive in _CALLS:
        inside = (e for body in jaxprs_in_params(params) for e in body.eqns)
        return any(keeps(e.primitive, *(v.aval for v in e.invars), **e.params) for e in inside)
    if primitive.name in _COMPARISONS:
        return jnp.issubdtype(avals[0].dtype, jnp.floating)
    return primitive.name not in _COMPUTED_AGAIN


def is_left_to_us(jaxpr: Any) -> bool:
    """Whether a scan's body neither says what it keeps, by a `jax.checkpoint`, nor has effects, which run once."""
    inner, _ = compat.open_jaxpr(jaxpr)
    return not inner.effects and not _recomputes(inner)


def _recomputes(jaxpr: Any) -> bool:
    return any(e.primitive is compat.remat_p or any(map(_recomputes, jaxprs_in_params(e.params))) for e in jaxpr.eqns)
