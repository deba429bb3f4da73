"""How a model does on held-out samples: its greedy answers, scored, and the loss of the expected ones."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments import data
from experiments.models import Model
from experiments.training import intervals, subject, task
from experiments.training.step import LossFn, loss_inputs

MEASURES = (
    ("valid", "valid_json", "Valid JSON", "the whole answer parses and has the keys that were asked for"),
    ("correct", "accuracy", "Accuracy", "the answer is the expected one, in the form that was asked for"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said to a held-out question, and how that compares with the reference."""

    id: str
    question: str
    reference: str
    answer: str
    valid: bool | None
    correct: bool


class Evaluator:
    """Evaluates subjects of one model on one list of samples; programs are compiled once and used again.

    A subject is what `subject.of` returns: plain parameters, or a pair of base and adapter.

    Args:
        model: for its tokenizer and functions; the parameters to evaluate are given with each call.
        loss: of `step.summed_loss(model)`.
        samples: held out.
        layout: of the batches that the loss is taken over.
        max_new_tokens: the longest answer.
        batch_size: samples answered together.
        is_merged: whether the subjects are plain parameters.
        placeholders: tokens in front of every sample, for methods that learn its first positions.

    Attributes:
        encoded: the samples that fit the layout; the others have no part in the loss.
    """

    def __init__(
        self,
        model: Model,
        loss: LossFn,
        samples: Sequence[data.Sample],
        layout: data.Packed | data.Bucketed,
        *,
        max_new_tokens: int,
        batch_size: int,
        is_merged: bool = True,
        placeholders: Sequence[int] = (),
    ):
        """Encode the samples."""
        self._model, self._samples = model, list(samples)
        self._loss = jax.jit(loss if is_merged else subject.adapted(loss))
        self._generation = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "placeholders": placeholders}
        if not is_merged:
            self._generation |= {"transform": subject.adapted, "after": subject.adapted_later}
        self._layout = layout
        tokenizer = model.tokenizer
        assert tokenizer is not None
        self._tokenizer = tokenizer
        encodings = data.encode_samples(
            self._samples, tokenizer, max_positions=layout.max_positions, placeholders=placeholders
        )
        self.encoded, self._overlong = encodings
        self._prompts = [data.encode_prompt(sample.prompt, tokenizer) for sample in self._samples]
        self._identifiers = task.identifiers(self._samples)

    @property
    def count(self) -> int:
        """How many samples there are."""
        return len(self._samples)

    def answers(self, evaluated: Any, count: int) -> list[Answer]:
        """Return the greedy answers to the first `count` samples."""
        generated = self._model.generate(
            evaluated, self._prompts[:count], stop_ids=[self._tokenizer.eos_id], **self._generation
        )
        rows = zip(self._identifiers, self._samples, generated, strict=False)
        return [self._answer(identifier, sample, ids) for identifier, sample, ids in rows]

    def _answer(self, identifier: str, sample: data.Sample, ids: list[int]) -> Answer:
        said = self._tokenizer.decode(ids).strip()
        score = task.score(said, sample.answer)
        return Answer(
            id=identifier,
            question=sample.prompt[-1]["content"],
            reference=sample.answer,
            answer=said,
            valid=score.valid,
            correct=score.correct,
        )

    def loss(self, evaluated: Any, count: int) -> dict[str, float]:
        """Return the mean loss of the first `count` samples' answers.

        Returns:
            `loss` in nats an answer token, `tokens`, `examples` and `overlong`: samples left out as too long.

        Raises:
            ValueError: if all of the samples are too long.
        """
        encoded = [example for example in self.encoded if example.sample < count]
        batches = data.Batches(encoded, self._layout, pad_id=self._tokenizer.pad_id, shuffle=False)
        summed, tokens = 0.0, 0.0
        for batch in batches.one_epoch():
            summed += float(self._loss(evaluated, loss_inputs(batch)))
            tokens += float(np.sum(batch["loss_weights"]))
        return {
            "loss": summed / tokens,
            "tokens": int(tokens),
            "examples": len(encoded),
            "overlong": sum(overlong.sample < count for overlong in self._overlong),
        }


def rates(answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the rate of each measure that applies to all answers, by its short name."""
    return {
        key: sum(answer[field] for answer in answers) / len(answers)
        for field, key, _, _ in MEASURES
        if answers and all(answer[field] is not None for answer in answers)
    }


def compare(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], *, seed: int) -> list[dict[str, Any]]:
    """Return each measure before and after training, with 95 % intervals.

    Args:
        before: the fields of `Answer`s.
        after: those of the same samples, in the same order.
        seed: of the bootstrap.
    """
    assert [a["id"] for a in before] == [a["id"] for a in after]
    compared = []
    for field, key, title, meaning in MEASURES:
        pairs = [[answer[field] for answer in answers] for answers in (before, after)]
        if not before or None in pairs[0]:
            continue
        old, new = (intervals.wilson(sum(outcomes), len(outcomes)) for outcomes in pairs)
        difference = intervals.paired_bootstrap(*pairs, seed=seed)
        compared.append(
            {"name": key, "title": title, "meaning": meaning}
            | {"before": dataclasses.asdict(old), "after": dataclasses.asdict(new)}
            | {"difference": dataclasses.asdict(difference)}
        )
    return compared
