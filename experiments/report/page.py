"""Puts the sections together into `report.html`."""

import os
import pathlib

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
    head = join(
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_NOTHING_FROM_OUTSIDE}">'),
        element("title", f"{run.config['name']}: fine-tuning report"),
        element("style", _asset("page.css")),
    )
    again = f"python -m experiments.report {run.config['run_dir']}"
    body = join(
        outcome.header(run),
        element("main", *(section(run) for section in sections)),
        element("footer", "Made from the logs of the run; ", element("code", again), " makes it again."),
        element("script", _asset("page.js")),
    )
    return f'<!doctype html>\n<html lang="en">\n{element("head", head)}\n{element("body", body)}\n</html>\n'


def _asset(name: str) -> Markup:
    return Markup((pathlib.Path(__file__).parent / name).read_text(encoding="utf-8"))


def write(directory: pathlib.Path) -> pathlib.Path:
    """Write `report.html` of the run in `directory` from its logs; return its path.

    Raises:
        ValueError: if that is no run's directory, or a log in it is not what a run writes.
    """
    path = directory / "report.html"
    temporary = path.with_name("report.html.tmp")
    temporary.write_text(render(logs.read(directory)), encoding="utf-8")
    os.replace(temporary, path)
    return path
