"""`results.csv`: one row a run, one column a number, for other tools."""

import csv
import io
import math

from experiments.report.study.costs import COSTS
from experiments.report.study.findings import Findings

MEASURED = [(split, name) for split in ("validation", "test", "retained") for name in ("score", "loss")]


def results_csv(found: Findings) -> str:
    """Return the table as text; a number that was not measured is an empty field.

    The columns are the cell's id and configuration, every axis, the status, whether its learning rate is the chosen
    one, scores and losses by split after training and (`base_…`) before it, and the costs in bytes and seconds.
    """
    axes = list(found.study.axes)
    names = [f"{split}_{name}" for split, name in MEASURED]
    header = ["cell", "configuration", *axes, "status", "diverged_at", "chosen_rate", *names]
    header += [f"base_{name}" for name in names] + ["tokens", "group"] + [cost.name for cost in COSTS]
    written = io.StringIO()
    rows = csv.writer(written, lineterminator="\n")
    rows.writerow(header)
    configuration = {cell.id: one for one in found.configurations for cell in one.cells}
    for cell in found.study.cells:
        one = configuration[cell.id]
        chosen = one.choice is not None and cell.settings.get("lr") == one.choice.rate
        row = [cell.id, one.label, *(cell.settings[axis] for axis in axes), cell.status, cell.result.get("diverged_at")]
        row += ["" if one.choice is None else int(chosen)]
        row += [cell.number(*keys) for keys in MEASURED] + [cell.number("base", *keys) for keys in MEASURED]
        row += [cell.result.get(name) for name in ("tokens", "group")]
        row += [cell.number("costs", cost.name) for cost in COSTS]
        rows.writerow(["" if isinstance(value, float) and math.isnan(value) else value for value in row])
    return written.getvalue()
