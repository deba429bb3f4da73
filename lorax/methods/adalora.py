"""AdaLoRA: `W + s·(A∘e)·B`, a product with a weight for each of its triplets, of which a budget keeps the best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorax import compat
from lorax.interpret.weight import Expression, Weight
from lorax.methods.base import Arrays, Method, register
from lorax.methods.settings import check
from lorax.sites import Site


@register
class AdaLoRA(Method):
    """Adaptive budget allocation, Zhang et al. 2023 (arXiv:2303.10512, section 3.1): `h = x·W + s·((x·A)∘e)·B`.

    A column of `A`, its entry of `e` and its row of `B` are a triplet. Training prunes triplets to a budget that all
    sites share; a pruned one has `e = 0`, keeps its vectors, and may come back. That is the work of
    `lorax.optim.adalora`, with which AdaLoRA has to be trained: it counts its budget updates in the array `updates`,
    and an adapter whose `e` has moved while that count is zero is refused (see `leaf`).

    `e` starts at zero, `A` and `B` are normal, of embeddings too. The scaling is PEFT's, `s = alpha/(rank + 1e-5)` with
    the *initial* rank, whatever is pruned; `lora_alpha` and `init_r` there are `alpha` and `rank` here.

    Attributes:
      rank: triplets of each weight at the start, at least 1; every layer of a stack is a weight of its own.
      target_rank: triplets a weight, on average over all sites, at the end; None is `rank/1.5`, at least 1.
      alpha: numerator of the scaling; None means `rank`, which makes it 1 but for PEFT's 1e-5.
      dropout: probability of dropping an entry of `x` on its way into `A`, when `adapted` is given an `rng`.
      dtype: dtype of `A`, `e` and `B`.
      initial_std: standard deviation of `A` and `B` as they start.

    >>> AdaLoRA(rank=12).budget, AdaLoRA(rank=2).budget, AdaLoRA(rank=4, target_rank=4).budget
    (8, 1, 4)
    """

    rank: int = 12
    target_rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    dtype: Any = "float32"
    initial_std: float = 0.02

    arrays = {"a": "SIR", "e": "SR", "b": "SRO", "scale": "S", "updates": "", "mask": "SR", "budget": ""}
    sizes = ("rank",)
    starts = ("target_rank", "alpha", "initial_std")

    def __post_init__(self) -> None:
        check(self)
        if self.target_rank is not None and self.target_rank > self.rank:
            raise ValueError(
                f"AdaLoRA: target_rank is {self.target_rank}; it can be the rank, {self.rank}, at most, since a budget "
                "only shrinks"
            )
        if not self.initial_std > 0:
            raise ValueError(f"AdaLoRA: initial_std is {self.initial_std!r}; with A = B = 0 nothing would ever train")

    @property
    def scaling(self) -> float:
        """The factor `s` in front of `(A∘e)·B`, as in PEFT."""
        return (self.rank if self.alpha is None else self.alpha) / (self.rank + 1e-5)

    @property
    def budget(self) -> int:
        """Triplets a weight at the end of training, on average over all sites."""
        return max(1, round(self.rank / 1.5)) if self.target_rank is None else self.target_rank

    def init(self, key: jax.Array, site: Site, base: Any) -> tuple[Arrays, Arrays]:
        """Draw `A` and `B`; `e` and the count of budget updates are zero."""
        key_a, key_b = jax.random.split(key)
        draw = lambda k, dims: self.initial_std * jax.random.normal(k, site.dims(dims, R=self.rank))
        trained = {
            "a": draw(key_a, "SIR").astype(self.dtype),
            "e": jnp.zeros(site.dims("SR", R=self.rank), self.dtype),
            "b": draw(key_b, "SRO").astype(self.dtype),
            "updates": jnp.zeros((), jnp.float32),
        }
        return trained, {"scale": jnp.asarray(self.scaling, jnp.float32)}

    def leaf(self, site: Site, base: Any, arrays: Mapping[str, Any]) -> Weight:
        """Return a leaf's adapted weight, unless an optimiser without the budget update has trained it.

        Such an optimiser moves `e` and leaves `updates` at zero: nothing would ever be pruned, and nothing would look
        wrong. Where the values are traced, as under `jit` or `grad`, `e` becomes NaN, and with it the loss.

        Raises:
          ValueError: `e` is not zero and `updates` is, in an adapter whose values are known; or as in `Method.leaf`.
        """
        is_sound = (arrays["updates"] != 0) | jnp.all(arrays["e"] == 0)
        if compat.is_traced(is_sound):
            return super().leaf(site, base, {**arrays, "e": jnp.where(is_sound, arrays["e"], jnp.nan)})
        if not is_sound:
            raise ValueError(
                f"{site.path}: the adapter's 'e' is not zero, and its 'updates' is: it was trained without a budget "
                "update. Train AdaLoRA with lorax.optim.adalora(inner, adapter, total_steps=...), which makes them. "
                "For an 'e' that comes from elsewhere, set 'updates' to 1"
            )
        return super().leaf(site, base, arrays)

    def carried(self, site: Site, common: Method) -> Arrays:
        """Return which of the stack's triplets are the member's, which the regulariser counts, and their budget."""
        mask = jnp.ones(site.dims("SR", R=self.rank), bool)
        return {**super().carried(site, common), "mask": mask, "budget": jnp.asarray(self.budget, jnp.int32)}

    def weight(
        self, w: Expression, *, a: Expression, e: Expression, b: Expression, scale: Expression, **others: Expression
    ) -> Expression:
        """`W + s·(A∘e)·B`."""
        # `e` comes before both factors: whichever of them an activation meets first, it meets the other one last.
        return w + (e * scale * a @ b).with_dropout(self.dropout)
