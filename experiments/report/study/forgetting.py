"""Learning against forgetting: the sweeps of learning rates as curves, and who forgets less for the same learning."""

import math

import numpy as np

from experiments.report import text
from experiments.report.markup import Markup, element, section
from experiments.report.study import tables
from experiments.report.study.configurations import Configuration
from experiments.report.study.costs import forgotten
from experiments.report.study.findings import Findings
from experiments.report.study.reading import Cell, Value
from experiments.report.study.tables import Column, Entry
from experiments.study import frontiers


def forgetting(found: Findings) -> Markup:
    """Return the section; empty where nothing was measured that the base could do before."""
    if all(math.isnan(forgotten(cell)) for cell in found.study.cells):
        return Markup()
    lead = (
        f"Test {found.score_name} against the loss that training added on what the base could do before. Each line is "
        "one configuration through its learning rates, because at one rate alone the rate decides: compare the lines "
        "where they learn alike, not single points."
    )
    return section(
        "forgetting",
        "Learning and forgetting",
        element("p", lead, class_="lead"),
        element("div", class_="facets", data_lines="forgetting"),
        _matched(found),
    )


def _matched(found: Findings) -> Markup | None:
    """How much more each configuration forgets than the reference, where both have learned the same."""
    reference = found.reference
    others = [one for one in found.compared if one is not reference and len(one.rates) > 1]
    if reference is None or not others:
        return None
    seeds = [seed for seed in reference.seeds if all(seed in one.seeds for one in others)]
    base = sweep(reference, seeds)
    columns = tables.settings_columns(found, found.study.several) + [
        Column(title="retained loss added, more", number=True),
        Column(title=f"at test {found.score_name}", words=True),
    ]
    rows = []
    for one in others:
        matched = _compared(sweep(one, seeds), base)
        entries = tables.settings(found, one.settings, found.study.several) + _entries(found, matched)
        rows.append(({"data_configuration": one.index, "data_label": one.label}, entries))
    about = (
        f"How much more loss than {reference.label} each adds on what the base could do, where both have learned the "
        "same: the mean over the part of their sweeps that they share, with a 95 % interval over the seeds, each by "
        "itself. Less is better."
    )
    shown = tables.table("Forgetting at equal learning", columns, rows)
    return element("div", element("p", about, class_="lead"), shown, class_="matched")


def sweep(one: Configuration, seeds: list[Value]) -> frontiers.Sweep:
    """Return what a configuration learned and forgot by seed and learning rate, NaN where a run diverged or is none."""
    by_place = {(cell.settings.get("seed"), cell.settings.get("lr")): cell for cell in one.cells}
    cells = [[by_place.get((seed, rate)) for rate in one.rates] for seed in seeds]
    return frontiers.Sweep(
        learned_SxR=np.array([[_learned(cell) for cell in row] for row in cells]),
        forgotten_SxR=np.array([[math.nan if cell is None else forgotten(cell) for cell in row] for row in cells]),
    )


def _learned(cell: Cell | None) -> float:
    return math.nan if cell is None or cell.status != "finished" else cell.number("test", "score")


def _compared(a: frontiers.Sweep, b: frontiers.Sweep) -> frontiers.Matched | None:
    every_seed_has_runs = all(np.isfinite(x.learned_SxR + x.forgotten_SxR).any(axis=1).all() for x in (a, b))
    return frontiers.compare_matched(a, b) if every_seed_has_runs else None


def _entries(found: Findings, matched: frontiers.Matched | None) -> list[Entry]:
    if matched is None:
        return [Entry(shown="", by=""), Entry(shown="they share no amount of learning")]
    d, ends = matched.difference, matched.targets_T[[0, -1]]
    interval = "" if math.isnan(d.low) else f" ({text.number(d.low, 2)} to {text.number(d.high, 2)})"
    where = " to ".join(found.scale.plain(float(end)) for end in ends)
    return [Entry(shown=text.number(d.value, 2) + interval, by=d.value), Entry(shown=where, by=float(ends[0]))]
