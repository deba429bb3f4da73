"""HTML from Python: `element("p", "a < b", class_="lead")`; text is escaped, markup is not."""

import html
from collections.abc import Sequence


class Markup(str):
    """Text that is HTML already and is not escaped again."""

    __slots__ = ()


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """Return an HTML element.

    Args:
        tag: its name.
        children: `Markup` as it is, anything else as escaped text; None is left out.
        attributes: a trailing underscore is dropped and the others become hyphens (`class_`, `aria_label`);
            True gives an attribute without a value, None and False none at all.

    >>> element("td", "1 < 2", element("b", 3), class_="number", aria_hidden="true")
    '<td class="number" aria-hidden="true">1 &lt; 2<b>3</b></td>'
    """
    written = "".join(
        f" {name.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(value)}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    return Markup(f"<{tag}{written}>{join(*children)}</{tag}>")


def join(*children: object) -> Markup:
    """Return the children one after the other, escaped unless they are `Markup`."""
    return Markup("".join(c if isinstance(c, Markup) else escape(c) for c in children if c is not None))


def escape(value: object) -> str:
    """Return `value` as text that is safe in HTML, in a quoted attribute too."""
    return html.escape(str(value), quote=True)


def section(identifier: str, title: str, *children: object) -> Markup:
    """Return a section of the page under its heading."""
    heading = element("h2", title, id=identifier)
    return element("section", heading, *children, aria_labelledby=identifier)


def table(
    label: str,
    columns: list[str],
    rows: list[list[object]],
    *,
    numbers: set[str] = frozenset(),  # type: ignore[assignment]
    tall: bool = False,
) -> Markup:
    """Return a table that scrolls sideways where it is too wide; the first cell of a row is its header.

    Args:
        label: what a screen reader calls it.
        columns: their titles.
        rows: cells, as many as there are columns.
        numbers: the columns that are aligned to the right.
        tall: whether a long table scrolls inside its own height.
    """
    kinds = ["number" if name in numbers else None for name in columns]
    head = [element("th", name, scope="col", class_=kind) for name, kind in zip(columns, kinds, strict=True)]
    body = [
        element(
            "tr",
            element("th", row[0], scope="row", class_=kinds[0]),
            *(element("td", cell, class_=kind) for cell, kind in zip(row[1:], kinds[1:], strict=True)),
        )
        for row in rows
    ]
    whole = element("table", element("thead", element("tr", *head)), element("tbody", *body))
    classes = "scroll tall" if tall else "scroll"
    return element("div", whole, class_=classes, role="region", aria_label=label, tabindex=0)


def key_values(caption: str, rows: Sequence[tuple[str, object]]) -> Markup | None:
    """Return a card with a name and a value in each row; None where there are no rows."""
    if not rows:
        return None
    body = [element("tr", element("th", key, scope="row"), element("td", value)) for key, value in rows]
    whole = element("table", element("caption", caption), element("tbody", *body), class_="key-values")
    return element("div", whole, class_="card")
