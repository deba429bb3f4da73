"""What runs came to: the files of each run of a group that was trained."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from typing import Any

import lorax
from experiments.study import costs
from experiments.study.adaptation import Adaptations
from experiments.study.axes import Cell
from experiments.study.evaluation import Evaluator, Scores
from experiments.study.problem import Problem
from experiments.study.store import StudyDirectory
from experiments.study.training import Trained
from experiments.training.run_directory import bytes_on_disk

SPLITS = ("validation", "test", "retained")


class Results:
    """Evaluates trained groups and stores the outcome of their runs.

    Args:
        adaptations: of the study.
        directory: of the study.
    """

    def __init__(self, adaptations: Adaptations, directory: StudyDirectory):
        """Evaluate nothing yet."""
        self.adaptations, self.directory = adaptations, directory
        self._evaluators: dict[tuple[int, str], Evaluator] = {}
        self._before: dict[str, dict[str, Any]] = {}

    def evaluators(self, problem: Problem) -> dict[str, Evaluator]:
        """Return the evaluator of every split that a problem has; what they compile is used again."""
        tasks = {"validation": problem, "test": problem, "retained": problem.retained}
        for split, task in tasks.items():
            if task is not None and (id(problem), split) not in self._evaluators:
                data = task.data if task is problem.retained else problem.data[split]
                batch = self.adaptations.config.evaluation.batch
                self._evaluators[id(problem), split] = Evaluator(task, data, batch=batch)
        return {split: self._evaluators[id(problem), split] for split, task in tasks.items() if task is not None}

    def store(self, name: str, cells: Sequence[Cell], trained: Trained, seconds: float) -> dict[str, Any]:
        """Store each run that has no result yet.

        Args:
            name: of the group.
            cells: its runs.
            trained: what they came to.
            seconds: that the group took, compiling included.

        Returns:
            What `groups/<name>.json` holds.
        """
        base, program = self.adaptations.base(cells[0].settings), trained.program
        scores = {split: it.stack(base.params, trained.stack) for split, it in self.evaluators(base.problem).items()}
        steps, members = len(trained.curves.log.loss), len(cells)
        trained.curves.add(steps, scores["validation"])
        of_each = {
            "step_seconds": trained.curves.seconds / steps / members,
            "compile_seconds": program.compile_seconds / members,
            "wall_seconds": seconds / members,
        }
        for place, cell in enumerate(cells):
            if not self.directory.exists(f"cells/{cell.id}/result.json"):
                own = {split: Scores(of.loss[place], of.score[place]) for split, of in scores.items()}
                self._store(cell, place, trained, own, {"group": name, "steps": steps}, of_each)
        return {
            "id": name,
            "cells": [cell.id for cell in cells],
            "members": members,
            "compile_seconds": program.compile_seconds,
            "seconds": seconds,
            "steps": steps,
            "flops": program.flops,
            "temporary_bytes": program.temporary_bytes,
            "peak_bytes": program.peak_bytes,
            "process": {"host": platform.node(), "pid": os.getpid()},
        }

    def _store(
        self,
        cell: Cell,
        place: int,
        trained: Trained,
        scores: dict[str, Scores],
        trained_in: dict[str, Any],
        of_each: dict[str, float],
    ) -> None:
        """Store one run, its result last, because that says that all is there."""
        config, base = self.adaptations.config, self.adaptations.base(cell.settings)
        folder = f"cells/{cell.id}"
        adapter = self.directory.path / folder / "adapter"
        shutil.rmtree(adapter, ignore_errors=True)  # of a process that was killed here
        metadata = {"study": config.name, "run": cell.id}
        lorax.save(adapter, lorax.select(trained.stack, place), base=base.params, metadata=metadata)
        self.directory.write(f"{folder}/curve.json", trained.curves.of(place))
        items = {f"{split}_{what}": array for split, of in scores.items() for what, array in of._asdict().items()}
        self.directory.write_arrays(f"{folder}/items.npz", items)
        diverged_at = trained.curves.diverged_at(place)
        of_files = {"checkpoint_bytes": bytes_on_disk(adapter)}
        examples = trained_in["steps"] * config.train.batch
        result = {
            "id": cell.id,
            "settings": cell.settings,
            "status": "finished" if diverged_at is None else "diverged",
            "diverged_at": diverged_at,
            **_means(scores),
            "base": self._before_training(cell),
            "costs": {**self._costs(cell), **of_files, **of_each},
            "tokens": examples * base.problem.tokens_per_example,
            **trained_in,
        }
        self.directory.write(f"{folder}/result.json", result)

    def _before_training(self, cell: Cell) -> dict[str, Any]:
        """Return how a run's base does without any adapter."""
        quantize = cell.settings["quantize"]
        if quantize not in self._before:
            base = self.adaptations.base({"method": "head", "quantize": quantize})
            scores = {split: it.base(base.params) for split, it in self.evaluators(base.problem).items()}
            self._before[quantize] = _means(scores)
        return self._before[quantize]

    def _costs(self, cell: Cell) -> dict[str, Any]:
        """Measure what the run's configuration takes, once for all processes."""
        name = costs.name(cell.settings)
        with self.directory.claimed(f"costs {name}", wait=True):
            found = self.directory.read(f"costs/{name}.json")
            if found is None:
                found = costs.measure(self.adaptations, cell.settings)
                self.directory.write(f"costs/{name}.json", found)
        return found


def _means(scores: dict[str, Scores]) -> dict[str, Any]:
    return {split: scores[split].means() if split in scores else None for split in SPLITS}
