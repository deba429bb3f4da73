"""The tables of configurations and of cells.

`table.js` sorts and filters them by the values behind the text, and opens the details of a row.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from experiments.report import text
from experiments.report.markup import Markup, element
from experiments.report.study.configurations import Configuration, plain
from experiments.report.study.findings import Findings
from experiments.report.study.reading import Value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table that sorts.

    Attributes:
        title: what stands over it.
        number: whether it is aligned to the right.
        largest_first: whether the first click puts the largest on top.
        filter: whether rows can be chosen by its values.
        words: whether its text may run over several lines.
    """

    title: str
    number: bool = False
    largest_first: bool = False
    filter: bool = False
    words: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A cell of a table: what is shown, and what it is sorted by where that is something else."""

    shown: object
    by: float | str | None = None


Row = tuple[Mapping[str, object], Sequence[Entry]]  # the attributes of its `tr`, and its entries


def table(label: str, columns: Sequence[Column], rows: Sequence[Row], **attributes: object) -> Markup:
    """Return a table that `table.js` makes sortable.

    Args:
        label: what a screen reader calls it.
        columns: what stands over the cells.
        rows: as many entries each as there are columns.
        attributes: of the `table`; `class_` is added to its own.
    """
    kinds = ["number" if column.number else "words" if column.words else None for column in columns]
    head = [
        element(
            "th",
            column.title,
            scope="col",
            class_=kind,
            data_first="descending" if column.largest_first else None,
            data_filter=column.filter,
        )
        for column, kind in zip(columns, kinds, strict=True)
    ]
    body = [
        element(
            "tr",
            *(
                element(
                    "td" if i else "th", entry.shown, scope=None if i else "row", class_=kind, data_v=_key(entry.by)
                )
                for i, (kind, entry) in enumerate(zip(kinds, entries, strict=True))
            ),
            **of_row,
        )
        for of_row, entries in rows
    ]
    classes = f"data {attributes.pop('class_', '')}".strip()
    parts = element("thead", element("tr", *head)), element("tbody", *body)
    whole = element("table", *parts, class_=classes, **attributes)
    scroll = element("div", whole, class_="scroll tall", role="region", aria_label=label, tabindex=0)
    return element("div", scroll, class_="card below")


def _key(value: float | str | None) -> object:
    if value is None or isinstance(value, str):
        return value
    return f"{value:.6g}" if math.isfinite(value) else ""


def settings_columns(found: Findings, axes: Sequence[str]) -> list[Column]:
    """Return the columns of `settings`."""
    return [Column(title=axis.replace("_", " "), filter=True) for axis in axes] or [Column(title="")]


def settings(found: Findings, values: Mapping[str, Value], axes: Sequence[str]) -> list[Entry]:
    """Return an entry for the value of each axis; one that says that there is none where there are no axes."""
    return [_setting(axis, values[axis], found.study.axes[axis]) for axis in axes] or [Entry(shown="all")]


def _setting(axis: str, value: Value, order: Sequence[Value]) -> Entry:
    if value is None:
        return Entry(shown="", by="")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Entry(shown=text.rate(value) if axis == "lr" else plain(value), by=value)
    return Entry(shown=plain(value), by=order.index(value))  # names in the order of declaration


def results(found: Findings) -> Markup:
    """Return the table of configurations with scores, differences and the ranks that the intervals allow."""
    axes = found.study.several
    columns = settings_columns(found, axes) + [
        Column(title="rate", number=True, filter=True),
        Column(title=f"test {found.score_name}", number=True, largest_first=True),
        Column(title="difference", largest_first=True),
        Column(title="ranks", number=True),
        Column(title="validation", number=True, largest_first=True),
        Column(title="notes", words=True),
    ]
    rows = [
        (
            {"data_configuration": one.index, "data_label": one.label},
            [*settings(found, one.settings, axes), *_judged(found, one), Entry(shown="; ".join(notes(one)))],
        )
        for one in found.configurations
    ]
    place = [column.title for column in columns].index("difference")
    return table("Results of the configurations", columns, rows, class_="results", data_difference=place)


def _judged(found: Findings, one: Configuration) -> list[Entry]:
    if one.choice is None or one.interval is None:
        return [Entry(shown="", by="")] * 5
    ranks = found.ranks.get(one.label)
    return [
        _setting("lr", one.choice.rate, one.rates),
        Entry(shown=found.scale.between(one.interval), by=one.interval.value),
        Entry(shown="", by=""),  # the difference: `table.js` writes it, to a reference that can be changed
        Entry(shown="", by="") if ranks is None else _ranks(*ranks),
        Entry(shown=found.scale.written(one.choice.score), by=one.choice.score),
    ]


def _ranks(best: int, worst: int) -> Entry:
    return Entry(shown=f"{best} to {worst}" if best < worst else str(best), by=best + worst / 1000)


def notes(one: Configuration) -> list[str]:
    """Return what a reader has to know about a configuration's score."""
    counts = [(one.waiting, "not ended"), (len(one.diverged), "diverged")]
    said = [f"{count} of {len(one.cells)} {what}" for count, what in counts if count]
    return (["rate on the edge"] if one.on_edge else []) + said
