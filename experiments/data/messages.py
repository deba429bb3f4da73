"""Chat samples: the sentiment task written as chat, and the user's own data from a JSONL file.

A line of the user's file is either of

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}

and the second is short for a user's message and the assistant's answer. Further keys of a line are kept as
`Sample.meta`. Nothing is trained on silently: a line that does not fit is reported with its number.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments.data.sentiment import LABELS, Example, Label

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

ROLES = ("system", "user", "assistant")
MAX_REASONS = 20  # of bad lines in one error message; the numbers of the others are listed too

SENTIMENT_INSTRUCTION = (
    'Classify the sentiment. Answer with JSON only: {"sentiment": "positive"} or {"sentiment": "negative"}.'
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A conversation that ends with the assistant's answer, and what else is known of it."""

    messages: tuple[Message, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the last answer: what a model is asked with."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text of the last answer."""
        return self.messages[-1]["content"]


class BadLine(NamedTuple):
    """A line (counted from 1) that is no sample, and why."""

    line: int
    reason: str


def sentiment_sample(example: Example) -> Sample:
    """Asks for the sentiment of a rated sentence; the answer is JSON such as `{"sentiment": "positive"}`."""
    return Sample(
        messages=(
            {"role": "system", "content": SENTIMENT_INSTRUCTION},
            {"role": "user", "content": f"Text: {example.text}"},
            {"role": "assistant", "content": json.dumps({"sentiment": example.label})},
        ),
        meta={"id": example.id, "domain": example.domain, "label": example.label},
    )


def read_sentiment(answer: str) -> Label | None:
    r"""Reads a model's answer: its label, or None unless the whole answer is the JSON that was asked for.

    >>> read_sentiment('{"sentiment": "negative"}\n')
    'negative'
    >>> read_sentiment('The sentiment is {"sentiment": "negative"}.') is None
    True
    """
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.keys() != {"sentiment"}:
        return None
    return next((label for label in LABELS if label == value["sentiment"]), None)


def read_jsonl(
    path: str | os.PathLike[str], *, on_bad: Literal["raise", "skip"] = "raise"
) -> tuple[list[Sample], list[BadLine]]:
    """Reads chat samples from a UTF-8 file, one JSON object a line; blank lines are passed over.

    Args:
        path: the file.
        on_bad: "raise" an error that lists all bad lines, or "skip" them and return them too.

    Returns:
        The samples, each with its line number in `meta["line"]`, and the bad lines.

    Raises:
        ValueError: bad lines (unless skipped), or no sample in the file.
        FileNotFoundError: no such file.
    """
    if on_bad not in ("raise", "skip"):
        raise ValueError(f'on_bad: got {on_bad!r}, wanted "raise" or "skip"')
    samples, bad = [], []
    with Path(path).expanduser().open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                # A file saved on Windows may start with a byte order mark.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    samples.append(_parse_line(text, number))
            except UnicodeDecodeError as error:
                bad.append(BadLine(number, f"not UTF-8 (byte {error.start} of the line)"))
            except ValueError as error:
                bad.append(BadLine(number, str(error)))
    if bad and on_bad == "raise":
        raise ValueError(_describe(path, bad))
    if not samples:
        raise ValueError(f"{path}: no sample in the file" + (f"; {_describe(path, bad)}" if bad else ""))
    return samples, bad


def _describe(path: str | os.PathLike[str], bad: list[BadLine]) -> str:
    lines = [f"{path}: {len(bad)} bad line(s). Mend them, or skip bad lines (on_bad='skip')."]
    lines += [f"  line {line}: {reason}" for line, reason in bad[:MAX_REASONS]]
    if rest := bad[MAX_REASONS:]:
        lines.append(f"  and lines {', '.join(str(line) for line, _ in rest)}")
    return "\n".join(lines)


def _parse_line(text: str, number: int) -> Sample:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("not readable JSON (nested too deeply)") from None
    if not isinstance(value, dict):
        raise ValueError(f"got a JSON {type(value).__name__}, wanted an object")
    is_chat, is_pair = "messages" in value, "prompt" in value or "completion" in value
    if is_chat == is_pair:
        raise ValueError(f"got the keys {sorted(value)}, wanted either messages, or prompt and completion")
    if is_pair:
        value["messages"] = [
            {"role": "user", "content": value.pop("prompt", None)},
            {"role": "assistant", "content": value.pop("completion", None)},
        ]
    messages = value.pop("messages")
    _check_messages(messages, ("prompt", "completion") if is_pair else ())
    return Sample(messages=tuple(messages), meta={**value, "line": number})


def _check_messages(messages: Any, names: tuple[str, ...]) -> None:
    """Raises ValueError unless the value is a conversation; `names` are what the user calls its messages."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages: wanted a list with at least a user's and an assistant's message")
    for index, message in enumerate(messages):
        where = names[index] if names else f"messages[{index}]"
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            got = sorted(message) if isinstance(message, dict) else type(message).__name__
            raise ValueError(f"{where}: got {got}, wanted the keys role and content and no others")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise ValueError(f"{where}: got the role {role!r}, wanted one of {', '.join(ROLES)}")
        if role == "system" and index:
            raise ValueError(f"{where}: a system message has to be the first")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"{where}: got the content {content!r}, wanted a text that is not empty")
        if any("\ud800" <= character <= "\udfff" for character in content):
            raise ValueError(f"{where}: half of a surrogate pair (a broken emoji?) in the content")
    roles = [message["role"] for message in messages]
    if roles[0 if roles[0] != "system" else 1 :][:1] != ["user"]:
        raise ValueError("the first message, or the one after the system's, has to be the user's")
    if roles[-1] != "assistant":
        raise ValueError(f"the last message is the {roles[-1]}'s, wanted the assistant's answer")
