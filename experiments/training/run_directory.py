"""The directory of a run: what it holds, who may use it, and files that appear whole or not at all.

config.json         the resolved settings
environment.json    command, versions, machine, seed
sites.json          the adapted leaves and how each is computed
budget.json         parameters and bytes
metrics.jsonl       one line a step; `tensorboard/` has the same numbers
evaluation/         before.json and after.json: every held-out answer; step_*.json: those given while training
checkpoints/        what a killed run goes on from
adapter/            the result, for `lorax.restore`
adapter_peft/       the same for PEFT and servers that read its directories, where the method has a form there
result.json         the outcome, once there is one
report.html         made from the files above
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import config_dict

import lorax
from experiments.training import devices, settings

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml-collections")
MAY_CHANGE = ("config.run_dir:",)  # a run may be moved or named another way


class RunDirectory:
    """Paths and JSON files of one run, whose processes share the directory: what one reads, all do.

    Args:
        config: the resolved settings.

    Raises:
        ValueError: if the directory holds a run with other settings, or something that is not a run.
    """

    def __init__(self, config: config_dict.ConfigDict):
        """Create the directory, or check that its run has the same settings."""
        self.path = pathlib.Path(config.run_dir)
        devices.from_main(lambda: self._create(config))

    def _create(self, config: config_dict.ConfigDict) -> None:
        stored = self.path / "config.json"
        if stored.exists():
            self._check_same(json.loads(stored.read_text(encoding="utf-8")), config)
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(
                f"{self.path}: not empty, and no run (it has no config.json); give another --config.run_dir"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self.write("config.json", json.loads(settings.to_json(config)))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the directory while the block runs; a kill releases it.

        Raises:
            ValueError: if a process is at work in it.
        """
        with contextlib.ExitStack() as held:
            devices.from_main(lambda: self._lock(held))
            yield

    def _lock(self, held: contextlib.ExitStack) -> None:
        lock = held.enter_context((self.path / "lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path}: another process is running in it; wait for it, or stop it") from None

    def _check_same(self, stored: dict[str, Any], config: config_dict.ConfigDict) -> None:
        changed = settings.differences(stored, json.loads(settings.to_json(config)))
        changed = [line for line in changed if not line.startswith(MAY_CHANGE)]
        if changed:
            raise ValueError(
                f"{self.path}: holds a run with other settings, which cannot go on with these:\n  "
                + "\n  ".join(changed)
                + "\nGive another --config.run_dir, or delete that directory to start anew."
            )

    def read(self, name: str) -> dict[str, Any] | None:
        """Return the JSON object in the file `name`; None if there is no such file."""
        path = self.path / name
        return devices.from_main(lambda: json.loads(path.read_text(encoding="utf-8")) if path.exists() else None)

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Write the JSON object to the file `name`, whole or not at all; of several processes the main one does."""
        if not devices.is_main():
            return
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def bytes_on_disk(path: pathlib.Path) -> int:
    """Return how many bytes the files under `path` hold."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def environment(config: config_dict.ConfigDict, *, command: str, model: str) -> dict[str, Any]:
    """Return what a reader needs to repeat the run: the command that was typed, versions, machine, seed."""
    versions = {"python": platform.python_version(), "lorax": lorax.__version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    there = jax.devices()
    return {
        "command": command,
        "model": model,
        "versions": versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": f"{len(there)} × {there[0].device_kind}",
        "processes": jax.process_count(),
        "cores": os.cpu_count(),
        "seed": config.seed,
    }
