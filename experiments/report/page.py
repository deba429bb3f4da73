"""Puts the sections together into `report.html`."""

import os
import pathlib
from collections.abc import Sequence

from experiments.report import curves, logs, makeup, outcome
from experiments.report.markup import Markup, element, join

_NOTHING_FROM_OUTSIDE = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def render(run: logs.RunLogs) -> str:
    """Return the page of a run as one HTML text that refers to nothing outside itself."""
    sections = (
        outcome.headline,
        curves.curves,
        outcome.answers,
        makeup.budget,
        makeup.sites,
        makeup.reproduce,
    )
    again = f"python -m experiments.report {run.config['run_dir']}"
    body = join(
        outcome.header(run),
        element("main", *(section(run) for section in sections)),
        element("footer", "Made from the logs of the run; ", element("code", again), " makes it again."),
    )
    return whole(f"{run.config['name']}: fine-tuning report", ["page.css"], body, ["page.js", "copy.js"])


def whole(title: str, styles: Sequence[str], body: Markup, scripts: Sequence[str]) -> str:
    """Return an HTML text that refers to nothing outside itself.

    Args:
        title: of the window.
        styles: files beside this one whose text is put into the head.
        body: of the page.
        scripts: files beside this one whose text is put after the body, in one element.
    """
    head = join(
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_NOTHING_FROM_OUTSIDE}">'),
        element("title", title),
        *(element("style", _asset(name)) for name in styles),
    )
    end = join(body, element("script", Markup("\n".join(map(_asset, scripts)))))
    return f'<!doctype html>\n<html lang="en">\n{element("head", head)}\n{element("body", end)}\n</html>\n'


def _asset(name: str) -> Markup:
    return Markup((pathlib.Path(__file__).parent / name).read_text(encoding="utf-8"))


def write(directory: pathlib.Path) -> pathlib.Path:
    """Write `report.html` of the run in `directory` from its logs; return its path.

    Raises:
        ValueError: if that is no run's directory, or a log in it is not what a run writes.
    """
    return put(directory / "report.html", render(logs.read(directory)))


def put(path: pathlib.Path, written: str | bytes) -> pathlib.Path:
    """Write a file whole or not at all, and return its path."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(written if isinstance(written, bytes) else written.encode())
    os.replace(temporary, path)
    return path
