"""The study's figures for a paper: PNG and SVG, of the width of a column or a page, the same bytes for the same logs.

They show what the page shows, by default: lines by one axis, a panel for each combination of the others.
"""

import io
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report import page, text
from experiments.report.study import colours, costs, heat, lines, plots
from experiments.report.study.configurations import plain
from experiments.report.study.findings import SEPARATED, Findings

COLUMN, PAGE = 3.35, 6.9  # inches
PANELS = 24  # the most in one figure
PARTS = 1  # of the leaves, how many have figures of their updates
PALETTE = ("#2f6fd0", "#d9822b", "#15916f", "#a64ca6", "#c23b3b", "#2aa7c7", "#8a6d1f", "#6b7280")  # as in study.css
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.5, "lines.linewidth": 1.2, "legend.frameon": False,
    "figure.constrained_layout.use": True, "savefig.dpi": 300, "svg.hashsalt": "lorax", "svg.fonttype": "path",
}  # fmt: skip
FORMS: Mapping[str, Callable[[float], str]] = {
    "percent": lambda value: f"{100 * value:.4g} %",
    "count": text.count,
    "size": text.size,
    "seconds": text.seconds,
    "rate": text.rate,
    "number": text.number,
}


def write(found: Findings, directory: pathlib.Path) -> list[pathlib.Path]:
    """Write every figure that the study has data for, remove those of which it has none; return the paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, figure in figures(found):
            figure.get_layout_engine().execute(figure)
            figure.set_layout_engine("none")  # laid out once, for both kinds of file
            for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                file = io.BytesIO()
                figure.savefig(file, format=kind, metadata=metadata)
                paths.append(page.put(directory / f"{name}.{kind}", file.getvalue()))
    for stale in {*directory.glob("*.png"), *directory.glob("*.svg")} - set(paths):
        stale.unlink()
    return paths


def figures(found: Findings) -> Iterator[tuple[str, Figure]]:
    """Yield the figures with their names, in the style that is set."""
    colour = heat.colour_range(found)
    for down, across in heat.pairs(found) if colour is not None else []:
        yield "_".join(["heat", down, *([across] if across else [])]), _heat(found, down, across, colour)
    if found.comparisons:
        yield "differences", _differences(found)
    for name, chart in lines.charts(found).items():
        for part in list(dict.fromkeys(line.get("part") for line in chart["lines"]))[:PARTS]:
            own = [line for line in chart["lines"] if line.get("part") == part]
            yield "_".join([name, *([_file_name(part)] if part else [])]), _panels(found, chart, own, part)
    fronts = costs.fronts(found)
    for chart in fronts["charts"]:
        yield f"front_{_file_name(chart['x']['label'])}", _front(found, fronts, chart)
    if found.study.analysis["subspaces"]:
        yield "subspaces", _subspaces(found)


def _file_name(words: str) -> str:
    """The words as a part of a file's name.

    >>> _file_name("layers/up/kernel, layer 0")
    'layers-up-kernel-layer-0'
    """
    return "-".join("".join(c if c.isalnum() else " " for c in words).split())


def _grid(
    count: int, *, width: float = 1.7, height: float = 1.6, most: int = 4, **how: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with that many panels, in rows that fit a column or a page."""
    columns = min(count, most)
    rows = -(-count // columns)
    size = (max(COLUMN if columns <= 2 else PAGE, columns * width * 0.8), rows * height + 0.5)
    figure = Figure(figsize=size)
    panels = figure.subplots(rows, columns, squeeze=False, **how).flatten().tolist()
    for spare in panels[count:]:
        spare.set_axis_off()
    return figure, panels[:count]


def _heat(found: Findings, down: str, across: str | None, colour: heat.Range) -> Figure:
    shown = heat.maps(found, down, across)[:PANELS]
    widest, tallest = max(len(one.columns) for one in shown), max(len(one.rows) for one in shown)
    most = max(1, int(PAGE / (0.62 * widest + 0.6)))
    figure, panels = _grid(len(shown), width=0.62 * widest + 0.6, height=0.32 * tallest + 0.6, most=most)
    scale = matplotlib.colors.LinearSegmentedColormap.from_list("scale", colours.SCALE)
    image = None
    for panel, one in zip(panels, shown, strict=True):
        values = np.full((len(one.rows), len(one.columns)), np.nan)
        for i, row in enumerate(one.rows):
            for j, column in enumerate(one.columns):
                there = one.squares.get((row, column))
                if there is None or there.interval is None:
                    continue
                values[i, j] = there.interval.value
                mark = heat.EDGES[there.choice.edge] if there.on_edge else ""
                ends = f"{found.scale.plain(there.interval.low)}–{found.scale.plain(there.interval.high)}"
                said = f"{found.scale.plain(there.interval.value)}{mark}\n{ends}"
                ink = colours.ink(colour.share(there.interval.value))
                panel.text(j, i, said, ha="center", va="center", fontsize=5.5, color=ink)
        image = panel.imshow(values, cmap=scale, vmin=colour.low, vmax=colour.high, aspect="auto")
        panel.set_xticks(range(len(one.columns)), [] if across is None else [plain(value) for value in one.columns])
        panel.set_yticks(range(len(one.rows)), [plain(value) for value in one.rows])
        panel.set_title(one.title)
        panel.grid(visible=False)
        panel.set_ylabel(down.replace("_", " "))
        panel.set_xlabel((across or "").replace("_", " "))
    bar = figure.colorbar(image, ax=panels, fraction=0.05, label=f"test {found.score_name}")
    bar.ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: found.scale.plain(value)))
    return figure


