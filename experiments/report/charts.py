"""Line charts as inline SVG that stretches with the page.

Only the lines are in the SVG, which is scaled freely in both directions with strokes of constant width; the
words and the numbers around it are HTML placed in per cent, so they keep their size on a phone and in print.
`page.js` adds the read-out under the pointer or the arrow keys, from the numbers embedded beside each chart.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence

from experiments.report import text
from experiments.report.markup import Markup, element


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """One line: its points in order of x, its name, and a style class of `page.css`.

    `style` is "line", "faint", "before", "after" or "third"; with `points`, each point is marked as well.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "line"
    points: bool = False


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Return round numbers from below `low` to above `high`.

    They are 1, 2, 2.5 or 5 times a power of ten apart.

    >>> ticks(0.13, 0.92)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    >>> ticks(3, 3)
    [2.0, 2.5, 3.0, 3.5, 4.0]
    """
    if not high > low:
        margin = abs(low) / 3 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / max(1, wanted)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, last + 1)]


def smooth(values: Sequence[float], window: float) -> list[float]:
    """Return the exponential moving average of `values`, unbiased at the start.

    Args:
        values: in order.
        window: how many values the average remembers, about.

    >>> smooth([4.0, 4.0, 4.0], 10)
    [4.0, 4.0, 4.0]
    """
    keep = 1 - 1 / max(1.0, window)
    total, weight, averages = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        averages.append(total / weight)
    return averages


def line_chart(
    identifier: str,
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    y_from: float | None = None,
    y_to: float | None = None,
    form: Callable[[float], str] = text.number,
    note: str = "",
    wide: bool = False,
) -> Markup:
    """Return a figure with one or more lines over the step.

    Args:
        identifier: unique in the page.
        title: what is drawn, shown above.
        series: the lines; without any finite point, there is no figure.
        unit: of y, shown beside the title.
        y_from: lowest y shown, whatever the points.
        y_to: highest y shown, whatever the points.
        form: writes a y value as text.
        note: a sentence under the title.
        wide: whether it takes the whole width of the page.
    """
    series = [finite for one in series if (finite := _finite(one)).x]
    if not series:
        return Markup()
    frame = _frame(series, y_from, y_to)
    grid = [f'<line class="grid" x1="0" x2="100" y1="{frame.at_y(y)}" y2="{frame.at_y(y)}"/>' for y in frame.y_ticks]
    lines = "".join(grid) + "".join(_draw(one, frame) for one in series)
    svg = f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{lines}</svg>'
    ends = "; ".join(f"{one.name} {form(one.y[-1])} at step {one.x[-1]:,.0f}" for one in series)
    keys = [element("li", element("i", class_=f"key {one.style}"), one.name) for one in series]
    caption = element(
        "figcaption",
        element("h3", title, *([" ", element("small", unit)] if unit else [])),
        element("p", note) if note else None,
        element("ul", *keys, class_="legend") if len(series) > 1 else None,
    )
    y_labels = [element("span", form(y), style=f"top:{frame.at_y(y)}%") for y in frame.y_ticks]
    x_labels = [element("span", f"{x:,.0f}", style=f"left:{frame.at_x(x)}%") for x in frame.x_ticks]
    area = element(
        "div",
        Markup(svg),
        element("div", class_="rule", hidden=True),
        element("div", class_="readout", role="status", hidden=True),
        class_="area",
        tabindex=0,
        role="img",
        aria_label=f"{title} over the steps: {ends}. Arrow keys read values out.",
    )
    plot = element(
        "div",
        element("div", *y_labels, class_="y-labels", aria_hidden="true"),
        area,
        element("div", *x_labels, element("b", "step"), class_="x-labels", aria_hidden="true"),
        class_="plot",
    )
    data = element("script", _script_json(_values(series, frame, form)), type="application/json")
    return element("figure", caption, plot, data, class_="chart wide" if wide else "chart", id=identifier)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Frame:
    """What a chart shows of the plane, and where in it (in per cent from the upper left) a point is."""

    x: tuple[float, float]
    y: tuple[float, float]
    x_ticks: list[float]
    y_ticks: list[float]

    def at_x(self, x: float) -> float:
        return round(100 * (x - self.x[0]) / (self.x[1] - self.x[0]), 3)

    def at_y(self, y: float) -> float:
        return round(100 * (1 - (y - self.y[0]) / (self.y[1] - self.y[0])), 3)


def _frame(series: Sequence[Series], y_from: float | None, y_to: float | None) -> _Frame:
    every_y = [y for one in series for y in one.y]
    low = min(every_y) if y_from is None else min(y_from, *every_y)
    high = max(every_y) if y_to is None else max(y_to, *every_y)
    y_ticks = ticks(low, high)
    x_low, x_high = min(one.x[0] for one in series), max(one.x[-1] for one in series)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    room = x_low + 0.88 * (x_high - x_low)  # what is further right would run into the axis's name
    x_ticks = [x for x in ticks(x_low, x_high) if x_low <= x <= room and x == int(x)]
    return _Frame(x=(x_low, x_high), y=(y_ticks[0], y_ticks[-1]), x_ticks=x_ticks, y_ticks=y_ticks)


def _values(series: Sequence[Series], frame: _Frame, form: Callable[[float], str]) -> dict[str, object]:
    """What the read-out shows, as JSON for `page.js`."""
    lines = [
        {
            "name": one.name,
            "style": one.style,
            "x": list(one.x),
            "text": [form(y) for y in one.y],
        }
        for one in series
    ]
    return {"x": frame.x, "series": lines}


def _finite(series: Series) -> Series:
    kept = [i for i, y in enumerate(series.y) if math.isfinite(y)]
    return dataclasses.replace(series, x=[series.x[i] for i in kept], y=[series.y[i] for i in kept])


def _draw(series: Series, frame: _Frame) -> str:
    there = [(frame.at_x(x), frame.at_y(y)) for x, y in zip(series.x, series.y, strict=True)]
    drawn = f'<polyline class="{series.style}" points="{" ".join(f"{x},{y}" for x, y in there)}"/>'
    if series.points or len(there) == 1:
        # a line of no length with round ends stays a round dot however the picture is stretched
        drawn += f'<path class="dots {series.style}" d="{"".join(f"M{x} {y}h0" for x, y in there)}"/>'
    return drawn


def _script_json(data: object) -> Markup:
    # inside a script element only "</" could end it early
    return Markup(json.dumps(data, allow_nan=False, separators=(",", ":")).replace("</", "<\\/"))
