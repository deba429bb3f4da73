"""AdamW with a warm-up, a cosine and clipping, from the settings of a run."""

import optax
from ml_collections import config_dict


def schedule(train: config_dict.ConfigDict) -> optax.Schedule:
    """Return the learning rate over the updates done: up from 0, then down along half a cosine."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if train.warmup_steps else train.learning_rate,
        peak_value=train.learning_rate,
        warmup_steps=train.warmup_steps,
        decay_steps=train.steps,
        end_value=train.final_learning_rate,
    )


def optimiser(train: config_dict.ConfigDict) -> optax.GradientTransformation:
    """Return the optimiser of the trainable parameters.

    The gradient's global norm is clipped to `clip_norm` first. Decay acts on the factors: on the adapter's
    weights, not on the base.
    """
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.adamw(schedule(train), b1=train.beta1, b2=train.beta2, weight_decay=train.weight_decay),
    )
