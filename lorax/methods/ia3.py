"""(IA)³: a learned gain on every output, or every input, of a weight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorax.interpret.weight import Expression
from lorax.methods.base import Arrays, Method, register
from lorax.methods.settings import check
from lorax.sites import Site


@register
class IA3(Method):
    """Infused adapter by inhibiting and amplifying inner activations, Liu et al. 2022 (arXiv:2205.05638, section 3.3).

    `W' = W · diag(l)`, with `l` starting at one. The paper has gains on keys, values and the activation inside the
    feed-forward: `IA3()` on the key and value weights, `IA3(on="input")` on the second feed-forward weight.

    Attributes:
      on: `output` (gain an output unit) or `input` (gain an input unit, as PEFT's `feedforward_modules`).
      dtype: dtype of the gains.
    """

    on: str = "output"
    dtype: Any = "float32"

    arrays = {"gain": "SO", "input_gain": "SI"}

    def __post_init__(self) -> None:
        check(self)
        if self.on not in ("output", "input"):
            raise ValueError(f"IA3: on is {self.on!r}; it has to be 'output' or 'input'")

    def init(self, key: jax.Array, site: Site, base: Any) -> tuple[Arrays, Arrays]:
        """Ones."""
        name = "gain" if self.on == "output" else "input_gain"
        return {name: jnp.ones(site.dims(self.arrays[name]), self.dtype)}, {}

    def weight(
        self, w: Expression, *, gain: Expression | None = None, input_gain: Expression | None = None
    ) -> Expression:
        """`W · diag(l)`, or `diag(l) · W`."""
        (scaling,) = [g for g in (gain, input_gain) if g is not None]
        return w * scaling
