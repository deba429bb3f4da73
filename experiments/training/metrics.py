"""What a run logs: one JSON object a step in `metrics.jsonl`, and the same numbers for TensorBoard.

A line has the step (optimiser updates done), the numbers of that update, and the held-out numbers of the
steps that were evaluated. The file is only ever appended to. A run that resumes from step n first drops what
was logged after n, and a line torn by the kill, so that every step is there once.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """Return the complete lines of a `metrics.jsonl`, in order; none when there is no such file.

    A last line without its newline was torn by a kill and is left out.

    Raises:
        ValueError: for a complete line that is not a JSON object with a step.
    """
    if not path.exists():
        return []
    complete = path.read_bytes().split(b"\n")[:-1]
    rows = []
    for number, line in enumerate(complete, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path}:{number}: expected an object with a step, got {row!r}")
        rows.append(row)
    return rows


class NoLog:
    """Takes what a `MetricsLog` does and keeps only the last line: for processes beside the main one."""

    def __init__(self) -> None:
        """Start without a line."""
        self.last: dict[str, Any] = {}

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Remember the line of one step."""
        self.last = {"step": step, **values}

    def sync(self) -> None:
        """Nothing to put anywhere."""

    def close(self) -> None:
        """Nothing to close."""


class MetricsLog(NoLog):
    """Appends steps to `metrics.jsonl` and scalars to TensorBoard event files.

    Args:
        directory: the run's directory.
        resumed_step: what was logged after this step is dropped; 0 when the run starts.
    """

    def __init__(self, directory: pathlib.Path, *, resumed_step: int = 0):
        """Truncate what is there to `resumed_step` and open it; `last` is the last line there is."""
        from tensorboardX import SummaryWriter

        super().__init__()
        self._path = directory / "metrics.jsonl"
        kept = [row for row in read_metrics(self._path) if row["step"] <= resumed_step] if resumed_step else []
        _write_atomically(self._path, "".join(_line(row) for row in kept))
        self.last = kept[-1] if kept else {}
        self._file = self._path.open("a", encoding="utf-8")
        purge = {"purge_step": resumed_step + 1} if resumed_step else {}
        self._board = SummaryWriter(str(directory / "tensorboard"), **purge)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the line of one step."""
        super().write(step, values)
        self._file.write(_line(self.last))
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Put everything written so far on the disk: called before a checkpoint that counts on it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        """Flush and close both logs."""
        self.sync()
        self._file.close()
        self._board.close()


def _line(row: Mapping[str, Any]) -> str:
    # JSON has no NaN: a non-finite number is written as its name, so that any reader can parse the line
    finite = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _write_atomically(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
