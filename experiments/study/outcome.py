"""What the trained adapters look like inside: spectra of their updates, and the subspaces that runs have in common."""

from __future__ import annotations

import functools
import itertools
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

import lorax
from experiments.study import selection
from experiments.study.adaptation import Adaptations, Base
from experiments.study.axes import WITHIN, Cell
from experiments.study.store import StudyDirectory
from lorax import analysis

SIDE = "output"  # A is mostly what it started as: inputs of two seeds have little in common, whatever these learned
SITES = 2  # whose subspaces are compared, where the settings name none
DIGITS = 5


def write(directory: StudyDirectory, cells: Sequence[Cell], adaptations: Adaptations) -> None:
    """Write `analysis.json` if it is not there, and remove the adapters that the settings do not keep.

    Args:
        directory: of a study whose runs are all finished.
        cells: the runs.
        adaptations: of the study.
    """
    chosen = _chosen(directory, cells, worst=0.0 if adaptations.problem.score else -math.inf)
    if not directory.exists("analysis.json"):
        directory.write("analysis.json", _Analysis(directory, adaptations).of(chosen))
    kept = {"all": cells, "best": list(itertools.chain.from_iterable(chosen)), "none": []}[adaptations.config.keep]
    for cell in cells:
        if cell not in kept:
            shutil.rmtree(_adapter(directory, cell), ignore_errors=True)


def _adapter(directory: StudyDirectory, cell: Cell) -> Any:
    return directory.path / "cells" / cell.id / "adapter"


def _chosen(directory: StudyDirectory, cells: Iterable[Cell], *, worst: float) -> list[list[Cell]]:
    """Return for each configuration its runs at the chosen learning rate, by seed, without those that diverged.

    Args:
        directory: of the study.
        cells: the runs.
        worst: what the score of a run that diverged counts as.
    """
    by_configuration: dict[Any, list[tuple[Cell, dict[str, Any]]]] = {}
    for cell in cells:
        result = directory.read(f"cells/{cell.id}/result.json")
        assert result is not None
        by_configuration.setdefault(cell.configuration, []).append((cell, result))
    chosen = []
    for runs in by_configuration.values():
        rate = selection.choose_rate([(cell.settings["lr"], *_validated(result, worst)) for cell, result in runs]).rate
        at_rate = [c for c, r in runs if c.settings["lr"] == rate and r["status"] == "finished"]
        chosen.append(sorted(at_rate, key=lambda cell: cell.settings["seed"]))
    return [runs for runs in chosen if runs]


def _validated(result: dict[str, Any], worst: float) -> tuple[float, float]:
    score, loss = result["validation"]["score"], result["validation"]["loss"]
    if result["status"] == "diverged" or score is None or loss is None:  # null: not finite
        return worst, math.inf
    return score, loss


class _Analysis:
    """Measures adapters; those of a comparison that follows another are read once."""

    def __init__(self, directory: StudyDirectory, adaptations: Adaptations):
        self.directory, self.adaptations = directory, adaptations
        self.settings = adaptations.config.analysis
        self.restored = functools.lru_cache(maxsize=4)(self._restored)

    def of(self, chosen: Sequence[Sequence[Cell]]) -> dict[str, Any]:
        """Return the analysis of each configuration's runs, of which the first stands for it."""
        first = [runs[0] for runs in chosen]
        spectra = {cell.id: of for cell in first if (of := self._spectra(cell))}
        pairs = [*_of_ranks(first), *((runs[0], runs[1]) for runs in chosen if len(runs) > 1)]
        return {
            "spectra": {name: {path: _rounded(values) for path, values in of.items()} for name, of in spectra.items()},
            "effective_rank": {
                name: {path: _rounded(analysis.effective_rank(values)) for path, values in of.items()}
                for name, of in spectra.items()
            },
            "subspaces": [found for a, b in pairs for found in self._subspaces(a, b, spectra)],
        }

    def _restored(self, cell_id: str, base: Base) -> lorax.Adapter:
        return lorax.restore(self.directory.path / "cells" / cell_id / "adapter", base=base.params)

    def _spectra(self, cell: Cell) -> dict[str, Any]:
        """Return the singular values of what a run adds to weights, [layers, values] by path."""
        base = self.adaptations.base(cell.settings)
        found = analysis.spectra(self.restored(cell.id, base), base.params)
        return {path: values for path, values in found.items() if not self.adaptations.is_always_trained(path)}

    def _subspaces(self, a: Cell, b: Cell, spectra: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Return the maps of what two runs' updates have in common, in the middle layer of each compared leaf.

        Args:
            a: a run whose spectra are there, if it has any.
            b: another one, or one of another seed of the same configuration.
            spectra: by run and path.
        """
        paths = spectra.get(a.id, {})
        common = [path for path in paths if path in spectra.get(b.id, paths)]
        wanted = [path for path in self.settings.sites if path in common] if self.settings.sites else common[:SITES]
        bases = [self.adaptations.base(cell.settings) for cell in (a, b)]
        adapters = [self.restored(cell.id, base) for cell, base in zip((a, b), bases, strict=True)]
        for path in wanted:
            sides = [
                analysis.directions(adapter, path, SIDE, base.params)
                for adapter, base in zip(adapters, bases, strict=True)
            ]
            layer = sides[0].shape[0] // 2
            phi = analysis.subspace_map(*(side[layer, :, : self.settings.subspace_rank] for side in sides))
            yield {"a": a.id, "b": b.id, "path": path, "layer": layer, "side": SIDE, "phi": _rounded(phi)}


def _of_ranks(cells: Iterable[Cell]) -> Iterator[tuple[Cell, Cell]]:
    """Return each run with the one of the largest rank that is otherwise of the same configuration."""
    families: dict[Any, list[Cell]] = {}
    for cell in cells:
        if cell.settings["rank"] is not None:
            others = tuple((axis, value) for axis, value in cell.settings.items() if axis not in ("rank", *WITHIN))
            families.setdefault(others, []).append(cell)
    for family in families.values():
        *smaller, largest = sorted(family, key=lambda cell: cell.settings["rank"])
        yield from ((cell, largest) for cell in smaller)


def _rounded(values: Any) -> Any:
    """Return an array as lists of numbers with few digits."""
    array = np.asarray(values, np.float64)
    return [_rounded(part) for part in array] if array.ndim else float(f"{array:.{DIGITS}g}")
