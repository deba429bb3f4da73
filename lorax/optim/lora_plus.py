"""LoRA+: a higher learning rate for `B` than for `A`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from lorax.adapter import Adapter

OUTPUT_FACTORS = ("b", "bias")


def lora_plus(
    adapter: Adapter,
    learning_rate: optax.ScalarOrSchedule,
    *,
    ratio: float = 16.0,
    embedding_learning_rate: optax.ScalarOrSchedule | None = None,
    base: Callable[..., optax.GradientTransformation] = optax.adamw,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """Train `B` at `λ` times the learning rate of `A`: `η_B = λ·η_A`, LoRA+, Hayou et al. 2024 (arXiv:2402.12354).

    Each group of arrays has an optimiser `base` of its own. AdamW's decay is decoupled: a step shrinks an entry by its
    group's rate times `weight_decay`. What `base` does to a gradient as a whole, such as clipping its norm, would be
    done to each group by itself: put it in front, `optax.chain(optax.clip_by_global_norm(1.0), lora_plus(...))`.

    Args:
      adapter: the adapter to be trained; only its sites and the names of its arrays count.
      learning_rate: `η_A`, a number or a schedule over steps, of all arrays not named below.
      ratio: `λ`, at least 1: every `b`, and the `bias` that belongs to it, has the rate `ratio * learning_rate`.
      embedding_learning_rate: a number or a schedule, of all arrays of embeddings, whose factors have each other's
        roles (`A` starts at zero there); None is `learning_rate`. PEFT's default is 1e-6.
      base: makes an optimiser of a learning rate, such as `optax.adamw`.
      **settings: further arguments of `base`, such as `weight_decay=0.01`.

    Returns:
      A transformation of gradients shaped like `adapter.params`.

    Raises:
      ValueError: the ratio is below 1.

    >>> import jax, jax.numpy as jnp, lorax
    >>> fn = lambda params, x: x @ params["kernel"]
    >>> params, x = {"kernel": jnp.eye(4)}, jnp.ones((2, 4))
    >>> spec = lorax.Spec({"kernel": lorax.LoRA(rank=2)})
    >>> adapter = lorax.init(jax.random.key(0), spec, lorax.trace(fn, params, x), params)
    >>> tx = lora_plus(adapter, 0.5, ratio=4, base=optax.sgd)
    >>> ones = jax.tree.map(jnp.ones_like, adapter.params)
    >>> updates, _ = tx.update(ones, tx.init(adapter.params), adapter.params)
    >>> {name: float(x.mean()) for name, x in updates["kernel"].items()}
    {'a': -0.5, 'b': -2.0}
    """
    if not ratio >= 1:
        raise ValueError(f"lora_plus: ratio is {ratio!r}; B learns faster than A, so it has to be at least 1")
    rates = {
        "plain": learning_rate,
        "output": _scaled(learning_rate, ratio),
        "embedding": learning_rate if embedding_learning_rate is None else embedding_learning_rate,
    }
    return optax.partition({group: base(rate, **settings) for group, rate in rates.items()}, lora_plus_groups(adapter))


def lora_plus_groups(adapter: Adapter) -> Any:
    """Return the group of every trained array, shaped like `adapter.params`: `plain`, `output` or `embedding`."""
    group = lambda site, name: "output" if name in OUTPUT_FACTORS else "plain"
    return {
        site.path: {
            name: "embedding" if site.kind == "embedding" else group(site, name) for name in adapter.params[site.path]
        }
        for site, _ in adapter.plan.entries
    }


def _scaled(rate: optax.ScalarOrSchedule, ratio: float) -> optax.ScalarOrSchedule:
    return (lambda step: ratio * rate(step)) if callable(rate) else ratio * rate
