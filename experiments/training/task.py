"""What a run learns from and is judged by: samples to train, watch and test on, and how answers score."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections import Counter
from collections.abc import Sequence

from ml_collections import config_dict

from experiments import data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Samples in a fixed order.

    Args:
        train: what the adapter is trained on.
        validation: held out; watched while training.
        test: held out; answered before and after training.
        facts: what to say of the data in the report.
    """

    train: list[data.Sample]
    validation: list[data.Sample]
    test: list[data.Sample]
    facts: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """How an answer does.

    Args:
        valid: it parses as JSON with the keys that the reference has; None when the reference is not JSON.
        correct: it is the reference, as JSON values or else as text without the spaces around it.
    """

    valid: bool | None
    correct: bool


def load(config: config_dict.ConfigDict) -> Task:
    """Load the user's file if the settings name one, else the sentiment sentences.

    Raises:
        ValueError: for a bad line (with its number), or for data of which nothing is left to train or test
            on.
    """
    return _own(config) if config.data.path else _sentiment(config)


def _sentiment(config: config_dict.ConfigDict) -> Task:
    cache = config.data.cache_dir or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "lorax"
    )
    examples = data.load_sentiment(cache, tuple(config.data.domains))
    parts: dict[str, list[data.Example]] = {"train": [], "validation": [], "test": []}
    for example in examples:
        parts[example.split].append(example)
    watched = max(config.evaluation.progress_examples, config.evaluation.loss_examples)
    tested = max(config.evaluation.examples, config.evaluation.loss_examples)
    chosen = {
        "train": parts["train"],
        "validation": data.take_examples(parts["validation"], watched, seed=config.seed),
        "test": data.take_examples(parts["test"], tested, seed=config.seed),
    }
    samples = {name: [data.sentiment_sample(e) for e in part] for name, part in chosen.items()}
    commonest = Counter(example.label for example in chosen["test"]).most_common(1)[0][1]
    sizes = ", ".join(f"{len(parts[name]):,} {name}" for name in parts)
    facts = {
        "Data": f"sentences rated by people (VADER, MIT licence): {', '.join(config.data.domains)}; {sizes}",
        "Always the commonest answer": f"right for {100 * commonest / len(chosen['test']):.1f} %",
    }
    return Task(**samples, facts=facts)


def _own(config: config_dict.ConfigDict) -> Task:
    samples = _read(config.data.path)
    if config.data.held_out_path:
        train, held_out = samples, _read(config.data.held_out_path)
    else:
        ranks = [_rank(sample, config.seed) for sample in samples]
        count = max(1, round(config.data.held_out_fraction * len(samples)))
        drawn = set(sorted(ranks)[:count])  # a set, so that copies of a question are held out together
        train = [sample for sample, rank in zip(samples, ranks, strict=True) if rank not in drawn]
        held_out = [sample for sample, rank in zip(samples, ranks, strict=True) if rank in drawn]
        if not train:
            raise ValueError(
                f"{config.data.path}: got {len(samples)} sample(s) with {len(set(ranks))} different "
                "question(s), wanted at least one to train on and one to hold out"
            )
    facts = {"Data": f"{config.data.path}: {len(train):,} to train on, {len(held_out):,} held out"}
    return Task(train=train, validation=held_out, test=held_out, facts=facts)


def _read(path: str) -> list[data.Sample]:
    if not os.path.isfile(os.path.expanduser(path)):
        raise ValueError(f"{path}: there is no such file; data.path names a JSONL file of chat messages")
    samples, _ = data.read_jsonl(path)
    return samples


def _rank(sample: data.Sample, seed: int) -> bytes:
    """A place in a random order that depends on what is asked alone."""
    asked = json.dumps(sample.prompt, sort_keys=True)
    return hashlib.sha256(f"{seed}/{asked}".encode()).digest()


def identifiers(samples: Sequence[data.Sample]) -> list[str]:
    """Return a name for each sample: its id, its line in the user's file, or else its place."""
    return [str(sample.meta.get("id", sample.meta.get("line", place))) for place, sample in enumerate(samples)]


def score(answer: str, reference: str) -> Score:
    r"""Return how `answer` does against `reference`.

    >>> score('{"sentiment": "negative"}\n', '{"sentiment": "positive"}')
    Score(valid=True, correct=False)
    >>> score("I think it is positive.", '{"sentiment": "positive"}')
    Score(valid=False, correct=False)
    >>> score(" Paris ", "Paris")
    Score(valid=None, correct=True)
    """
    wanted = _json_object(reference)
    if wanted is None:
        return Score(valid=None, correct=answer.strip() == reference.strip())
    got = _json_object(answer)
    return Score(valid=got is not None and got.keys() == wanted.keys(), correct=got == wanted)


def _json_object(text: str) -> dict[str, object] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
