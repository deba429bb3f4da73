"""Prompt and prefix tuning: learned vectors at the first positions of a sequence."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorax.methods.base import Arrays, Method, base_values, register
from lorax.methods.settings import check
from lorax.paths import is_quantized
from lorax.sites import Site


@register
class Prompt(Method):
    """Prompt tuning, Lester et al. 2021 (arXiv:2104.08691, section 2), of an embedding table.

    The first `length` positions of what is looked up are learned vectors. The batch keeps `length` placeholder tokens
    there, of any value, which the loss ignores. A lookup of no more than `length` positions is left alone, so that a
    decoder with a cache can go on token by token.

    The vectors start at rows of the table: those of `tokens`, or as many drawn at random. With these tokens as
    placeholders (`adapter.state[path]["tokens"]`) an untrained prompt changes nothing.

    Attributes:
      length: number of positions.
      tokens: rows to start from, `length` of them; none: drawn at random.
      dtype: dtype of the vectors.
    """

    length: int = 8
    tokens: tuple[int, ...] = ()
    dtype: Any = "float32"

    arrays = {"prompt": "PL", "tokens": "P", "mask": "P"}
    output_arrays = ("prompt", "mask")
    sizes = ("length",)
    starts = ("tokens",)
    is_invertible = False
    acts_on_lookups = True

    def __post_init__(self) -> None:
        check(self)
        object.__setattr__(self, "tokens", tuple(int(t) for t in self.tokens))
        if self.tokens and len(self.tokens) != self.length:
            raise ValueError(f"Prompt: {len(self.tokens)} tokens for a length of {self.length}")

    def refuses(self, site: Site) -> str | None:
        """Refuse what no rows are looked up in."""
        if not site.is_floating or not site.axes("V"):
            return "no rows are looked up in it"
        outside = [t for t in self.tokens if not 0 <= t < site.size("V")]
        return f"it has {site.size('V')} rows and no {outside}" if outside else None

    def init(self, key: jax.Array, site: Site, base: Any) -> tuple[Arrays, Arrays]:
        """Take rows of the table."""
        base = base_values(site, base)
        table = base.dequantize() if is_quantized(base) else base
        drawn = jax.random.randint(key, (self.length,), 0, site.size("V"), jnp.int32)
        tokens = jnp.asarray(self.tokens, jnp.int32) if self.tokens else drawn
        rows = jnp.take(table, tokens, axis=site.axes("V")[0])
        rows = jnp.moveaxis(rows, site.axes("V")[0], 0)
        return {"prompt": rows.astype(self.dtype)}, {"tokens": tokens}

    def carried(self, site: Site, common: Method) -> Arrays:
        """Return which of the stack's positions are the member's."""
        return {"mask": jnp.ones(self.length, bool)}

    def output(self, y: Any, x: Any, *, prompt: Any, mask: Any = None) -> Any:
        """The looked-up rows, the first of them replaced."""
        return y.with_first_positions(prompt, mask)


@register
class Prefix(Method):
    """Prefix tuning, Li and Liang 2021 (arXiv:2101.00190, section 4), of key and value weights.

    The first `length` positions of the output are learned vectors, in every layer its own. The batch keeps `length`
    placeholder tokens there, of any value, which the loss ignores; the other tokens attend to the learned keys and
    values. Positional rotations and biases of the function act on them like on any key. An output of no more than
    `length` positions is left alone, so that a decoder with a cache can go on token by token.

    Vectors that are drawn at random change the function from the start: `lorax.prefix_from` starts them at the keys
    and values that given placeholder tokens have, and then nothing changes for a batch that begins with these.

    Attributes:
      length: number of positions.
      initial_std: standard deviation of the initial values.
      dtype: dtype of the vectors.
    """

    length: int = 8
    initial_std: float = 0.02
    dtype: Any = "float32"

    arrays = {"prefix": "SPO", "mask": "P"}
    output_arrays = ("prefix", "mask")
    sizes = ("length",)
    starts = ("initial_std",)
    is_invertible = False

    def __post_init__(self) -> None:
        check(self)

    def refuses(self, site: Site) -> str | None:
        """Refuse all but products, whose output has positions."""
        return super().refuses(site) or (
            None if site.kind == "linear" else f"the output of a use of kind {site.kind} has no positions"
        )

    def init(self, key: jax.Array, site: Site, base: Any) -> tuple[Arrays, Arrays]:
        """Draw the vectors."""
        shape = site.dims("SPO", P=self.length)
        return {"prefix": self.initial_std * jax.random.normal(key, shape, self.dtype)}, {}

    def carried(self, site: Site, common: Method) -> Arrays:
        """Return which of the stack's positions are the member's."""
        return {"mask": jnp.ones(self.length, bool)}

    def output(self, y: Any, x: Any, *, prefix: Any, mask: Any = None) -> Any:
        """The output, its first positions replaced."""
        return y.with_first_positions(prefix, mask)
