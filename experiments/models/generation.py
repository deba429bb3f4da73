"""Greedy generation for a batch of prompts with a cache of keys and values.

Prompts are sorted by length and padded on the left to few widths, so that all rows of a batch write the same
slot and one program serves many batches. Tokens that all prompts begin with (an instruction) are read once.

Slots of a row:  [ common prefix | left padding | rest of the prompt | generated ]

Axes: B batch, T tokens of the padded prompts, S slots, P tokens of the common prefix, M new tokens.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.models import partition
from experiments.models.llama import Llama, LlamaConfig, empty_cache

# Prompt and prefix widths are multiples of this many tokens: fewer programs to compile, against more padding.
_WIDTH = 16

Transform = Callable[[Callable[..., Any]], Callable[..., Any]]


@functools.lru_cache(maxsize=64)
def cached_step(config: LlamaConfig, transform: Transform | None) -> Callable[..., Any]:
    """The pure function `(params, cache, tokens, positions, visible, slot) -> (logits, cache)`, transformed.

    The same arguments give the same function object, so that programs compiled for it are found again.
    """
    module: Any = Llama(config)

    def step(params: Any, *args: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return module.apply({"params": params}, *args, method=Llama.step)

    return step if transform is None else transform(step)


def generate(
    config: LlamaConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    transform: Transform | None = None,
    placeholders: Sequence[int] = (),
    after: Transform | None = None,
    batch_size: int = 32,
) -> list[list[int]]:
    """Continues each prompt with the most probable tokens.

    Args:
        config: of the decoder.
        params: first argument of the (transformed) step: the parameters, or whatever `transform` asks for.
        prompts: token ids, none empty.
        max_new_tokens: at most this many are generated for a prompt.
        stop_ids: tokens that end a row; they are not returned.
        transform: turns the pure step `(params, ...) -> ...` into one with another first argument, for
            example `lambda step: lambda pair, *args: lorax.adapt(step)(*pair, *args)` with
            `params=(base, adapter)`. Pass the same function object each time: programs are compiled for it.
        placeholders: tokens in front of every prompt, for methods that learn a sequence's first positions.
        after: with placeholders, `transform` for all that follows the common prefix: it must not take the positions
            that it reads for the first ones. None: no transform.
        batch_size: prompts in one batch.

    Returns:
        New token ids for each prompt, in the order of `prompts`.

    Raises:
        ValueError: if a prompt is empty, or too long for the model's positions.
    """
    _check(config, prompts, len(placeholders) + max_new_tokens, batch_size)
    if not prompts:
        return []
    stop = tuple(sorted(set(int(i) for i in stop_ids)))
    step = cached_step(config, transform)
    rows = [[int(token) for token in prompt] for prompt in prompts]
    shared = _common_prefix(rows)
    rest = [row[len(shared) :] for row in rows]
    prefix = [*(int(token) for token in placeholders), *shared]
    prefix_cache = None
    if placeholders:
        # With a token more, whose slot is dropped: a method that learns n positions takes n tokens for later ones.
        longer = jnp.asarray([[*prefix, prefix[-1]]], jnp.int32)
        read = _read_prefix(params, longer, step=step, config=config)
        prefix_cache = {name: slots[:, :, : len(prefix)] for name, slots in read.items()}
        step = cached_step(config, after)
    elif prefix:
        prefix_cache = _read_prefix(params, jnp.asarray([prefix], jnp.int32), step=step, config=config)
    order = sorted(range(len(rest)), key=lambda i: len(rest[i]))
    size = min(batch_size, len(rest))
    answers: list[list[int]] = [[] for _ in rest]
    for start in range(0, len(order), size):
        members = order[start : start + size]
        tokens_BxT, lengths_B = _left_pad([rest[i] for i in members], size)
        settings = {"step": step, "config": config, "stop": stop, "new": max_new_tokens}
        new_BxM = np.asarray(_continue(params, tokens_BxT, lengths_B, prefix_cache, **settings))
        for i, row in zip(members, new_BxM[: len(members)], strict=True):  # the rest fills up the last batch
            answers[i] = _until_stop(row.tolist(), stop)
    return answers


def _check(config: LlamaConfig, prompts: Sequence[Sequence[int]], new: int, batch_size: int) -> None:
    if new < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens={new} and batch_size={batch_size} have to be at least 1")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; give it at least one token")
        if len(prompt) + new > config.max_positions:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; with {new} more, generated or in front of it, that is above "
                f"the model's max_positions={config.max_positions}"
            )


def _common_prefix(prompts: list[list[int]]) -> list[int]:
    """Leading tokens that all prompts share: a multiple of `_WIDTH`, and less than the shortest prompt."""
    if len(prompts) < 2:
        return []
    first, last = min(prompts), max(prompts)  # what the extremes in lexical order share, all share
    shared = 0
    for a, b in zip(first, last, strict=False):  # of different lengths
        if a != b:
            break
        shared += 1
    shared = min(shared, min(len(p) for p in prompts) - 1)
    return list(first[: shared // _WIDTH * _WIDTH])


def _left_pad(prompts: list[list[int]], rows: int) -> tuple[np.ndarray, np.ndarray]:
    width = -(-max(len(p) for p in prompts) // _WIDTH) * _WIDTH
    tokens_BxT = np.zeros((rows, width), np.int32)
    lengths_B = np.zeros(rows, np.int32)
    for row in range(rows):
        prompt = prompts[min(row, len(prompts) - 1)]
        tokens_BxT[row, width - len(prompt) :] = prompt
        lengths_B[row] = len(prompt)
    return tokens_BxT, lengths_B


def _until_stop(tokens: list[int], stop: tuple[int, ...]) -> list[int]:
    ends = [i for i, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0]] if ends else tokens


@functools.partial(jax.jit, static_argnames=("step", "config"))
def _read_prefix(
    params: Any, tokens_1xP: jax.Array, *, step: Callable[..., Any], config: LlamaConfig
) -> dict[str, jax.Array]:
    P = tokens_1xP.shape[1]
    visible = jnp.ones((1, P), bool)
    return step(params, empty_cache(config, 1, P), tokens_1xP, jnp.arange(P)[None], visible, 0)[1]


@functools.partial(jax.jit, static_argnames=("step", "config", "stop", "new"))
def _continue(
    params: Any,
    tokens_BxT: jax.Array,
    lengths_B: jax.Array,
    prefix: dict[str, jax.Array] | None,
    *,
    step: Callable[..., Any],
    config: LlamaConfig,
    stop: tuple[int, ...],
    new: int,
) -> jax.Array:
    """Returns the new tokens B x M; what follows a stop token is unspecified."""
    B, T = tokens_BxT.shape
    P = 0 if prefix is None else prefix["key"].shape[2]
    S = P + T + new
    cache = empty_cache(config, B, S)
    if prefix is not None:
        cache = {k: cache[k].at[:, :, :P].set(prefix[k]) for k in cache}
    padding_B = T - lengths_B
    slots_S = jnp.arange(S)
    visible_BxS = (slots_S < P) | (slots_S >= P + padding_B[:, None])
    positions_BxT = jnp.maximum(P + jnp.arange(T) - padding_B[:, None], 0)
    logits_BxV, cache = step(params, cache, tokens_BxT, positions_BxT, visible_BxS, P)
    token_B = jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    stop_ids = jnp.asarray(stop, jnp.int32)

    def has_stopped(token_B: jax.Array) -> jax.Array:
        return jnp.any(token_B[:, None] == stop_ids, axis=-1)

    def unfinished(carry: tuple[Any, ...]) -> jax.Array:
        made, _, done_B, _, _ = carry
        return (made < new) & ~jnp.all(done_B)

    def advance(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        made, token_B, done_B, new_BxM, cache = carry
        slot = P + T + made - 1
        positions_Bx1 = (slot - padding_B)[:, None]
        logits_BxV, cache = step(params, cache, token_B[:, None], positions_Bx1, visible_BxS, slot)
        token_B = jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
        return made + 1, token_B, done_B | has_stopped(token_B), new_BxM.at[:, made].set(token_B), cache

    new_BxM = jnp.zeros((B, new), jnp.int32).at[:, 0].set(token_B)
    carry = (jnp.int32(1), token_B, has_stopped(token_B), new_BxM, cache)
    return partition.whole(jax.lax.while_loop(unfinished, advance, carry)[3])
