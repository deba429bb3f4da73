"""What configurations cost: the table, and the fronts of quality against each cost."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from experiments.report import text
from experiments.report.markup import Markup, element, section
from experiments.report.study import tables
from experiments.report.study.configurations import Configuration
from experiments.report.study.findings import Findings
from experiments.report.study.reading import Cell
from experiments.study import statistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Something that a run takes.

    Attributes:
        name: in `result.json`.
        title: over its column.
        form: how charts write it: a name of `FORMS` in `figures.py` and `chart.js`.
        axis: what its axis in a front is called; empty: there is no front.
        log: whether that axis is logarithmic.
    """

    name: str
    title: str
    form: str
    axis: str = ""
    log: bool = False

    def written(self, value: float) -> str:
        """Return it with its unit, empty where it was not measured."""
        forms: dict[str, Callable[[float], str]] = {"count": text.count, "size": text.size, "seconds": text.seconds}
        return "" if math.isnan(value) else forms[self.form](value)


COSTS = (
    Cost(name="trainable_parameters", title="Trained", form="count", axis="trained parameters", log=True),
    Cost(name="checkpoint_bytes", title="Checkpoint", form="size"),
    Cost(name="peak_bytes", title="Peak memory", form="size", axis="peak memory of the step"),
    Cost(name="flops", title="FLOPs a step", form="count", axis="FLOPs a step"),
    Cost(name="step_seconds", title="Time a step", form="seconds"),
    Cost(name="wall_seconds", title="Wall time", form="seconds", axis="wall time of a run"),
    Cost(name="compile_seconds", title="Compilation", form="seconds"),
    Cost(name="merged_latency_seconds", title="Latency, merged", form="seconds"),
    Cost(name="unmerged_latency_seconds", title="Latency, unmerged", form="seconds", axis="latency, unmerged"),
)


def cost_of(one: Configuration, name: str) -> float:
    """Return the mean of a cost over a configuration's runs at the chosen rate, NaN where it was not measured."""
    return _mean([cell.number("costs", name) for cell in one.chosen])


def forgotten(cell: Cell) -> float:
    """Return by how much training raised the loss on what the base could do before; NaN where it was not measured."""
    return cell.number("retained", "loss") - cell.number("base", "retained", "loss")


def _mean(values: Sequence[float]) -> float:
    there = [value for value in values if not math.isnan(value)]
    return sum(there) / len(there) if there else math.nan


def costs(found: Findings) -> Markup:
    """Return the section on what each configuration costs, the mean over its runs at the chosen rate."""
    known = [cost for cost in COSTS if any(not math.isnan(cost_of(one, cost.name)) for one in found.judged)]
    if not known:
        return Markup()
    columns = tables.settings_columns(found, found.study.several)
    columns += [tables.Column(title=cost.title, number=True) for cost in known]
    rows = []
    for one in found.judged:
        values = [(cost, cost_of(one, cost.name)) for cost in known]
        entries = [tables.Entry(shown=cost.written(value), by=value) for cost, value in values]
        settings = tables.settings(found, one.settings, found.study.several)
        rows.append(({"data_configuration": one.index, "data_label": one.label}, settings + entries))
    lead = (
        "Memory and FLOPs are those of the compiled step of one run alone; times are the run’s share of the program "
        "that trained it with others. Latency is of a forward pass with the adapter merged into the weights, and "
        "beside them; empty where a method cannot be merged."
    )
    shown = tables.table("Costs of the configurations", columns, rows, class_="costs")
    return section("costs", "What it costs", element("p", lead, class_="lead"), shown)


def fronts(found: Findings) -> dict[str, Any]:
    """Return the score and the costs of every configuration, and which of them are on the fronts.

    `charts` has an entry for each cost of which there are several values: `title`, `x` (`label`, `form`, `log`),
    `values` by configuration, and `front`, the configurations that none is both better and cheaper than, the cheapest
    first. `y`, `low` and `high` are the scores by configuration, None before there are any.
    """
    every, judged = found.configurations, {one.index: one for one in found.judged}
    measured = [(cost.axis, cost.form, cost.log, [cost_of(one, cost.name) for one in every]) for cost in COSTS]
    lost = [_mean([forgotten(cell) for cell in one.chosen]) for one in every]
    charts = []
    for title, form, log, values in [*measured, ("retained loss added", "number", False, lost)]:
        there = [c for c in judged if not math.isnan(values[c])]
        if not title or len({values[c] for c in there}) < 2:
            continue
        best = statistics.pareto([judged[c].interval.value for c in there], [values[c] for c in there])
        charts.append({
            "title": f"Against {title}",
            "x": {"label": title, "form": form, "log": log},
            "values": values,
            "front": sorted((there[i] for i in best), key=values.__getitem__),
        })  # fmt: skip
    intervals = [one.interval for one in every]
    return {
        "charts": charts,
        "y": [i and i.value for i in intervals],
        "low": [i and i.low for i in intervals],
        "high": [i and i.high for i in intervals],
    }
