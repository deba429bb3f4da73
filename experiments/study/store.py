"""The directory of a study: files that appear whole or not at all, and claims by which processes share the work.

config.json             the resolved settings
environment.json        command, versions, machine, seed
study.json              axes, problem, every declared run (cell), and the groups that are trained together
groups/ID.json          what a finished group took; ID.npz while it trains: what a killed one goes on from
cells/ID/result.json    a run's outcome; it is finished exactly when this is there
cells/ID/curve.json     its losses while it trained
cells/ID/items.npz      loss and score of every held-out example
cells/ID/adapter        the adapter, for `lorax.restore`
costs/                  what a run of each configuration takes
analysis.json           spectra and subspaces of the adapters at the chosen learning rates
results.csv, figures, report.html: made from the files above

Several processes, on one machine or on several over a shared file system, work in one directory. A claim is a locked
file: the operating system releases it when the process ends, however that happens.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from experiments.training import settings
from experiments.training.run_directory import MAY_CHANGE


class StudyDirectory:
    """Files and claims of one study.

    Args:
        path: the directory; made if it is not there.

    Raises:
        ValueError: if it holds something else.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Make the directory."""
        self.path = pathlib.Path(path)
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / "locks").exists():
            raise ValueError(f"{self.path}: not empty, and no study (it has no locks); give another --config.run_dir")
        (self.path / "locks").mkdir(parents=True, exist_ok=True)

    def check_same(self, config: Mapping[str, Any]) -> None:
        """Check that the directory holds no study with other settings.

        Raises:
            ValueError: with the settings that differ.
        """
        stored = self.read("config.json")
        changed = settings.differences(stored, config) if stored is not None else []
        changed = [line for line in changed if not line.startswith(MAY_CHANGE)]
        if changed:
            raise ValueError(
                f"{self.path}: holds a study with other settings, which cannot go on with these:\n  "
                + "\n  ".join(changed)
                + "\nGive another --config.run_dir, or delete that directory to start anew."
            )

    def exists(self, name: str) -> bool:
        """Return whether there is such a file."""
        return (self.path / name).exists()

    def read(self, name: str) -> dict[str, Any] | None:
        """Return the JSON object in the file `name`; None if there is no such file."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Write the JSON object to the file `name`; numbers that are not finite become null."""
        text = json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False)
        with self._replacing(name) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def write_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write arrays to the file `name`, an npz."""
        with self._replacing(name) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    def read_arrays(self, name: str) -> dict[str, np.ndarray] | None:
        """Return the arrays of an npz; None if there is no such file."""
        if not self.exists(name):
            return None
        with np.load(self.path / name) as arrays:
            return dict(arrays)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def claimed(self, name: str, *, wait: bool = False) -> Iterator[bool]:
        """Claim something by name while the block runs; a kill releases it.

        Args:
            name: of what is claimed.
            wait: until it is free.

        Yields:
            Whether it is this process's: not if another one has it, and there was no waiting.
        """
        with (self.path / "locks" / name).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    @contextlib.contextmanager
    def _replacing(self, name: str) -> Iterator[pathlib.Path]:
        # Only who has claimed what a file belongs to writes it: its temporary name is nobody else's.
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        yield temporary
        os.replace(temporary, path)


def finite(value: Any) -> Any:
    """Return JSON without numbers that JSON has not: null in place of NaN and infinity.

    >>> finite({"loss": [0.5, float("nan")]})
    {'loss': [0.5, None]}
    """
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
