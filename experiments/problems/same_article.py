"""What a sentence encoder could do before it was adapted: tell which sentences are of one subject.

A group is two sentences from each of four newspaper articles. Of every sentence it is asked which of the other seven is
from its article: the one with the highest cosine. The loss is the cross-entropy of the right one under the softmax of
the cosines times 20, which is what all-MiniLM-L6-v2 was trained with (in larger groups). Only the angles between
embeddings count: an adapter that turns them all alike has forgotten nothing, though each is far from the base's then.
Guessing is right for one in seven, the base for 62 % of the sentences that take at most 24 tokens.

Axes: B groups, S sentences of a group, T tokens, D width.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.data import Example
from experiments.data.batches import shuffled
from experiments.models.sentence_encoder import pad
from experiments.study.problem import Arrays, Retained

DOMAIN = "editorials"  # of experiments.data.sentiment: identifiers are "editorials/article_sentence"
ARTICLES = 4  # in a group
SENTENCES = 2 * ARTICLES
SCALE = 20.0  # of cosines

Embed = Callable[[Any, jax.Array, jax.Array], jax.Array]  # (params, tokens N x T, mask N x T) -> unit vectors N x D


def groups(rows: Mapping[Example, Sequence[int]], *, count: int, length: int, seed: int = 0) -> Arrays:
    """Put sentences into groups: the first two of each article, the articles in an order drawn by the seed.

    Args:
        rows: the tokens of sentences of `DOMAIN`.
        count: how many groups, if there are as many.
        length: tokens that the sentences are padded to.
        seed: of the order.

    Returns:
        "tokens" and "mask", int32 B x S x T; sentences 2i and 2i + 1 are from one article.

    Raises:
        ValueError: there are not articles enough for one group.
    """
    articles: dict[str, list[Sequence[int]]] = defaultdict(list)
    for example, row in rows.items():
        articles[example.id.rpartition("_")[0]].append(row)
    pairs = [sentences[:2] for sentences in articles.values() if len(sentences) > 1]
    there = min(count, len(pairs) // ARTICLES)
    if not there:
        raise ValueError(
            f"{len(pairs)} articles have two sentences of at most {length} tokens, wanted {ARTICLES} or more: raise "
            "config.problem.max_tokens, or set config.problem.retained_examples = 0"
        )
    order = shuffled(len(pairs), seed, 0)[: there * ARTICLES]
    flat = pad(list(itertools.chain.from_iterable(pairs[i] for i in order)), length)
    return {name: array.reshape(there, SENTENCES, length) for name, array in zip(("tokens", "mask"), flat, strict=True)}


def retained(embed: Embed, data: Arrays) -> Retained:
    """Return the task on groups, for an encoder.

    Args:
        embed: `(params, tokens N x T, mask N x T) -> N x D`, embeddings of length 1.
        data: as `groups` returns them.
    """

    def logits(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        B, S, T = batch["tokens"].shape
        embeddings_NxD = embed(params, batch["tokens"].reshape(B * S, T), batch["mask"].reshape(B * S, T))
        embeddings_BxSxD = embeddings_NxD.reshape(B, S, -1)
        logits_BxSxS = SCALE * embeddings_BxSxD @ embeddings_BxSxD.mT
        return jnp.where(jnp.eye(S, dtype=bool), -jnp.inf, logits_BxSxS)  # no sentence is asked for itself

    return Retained(fn=logits, loss=nats, score=found, score_name="article found", data=data)


def nats(logits_BxSxS: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Return the cross-entropy of the right sentences, mean of a group, B."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits_BxSxS, _partners(logits_BxSxS)), axis=-1)


def found(logits_BxSxS: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Return the part of a group whose nearest sentence is from the same article, B."""
    return jnp.mean(jnp.argmax(logits_BxSxS, axis=-1) == _partners(logits_BxSxS), axis=-1, dtype=jnp.float32)


def _partners(logits_BxSxS: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(logits_BxSxS.shape[-1]) ^ 1, logits_BxSxS.shape[:-1])
