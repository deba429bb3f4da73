"""Sentiment in JSON, for a pretrained decoder: the quickstart's task, an example a row of fixed length.

A sentence is asked about by chat, and the answer is `{"sentiment": "positive"}` or negative. The loss of an example is
the mean nats of its answer's tokens, and its score whether each of them is the most probable one after the right ones
before it (teacher forced): then, and only then, the greedy answer is the right one.

Axes: N examples, B batch, T positions of a row, K loss positions of a row, P placeholders, D width, V vocabulary.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import data, models
from experiments.data.batches import PlannedBatch, Shape, build_batch, shuffled
from experiments.problems import cache
from experiments.problems.places import PLACEMENTS, TARGETS
from experiments.problems.settings import one_of, whole_number
from experiments.study.problem import SPLITS, Arrays, Problem
from experiments.training.preparation import MODEL_NAMES
from experiments.training.settings import REMAT

DEFAULTS: dict[str, Any] = {
    "source": "smollm2",  # or a .gguf file, or a Hugging Face directory
    "dtype": "float32",  # of the frozen parameters and the activations: float32 or bfloat16
    "remat": "none",  # what the backward pass recomputes: none, full, dots or dots_no_batch
    "domains": ("movies", "amazon", "tweets", "editorials"),
    "max_tokens": 96,  # of a row; longer examples are left out, and counted
    "train_examples": 0,  # of those that are short enough, drawn by the seed; 0: all
    "validation_examples": 128,
    "test_examples": 256,
    "seed": 0,  # of the examples that are drawn, and of the placeholders
    "cache_dir": "",  # where downloads are kept; empty: the user's cache directory
}

READ = ("tokens", "loss_positions", "loss_targets", "loss_weights")  # of a batch of experiments.data


def load(config: Any) -> Problem:
    """Load the decoder and the sentences.

    Args:
        config: with the settings of `DEFAULTS` in `config.problem`.

    Raises:
        ValueError: the model is not there or has no tokenizer, or nothing is left of a split.
        experiments.data.DownloadError: the sentences cannot be downloaded.
    """
    settings = config.problem
    whole_number("max_tokens", settings.max_tokens, 1)
    wanted = {split: whole_number(f"{split}_examples", settings[f"{split}_examples"], 0) for split in SPLITS}
    remat = None if one_of("remat", settings.remat, REMAT) == "none" else settings.remat
    dtype = jnp.dtype(one_of("dtype", settings.dtype, ("float32", "bfloat16")))
    rated = data.load_sentiment(cache.directory(settings.cache_dir), tuple(settings.domains))
    parts = {split: [example for example in rated if example.split == split] for split in SPLITS}
    drawn = {split: data.take_examples(part, len(part), seed=settings.seed) for split, part in parts.items()}
    samples = {split: [data.sentiment_sample(example) for example in part] for split, part in drawn.items()}
    model = models.load(settings.source, dtype=dtype, remat=remat)
    facts = {
        "Model": MODEL_NAMES.get(settings.source, settings.source),
        "Data": f"sentences rated by people (VADER, MIT licence): {', '.join(settings.domains)}",
    }
    return make(model, samples, wanted, max_tokens=settings.max_tokens, seed=settings.seed, facts=facts)


def make(
    model: models.Model,
    samples: Mapping[str, Sequence[data.Sample]],
    wanted: Mapping[str, int],
    *,
    max_tokens: int,
    seed: int = 0,
    facts: Mapping[str, str] | None = None,
) -> Problem:
    """Make a problem of a decoder and chat samples, whose last answers are learned.

    Args:
        model: with a tokenizer.
        samples: by split; those that take more than `max_tokens` are left out, and counted in the facts.
        wanted: how many of the others to use, the first ones, by split; 0: all.
        max_tokens: positions of a row.
        seed: of the placeholders.
        facts: what else the report says.

    Raises:
        ValueError: the model has no tokenizer, or nothing is left of a split.
    """
    if model.tokenizer is None:
        raise ValueError(
            "the model has no tokenizer, so it cannot read text; put its tokenizer.json and tokenizer_config.json "
            "beside its config.json"
        )
    chosen, left_out = {}, {}
    for split in SPLITS:
        fitting, overlong = data.encode_samples(samples[split], model.tokenizer, max_positions=max_tokens)
        if not fitting:
            raise ValueError(
                f"none of the {len(samples[split])} {split} examples takes {max_tokens} tokens or fewer: raise "
                "config.problem.max_tokens"
            )
        chosen[split], left_out[split] = fitting[: wanted[split] or len(fitting)], len(overlong)
    answers = Counter(samples["test"][example.sample].answer for example in chosen["test"])
    told = {
        "Examples": ", ".join(f"{len(chosen[split]):,} {split}" for split in SPLITS),
        "Left out": f"longer than {max_tokens} tokens: " + ", ".join(f"{n:,} {split}" for split, n in left_out.items()),
        "Always the commonest answer": f"right for {100 * max(answers.values()) / answers.total():.1f} %",
    }
    slots = max(example.answer_tokens for part in chosen.values() for example in part)
    parts = {split: _arrays(part, max_tokens, slots, model.tokenizer.pad_id) for split, part in chosen.items()}
    without_params = dataclasses.replace(model, params={})
    return _problem(without_params, model.params, parts, seed, {**(facts or {}), **told})


def _arrays(examples: Sequence[data.Encoded], length: int, slots: int, pad_id: int) -> Arrays:
    """Return examples a row each."""
    plan = PlannedBatch(Shape(len(examples), length, slots), [[index] for index in range(len(examples))])
    batch = build_batch(examples, plan, pad_id=pad_id)
    return {name: batch[name] for name in READ}


def _problem(
    model: models.Model, params: Any, parts: Mapping[str, Arrays], seed: int, facts: Mapping[str, str], count: int = 0
) -> Problem:
    placeholders_P = shuffled(model.config.vocab_size, seed, 0)[:count].astype(np.int32)

    def logits(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        # The padding needs no mask: it is behind the answer, where a causal decoder does not look.
        hidden_BxTxD = model.apply(params, batch["tokens"], logits=False)
        return model.unembed(params, data.gather_loss_positions(hidden_BxTxD, batch["loss_positions"]))

    behind = {split: behind_placeholders(arrays, placeholders_P) for split, arrays in parts.items()}
    return Problem(
        name="json",
        fn=logits,
        params=params,
        loss=mean_nats,
        score=is_most_probable,
        score_name="right answers",
        data=behind,
        targets=TARGETS,
        placements=PLACEMENTS | {"norm": r".*norm/scale", "prompt": r"embed/embedding"},
        quantizable=TARGETS["all"],
        with_placeholders=lambda count: _problem(model, params, parts, seed, facts, count),
        tokens_per_example=behind["train"]["tokens"].shape[1],
        facts=facts,
    )


def behind_placeholders(arrays: Arrays, placeholders_P: np.ndarray) -> Arrays:
    """Return examples with the same tokens in front of each."""
    tokens_NxT = arrays["tokens"]
    in_front_NxP = np.broadcast_to(placeholders_P, (len(tokens_NxT), len(placeholders_P)))
    return arrays | {
        "tokens": np.concatenate([in_front_NxP, tokens_NxT], axis=1),
        "loss_positions": arrays["loss_positions"] + np.int32(len(placeholders_P)),
    }


def mean_nats(logits_BxKxV: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Return the mean cross-entropy of each example's answer tokens, in nats, B."""
    nats_BxK = optax.softmax_cross_entropy_with_integer_labels(logits_BxKxV, batch["loss_targets"])
    weights_BxK = batch["loss_weights"]
    return jnp.sum(nats_BxK * weights_BxK, axis=-1) / jnp.sum(weights_BxK, axis=-1)


def is_most_probable(logits_BxKxV: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Return 1 where all of an example's answer tokens are the most probable ones, B."""
    is_right_BxK = jnp.argmax(logits_BxKxV, axis=-1) == batch["loss_targets"]
    return jnp.all(is_right_BxK | (batch["loss_weights"] == 0), axis=-1).astype(jnp.float32)
