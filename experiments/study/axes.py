"""The axes of a study and its cells: a run for every combination of values.

A value that means nothing to a run's method is None (the rank of full fine-tuning), and runs that are then the same
are one.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from ml_collections import config_dict

import lorax
from experiments.study.adaptation import QUANTIZED, Adaptations, find
from experiments.study.problem import examples
from experiments.study.settings import AXES
from lorax import analysis

Scalar = str | int | float | None

WITHIN = ("lr", "seed")  # the axes that a configuration leaves open


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        id: its name, made of the values of the axes that have several.
        settings: its value on every axis; None where it means nothing to the method.
    """

    id: str
    settings: dict[str, Scalar]

    @property
    def configuration(self) -> tuple[Scalar, ...]:
        """The values of all axes but the learning rate and the seed."""
        return tuple(value for axis, value in self.settings.items() if axis not in WITHIN)


def cells(config: config_dict.ConfigDict, adaptations: Adaptations) -> list[Cell]:
    """Return the runs that a configuration declares.

    Raises:
        ValueError: an axis has a value that the problem lacks, or a budget is below the smallest rank.
    """
    product = itertools.product(*(config.axes[axis] for axis in AXES))
    resolved = [_resolved(dict(zip(AXES, values, strict=True)), adaptations) for values in product]
    distinct = list({tuple(settings.values()): settings for settings in resolved}.values())
    several = [axis for axis in AXES if len({settings[axis] for settings in distinct} - {None}) > 1]
    return [Cell(_name(settings, several), settings) for settings in distinct]


def values(found: list[Cell]) -> dict[str, list[Scalar]]:
    """Return the values that occur on every axis: numbers by size, names as they were declared."""
    of_axis: dict[str, list[Any]] = {axis: [] for axis in AXES}
    for cell in found:
        for axis, value in cell.settings.items():
            if value is not None and value not in of_axis[axis]:
                of_axis[axis].append(value)
    is_number = lambda x: isinstance(x, int | float)
    return {axis: sorted(seen) if all(map(is_number, seen)) else seen for axis, seen in of_axis.items()}


def _resolved(given: dict[str, Any], adaptations: Adaptations) -> dict[str, Scalar]:
    """Return the values of one run: what its method has no use for is None, what is derived is there."""
    method = given["method"]
    used, size = adaptations.axes_used(method), find(method).size
    settings = {
        axis: value if axis in used or axis not in ("targets", "alpha", "initializer", "dropout") else None
        for axis, value in given.items()
    }
    settings["quantize"] = QUANTIZED.get(method, given["quantize"])
    settings["examples"] = _examples(given["examples"], adaptations)
    settings["budget"] = given["budget"] or None if size else None
    settings["rank"] = (given["rank"] if size == "lora.rank" else adaptations.size(method)) if size else None
    if settings["budget"]:
        settings["rank"] = _rank_within(settings["budget"], settings, adaptations)
    return settings


def _examples(wanted: int, adaptations: Adaptations) -> int:
    there = examples(adaptations.problem.data["train"])
    if wanted > there:
        raise ValueError(
            f"config.axes.examples = {wanted}: the problem {adaptations.problem.name} has {there} examples to train on"
        )
    return wanted or there


def _rank_within(budget: int, settings: dict[str, Scalar], adaptations: Adaptations) -> int:
    """Return the largest rank (or width, or length) that trains at most `budget` numbers beside what always is."""
    sites = adaptations.base({"method": "head", "quantize": "none"}).sites
    spec = lambda rank: lorax.Spec(adaptations.rules(settings | {"rank": rank}))
    try:
        return analysis.rank_for_budget(spec, sites, budget)
    except ValueError as error:
        where = f"{settings['method']}{' at ' + str(settings['targets']) if settings['targets'] else ''}"
        raise ValueError(f"config.axes.budget = {budget}, {where}: {error}") from None


def _name(settings: dict[str, Scalar], several: list[str]) -> str:
    given = [(axis, settings[axis]) for axis in several if settings[axis] is not None]
    return ",".join(f"{axis}={value}" for axis, value in given) or "run"
