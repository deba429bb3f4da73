"""LoRA and rsLoRA: `W + s·A·B`, with `s = α/r` or `α/√r`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorax.interpret.weight import Expression
from lorax.methods.base import Arrays, register
from lorax.methods.lowrank import LowRank
from lorax.sites import Site


@register
class LoRA(LowRank):
    """Low-rank adaptation, Hu et al. 2021 (arXiv:2106.09685, section 4.1): `h = x·W + s·(x·A)·B`.

    `B` starts at zero; of an embedding `A` does, and `B` is standard normal (as in PEFT).

    Attributes:
      rank: width of the product, at least 1.
      alpha: numerator of the scaling; None means `rank`, which makes the scaling 1 (√rank if rank-stabilised).
      rank_stabilized: scale by `alpha/√rank` (Kalajdzievski 2023, arXiv:2312.03732) and not by `alpha/rank`.
      dropout: probability of dropping an entry of `x` on its way into `A`, when `adapted` is given an `rng`. An
        embedding's lookup, and a weight that has to be built, have none.
      dtype: dtype of the factors; products are computed in the dtype that the function casts its weight to.
      initializer: how the factors start, see `lorax.methods.initializers`.
      bias: also train a bias on `B`, so that `s·bias` is added to the output (PEFT's `lora_bias`); such an adapter has
        no merged weight.
    """

    bias: bool = False

    arrays = {"a": "SIR", "b": "SRO", "scale": "S", "a0": "SIR", "b0": "SRO", "bias": "SO", "shift": "SO"}
    sizes = ("rank",)
    output_arrays = ("shift",)

    @property
    def is_mergeable(self) -> bool:
        """Whether there is no bias."""
        return not self.bias

    def refuses(self, site: Site) -> str | None:
        """Refuse a bias on rows of several groups, besides what nothing can adapt."""
        if self.bias and site.kind == "grouped":
            return "the rows of a ragged product belong to several experts, and a bias to one"
        return super().refuses(site)

    def init(self, key: jax.Array, site: Site, base: Any) -> tuple[Arrays, Arrays]:
        """Draw the factors."""
        trained, fixed = self.factors(key, site, base)
        bias = {"bias": jnp.zeros(site.dims("SO"), self.dtype)} if self.bias else {}
        return {**trained, **bias}, fixed

    @property
    def derives(self) -> bool:
        """Whether there is a bias."""
        return self.bias

    def derive(self, site: Site, base: Any, arrays: Mapping[str, Any]) -> Arrays:
        """Return what a bias adds to the output."""
        scale = arrays["scale"]
        return {"shift": arrays["bias"] * scale.reshape(scale.shape + (1,) * (arrays["bias"].ndim - scale.ndim))}

    def weight(
        self,
        w: Expression,
        *,
        a: Expression,
        b: Expression,
        scale: Expression,
        a0: Expression | None = None,
        b0: Expression | None = None,
        bias: Expression | None = None,
    ) -> Expression:
        """`W + s·A·B`, less the initial product where there is one."""
        return w + self.update(a, b, scale, a0, b0)

    def output(self, y: Any, x: Any, *, shift: Any) -> Any:
        """`y + s·bias`."""
        return y + shift