def _differences(found: Findings) -> Figure:
    """Every compared configuration's difference to the reference, the best on top."""
    reference = found.reference.label
    rows = []
    for one in found.comparisons:
        d = one.difference
        if one.b == reference:
            rows.append((one.a, d.value, d.low, d.high, found.verdict(one) == SEPARATED))
        elif one.a == reference:
            rows.append((one.b, -d.value, -d.high, -d.low, found.verdict(one) == SEPARATED))
    rows.sort(key=lambda row: row[1])
    figure = Figure(figsize=(COLUMN, 0.17 * len(rows) + 0.7))
    panel = figure.subplots()
    unit = 100 if found.scale.fraction else 1
    for i, (_, value, low, high, separated) in enumerate(rows):
        colour = PALETTE[0] if separated else PALETTE[7]
        panel.plot([unit * low, unit * high], [i, i], color=colour, linewidth=1)
        panel.plot([unit * value], [i], "o", color=colour, markersize=3.5)
    panel.axvline(0, color="#444", linewidth=0.8)
    panel.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=6)
    panel.set_ylim(-0.7, len(rows) - 0.3)
    panel.grid(axis="y", visible=False)
    panel.set_xlabel(f"test {found.score_name} less that of {reference}" + (", points" if found.scale.fraction else ""))
    return figure


def _panels(found: Findings, chart: Mapping[str, Any], own: Sequence[Mapping[str, Any]], part: str | None) -> Figure:
    """Small multiples: a line for each value of one axis, a panel for each combination of the others."""
    by = lines.line_axis(found)
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for line in own:
        grouped.setdefault(lines.others(found, found.configurations[line["c"]], by), []).append(line)
    figure, panels = _grid(min(len(grouped), PANELS), sharex=True, sharey=True)
    shown = {}
    for panel, (title, members) in zip(panels, grouped.items(), strict=False):
        for line in members:
            value = found.configurations[line["c"]].settings[by] if by else None
            colour = _colour(found, by, value)
            x, y = np.asarray(line["x"], float), np.asarray(line["y"], float)
            style = {"marker": "o", "markersize": 2.5} if chart.get("points") else {}
            (shown[value],) = panel.plot(x, y, color=colour, **style)
            if "low" in line:
                low, high = np.asarray(line["low"], float), np.asarray(line["high"], float)
                panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            if "marked" in line:
                panel.plot(x[line["marked"]], y[line["marked"]], "o", color=colour, markersize=6, fillstyle="none")
        panel.set_title(title)
        if chart["x"].get("log"):
            panel.set_xscale("log")
        if chart["y"].get("log"):
            panel.set_yscale("log")
        if form := chart["y"].get("form"):
            panel.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _, form=form: FORMS[form](value)))
        if chart["x"].get("form") == "rate":
            panel.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: text.rate(value)))
            panel.xaxis.set_minor_formatter(ticker.NullFormatter())
    figure.supxlabel(chart["x"]["label"], fontsize=8)
    figure.supylabel(chart["y"]["label"], fontsize=8)
    title = chart["title"] + (f", {part}" if part else "")
    if by and len(shown) > 1:
        _legend(found, figure, by, shown, title=f"{title}, by {by.replace('_', ' ')}")
    else:
        figure.suptitle(title, fontsize=8)
    return figure


def _legend(found: Findings, figure: Figure, by: str, shown: Mapping[Any, Any], title: str) -> None:
    values = [value for value in found.study.axes[by] if value in shown]
    figure.legend(
        [shown[value] for value in values],
        [plain(value) for value in values],
        title=title,
        loc="outside upper center",
        ncols=8,
    )


