"""Heat maps: any two axes, a map for each combination of the others, in every square what was measured there.

Squares are cells of HTML tables, so they can be read out, copied and printed. All pairs of axes are in the page, and
`study.js` shows one at a time.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from experiments.report.markup import Markup, element, section
from experiments.report.study import colours
from experiments.report.study.configurations import Configuration, plain, together
from experiments.report.study.findings import Findings
from experiments.report.study.reading import RUN, Value

EDGES = {"low": "◂", "high": "▸"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """Which scores the ends of the colours stand for."""

    low: float
    high: float

    def share(self, value: float) -> float:
        """Return how far along the colours a score is."""
        return (value - self.low) / (self.high - self.low)


def colour_range(found: Findings) -> Range | None:
    """Return what the colours of all maps stand for; None before there is a score.

    It spans two widths of an interval at least, so that what may be noise does not run through all colours.
    """
    intervals = [one.interval for one in found.judged]
    if not intervals:
        return None
    low, high = min(i.value for i in intervals), max(i.value for i in intervals)
    widths = sorted(i.high - i.low for i in intervals)
    span = max(high - low, 2 * widths[len(widths) // 2], 1e-9)
    start = max(found.scale.worst, min((low + high - span) / 2, found.scale.best - span))  # no score lies beyond these
    return Range(low=start, high=start + span)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Map:
    """One map: its place on the other axes in words, and the configurations by row and column."""

    title: str
    rows: Sequence[Value]
    columns: Sequence[Value]
    squares: dict[tuple[Value, Value], Configuration]


def pairs(found: Findings) -> list[tuple[str, str | None]]:
    """Return which axes span the maps: every pair of those with several values, one alone where there is no other."""
    varied = sorted(found.study.varied, key=lambda axis: axis == RUN)
    return list(itertools.combinations(varied, 2)) or [(axis, None) for axis in varied]


def maps(found: Findings, down: str, across: str | None) -> list[Map]:
    """Return the maps of two axes, one for each combination of the others, in the order of declaration."""
    others = [axis for axis in found.study.varied if axis not in (down, across)]
    grouped: dict[str, dict[tuple[Value, Value], Configuration]] = {}
    for one in found.configurations:
        title = together(one.settings, others)
        column = None if across is None else one.settings[across]
        grouped.setdefault(title, {})[one.settings[down], column] = one
    axes = found.study.axes
    return [
        Map(
            title=title,
            rows=[value for value in axes[down] if any(value == row for row, _ in squares)],
            columns=[None] if across is None else [v for v in axes[across] if any(v == c for _, c in squares)],
            squares=squares,
        )
        for title, squares in grouped.items()
    ]


def heat_maps(found: Findings) -> Markup:
    """Return the section; empty where no axis has several values or nothing has ended."""
    colour = colour_range(found)
    if colour is None or not found.study.varied:
        return Markup()
    unit = ", per cent" if found.scale.fraction else ""
    lead = (
        f"Mean test {found.score_name}{unit} at the learning rate chosen on validation, with its 95 % interval over "
        "seeds and examples. All maps have the same colours. Select a square for its curves."
    )
    marks = {
        "◂ ▸": "the chosen rate is the lowest or highest of its grid: extend the grid",
        "✕": "runs that diverged at the chosen rate, and count as the worst score",
        "…": "not all of its runs have ended",
    }
    shown = [
        element(
            "div",
            *(_table(found, one, down, across, colour) for one in maps(found, down, across)),
            class_="maps",
            data_pair=down if across is None else f"{down} × {across}",
        )
        for down, across in pairs(found)
    ]
    return section(
        "heat",
        "Where the score is high",
        element("p", lead, class_="lead"),
        element("div", *shown, class_="heat"),
        element("div", _key(found, colour), *(_mark(sign, said) for sign, said in marks.items()), class_="heat-key"),
    )


def _table(found: Findings, one: Map, down: str, across: str | None, colour: Range) -> Markup:
    titles = [element("th", "" if across is None else plain(column), scope="col") for column in one.columns]
    corner = element("td", down if across is None else f"{down} ↓ {across} →", class_="corner")
    body = [
        element(
            "tr",
            element("th", plain(row), scope="row"),
            *(_square(found, one.squares.get((row, column)), colour) for column in one.columns),
        )
        for row in one.rows
    ]
    caption = element("caption", one.title) if one.title else None
    head = element("thead", element("tr", corner, *titles))
    return element("div", element("table", caption, head, element("tbody", *body), class_="map"), class_="card scroll")


def _square(found: Findings, one: Configuration | None, colour: Range) -> Markup:
    if one is None:
        return element("td", class_="absent")
    if one.interval is None:
        return element("td", "…", class_="absent", title=f"{one.label}: not run yet")
    share = colour.share(one.interval.value)
    diverged = sum(cell.status == "diverged" for cell in one.chosen)
    signs = [EDGES[one.choice.edge]] if one.on_edge else []
    signs += [f"✕{diverged}"] if diverged else []
    signs += ["…"] if one.waiting else []
    between = f"{found.scale.plain(one.interval.low)}–{found.scale.plain(one.interval.high)}"
    return element(
        "td",
        element("b", found.scale.plain(one.interval.value)),
        element("i", " ".join(signs)) if signs else None,
        element("small", between),
        style=f"background:{colours.fill(share)};color:{colours.ink(share)}",
        data_configuration=one.index,
        title=one.label,
    )


def _key(found: Findings, colour: Range) -> Markup:
    gradient = f"background:linear-gradient(90deg,{','.join(colours.SCALE)})"
    ends = element("span", found.scale.plain(colour.low)), element("span", found.scale.plain(colour.high))
    return element("div", ends[0], element("i", style=gradient), ends[1], class_="scale")


def _mark(sign: str, said: str) -> Markup:
    return element("span", element("b", sign), f" {said}")
