"""The logs of one or several studies as the report reads them; nothing in the page comes from anywhere else.

A study's directory holds `config.json`, `environment.json`, `study.json` with every cell that was declared, and for
each cell that has ended `cells/ID/result.json`, `curve.json` and `items.npz`. `analysis.json` comes last.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.report import logs

Value = str | float | bool | None  # of an axis: a JSON scalar; None where a cell has no such setting

WITHIN = ("lr", "seed")  # the axes that a configuration leaves open
DERIVED = ("rank",)  # may follow from a budget, and is not what was asked then
RUN = "run"  # the axis that tells the runs apart, where several were joined whose cells have the same settings
NOT_RUN = "not run"
SCORED = ("test", "retained")  # examples that have to be the same where studies are compared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: a value for each axis, and what came out.

    Attributes:
        id: unique in the report.
        settings: the value of every axis of the report, in the order of the axes.
        directory: where its logs are.
        result: its `result.json`; empty as long as the cell has not ended.
    """

    id: str
    settings: Mapping[str, Value]
    directory: pathlib.Path
    result: Mapping[str, Any]

    @property
    def status(self) -> str:
        """`finished`, `diverged` or `not run`."""
        return self.result.get("status", NOT_RUN)

    def number(self, *keys: str) -> float:
        """Return a number of the result by its keys, NaN where it is missing.

        >>> cell = Cell(id="1", settings={}, directory=pathlib.Path(), result={"test": {"score": 0.5}})
        >>> cell.number("test", "score"), cell.number("retained", "loss")
        (0.5, nan)
        """
        value: Any = self.result
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return _number(value)

    @functools.cached_property
    def items(self) -> dict[str, np.ndarray]:
        """Scores and losses, one entry an example; empty as long as the cell has not ended."""
        path = self.directory / "items.npz"
        if not path.is_file():
            return {}
        with np.load(path) as arrays:
            return {name: np.asarray(arrays[name], np.float64) for name in arrays}

    @functools.cached_property
    def curve(self) -> dict[str, dict[str, list[float]]]:
        """Numbers over the steps by split and name; empty as long as the cell has not ended."""
        logged = logs.read_object(self.directory / "curve.json")
        return {split: {name: [*map(_number, values)] for name, values in one.items()} for split, one in logged.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Everything that the report is made of.

    Attributes:
        directories: of the studies, as they were named.
        configs: the `config.json` of each.
        environments: the `environment.json` of each.
        axes: the values of each axis in the order of declaration, None last where it means nothing to some cells.
        problem: name, score and facts.
        cells: every declared cell.
        groups: what was trained together.
        analysis: `analysis.json` of all studies, with the report's cell ids.
    """

    directories: Sequence[pathlib.Path]
    configs: Sequence[Mapping[str, Any]]
    environments: Sequence[Mapping[str, Any]]
    axes: Mapping[str, list[Value]]
    problem: Mapping[str, Any]
    cells: Sequence[Cell]
    groups: Sequence[Mapping[str, Any]]
    analysis: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The studies' names, the title of the page."""
        return " + ".join(dict.fromkeys(str(config.get("name", "study")) for config in self.configs))

    @functools.cached_property
    def varied(self) -> list[str]:
        """The axes that it takes to tell configurations apart.

        An axis that follows from others is left out: the rank that a budget allows, settings that a method has not.
        """
        every = needed = [axis for axis, values in self.axes.items() if len(values) > 1 and axis not in WITHIN]
        derived = [axis for axis in DERIVED if axis in needed]
        for axis in [*derived, *(axis for axis in reversed(every) if axis not in (*derived, "method", RUN))]:
            rest = [other for other in needed if other != axis]
            if rest and self._distinct(rest) == self._distinct(every):
                needed = rest
        return needed

    @functools.cached_property
    def several(self) -> list[str]:
        """The axes that are shown of a configuration: `varied`, and others that have several values."""
        values = {axis: [value for value in values if value is not None] for axis, values in self.axes.items()}
        return [axis for axis in self.axes if axis in self.varied or (len(values[axis]) > 1 and axis not in WITHIN)]

    def _distinct(self, axes: Sequence[str]) -> int:
        return len({tuple(cell.settings[axis] for axis in axes) for cell in self.cells})


def is_study(directory: pathlib.Path) -> bool:
    """Return whether `directory` is a study's, not a single run's."""
    return (directory / "study.json").is_file()


def read(directories: Sequence[pathlib.Path]) -> Study:
    """Read the studies under `directories` and join them.

    Cells whose settings are those of a cell of another study are told apart by one more axis, the run.

    Raises:
        ValueError: if one is no study's directory, a log is not what a study writes, or the problems differ.
    """
    studies = [logs.read_object(directory / "study.json") for directory in directories]
    for directory, study in zip(directories, studies, strict=True):
        if not study:
            raise ValueError(f"{directory}: no study.json here; give the directory of a study, such as runs/ablation")
    problems = [study["problem"] for study in studies]
    for directory, problem in zip(directories, problems, strict=True):
        if (problem["name"], problem["score_name"]) != (problems[0]["name"], problems[0]["score_name"]):
            raise ValueError(
                f"{directory}: its problem is {problem['name']} ({problem['score_name']}), that of {directories[0]} is "
                f"{problems[0]['name']} ({problems[0]['score_name']}); such scores do not compare: report them apart"
            )
        if others := _other_examples(problem, problems[0]):
            raise ValueError(
                f"{directory}: its {' and '.join(others)} examples are not those of {directories[0]}; such scores do "
                "not compare: report them apart"
            )
    axes = list(dict.fromkeys(axis for study in studies for axis in study["axes"]))
    declared = [
        [{axis: cell["settings"].get(axis) for axis in axes} for cell in study["cells"]] for study in studies
    ]  # fmt: skip
    names = _run_names(directories)
    if _coincide(declared):
        axes.append(RUN)
        for name, settings in zip(names, declared, strict=True):
            for one in settings:
                one[RUN] = name
    prefixes = [f"{name}/" for name in names] if len(studies) > 1 else [""]
    cells = [
        _cell(directory / "cells" / cell["id"], prefix + cell["id"], settings)
        for directory, prefix, study, rows in zip(directories, prefixes, studies, declared, strict=True)
        for cell, settings in zip(study["cells"], rows, strict=True)
    ]
    order = {axis: [v for study in studies for v in study["axes"].get(axis, [])] for axis in axes}
    order[RUN] = list(names)
    return Study(
        directories=directories,
        configs=[logs.read_object(directory / "config.json") for directory in directories],
        environments=[logs.read_object(directory / "environment.json") for directory in directories],
        axes={axis: _values(order[axis], [cell.settings[axis] for cell in cells]) for axis in axes},
        problem=problems[0],
        cells=cells,
        groups=[
            logs.read_object(path) for directory in directories for path in sorted(directory.glob("groups/*.json"))
        ],
        analysis=_analysis(directories, prefixes),
    )


def _other_examples(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    of_a, of_b = a.get("digests", {}), b.get("digests", {})
    return [name for name in SCORED if name in of_a and name in of_b and of_a[name] != of_b[name]]


def _run_names(directories: Sequence[pathlib.Path]) -> list[str]:
    """The shortest ends of the directories' paths that tell them apart.

    >>> _run_names([pathlib.Path("runs/a"), pathlib.Path("runs/b")])
    ['a', 'b']
    >>> _run_names([pathlib.Path("old/a"), pathlib.Path("new/a")])
    ['old/a', 'new/a']
    """
    parts = [directory.resolve().parts for directory in directories]
    if len(set(parts)) < len(parts):
        raise ValueError(f"the same directory is named twice: {', '.join(map(str, directories))}")
    length = next(n for n in range(1, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len(parts))
    return ["/".join(p[-length:]) for p in parts]


def _coincide(declared: Sequence[Sequence[Mapping[str, Value]]]) -> bool:
    every = [tuple(one.values()) for settings in declared for one in settings]
    return len(declared) > 1 and len(set(every)) < len(every)


def _cell(directory: pathlib.Path, identifier: str, settings: Mapping[str, Value]) -> Cell:
    return Cell(
        id=identifier, settings=settings, directory=directory, result=logs.read_object(directory / "result.json")
    )


def _values(order: Iterable[Value], found: Iterable[Value]) -> list[Value]:
    """The values in the order of declaration; numbers of several studies in the order of size; None last."""
    values = list(dict.fromkeys([*order, *found]))
    there = [value for value in values if value is not None]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in there):
        there.sort()
    return there + [None] * (None in values)


def _analysis(directories: Sequence[pathlib.Path], prefixes: Sequence[str]) -> dict[str, Any]:
    joined: dict[str, Any] = {"spectra": {}, "effective_rank": {}, "subspaces": []}
    for directory, prefix in zip(directories, prefixes, strict=True):
        analysis = logs.read_object(directory / "analysis.json")
        for name in ("spectra", "effective_rank"):
            joined[name] |= {prefix + cell: value for cell, value in analysis.get(name, {}).items()}
        joined["subspaces"] += [
            one | {"a": prefix + one["a"], "b": prefix + one["b"]} for one in analysis.get("subspaces", [])
        ]
    return joined


def _number(value: Any) -> float:
    # JSON has no NaN: it is logged as its name or as null
    return math.nan if value is None or isinstance(value, Mapping) else float(value)
