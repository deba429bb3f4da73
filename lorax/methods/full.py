"""Full fine-tuning of a leaf: BitFit, norm tuning, a trained head are specs of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorax.interpret.weight import Expression
from lorax.methods.base import Arrays, Method, base_values, register
from lorax.methods.settings import check
from lorax.paths import is_quantized
from lorax.sites import Site


@register
class Full(Method):
    """The leaf itself is trained; it starts at the base's value.

    BitFit is `Spec({r".*/bias": Full()})`, norm tuning `Spec({r".*norm.*/scale": Full()})`.

    Attributes:
      dtype: dtype of the trained copy; None keeps the base's.
    """

    dtype: Any = None

    arrays = {"value": "W"}
    is_invertible = False

    def __post_init__(self) -> None:
        check(self)

    def refuses(self, site: Site) -> str | None:
        """Refuse integers, booleans and PRNG keys, which have no gradient."""
        return None if site.is_floating else f"{site.dtype} is not floating point"

    def init(self, key: jax.Array, site: Site, base: Any) -> tuple[Arrays, Arrays]:
        """Copy the base; of abstract params only the shape counts, so that they are for `jax.eval_shape` alone."""
        base = base_values(site, base)
        value = base.dequantize() if is_quantized(base) else base
        return {"value": jnp.array(value, dtype=self.dtype or base.dtype)}, {}

    def weight(self, w: Expression, *, value: Expression) -> Expression:
        """The trained copy."""
        return value
