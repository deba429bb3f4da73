"""AdamW with a warm-up, a cosine and clipping, from the settings of a run, and what some methods need instead."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import config_dict

import lorax


class Rates(NamedTuple):
    """What an optimiser takes besides the settings that all runs of a program share: numbers, or traced ones."""

    learning_rate: optax.ScalarOrSchedule
    weight_decay: Any


def rates(train: config_dict.ConfigDict) -> Rates:
    """Return the rates of a run."""
    return Rates(schedule(train), train.weight_decay)


def schedule(train: config_dict.ConfigDict) -> optax.Schedule:
    """Return the learning rate over the updates done: up from 0, then down along half a cosine."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if train.warmup_steps else train.learning_rate,
        peak_value=train.learning_rate,
        warmup_steps=train.warmup_steps,
        decay_steps=train.steps,
        end_value=train.final_learning_rate,
    )


def adamw(config: config_dict.ConfigDict, adapter: lorax.Adapter, rates: Rates) -> optax.GradientTransformation:
    """Return the optimiser of the trainable parameters.

    The gradient's global norm is clipped to `clip_norm` first. Decay acts on the factors: on the adapter's
    weights, not on the base.
    """
    train = config.train
    moved = optax.adamw(rates.learning_rate, weight_decay=rates.weight_decay, b1=train.beta1, b2=train.beta2)
    return optax.chain(optax.clip_by_global_norm(train.clip_norm), moved)


def lora_plus(config: config_dict.ConfigDict, adapter: lorax.Adapter, rates: Rates) -> optax.GradientTransformation:
    """Return the same with `lora_plus.ratio` times the learning rate for every `B`."""
    train = config.train
    settings = {"weight_decay": rates.weight_decay, "b1": train.beta1, "b2": train.beta2}
    moved = lorax.optim.lora_plus(adapter, rates.learning_rate, ratio=config.lora_plus.ratio, **settings)
    return optax.chain(optax.clip_by_global_norm(train.clip_norm), moved)


def adalora(config: config_dict.ConfigDict, adapter: lorax.Adapter, rates: Rates) -> optax.GradientTransformation:
    """Return `adamw` with AdaLoRA's regulariser, which is clipped too, and budget."""
    settings, steps = config.adalora, config.train.steps
    return lorax.optim.adalora(
        adamw(config, adapter, rates),
        adapter,
        total_steps=steps,
        warmup_steps=steps // 10 if settings.warmup_steps < 0 else settings.warmup_steps,
        final_steps=steps // 4 if settings.final_steps < 0 else settings.final_steps,
        interval=settings.interval,
        orthogonal_weight=settings.orthogonal_weight,
    )


def held(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Return `inner` with an argument `halted` of its update: where that is true, the state stays as it is.

    The updates are `inner`'s in any case. The choice is made here, so that `lorax.optim.offload` around it moves the
    state that was chosen.
    """
    optimiser = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, *, halted: jax.Array, **extra: Any) -> tuple[Any, Any]:
        updates, new = optimiser.update(updates, state, params, **extra)
        return updates, jax.tree.map(lambda x, old: jnp.where(halted, old, x), new, state)

    return optax.GradientTransformationExtraArgs(optimiser.init, update)
