"""The sentiment of rated sentences, for a pretrained sentence encoder with a new head.

all-MiniLM-L6-v2 turns a sentence into one vector, the mean over its tokens, and a linear layer that starts at zero
makes two logits of it. The layer reads the vector at length √D: its numbers are near 1 then, so that the layer learns
at the rates that suit the encoder. What the encoder could do before is asked by `experiments.problems.same_article`.

Placeholders stand in front of a sentence, at the positions after the longest one: the sentence keeps the positions that
the encoder was trained for. (Eight rows of the vocabulary there leave embeddings at a cosine of 0.83 to what they were,
and at the first positions, as PEFT has it, 0.76.) They are attended to, and left out of the mean.

Axes: B batch, T tokens, P placeholders, D width, C classes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorax
from experiments import data
from experiments.data.batches import shuffled
from experiments.models import sentence_encoder
from experiments.models.pooling import mean_pool, unit_length
from experiments.models.sentence_encoder import Encoder
from experiments.problems import cache, same_article
from experiments.problems.places import PLACEMENTS, TARGETS
from experiments.problems.settings import whole_number
from experiments.study.problem import SPLITS, Arrays, Problem

DEFAULTS: dict[str, Any] = {
    "source": "minilm",  # or a package or a directory, see experiments.models.sentence_encoder.load
    "domains": ("movies",),
    "max_tokens": 24,  # of a sentence, [CLS] and [SEP] included; longer ones are left out, and counted
    "train_examples": 0,  # drawn by the seed from the sentences that are short enough; 0: all
    "validation_examples": 0,
    "test_examples": 0,
    "retained_examples": 32,  # groups of eight sentences; 0: nothing is retained
    "seed": 0,  # of the examples that are drawn, and of the placeholders
    "cache_dir": "",  # where downloads are kept; empty: the user's cache directory
}

CLASSES = ("negative", "positive")
MODEL_NAMES = {"minilm": "all-MiniLM-L6-v2"}


def load(config: Any) -> Problem:
    """Load the encoder and the sentences.

    Args:
        config: with the settings of `DEFAULTS` in `config.problem`.

    Raises:
        ValueError: the weights are not installed, or nothing is left of a split.
        experiments.data.DownloadError: the sentences cannot be downloaded.
    """
    settings, domains = config.problem, tuple(config.problem.domains)
    length = whole_number("max_tokens", settings.max_tokens, 1)
    counts = {split: whole_number(f"{split}_examples", settings[f"{split}_examples"], 0) for split in SPLITS}
    encoder = sentence_encoder.load(settings.source)
    rated = data.load_sentiment(cache.directory(settings.cache_dir), domains)
    rows = short_enough(rated, encoder, length)
    chosen = {}
    for split in SPLITS:
        there = [example for example in rows if example.split == split]
        if not there:
            raise ValueError(f"no {split} sentence takes {length} tokens or less: raise config.problem.max_tokens")
        chosen[split] = data.take_examples(there, counts[split] or len(there), seed=settings.seed)
    labels = Counter(example.label for example in chosen["test"])
    left_out = Counter(example.split for example in rated if example not in rows)
    sizes = ", ".join(f"{len(chosen[split]):,} {split}" for split in SPLITS)
    facts = {
        "Model": f"{MODEL_NAMES.get(settings.source, settings.source)}, {_size(encoder.params):,} parameters",
        "Data": f"sentences rated by people (VADER, MIT licence): {', '.join(domains)}; {sizes}",
        "Left out": f"longer than {length} tokens: {', '.join(f'{left_out[split]:,} {split}' for split in SPLITS)}",
        "Always the commonest answer": f"right for {100 * max(labels.values()) / labels.total():.1f} %",
    }
    parts = {split: arrays(chosen[split], rows, length) for split in SPLITS}
    return make(encoder, parts, _groups(settings, encoder), seed=settings.seed, facts=facts)


def _groups(settings: Any, encoder: Encoder) -> Arrays | None:
    """What is retained: sentences that nothing is trained on, also where their domain is."""
    count = whole_number("retained_examples", settings.retained_examples, 0)
    if not count:
        return None
    rated = data.load_sentiment(cache.directory(settings.cache_dir), (same_article.DOMAIN,))
    unseen = [example for example in rated if example.split != "train" or example.domain not in settings.domains]
    rows = short_enough(unseen, encoder, settings.max_tokens)
    return same_article.groups(rows, count=count, length=settings.max_tokens, seed=settings.seed)


def _size(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def short_enough(examples: Sequence[data.Example], encoder: Encoder, length: int) -> dict[data.Example, list[int]]:
    """Return the tokens of those sentences that take at most `length`, in their order."""
    return {example: row for example in examples if len(row := encoder.tokens(example.text)) <= length}


def arrays(examples: Sequence[data.Example], rows: Mapping[data.Example, Sequence[int]], length: int) -> Arrays:
    """Return sentences as "tokens" and "mask", int32 N x `length`, and "label", int32 N: the place in `CLASSES`."""
    tokens, mask = sentence_encoder.pad([rows[example] for example in examples], length)
    labels = np.array([CLASSES.index(example.label) for example in examples], np.int32)
    return {"tokens": tokens, "mask": mask, "label": labels}


def make(
    encoder: Encoder,
    parts: Mapping[str, Arrays],
    groups: Arrays | None = None,
    *,
    seed: int = 0,
    facts: Mapping[str, str] | None = None,
    placeholders: int = 0,
) -> Problem:
    """Make a problem of a sentence encoder and labelled sentences.

    Args:
        encoder: with its parameters.
        parts: by split, as `arrays` returns them.
        groups: what is retained, as `same_article.groups` returns it; none: nothing is.
        seed: of the placeholders.
        facts: what the report says.
        placeholders: how many positions in front of every sentence.
    """
    placeholders_P = shuffled(encoder.config.vocab_size, seed, 0)[:placeholders]

    def embed(params: Any, tokens_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
        positions_T = jnp.roll(jnp.arange(tokens_BxT.shape[1]), placeholders)
        hidden_BxTxD = encoder.apply(params, tokens_BxT, mask_BxT, positions=positions_T)
        return unit_length(mean_pool(hidden_BxTxD[:, placeholders:], mask_BxT[:, placeholders:]))

    def logits(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        x_BxD = embed(params, batch["tokens"], batch["mask"]) * encoder.config.dim**0.5
        return x_BxD @ params["classifier"]["kernel"] + params["classifier"]["bias"]

    classifier = {"kernel": jnp.zeros((encoder.config.dim, len(CLASSES))), "bias": jnp.zeros(len(CLASSES))}
    data = {split: in_front(part, placeholders_P) for split, part in parts.items()}
    return Problem(
        name="sentences",
        fn=logits,
        params={**encoder.params, "classifier": classifier},
        loss=cross_entropy,
        score=is_right,
        data=data,
        targets=TARGETS,
        always={r"classifier/.*": lorax.Full()},
        placements=PLACEMENTS
        | {"bitfit": r"(embed|layers)/.*bias", "norm": r".*norm/scale", "prompt": r"embed/tokens/embedding"},
        quantizable=TARGETS["all"],
        with_placeholders=lambda count: make(encoder, parts, groups, seed=seed, facts=facts, placeholders=count),
        retained=None if groups is None else same_article.retained(embed, in_front(groups, placeholders_P)),
        tokens_per_example=data["train"]["tokens"].shape[-1],
        facts=facts or {},
    )


def in_front(arrays: Arrays, placeholders_P: np.ndarray) -> Arrays:
    """Return sentences (... x T) with the same tokens in front of each, which the mask lets in."""

    def extended(array: np.ndarray, first: np.ndarray) -> np.ndarray:
        first = np.broadcast_to(first.astype(array.dtype), (*array.shape[:-1], len(first)))
        return np.concatenate([first, array], axis=-1)

    tokens, mask = arrays["tokens"], arrays["mask"]
    return arrays | {
        "tokens": extended(tokens, placeholders_P),
        "mask": extended(mask, np.ones_like(placeholders_P)),
    }


def cross_entropy(logits_BxC: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Return the nats of each label, B."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxC, batch["label"])


def is_right(logits_BxC: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Return 1 where the more probable class is the label, B."""
    return (jnp.argmax(logits_BxC, axis=-1) == batch["label"]).astype(jnp.float32)
