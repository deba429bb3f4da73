"""A whole study: plan it, train its groups, store what each run came to, and report.

Each part is done once, by whichever process claims it, however often processes are killed and started again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from experiments.study import axes, grouping, outcome
from experiments.study.adaptation import Adaptations
from experiments.study.axes import Cell
from experiments.study.problem import Problem, examples
from experiments.study.program import Programs
from experiments.study.progress import Progress
from experiments.study.results import Results
from experiments.study.store import StudyDirectory
from experiments.study.training import GroupTraining
from experiments.training.run_directory import environment
from experiments.training.settings import to_json
from experiments.training.stopping import StopSignals


def run(config: config_dict.ConfigDict, problem: Problem, *, command: str, stop: StopSignals) -> bool:
    """Do what is left of a study in `config.run_dir`, beside other processes that do the same.

    Args:
        config: of `settings.resolve`.
        problem: what its runs train on.
        command: what was typed, for the report.
        stop: installed signal handlers.

    Returns:
        Whether all runs are finished; if not, other processes are at work on the rest.

    Raises:
        ValueError: the settings do not fit the problem, or the directory holds something else.
        Stopped: by a signal; the state is saved.
    """
    study = _Study(config, problem)
    with study.directory.claimed("plan", wait=True):
        study.plan(command)
    study.train(stop)
    return study.finish()


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that are trained together."""

    id: str
    cells: list[Cell]

    @property
    def file(self) -> str:
        """What tells that it is finished."""
        return f"groups/{self.id}.json"

    @property
    def updates(self) -> int:
        """Those of all its runs."""
        return len(self.cells) * self.cells[0].settings["steps"]


class _Study:
    """A study under way in this process."""

    def __init__(self, config: config_dict.ConfigDict, problem: Problem):
        self.config, self.problem = config, problem
        self.directory = StudyDirectory(config.run_dir)
        self.adaptations = Adaptations(config, problem)
        self.programs = Programs(self.adaptations, config.train.batch)
        self.results = Results(self.adaptations, self.directory)
        self.cells: list[Cell] = []
        self.digests: dict[str, Any] = {}
        self.groups: list[Group] = []

    def plan(self, command: str) -> None:
        """Read what the study's first process planned, or plan."""
        settings = json.loads(to_json(self.config))
        self.directory.check_same(settings)
        self.cells = axes.cells(self.config, self.adaptations)
        self.digests = self.problem.digests()
        stored = self.directory.read("study.json")
        if stored is None:
            model = f"{self.problem.name}, {_numbers(self.problem.params):,} parameters"
            stored = self._planned()
            self.directory.write("config.json", settings)
            self.directory.write("environment.json", environment(self.config, command=command, model=model))
            self.directory.write("study.json", stored)
        by_id = {cell.id: cell for cell in self.cells}
        before = stored["problem"].get("digests", self.digests)
        changed = sorted(name for name in before.keys() | self.digests if before.get(name) != self.digests.get(name))
        if changed:
            raise ValueError(
                f"{self.directory.path}: the study began with other numbers in its problem's {', '.join(changed)}, and "
                "its runs would not compare. Give another --config.run_dir, or delete that directory to start anew"
            )
        if stored["cells"] != [dataclasses.asdict(cell) for cell in self.cells]:
            raise ValueError(
                f"{self.directory.path}: its runs are others than the problem {self.problem.name} gives now; was the "
                "problem changed? Give another --config.run_dir, or delete that directory to start anew"
            )
        self.groups = [Group(group["id"], [by_id[name] for name in group["cells"]]) for group in stored["groups"]]

    def _planned(self) -> dict[str, Any]:
        settings = self.config.grouping
        limit = grouping.memory_limit(settings.memory_gib)
        print(f"planning {len(self.cells)} runs; a program may take {limit / 2**30:.1f} GiB")

        def fits(members: Sequence[Cell]) -> bool:
            program = self.programs.compiled(members, self.programs.abstract_start(members), self._chunk(members[0]))
            gib, seconds = program.peak_bytes / 2**30, program.compile_seconds
            print(f"{len(members)} runs in one program: {gib:.2f} GiB, compiled in {seconds:.0f} s")
            return program.peak_bytes <= limit

        families = grouping.families(self.cells, self.adaptations, padding=settings.padding)
        most = grouping.most_members(settings.members, jax.default_backend())
        parts = [part for family in families for part in grouping.groups(family, fits, most=most)]
        digits = len(str(len(parts) - 1))
        count = ", ".join(f"{examples(data):,} {name}" for name, data in self.problem.data.items())
        facts = {"Examples": count, "Base parameters": f"{_numbers(self.problem.params):,}", **self.problem.facts}
        return {
            "axes": axes.values(self.cells),
            "problem": {
                "name": self.problem.name,
                "score_name": self.problem.score_name,
                "facts": facts,
                "digests": self.digests,
            },
            "cells": [dataclasses.asdict(cell) for cell in self.cells],
            "groups": [
                {"id": f"g{place:0{digits}}", "cells": [cell.id for cell in part]} for place, part in enumerate(parts)
            ],
        }

    def _chunk(self, cell: Cell) -> int:
        """Return the updates between validations."""
        return cell.settings["steps"] // self.config.evaluation.points

    def train(self, stop: StopSignals) -> None:
        """Train every group that is neither finished nor another process's, until none is left."""
        updates = sum(group.updates for group in self.groups)
        with Progress(updates, sum(group.updates for group in self._finished())) as progress:
            has_trained = True
            while has_trained:
                has_trained = any([self._train(group, stop, progress) for group in self.groups])

    def _train(self, group: Group, stop: StopSignals, progress: Progress) -> bool:
        """Train a group, if there is something to do; return whether there was."""
        if self.directory.exists(group.file):
            return False
        with self.directory.claimed(group.id) as is_mine:
            if not is_mine or self.directory.exists(group.file):
                return False
            base = self.adaptations.base(group.cells[0].settings)
            training = GroupTraining(
                group.id,
                group.cells,
                self.programs,
                self.directory,
                self.results.evaluators(base.problem)["validation"],
                chunk=self._chunk(group.cells[0]),
                checkpoint_seconds=self.config.checkpoint_seconds,
            )
            if done := len(training.curves.log.loss):
                progress.write(f"group {group.id}: going on after update {done} of {group.cells[0].settings['steps']}")
            trained = training.to_the_end(stop, lambda done: self._show(progress, done * len(group.cells)))
            stored = self.results.store(group.id, group.cells, trained, training.elapsed)
            self.directory.write(group.file, stored)
            training.forget()
            progress.write(f"group {group.id}: {len(group.cells)} runs in {training.elapsed:.0f} s")
            self._show(progress, 0)
            return True

    def _finished(self) -> list[Group]:
        return [group for group in self.groups if self.directory.exists(group.file)]

    def _show(self, progress: Progress, updates: int) -> None:
        finished = self._finished()
        progress.show(
            sum(group.updates for group in finished) + updates,
            groups=f"{len(finished)}/{len(self.groups)}",
            runs=f"{sum(len(group.cells) for group in finished)}/{len(self.cells)}",
        )

    def finish(self) -> bool:
        """Analyse and report if all runs are finished, unless another process is doing so; return whether they are."""
        if len(self._finished()) < len(self.groups):
            return False
        with self.directory.claimed("finish") as is_mine:
            if is_mine:
                from experiments.report import study as report  # charts take a while to import

                outcome.write(self.directory, self.cells, self.adaptations)
                print(f"report: {report.write([self.directory.path])}")
        return True


def _numbers(params: Any) -> int:
    return sum(np.size(leaf) for leaf in jax.tree.leaves(params))
