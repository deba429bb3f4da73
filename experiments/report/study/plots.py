"""The sections whose charts `study.js` draws from the embedded numbers."""

from experiments.report.markup import Markup, element, section
from experiments.report.study import colours, costs
from experiments.report.study.findings import Findings

MAPS = 12  # of the subspaces, how many are shown at once


def sweeps(found: Findings) -> Markup:
    """Return the learning-rate sweeps; empty where there was one rate alone."""
    swept = [one for one in found.configurations if one.choice is not None and len(one.rates) > 1]
    if not swept:
        return Markup()
    lead = (
        f"Validation {found.score_name} against the learning rate: means, and bands from the worst to the best seed. "
        "The ring marks the rate that was chosen. Where that is the first or the last, the best one may lie beyond."
    )
    return _lines("sweeps", "Learning rates", lead, "sweep")


def curves(found: Findings) -> Markup:
    """Return the curves over the steps; empty before a run has ended."""
    if not any(cell.curve for one in found.configurations for cell in one.chosen):
        return Markup()
    lead = "At the chosen rate: means over the seeds, with 95 % intervals as bands."
    return _lines("curves", "Training", lead, "train validation validation_loss")


def fronts(found: Findings) -> Markup:
    """Return the scores against the costs; empty where no cost has two values."""
    if not costs.fronts(found)["charts"]:
        return Markup()
    lead = (
        f"Test {found.score_name} against what it costs. The dashed line joins the configurations that none is both "
        "better and cheaper than, as measured: neighbours whose intervals overlap may change places."
    )
    return section(
        "fronts", "Quality and cost", element("p", lead, class_="lead"), element("div", class_="fronts")
    )  # fmt: skip


def spectra(found: Findings) -> Markup:
    """Return effective ranks and singular values of the updates by layer; empty without `analysis.json`."""
    if not found.study.analysis["spectra"] and not found.study.analysis["effective_rank"]:
        return Markup()
    lead = (
        "ΔW is what an adapter adds to a weight, at the chosen rate, in the first seed that was kept. Its effective "
        "rank is the exponential of the entropy of its singular values: how many directions it really uses."
    )
    return _lines("spectra", "What the updates look like", lead, "effective spectra")


def _lines(identifier: str, title: str, lead: str, names: str) -> Markup:
    return section(
        identifier,
        title,
        element("p", lead, class_="lead"),
        element("div", class_="facets", data_lines=names),
    )


def names(found: Findings, *cells: str) -> list[str]:
    """Return what some cells of `analysis.json` are called: their configurations, with the seeds where these agree."""
    known = {cell.id: (one.label, cell) for one in found.configurations for cell in one.cells}
    there = [known[cell] for cell in cells]
    if len({label for label, _ in there}) > 1:
        return [label for label, _ in there]
    return [f"{label}, seed {cell.settings.get('seed')}" for label, cell in there]


def subspaces(found: Findings) -> Markup:
    """Return how far the leading directions of two updates agree; empty where none were compared."""
    compared = found.study.analysis["subspaces"]
    if not compared:
        return Markup()
    maps = []
    for one in compared:
        phi = one["phi"]
        digits = "".join(f"{round(99 * min(max(value, 0.0), 1.0)):02d}" for row in phi for value in row)
        a, b = names(found, one["a"], one["b"])
        where = f"{one['path']}, layer {one['layer']}, {one['side']} side"
        caption = element("figcaption", element("h3", f"{a} ↓ {b} →"), element("p", where))
        canvas = element(
            "canvas",
            data_phi=digits,
            data_width=len(phi[0]),
            data_colours=" ".join(colours.SCALE),
            role="img",
            aria_label=f"φ of {len(phi)} by {len(phi[0])} leading directions; φ(1, 1) = {phi[0][0]:.2f}",
        )
        corners = f"φ(1, 1) = {phi[0][0]:.2f}, φ({len(phi)}, {len(phi[0])}) = {phi[-1][-1]:.2f}"
        maps.append(element("figure", caption, canvas, element("output", corners), class_="subspace card"))
    lead = (
        "φ(i, j) says how much of the span of the first i singular directions of one update lies in that of the first "
        "j of the other: 0 (dark) none, 1 (light) all. Down i, across j. The input side is mostly the adapter’s random "
        "start, so agreement there is no finding."
    )
    return section(
        "subspaces",
        "Do they find the same directions?",
        element("p", lead, class_="lead"),
        element("div", *maps[:MAPS], class_="subspaces"),
        element(
            "details",
            element("summary", f"{len(maps) - MAPS} more pairs"),
            element("div", *maps[MAPS:], class_="subspaces"),
        )
        if len(maps) > MAPS
        else None,
    )
