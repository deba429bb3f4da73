"""Chat samples as tokens, with a mark on those that are the assistant's answer.

A conversation is rendered by the tokenizer's chat template and cut where the assistant begins to speak. The
text before (exactly what a model is given when it is asked to answer) and the answer are encoded on their
own, so that training sees the tokens that generation sees, and the mark covers the answer's tokens, all of
them and no others. An answer ends with the end token; what a template puts after it (ChatML: a line break) is
not part of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Protocol

import numpy as np

from experiments.data.messages import Message, Sample


class Tokenizer(Protocol):
    """What is needed of a tokenizer; special tokens in the text are recognised by `encode`."""

    @property
    def eos_id(self) -> int:
        """The token that ends an answer."""
        ...

    @property
    def pad_id(self) -> int:
        """The token that fills up a row."""
        ...

    def encode(self, text: str) -> list[int]:
        """Text to tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens to text."""
        ...

    def apply_chat_template(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """Renders a conversation; with a generation prompt, up to where the assistant begins to speak."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """A sample of N tokens: `tokens` (N,) int32, `is_answer` (N,) bool, and the index of the sample.

    A model reads tokens[:-1] to predict tokens[1:], so that the sample takes N - 1 positions of a row.
    """

    tokens: np.ndarray
    is_answer: np.ndarray
    sample: int

    @cached_property
    def positions(self) -> int:
        """How many positions of a row the sample takes."""
        return len(self.tokens) - 1

    @cached_property
    def answer_tokens(self) -> int:
        """How many tokens carry loss."""
        return int(self.is_answer.sum())


class Overlong(NamedTuple):
    """A sample (its index in the list) that takes more positions than there are in a row."""

    sample: int
    positions: int


class Encodings(NamedTuple):
    """The samples that fit, and those that do not."""

    examples: list[Encoded]
    overlong: list[Overlong]


def encode_samples(
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    *,
    max_positions: int,
    loss_on: Literal["last", "all"] = "last",
    placeholders: Sequence[int] = (),
) -> Encodings:
    """Encodes chat samples for training; those that are too long are left out whole, and listed.

    Args:
        samples: the conversations.
        tokenizer: encodes and renders them.
        max_positions: the longest row, in tokens.
        loss_on: learn the "last" answer of a conversation, or "all" of the assistant's.
        placeholders: tokens in front of each sample, for methods that learn its first positions.

    Raises:
        ValueError: a template that renders the beginning of a conversation differently once more follows.
    """
    if loss_on not in ("last", "all"):
        raise ValueError(f'loss_on: got {loss_on!r}, wanted "last" or "all"')
    result = Encodings([], [])
    for index, sample in enumerate(samples):
        example = _after_placeholders(_encode(sample, tokenizer, index, loss_on), placeholders)
        if example.positions > max_positions:
            result.overlong.append(Overlong(index, example.positions))
        else:
            result.examples.append(example)
    return result


def encode_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Encodes what a model is asked with; equal to how a training sample with this prompt begins."""
    return tokenizer.encode(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True))


def _encode(sample: Sample, tokenizer: Tokenizer, index: int, loss_on: str) -> Encoded:
    turns = [i for i, message in enumerate(sample.messages) if message["role"] == "assistant"]
    if not turns or turns[0] == 0 or turns[-1] != len(sample.messages) - 1:
        raise ValueError(f"sample {index}: wanted a conversation that ends with the assistant's answer")
    tokens: list[int] = []
    is_answer: list[bool] = []
    rendered = ""
    pending: list[int] = []  # what the template put after the last answer's end token
    for turn in turns if loss_on == "all" else turns[-1:]:
        prompt = tokenizer.apply_chat_template(list(sample.messages[:turn]), add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(list(sample.messages[: turn + 1]))
        context = _after(rendered, prompt, index)
        answer, pending_next = _until_end(tokenizer.encode(_after(prompt, whole, index)), tokenizer.eos_id)
        before = [*pending, *tokenizer.encode(context)]
        tokens += [*before, *answer]
        is_answer += [False] * len(before) + [True] * len(answer)
        rendered, pending = whole, pending_next
    if tokens[-1] != tokenizer.eos_id:  # the template does not end it, but the model has to learn to stop
        tokens.append(tokenizer.eos_id)
        is_answer.append(True)
    return Encoded(tokens=np.array(tokens, np.int32), is_answer=np.array(is_answer, bool), sample=index)


def _after_placeholders(example: Encoded, placeholders: Sequence[int]) -> Encoded:
    if not placeholders:
        return example
    return Encoded(
        tokens=np.concatenate([np.array(placeholders, np.int32), example.tokens]),
        is_answer=np.concatenate([np.zeros(len(placeholders), bool), example.is_answer]),
        sample=example.sample,
    )


def _after(prefix: str, text: str, index: int) -> str:
    if not text.startswith(prefix):
        raise ValueError(
            f"sample {index}: the chat template renders the start of a conversation differently once more "
            f"follows, so that answers cannot be told from prompts: got {text!r}, wanted {prefix!r} first. "
            'Use loss_on="last", or a template that keeps what it has written.'
        )
    return text[len(prefix) :]


def _until_end(ids: list[int], eos_id: int) -> tuple[list[int], list[int]]:
    """Cuts an answer's tokens after the last end token; without one, all of them are the answer."""
    end = next((i + 1 for i in reversed(range(len(ids))) if ids[i] == eos_id), len(ids))
    return ids[:end], ids[end:]
