"""The table of every run, with its curves behind it."""

import math

from experiments.report import text
from experiments.report.markup import Markup, element, section
from experiments.report.study import tables
from experiments.report.study.costs import COSTS
from experiments.report.study.findings import Findings
from experiments.report.study.reading import WITHIN, Cell
from experiments.report.study.tables import Column, Entry

LOSSES = ("validation", "test", "retained")
SHOWN = [cost for cost in COSTS if cost.name in ("trainable_parameters", "peak_bytes", "wall_seconds")]


def cells(found: Findings) -> Markup:
    """Return the section with every cell that was declared."""
    study = found.study
    axes = [*study.several, *(axis for axis in WITHIN if len(study.axes.get(axis, ())) > 1)]
    columns = tables.settings_columns(found, axes) + [Column(title="status", filter=True)]
    columns += [Column(title=f"{split} {found.score_name}", number=True, largest_first=True) for split in LOSSES[:2]]
    columns += [Column(title=f"{split} loss", number=True) for split in LOSSES]
    columns += [Column(title=cost.title.lower(), number=True) for cost in SHOWN]
    configuration = {cell.id: one for one in found.configurations for cell in one.cells}
    rows = []
    for place, cell in enumerate(study.cells):
        one = configuration[cell.id]
        attributes = {"data_cell": place, "data_of": one.index, "data_label": one.name(cell)}
        rows.append((attributes, [*tables.settings(found, cell.settings, axes), *_measured(found, cell)]))
    lead = "One row a run. Select a row for its curves; a heading sorts."
    shown = tables.table("All runs", columns, rows, class_="cells")
    return section("cells", "Every run", element("p", lead, class_="lead"), shown)


def _measured(found: Findings, cell: Cell) -> list[Entry]:
    step = cell.result.get("diverged_at")
    scores = [cell.number(split, "score") for split in LOSSES[:2]]
    losses = [cell.number(split, "loss") for split in LOSSES]
    costs = [(cost, cell.number("costs", cost.name)) for cost in SHOWN]
    return [
        Entry(shown=cell.status if step is None else f"{cell.status} at step {step}"),
        *(Entry(shown=found.scale.written(value), by=value) for value in scores),
        *(Entry(shown="" if math.isnan(value) else text.number(value), by=value) for value in losses),
        *(Entry(shown=cost.written(value), by=value) for cost, value in costs),
    ]