def _colour(found: Findings, axis: str | None, value: Any) -> Any:
    if axis is None:
        return PALETTE[0]
    values = found.study.axes[axis]
    if lines.is_ordered(values):
        return matplotlib.colormaps["viridis"](0.85 * values.index(value) / (len(values) - 1))
    return PALETTE[values.index(value) % len(PALETTE)]


def _front(found: Findings, fronts: Mapping[str, Any], chart: Mapping[str, Any]) -> Figure:
    by = lines.line_axis(found)
    figure = Figure(figsize=(COLUMN, 2.6))
    panel = figure.subplots()
    x, y = chart["values"], fronts["y"]
    edge = chart["front"]
    panel.step([x[c] for c in edge], [y[c] for c in edge], where="post", color="#777", linestyle="--", linewidth=0.8)
    shown = {}
    for one in found.configurations:
        c = one.index
        if y[c] is None or np.isnan(x[c]):
            continue
        value = one.settings[by] if by else None
        error = [[y[c] - fronts["low"][c]], [fronts["high"][c] - y[c]]]
        shown[value] = panel.errorbar(
            x[c], y[c], yerr=error, fmt="o", markersize=3.5, elinewidth=0.7, color=_colour(found, by, value)
        )  # fmt: skip
    panel.margins(x=0.12)
    if chart["x"]["log"]:
        panel.set_xscale("log")
    else:
        panel.xaxis.set_major_locator(ticker.MaxNLocator(4))
        panel.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: FORMS[chart["x"]["form"]](value)))
    if found.scale.fraction:
        panel.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: FORMS["percent"](value)))
    panel.set_xlabel(chart["x"]["label"])
    panel.set_ylabel(f"test {found.score_name}")
    _above_bars(panel, [(x[c], fronts["high"][c], found.configurations[c].label) for c in edge])
    if by and len(shown) > 1:
        _legend(found, figure, by, shown, title=by.replace("_", " "))
    return figure


def _above_bars(panel: Axes, bars: Sequence[tuple[float, float, str]]) -> None:
    """Write names upwards above bars, given from the left: x, upper end, name; make room for them, and between them."""
    size, inches = 5.5, (2.6, 1.6)  # of the letters in points; of the panel, about
    line = {"arrowstyle": "-", "linewidth": 0.4, "color": "#999", "relpos": (0.5, 0), "shrinkA": 0, "shrinkB": 0}
    low, high = panel.get_ylim()
    length = max(len(name) for _, _, name in bars) * 0.55 * size / 72 / inches[1]
    foot = max(top for _, top, _ in bars) + 0.02 * (high - low)
    panel.set_ylim(low, low + (high - low) / (1 - min(length + 0.03, 0.6)))
    panel.set_xlim(panel.get_xlim())  # as the points leave them: the names are placed within
    gap, along = 1.2 * size / 72 / inches[0], -1.0
    for place, (at, top, name) in enumerate(bars):
        own = panel.transAxes.inverted().transform(panel.transData.transform((at, top)))[0]
        along = min(max(own, along + gap), 1 - gap * (len(bars) - 1 - place))
        panel.annotate(
            name, (at, top), (along, foot), textcoords=panel.get_yaxis_transform(), arrowprops=line, fontsize=size,
            rotation=90, ha="center", va="bottom",
        )  # fmt: skip


def _subspaces(found: Findings) -> Figure:
    compared = found.study.analysis["subspaces"][:PANELS]
    figure, panels = _grid(len(compared), height=1.7)
    image = None
    for panel, one in zip(panels, compared, strict=True):
        a, b = plots.names(found, one["a"], one["b"])
        rows, columns = np.shape(one["phi"])
        image = panel.imshow(one["phi"], vmin=0, vmax=1, cmap="viridis", aspect="auto")
        leaf = "/".join(one["path"].split("/")[-3:])
        panel.set_title(f"{leaf}\nlayer {one['layer']}, {one['side']} side", fontsize=6)
        panel.set_ylabel(f"i: {a}", fontsize=6)
        panel.set_xlabel(f"j: {b}", fontsize=6)
        panel.set_xticks(*_indices(columns))
        panel.set_yticks(*_indices(rows))
        panel.grid(visible=False)
    figure.colorbar(image, ax=panels, fraction=0.05, label="φ(i, j)")
    return figure


def _indices(count: int) -> tuple[list[int], list[str]]:
    """Where a few of the indices 1 … count are on an axis that counts from 0, and what they are called.

    >>> _indices(8)
    ([0, 3, 7], ['1', '4', '8'])
    """
    at = sorted({0, (count - 1) // 2, count - 1})
    return at, [str(i + 1) for i in at]
