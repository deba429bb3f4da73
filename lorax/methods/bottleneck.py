"""Bottleneck adapters: a small network with a residual connection at a weight's output."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorax.methods.base import Arrays, Method, register
from lorax.methods.settings import check
from lorax.sites import Site

ACTIVATIONS = {"gelu": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu, "tanh": jnp.tanh}


@register
class Bottleneck(Method):
    """Bottleneck adapter, Houlsby et al. 2019 (arXiv:1902.00751, section 2.1): `y + φ(y·D + d)·U + u`.

    `y` is the output of the adapted weight's product, before the function adds a bias. `U` and `u` start at zero, so
    that nothing changes. Houlsby's placement is a spec of the attention's output weights and of the feed-forward's
    second weights, that of Pfeiffer et al. 2021 (arXiv:2005.00247) of the latter alone.

    It is no change of the weight: there is nothing to merge, and a weight that is not used in a product as it is
    (joined to others, normalised, cut into parts along its output) cannot be adapted so.

    Attributes:
      rank: width of the bottleneck.
      activation: `gelu`, `relu`, `silu` or `tanh`.
      dtype: dtype of the arrays; computed in the dtype of `y`.
    """

    rank: int = 64
    activation: str = "gelu"
    dtype: Any = "float32"

    arrays = {"down": "SOR", "down_bias": "SR", "up": "SRO", "up_bias": "SO"}
    output_arrays = ("down", "down_bias", "up", "up_bias")
    sizes = ("rank",)
    is_invertible = False

    def __post_init__(self) -> None:
        check(self)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"Bottleneck: activation is {self.activation!r}; known are {', '.join(ACTIVATIONS)}")

    def refuses(self, site: Site) -> str | None:
        """Refuse rows of several groups besides what nothing can adapt."""
        if site.kind == "grouped":
            return "the rows of a ragged product belong to several experts"
        return super().refuses(site)

    def init(self, key: jax.Array, site: Site, base: Any) -> tuple[Arrays, Arrays]:
        """Draw the way down; the way up is zero."""
        down = jax.random.normal(key, site.dims("SOR", R=self.rank), self.dtype) / site.size("O") ** 0.5
        zeros = {n: jnp.zeros(site.dims(self.arrays[n], R=self.rank), self.dtype) for n in self.output_arrays[1:]}
        return {"down": down, **zeros}, {}

    def output(self, y: Any, x: Any, *, down: Any, down_bias: Any, up: Any, up_bias: Any) -> Any:
        """`y + φ(y·D + d)·U + u`."""
        hidden = (y @ down + down_bias).map(ACTIVATIONS[self.activation])
        return y + (hidden @ up + up_bias)
