"""The loss of a batch, and one jitted update of an adapter by it.

Axes: A parts of a batch, B rows, T positions of a row, K loss positions of a row, D width, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorax
from experiments.data import Batch, gather_loss_positions
from experiments.models import Model
from experiments.training.optimiser import held

LossFn = Callable[[Any, dict[str, Any]], jax.Array]
MODEL_INPUTS = ("tokens", "positions", "segment_ids", "loss_positions", "loss_targets", "loss_weights")


def summed_loss(model: Model, chunk: int = 0) -> LossFn:
    """Return `(params, batch) -> summed loss`: the cross-entropy of the answer tokens, in nats, float32.

    Logits are computed at the K loss positions of a row only: an answer is a few tokens of a long row, and
    the head is the widest product of a small model.

    Args:
        model: the decoder.
        chunk: of how many loss positions of a row there are logits at a time, forward and backward, where each is
            computed again; 0: of all.
    """

    def loss(params: Any, batch: dict[str, Any]) -> jax.Array:
        hidden_BxTxD = model.apply(
            params,
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            logits=False,
        )

        def summed(hidden_BxKxD: jax.Array, targets_BxK: jax.Array, weights_BxK: jax.Array) -> jax.Array:
            logits_BxKxV = model.unembed(params, hidden_BxKxD)
            nats_BxK = optax.softmax_cross_entropy_with_integer_labels(logits_BxKxV, targets_BxK)
            return jnp.sum(nats_BxK * weights_BxK)

        hidden_BxKxD = gather_loss_positions(hidden_BxTxD, batch["loss_positions"])
        return sum_in_chunks(summed, chunk, hidden_BxKxD, batch["loss_targets"], batch["loss_weights"])

    return loss


def sum_in_chunks(summed: Callable[..., jax.Array], size: int, *arrays_BxK: jax.Array) -> jax.Array:
    """Return `summed(*arrays_BxK)`, a chunk of `size` along the second axis at a time; size 0: all at once.

    What `summed` computes of a chunk is computed again in the backward pass, instead of being kept. The last chunk is
    filled up with zeros, of which `summed` has to be 0.
    """
    K = arrays_BxK[0].shape[1]
    if not 0 < size < K:
        return summed(*arrays_BxK)
    chunks = -(-K // size)

    def cut(x_BxK: jax.Array) -> jax.Array:
        filled = jnp.pad(x_BxK, [(0, chunks * size - K if axis == 1 else 0) for axis in range(x_BxK.ndim)])
        return jnp.moveaxis(filled.reshape(len(x_BxK), chunks, size, *x_BxK.shape[2:]), 1, 0)

    def add(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + summed(*chunk), None

    step = jax.checkpoint(add, prevent_cse=False)  # pyright: ignore[reportPrivateImportUsage]
    return jax.lax.scan(step, jnp.float32(0), tuple(map(cut, arrays_BxK)))[0]


class TrainState(NamedTuple):
    """What an update changes.

    `halted` is set by the first update whose loss or gradient is not finite. That update and all after it
    leave everything else as it is, so the state stays the last good one although the host learns of it an
    update later.
    """

    adapter: lorax.Adapter
    opt_state: optax.OptState
    halted: jax.Array


class StepOutput(NamedTuple):
    """Numbers of an update: mean loss in nats an answer token, norm of its gradient before clipping.

    `terms` are what else is told of the adapter before the update; the loss has no part of them. `is_told_to_stop`
    says whether any of the processes was.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    terms: dict[str, jax.Array]
    is_told_to_stop: jax.Array | bool = False


def train_step(
    loss: LossFn,
    optimiser: optax.GradientTransformation,
    *,
    offload: bool = False,
    terms: Callable[[lorax.Adapter], dict[str, jax.Array]] = lambda adapter: {},
    places: Any = None,
) -> Any:
    """Return the jitted update `(params, state, parts, rng, told) -> (state, output)`.

    `params` is an argument, so frozen weights are no constants of the program, and it is not differentiated;
    `state` is donated. `parts` is a batch with a leading axis A (`split_batch`): the gradients of the parts
    are added up one after the other before the one update, so the result is that of the whole batch at the
    memory of a part. `rng` draws the dropout; None turns it off. `told` has a bool a device: whether its process was
    told to stop; None where there is one process.

    Args:
        loss: of `summed_loss`.
        optimiser: of the adapter's parameters.
        offload: whether the state is that of `lorax.optim.offload(optimiser)`, in host memory.
        terms: further numbers of the adapter for the output.
        places: shardings of the state, as it is returned; None leaves them to XLA.
    """
    adapted = lorax.adapt(loss)
    transformation = held(optimiser)
    if offload:
        transformation = lorax.optim.offload(transformation)

    @functools.partial(jax.jit, donate_argnames="state", out_shardings=places and (places, None))
    def step(
        params: Any, state: TrainState, parts: dict[str, Any], rng: jax.Array | None, told: jax.Array | None = None
    ) -> tuple[TrainState, StepOutput]:
        adapter = state.adapter

        def part_loss(trainable: Any, part: dict[str, Any], part_rng: jax.Array | None) -> jax.Array:
            dropout = {} if part_rng is None else {"rng": part_rng}
            return adapted(params, adapter.replace(params=trainable), part, **dropout)

        def add_part(total: Any, inputs: tuple[dict[str, Any], jax.Array | None]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(part_loss)(adapter.params, *inputs)), None

        count = parts["tokens"].shape[0]
        rngs = None if rng is None else jax.random.split(rng, count)
        if count == 1:
            first = jax.tree.map(lambda x: x[0], (parts, rngs))
            summed, gradient = jax.value_and_grad(part_loss)(adapter.params, *first)
        else:
            nothing = jax.tree.map(jnp.zeros_like, adapter.params)
            (summed, gradient), _ = jax.lax.scan(add_part, (jnp.float32(0), nothing), (parts, rngs))
        answer_tokens = jnp.sum(parts["loss_weights"])
        gradient = jax.tree.map(lambda g: g / answer_tokens.astype(g.dtype), gradient)
        is_told = False if told is None else jnp.any(told)
        output = StepOutput(summed / answer_tokens, optax.tree.norm(gradient), terms(adapter), is_told)
        halted = state.halted | ~(jnp.isfinite(output.loss) & jnp.isfinite(output.gradient_norm))
        updates, opt_state = transformation.update(gradient, state.opt_state, adapter.params, halted=halted)

        def unless_halted(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(halted, old, new)

        trained = jax.tree.map(unless_halted, optax.apply_updates(adapter.params, updates), adapter.params)
        return TrainState(adapter.replace(params=trained), opt_state, halted), output

    return step


def split_batch(batch: Batch, parts: int) -> dict[str, np.ndarray]:
    """Return the arrays that the loss reads, each (B, …) as (A, B / A, …).

    Raises:
        ValueError: if the rows do not divide into `parts`.
    """
    rows = batch["tokens"].shape[0]
    if rows % parts:
        raise ValueError(
            f"a batch of {rows} rows of {batch['tokens'].shape[1]} tokens does not divide into "
            f"config.train.accumulate = {parts} parts; change that, config.train.rows or the row lengths"
        )
    return {name: batch[name].reshape(parts, rows // parts, *batch[name].shape[1:]) for name in MODEL_INPUTS}


def loss_inputs(batch: Batch) -> dict[str, np.ndarray]:
    """Return the arrays of a batch that the loss reads."""
    return {name: batch[name] for name in MODEL_INPUTS}
