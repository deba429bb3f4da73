"""The numbers of the line charts, for the page and for the figures.

A chart is a dictionary: `title`, the axes `x` and `y` (`label`, `form`, `log`, …), `points` where each is marked,
`own` where it belongs to the details of a configuration, `parts` what the lines' `part` is, and `lines`. A line has
`c`, the index of its configuration, `x`, `y`, where it has a band `low` and `high`, and `marked`, the place of the
point that was chosen.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.report import text
from experiments.report.study.configurations import Configuration, together
from experiments.report.study.costs import forgotten
from experiments.report.study.findings import Findings
from experiments.report.study.reading import Value
from experiments.study import statistics

POINTS = 64  # a curve is averaged in at most so many bins of steps

Line = dict[str, Any]


def line_axis(found: Findings) -> str | None:
    """Return the axis whose values are the lines of a chart: the first with a handful of numbers, else the first."""
    ordered = [axis for axis in found.study.varied if is_ordered(found.study.axes[axis])]
    return next((axis for axis in ordered if len(found.study.axes[axis]) <= 8), next(iter(found.study.varied), None))


def is_ordered(values: Sequence[Value]) -> bool:
    """Return whether the values of an axis are numbers, beside those that have none."""
    there = [value for value in values if value is not None]
    return len(there) > 1 and all(isinstance(value, int | float) and not isinstance(value, bool) for value in there)


def others(found: Findings, one: Configuration, axis: str | None) -> str:
    """Return what a configuration is called among those that share all but one axis."""
    return together(one.settings, [name for name in found.study.varied if name != axis])


def charts(found: Findings) -> dict[str, dict[str, Any]]:
    """Return the charts by name, those that have lines."""
    name = found.score_name
    score = {"label": name, "form": "percent" if found.scale.fraction else "number"}
    step, loss = {"label": "step"}, {"label": "loss"}
    rates = {"label": "learning rate", "form": "rate", "log": True, "few": True}
    every = found.configurations
    made = {
        "sweep": {
            "title": f"Validation {name} by learning rate", "x": rates, "y": score, "points": True, "own": True,
            "lines": [line for one in every if (line := _sweep(one))],
        },
        "train": {
            "title": "Training loss", "x": step, "y": loss, "own": True,
            "lines": [line for one in every if (line := _band(one, "train", "loss"))],
        },
        "validation": {
            "title": f"Validation {name}", "x": step, "y": score, "points": True, "own": True,
            "lines": [line for one in every if (line := _band(one, "validation", "score"))],
        },
        "validation_loss": {
            "title": "Validation loss", "x": step, "y": loss, "points": True, "own": True,
            "lines": [line for one in every if (line := _band(one, "validation", "loss"))],
        },
        "forgetting": {
            "title": "Learning against forgetting", "x": {"label": "retained loss added"}, "y": score, "points": True,
            "own": True, "scatter": True, "each": "rate",
            "lines": [line for one in every if (line := _forgetting(one))],
        },
        "effective": {
            "title": "Effective rank of ΔW", "x": {"label": "layer", "few": True},
            "y": {"label": "effective rank", "from": 0}, "points": True, "parts": "Leaf",
            "lines": _effective_ranks(found),
        },
        "spectra": {
            "title": "Singular values of ΔW", "x": {"label": "index"}, "y": {"label": "singular value", "log": True},
            "parts": "Leaf", "lines": _spectra(found),
        },
    }  # fmt: skip
    for chart in made.values():
        least = 0.0 if chart["y"].get("log") else -math.inf
        chart["lines"] = [line for line in chart["lines"] if _has_points(line["y"], above=least)]
    return {name: chart for name, chart in made.items() if chart["lines"]}


def _has_points(values: Sequence[float | None], *, above: float) -> bool:
    return any(value is not None and above < value < math.inf for value in values)


def _sweep(one: Configuration) -> Line | None:
    """Validation scores at every rate, the mean and the range over the seeds; nothing where there is one rate alone."""
    if one.choice is None or len(one.rates) < 2:
        return None
    rates = [rate for rate in one.rates if one.at(rate)]
    scores = [one.validation(rate) for rate in rates]
    return {
        "c": one.index,
        "x": rates,
        "y": [sum(values) / len(values) for values in scores],
        "low": [min(values) for values in scores],
        "high": [max(values) for values in scores],
        "marked": rates.index(one.choice.rate),
    }


def _band(one: Configuration, split: str, name: str) -> Line | None:
    """The mean over the seeds at the chosen rate, with its interval."""
    logged = [curve for cell in one.chosen if (curve := cell.curve.get(split, {})).get(name)]
    if not logged:
        return None
    steps = max((curve["step"] for curve in logged), key=len)
    values_SxT = np.full((len(logged), len(steps)), np.nan)  # a diverged run ends early
    for row, curve in zip(values_SxT, logged, strict=True):
        row[: len(curve[name])] = curve[name]
    x, y_SxT = binned(steps, values_SxT)
    band = statistics.band(y_SxT)
    bounds = (one.scale.worst, one.scale.best) if name == "score" and one.scale.fraction else (-np.inf, np.inf)
    low, high = (np.clip(ends, *bounds).tolist() for ends in (band.low, band.high))
    return {"c": one.index, "x": x, "y": band.mean.tolist(), "low": low, "high": high}


def binned(steps: Sequence[float], values_SxT: np.ndarray, points: int = POINTS) -> tuple[list[float], np.ndarray]:
    """Return the means of at most `points` bins of as many neighbouring steps, and of the values there.

    >>> binned([1, 2, 3, 4], np.array([[4.0, 2.0, 1.0, 3.0]]), points=2)
    ([1.5, 3.5], array([[3., 2.]]))
    """
    width = -(-len(steps) // points)
    bins = [slice(start, start + width) for start in range(0, len(steps), width)]
    return [float(np.mean(steps[one])) for one in bins], np.stack(
        [values_SxT[:, one].mean(axis=1) for one in bins], axis=1
    )


def _forgetting(one: Configuration) -> Line | None:
    """What was learnt and what was lost at every rate, means over the seeds that did not diverge."""
    points = []
    for rate in one.rates:
        kept = [cell for cell in one.at(rate) if cell.status == "finished" and not math.isnan(forgotten(cell))]
        if kept:
            lost, learnt = ([forgotten(cell) for cell in kept], [cell.number("test", "score") for cell in kept])
            points.append((float(np.mean(lost)), float(np.mean(learnt)), text.rate(rate)))
    if not points:
        return None
    x, y, names = zip(*points, strict=True)
    return {"c": one.index, "x": x, "y": y, "names": names}


def _analysed(found: Findings, name: str) -> list[tuple[Configuration, Mapping[str, list[Any]]]]:
    """What `analysis.json` has of that name for each configuration, layer by layer."""
    there = found.study.analysis[name]
    first = [(one, next((cell.id for cell in one.chosen if cell.id in there), None)) for one in found.configurations]
    return [(one, by_leaf(there[identifier])) for one, identifier in first if identifier is not None]


def by_leaf(by_path: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Return values by leaf and layer: of a stack of layers as they are, of numbered paths joined in one leaf.

    >>> by_leaf({"stack/kernel": [1, 2], "layer_0/kernel": [3], "layer_1/kernel": [4]})
    {'layer_*/kernel': [3, 4], 'stack/kernel': [1, 2]}
    """
    joined: dict[str, list[Any]] = {}
    for path in sorted(by_path, key=_by_number):
        leaf = re.sub(r"\d+", "*", path, count=1) if len(by_path[path]) == 1 else path
        joined.setdefault(leaf, []).extend(by_path[path])
    return joined


def _by_number(path: str) -> list[int | str]:
    """What sorts `layer_10` behind `layer_9`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def _effective_ranks(found: Findings) -> list[Line]:
    return [
        {"c": one.index, "part": leaf, "x": list(range(len(layers))), "y": layers}
        for one, leaves in _analysed(found, "effective_rank")
        for leaf, layers in leaves.items()
    ]


def _spectra(found: Findings) -> list[Line]:
    """The singular values of the first, the middle and the last layer of every leaf."""
    return [
        {"c": one.index, "part": f"{leaf}, layer {layer}", "x": list(range(1, len(values) + 1)), "y": values}
        for one, leaves in _analysed(found, "spectra")
        for leaf, layers in leaves.items()
        for layer in sorted({0, len(layers) // 2, len(layers) - 1})
        if (values := [value for value in layers[layer] if value > 0])
    ]
