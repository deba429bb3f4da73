"""The numbers embedded in the page for its charts, as JSON that stays small with a thousand cells.

Numbers are rounded to four digits, and the steps that many curves share are stored once.
"""

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.report.markup import Markup, element
from experiments.report.study import costs, lines
from experiments.report.study.configurations import words
from experiments.report.study.findings import OPEN, SEPARATED, UNSEPARATED, Findings
from experiments.report.study.reading import Cell

VERDICTS = {SEPARATED: "", UNSEPARATED: "", OPEN: "open"}  # what the table says of a difference


def data(found: Findings) -> Markup:
    """Return the script element with everything that `study.js` draws."""
    study, fraction = found.study, found.scale.fraction
    places = {axis: {value: i for i, value in enumerate(study.axes[axis])} for axis in study.varied}
    by = lines.line_axis(found)
    grids: list[list[float]] = []
    whole = {
        "score": {
            "name": found.score_name,
            "form": "percent" if fraction else "number",
            "difference": "points" if fraction else "signed",
        },
        "axes": [
            {
                "name": axis.replace("_", " "),
                "values": ["" if value is None else words(axis, value) for value in study.axes[axis]],
                "ordered": lines.is_ordered(study.axes[axis]),
            }
            for axis in study.varied
        ],
        "lineAxis": study.varied.index(by) if by else 0,
        "configurations": [
            {"label": one.label, "at": [places[axis][one.settings[axis]] for axis in study.varied]}
            for one in found.configurations
        ],
        "lines": lines.charts(found),
        "fronts": costs.fronts(found),
        "cells": [_cell(cell, grids) for cell in study.cells],
        "grids": grids,
        "pairs": _pairs(found),
    }
    return element("script", script_json(_rounded(whole)), type="application/json", id="study")


def script_json(value: object) -> Markup:
    r"""Return JSON that may stand in a script element, which nothing in it can end early.

    >>> script_json({"name": "</script>"})
    '{"name":"\\u003c/script>"}'
    """
    written = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return Markup(written.replace("<", "\\u003c"))


def _rounded(value: Any) -> Any:
    """Floats with four significant digits, None for those that are not finite."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        short = float(f"{value:.4g}")
        return int(short) if short.is_integer() and abs(short) < 1e15 else short
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def _cell(cell: Cell, grids: list[list[float]]) -> dict[str, Any]:
    """One run's curves; `train` and `validation` say where their steps are in `grids`."""
    trained, evaluated = cell.curve.get("train", {}), cell.curve.get("validation", {})
    curves: dict[str, Any] = {}
    if trained.get("step"):
        names = [name for name in ("loss", "gradient_norm") if trained.get(name)]
        x, y_NxT = lines.binned(trained["step"], np.array([trained[name] for name in names]))
        curves |= {"train": _place(x, grids)} | dict(zip(names, y_NxT.tolist(), strict=True))
    if evaluated.get("step"):
        curves["validation"] = _place(evaluated["step"], grids)
        curves |= {f"validation_{name}": evaluated[name] for name in ("loss", "score") if name in evaluated}
    return curves


def _place(steps: list[float], grids: list[list[float]]) -> int:
    if steps not in grids:
        grids.append(steps)
    return grids.index(steps)


def _pairs(found: Findings) -> dict[str, Any] | None:
    """The differences of all pairs: the first configuration's to those after it, then the second's, and so on."""
    if found.reference is None or not found.comparisons:
        return None
    place = {one.label: i for i, one in enumerate(found.compared)}
    reference, count, verdicts = place[found.reference.label], len(found.compared), list(VERDICTS)
    there: dict[tuple[int, int], list[float]] = {}
    for one in found.comparisons:
        value, low, high = one.difference.value, one.difference.low, one.difference.high
        verdict = verdicts.index(found.verdict(one))
        there[place[one.a], place[one.b]] = [value, low, high, verdict]
        there[place[one.b], place[one.a]] = [-value, -high, -low, verdict]
    return {
        "members": [one.index for one in found.compared],
        "reference": reference,
        "verdicts": list(VERDICTS.values()),
        "rows": [there[pair] for pair in itertools.combinations(range(count), 2)],
    }
