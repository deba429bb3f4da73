"""The logs of a run as the report reads them; nothing here or in the page comes from anywhere else.

A run's directory holds `config.json`, `environment.json`, `sites.json`, `budget.json`, `metrics.jsonl`,
`evaluation/before.json`, `evaluation/after.json` and, once it has ended, `result.json`. All but the first may
be missing while the run goes on: the page then has fewer sections.
"""

import dataclasses
import json
import pathlib
from typing import Any

from experiments.training import metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunLogs:
    """Parsed logs; an empty dictionary or list for what the run has not written yet."""

    directory: pathlib.Path
    config: dict[str, Any]
    environment: dict[str, Any]
    sites: list[dict[str, Any]]
    budget: dict[str, Any]
    steps: list[dict[str, Any]]
    before: dict[str, Any]
    after: dict[str, Any]
    result: dict[str, Any]


def read(directory: pathlib.Path) -> RunLogs:
    """Read the logs under `directory`.

    Raises:
        ValueError: if that is no run's directory, or a log in it is not what a run writes.
    """
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory}: no config.json here; give the directory of a run, such as runs/quickstart")
    return RunLogs(
        directory=directory,
        config=read_object(directory / "config.json"),
        environment=read_object(directory / "environment.json"),
        sites=read_object(directory / "sites.json").get("sites", []),
        budget=read_object(directory / "budget.json"),
        steps=metrics.read_metrics(directory / "metrics.jsonl"),
        before=read_object(directory / "evaluation" / "before.json"),
        after=read_object(directory / "evaluation" / "after.json"),
        result=read_object(directory / "result.json"),
    )


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty where there is no file.

    Raises:
        ValueError: if the file holds something else.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: not JSON ({error}); the run writes it whole, so it was edited or cut since"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
