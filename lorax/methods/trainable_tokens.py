"""Trained rows of a table: a few tokens of an embedding, often new ones."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorax import paths
from lorax.interpret.weight import Expression
from lorax.methods.base import Arrays, Method, base_values, register
from lorax.methods.settings import check
from lorax.sites import Site


@register
class TrainableTokens(Method):
    """The rows of some tokens are trained, and all others frozen: `W' = W + onehot·(value − W[tokens])`.

    PEFT's `trainable_token_indices`. `value` holds the rows themselves and not differences, so that an adapter gives
    new tokens the same vectors on a table whose new rows were drawn anew. Of a tied table both uses have the new rows.
    It costs `rows × len(tokens)` numbers where the table is looked up.

    Attributes:
      tokens: the trained rows; `value[i]` is row `tokens[i]`.
      dtype: dtype of the trained rows; None keeps the base's.
    """

    tokens: tuple[int, ...] = ()
    dtype: Any = None

    # V the table's rows, L the axes of one row, T the trained rows
    arrays = {"value": "STL", "delta": "STL", "onehot": "VT"}
    is_invertible = False

    def __post_init__(self) -> None:
        check(self)
        tokens = tuple(self.tokens)
        if not tokens or len(set(tokens)) != len(tokens) or any(not isinstance(t, int) or t < 0 for t in tokens):
            raise ValueError(
                f"TrainableTokens: tokens is {self.tokens!r}; it has to be row numbers, such as (3, 7), each once"
            )
        object.__setattr__(self, "tokens", tokens)

    def refuses(self, site: Site) -> str | None:
        """Refuse what is no table, and tables with fewer rows."""
        if not site.is_floating:
            return f"{site.dtype} is not floating point"
        if not site.axes("V"):
            return "no row of it is looked up"
        if max(self.tokens) >= site.size("V"):
            return f"it has {site.size('V')} rows and the last token is {max(self.tokens)}"
        return None

    def init(self, key: jax.Array, site: Site, base: Any) -> tuple[Arrays, Arrays]:
        """Copy the base's rows; abstract params are for `jax.eval_shape` alone."""
        return {"value": self._rows(site, base_values(site, base)).astype(self.dtype or site.dtype)}, {}

    def derive(self, site: Site, base: Any, arrays: Any) -> Arrays:
        """Return what is added to the table: the rows' differences, and where they belong."""
        value = arrays["value"]
        onehot = jax.nn.one_hot(jnp.asarray(self.tokens), site.size("V"), axis=0, dtype=value.dtype)
        return {"delta": value - self._rows(site, base).astype(value.dtype), "onehot": onehot}

    def weight(self, w: Expression, *, value: Expression, delta: Expression, onehot: Expression) -> Expression:
        """The table with the trained rows in place of its own."""
        return w + onehot @ delta

    def _rows(self, site: Site, base: Any) -> jax.Array:
        """Return the base's rows of the tokens, axes `STL`."""
        base = base.dequantize() if paths.is_quantized(base) else base
        table = jnp.moveaxis(base, site.axes("SVL"), range(len(site.shape)))
        return jnp.take(table, jnp.asarray(self.tokens), axis=len(site.stack))
