"""Puts the sections together, and writes everything that comes out of a study."""

import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.report import makeup, page, text
from experiments.report.markup import Markup, element, join, key_values, section
from experiments.report.study import answer, cells, costs, embedded, figures, forgetting, heat, plots, reading, tidy
from experiments.report.study.findings import Findings, find

_SCRIPTS = ("study/chart.js", "study/study.js", "study/table.js", "copy.js")


def write(
    directories: Sequence[pathlib.Path],
    out: pathlib.Path | None = None,
    *,
    reference: str = "",
    resamples: int = 10_000,
) -> pathlib.Path:
    """Write `report.html`, `results.csv` and `figures/` of one or several studies from their logs.

    Args:
        directories: of the studies; several are joined.
        out: where to write; the study's own directory, for several `A+B` beside the first one.
        reference: the label of the configuration that the others are compared with; that with the best validation
            score where empty.
        resamples: of the bootstrap.

    Returns:
        The path of the page.

    Raises:
        ValueError: if one is no study's directory, a log is not what a study writes, or they cannot be joined.
    """
    directories = [pathlib.Path(directory) for directory in directories]
    if out is None:
        joined = "+".join(dict.fromkeys(directory.resolve().name for directory in directories))
        out = directories[0] if len(directories) == 1 else directories[0].parent / joined
    study = reading.read(directories)
    seed = int(study.environments[0].get("seed") or 0)
    found = find(study, seed=seed, resamples=resamples, reference=reference)
    out.mkdir(parents=True, exist_ok=True)
    page.put(out / "results.csv", tidy.results_csv(found))
    figures.write(found, out / "figures")
    return page.put(out / "report.html", render(found, _again(study, out, reference)))


def _again(study: reading.Study, out: pathlib.Path, reference: str) -> str:
    # the directory as the run was told it, wherever its logs lie now
    named = [
        str(config.get("run_dir") or directory)
        for config, directory in zip(study.configs, study.directories, strict=True)
    ]
    given = [
        *named,
        *(["--out", str(out)] if len(named) > 1 else []),
        *(["--reference", reference] if reference else []),
    ]
    return f"python -m experiments.report {shlex.join(given)}"


def render(found: Findings, again: str) -> str:
    """Return the page as one HTML text that refers to nothing outside itself.

    Args:
        found: what the study's numbers allow to say.
        again: the command that writes the page once more.
    """
    sections = (
        answer.answer(found),
        heat.heat_maps(found),
        plots.sweeps(found),
        plots.curves(found),
        plots.fronts(found),
        forgetting.forgetting(found),
        costs.costs(found),
        cells.cells(found),
        plots.spectra(found),
        plots.subspaces(found),
        reproduce(found),
    )
    body = join(
        answer.header(found),
        element("main", *sections),
        element("footer", "Made from the logs of the study; ", element("code", again), " makes it again."),
        embedded.data(found),
    )
    return page.whole(f"{found.study.name}: report of a study", ["page.css", "study/study.css"], body, _SCRIPTS)


def reproduce(found: Findings) -> Markup:
    """Return the commands, what was trained together, the versions and the settings, of every study."""
    study = found.study
    commands = list(dict.fromkeys(one["command"] for one in study.environments if "command" in one))
    facts: list[tuple[str, object]] = []
    if study.groups:
        most = max(group.get("members", 1) for group in study.groups)
        facts += [
            ("Programs compiled", f"{len(study.groups):,}, of up to {most:,} runs"),
            ("Time: compilation", text.seconds(sum(group.get("compile_seconds", 0.0) for group in study.groups))),
            ("Time: training", text.seconds(sum(group.get("seconds", 0.0) for group in study.groups))),
            ("Processes", len({str(group.get("process")) for group in study.groups})),
        ]
    facts += [("Test examples", f"{found.scale.examples:,}")]
    versions = list(dict.fromkeys((name, str(value)) for one in study.environments for name, value in _versions(one)))
    every = [line for config in study.configs for line in [*makeup.settings(config), ""]]
    return section(
        "reproduce",
        "Reproduce",
        *(element("div", element("pre", element("code", one)), class_="card command") for one in commands),
        element("div", key_values("This study", facts), key_values("Versions", versions), class_="two"),
        element(
            "details",
            element("summary", "All settings"),
            element("div", element("pre", "\n".join(every)), class_="card below"),
        ),
    )


def _versions(environment: Mapping[str, Any]) -> list[tuple[str, Any]]:
    of_machine = [name for name in ("platform", "devices", "cores", "seed") if name in environment]
    return [*environment.get("versions", {}).items(), *((name, environment[name]) for name in of_machine)]
