"""The section of charts over the steps, with the same numbers as a table."""

from typing import Any

from experiments.report import charts, text
from experiments.report.logs import RunLogs
from experiments.report.markup import Markup, element, section, table

COLUMNS = ("loss", "heldout_loss", "valid_json", "accuracy", "learning_rate", "gradient_norm", "tokens_per_s")
TABLE_ROWS = 100  # about as many steps are listed; those that were evaluated are always there


def curves(run: RunLogs) -> Markup:
    """Return the charts; empty before the first step."""
    trained = [row for row in run.steps if "loss" in row]
    if not trained:
        return Markup()
    drawn = [
        _loss(run.steps, trained),
        _rates(run.steps),
        _over_steps(trained, "learning_rate", "Learning rate"),
        _over_steps(trained, "tokens_per_s", "Throughput", unit="tokens per second", form="{:,.0f}".format),
        _over_steps(trained, "gradient_norm", "Gradient norm", note="Before clipping."),
    ]
    lead = "Point at a chart, or focus it and use the arrow keys, to read its values."
    numbers = element("details", element("summary", "The numbers as a table"), _steps_table(run.steps))
    return section(
        "training",
        "Training",
        element("p", lead, class_="lead"),
        element("div", *drawn, class_="charts"),
        numbers,
    )


def _loss(rows: list[dict[str, Any]], trained: list[dict[str, Any]]) -> Markup:
    steps, losses = _points(trained, "loss")
    lines = [
        charts.Series(name="each step", x=steps, y=losses, style="faint"),
        charts.Series(name="smoothed", x=steps, y=charts.smooth(losses, max(5, len(steps) / 20))),
    ]
    held_out = _points(rows, "heldout_loss")
    if held_out[0]:
        lines.append(charts.Series(name="held out", x=held_out[0], y=held_out[1], style="before", points=True))
    return charts.line_chart("loss", "Loss", lines, unit="nats per answer token", y_from=0.0, wide=True)


def _rates(rows: list[dict[str, Any]]) -> Markup:
    lines = []
    for key, name, style in (("valid_json", "valid JSON", "third"), ("accuracy", "accuracy", "after")):
        steps, rates = _points(rows, key)
        lines.append(charts.Series(name=name, x=steps, y=rates, style=style, points=True))
    answered = [row["answered"] for row in rows if "answered" in row]
    note = f"Of {answered[0]} held-out examples, others than those above." if answered else ""
    return charts.line_chart("rates", "Held-out answers", lines, form=text.percent, y_from=0.0, y_to=1.0, note=note)


def _over_steps(rows: list[dict[str, Any]], key: str, title: str, **how: Any) -> Markup:
    steps, values = _points(rows, key)
    return charts.line_chart(key, title, [charts.Series(name=title.lower(), x=steps, y=values)], y_from=0.0, **how)


def _points(rows: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    there = [row for row in rows if key in row]
    # float(): a number that is not finite was logged as its name
    return [row["step"] for row in there], [float(row[key]) for row in there]


def _steps_table(rows: list[dict[str, Any]]) -> Markup:
    names = [name for name in COLUMNS if any(name in row for row in rows)]
    keep = max(1, len(rows) // TABLE_ROWS)
    listed = [
        [f"{row['step']:,}", *(text.number(float(row[name]), 4) if name in row else "" for name in names)]
        for i, row in enumerate(rows)
        if i % keep == 0 or i == len(rows) - 1 or "heldout_loss" in row
    ]
    titles = ["step", *(name.replace("_", " ") for name in names)]
    return table("Numbers of the steps", titles, listed, numbers=set(titles), tall=True)
