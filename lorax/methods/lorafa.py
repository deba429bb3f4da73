"""LoRA-FA: LoRA whose `A` is frozen, so that the backward pass keeps `x·A` and not `x`."""

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
class LoRAFA(LowRank):
    """LoRA with `A` frozen at its start, Zhang et al. 2023 (arXiv:2308.03303, section 3): `W + s·A·B`, `B` trained.

    The gradient of `B` needs `x·A`, which is `rank` wide, and nothing needs `x`: where the function itself does not
    keep a site's input for its backward pass, the step's memory falls by it.

    An initialiser that reads the weight (`pissa`, `olora`) freezes the directions that it finds: the update is
    `s·A·(B − B₀)`. Of an embedding `A` is standard normal and `B` zero, the reverse of LoRA's start, which would train
    nothing here.
    """

    arrays = {"a": "SIR", "b": "SRO", "scale": "S", "b0": "SRO"}
    sizes = ("rank",)

    def init(self, key: jax.Array, site: Site, base: Any) -> tuple[Arrays, Arrays]:
        """Draw the factors, of which `b` is trained."""
        trained, fixed = self.factors(key, site, base)
        a, b = trained["a"], trained["b"]
        if fixed.pop("a0", None) is None and site.kind == "embedding":
            a, b = jax.random.normal(key, a.shape, a.dtype), jnp.zeros_like(b)
        return {"b": b}, {"a": a, **fixed}

    def derive(self, site: Site, base: Any, arrays: Mapping[str, Any]) -> Arrays:
        """Return `b` less its start where the start is not zero: one thin product does for both."""
        return {"b": arrays["b"] - arrays["b0"]} if "b0" in arrays else {}

    def weight(
        self, w: Expression, *, a: Expression, b: Expression, scale: Expression, b0: Expression | None = None
    ) -> Expression:
        """`W + s·A·B`, of which `derive` has taken the start off."""
        return w + (a * scale @ b).with_dropout(self.dropout)
