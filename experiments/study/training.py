"""Training of a group of runs: chunks of updates with a validation after each, and going on after a kill."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import lorax
from experiments.study.axes import Cell
from experiments.study.evaluation import Evaluator, Scores
from experiments.study.program import Inputs, Log, Program, Programs, State
from experiments.study.store import StudyDirectory
from experiments.training.stopping import StopSignals


@dataclasses.dataclass
class Curves:
    """What is logged while N runs train.

    Attributes:
        log: of every update, arrays [updates, N].
        steps: after which updates there was a validation.
        loss: mean validation losses, [validations, N].
        score: mean validation scores, likewise.
        seconds: of the updates, without compiling and validating.
        elapsed: seconds that the group took altogether, up to the latest checkpoint.
    """

    log: Log
    steps: list[int]
    loss: np.ndarray
    score: np.ndarray
    seconds: float = 0.0
    elapsed: float = 0.0

    @classmethod
    def empty(cls, members: int) -> Curves:
        """Return those of runs that begin."""
        none = np.zeros((0, members), np.float32)
        return cls(Log(none, none, none.astype(bool)), [], none, none)

    def diverged_at(self, member: int) -> int | None:
        """Return the number of the update, counted from 1, that was not finite; None if all were."""
        diverged = self.log.diverged[:, member]
        return int(np.argmax(diverged)) + 1 if diverged.any() else None

    def of(self, member: int) -> dict[str, Any]:
        """Return the curves of one run as JSON."""
        column = lambda array: array[:, member].tolist()
        updates = range(1, len(self.log.loss) + 1)
        return {
            "train": {
                "step": list(updates),
                "loss": column(self.log.loss),
                "gradient_norm": column(self.log.gradient_norm),
            },
            "validation": {"step": self.steps, "loss": column(self.loss), "score": column(self.score)},
        }

    def add(self, at: int, scores: Scores) -> None:
        """Add a validation after update `at`."""
        self.steps.append(at)
        self.loss, self.score = (  # a run about to diverge has losses whose sum float32 does not hold
            np.concatenate([before, np.mean(now, axis=-1, dtype=np.float64)[None]])
            for before, now in ((self.loss, scores.loss), (self.score, scores.score))
        )


@dataclasses.dataclass(frozen=True)
class Trained:
    """A group after its last update."""

    stack: lorax.Adapter
    curves: Curves
    program: Program


class GroupTraining:
    """Trains a group.

    Args:
        name: of the group, for its files.
        cells: its runs.
        programs: where its program comes from.
        directory: of the study.
        validation: of its problem.
        chunk: updates between validations.
        checkpoint_seconds: at least so long between checkpoints.
    """

    def __init__(
        self,
        name: str,
        cells: Sequence[Cell],
        programs: Programs,
        directory: StudyDirectory,
        validation: Evaluator,
        *,
        chunk: int,
        checkpoint_seconds: float,
    ):
        """Start the group, or take up what an earlier process left of it."""
        self.cells, self.validation, self.chunk = cells, validation, chunk
        self._file, self._directory, self._every = f"groups/{name}.npz", directory, checkpoint_seconds
        self.base = programs.adaptations.base(cells[0].settings)
        self.inputs = programs.inputs(cells)
        started = time.perf_counter()
        state = programs.start(cells)
        made = time.perf_counter()
        self.program = programs.compiled(cells, state, chunk)
        self._saved_at = time.perf_counter()
        self.state, self.curves = self._restored(state)
        # as if the program were its own, compiled here: others may share it, and it may have been compiled before
        before = self.curves.elapsed or made - started + self.program.compile_seconds
        self._started = self._saved_at - before

    @property
    def elapsed(self) -> float:
        """Seconds that the group has taken, its compiling and what earlier processes did for it included."""
        return time.perf_counter() - self._started

    def to_the_end(self, stop: StopSignals, progress: Callable[[int], None]) -> Trained:
        """Make the updates that are left.

        Args:
            stop: signals; one that comes while updates run is acted on after the chunk.
            progress: called with the updates done so far.

        Raises:
            Stopped: a signal came. The state after the chunk of that moment was saved.
        """
        data = jax.device_put(self.base.problem.data["train"])
        steps, done = len(self.inputs.steps_T), len(self.curves.log.loss)
        progress(done)
        with stop.deferred():
            while done < steps and not stop.received:
                done = self._update(done, data)
                progress(done)
                if stop.received or time.perf_counter() - self._saved_at >= self._every:
                    self._save()
        return Trained(self.state.stack, self.curves, self.program)

    def _update(self, done: int, data: Any) -> int:
        """Make the updates of a chunk, and validate unless it is the last one; return how many are done."""
        started = time.perf_counter()
        now = slice(done, done + self.chunk)
        inputs = Inputs(self.inputs.rows_TxNxB[now], self.inputs.steps_T[now], self.inputs.dropout_keys_N)
        self.state, log = self.program.run(self.base.params, data, self.state, inputs)
        log = jax.device_get(log)
        self.curves.seconds += time.perf_counter() - started
        self.curves.log = Log(*(np.concatenate(pair) for pair in zip(self.curves.log, log, strict=True)))
        done += self.chunk
        if done < len(self.inputs.steps_T):  # after the last one every example's score is wanted
            self.curves.add(done, self.validation.stack(self.base.params, self.state.stack))
        return done

    def _save(self) -> None:
        leaves = {f"state/{place}": np.asarray(leaf) for place, leaf in enumerate(jax.tree.leaves(self.state))}
        curves = self.curves
        logged = {f"log/{name}": array for name, array in curves.log._asdict().items()}
        validated = {"steps": np.asarray(curves.steps, np.int32), "loss": curves.loss, "score": curves.score}
        seconds = {"seconds": np.asarray(curves.seconds), "elapsed": np.asarray(self.elapsed)}
        self._directory.write_arrays(self._file, leaves | logged | validated | seconds)
        self._saved_at = time.perf_counter()

    def _restored(self, fresh: State) -> tuple[State, Curves]:
        saved = self._directory.read_arrays(self._file)
        if saved is None:
            return fresh, Curves.empty(len(self.cells))
        likes, tree = jax.tree.flatten(fresh)
        # npz knows no bfloat16 and gives its bytes back without their type
        typed = lambda array, like: array if array.dtype == like.dtype else array.view(like.dtype)
        leaves = [jax.device_put(typed(saved[f"state/{place}"], like)) for place, like in enumerate(likes)]
        log = Log(*(saved[f"log/{name}"] for name in Log._fields))
        times = {name: float(saved[name]) for name in ("seconds", "elapsed")}
        curves = Curves(log, saved["steps"].tolist(), saved["loss"], saved["score"], **times)
        return jax.tree.unflatten(tree, leaves), curves

    def forget(self) -> None:
        """Remove the checkpoint: the group's outcome is stored."""
        self._directory.remove(self._file)
