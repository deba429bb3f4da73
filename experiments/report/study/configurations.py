"""Configurations: what cells share that differ only in learning rate and seed, judged at the rate that did best.

The rate is chosen on the validation examples, and the scores are those of the test examples, which the choice has not
seen. A run that diverged counts as the worst score there is: 0 of a fraction, else as worse than any in the choice, and
on the test examples as the worst score of any.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.report import text
from experiments.report.study.reading import NOT_RUN, WITHIN, Cell, Study, Value
from experiments.study import selection, statistics
from experiments.training.intervals import Interval

MEAN_RESAMPLES = 2000  # for the percentiles of one mean these do


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """What the scores of a study are, and how the page writes them.

    Attributes:
        fraction: whether all lie between 0 and 1; they are shown in per cent then.
        worst: what every test example of a diverged run scores.
        failed: what a diverged run counts as where a learning rate is chosen.
        best: what no score can exceed.
        examples: how many test examples every cell was scored on; 0 before any has ended.
    """

    fraction: bool
    worst: float
    failed: float
    best: float
    examples: int

    def plain(self, value: float) -> str:
        """Return a score, or the size of a difference, without its unit: of a fraction the per cent."""
        if not math.isfinite(value):
            return ""
        return f"{100 * value:.1f}" if self.fraction else text.number(value)

    def written(self, value: float) -> str:
        """Return a score with its unit."""
        return self.plain(value) + (" %" if self.fraction and math.isfinite(value) else "")

    def between(self, interval: Interval) -> str:
        """Return a score with the ends of its interval."""
        return f"{self.written(interval.value)} ({self.plain(interval.low)} to {self.plain(interval.high)})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configuration:
    """Cells that differ in learning rate and seed alone.

    Attributes:
        index: its place among the report's configurations.
        label: what the page calls it; unique.
        settings: every axis but learning rate and seed.
        cells: all of them, in the order of declaration.
        scale: of the scores.
        choice: the learning rate chosen on validation; None before any cell has ended.
        interval: of the mean test score at that rate, over seeds and examples.
    """

    index: int
    label: str
    settings: Mapping[str, Value]
    cells: Sequence[Cell]
    scale: Scale
    choice: selection.Choice | None = None
    interval: Interval | None = None

    @functools.cached_property
    def rates(self) -> list[Value]:
        """The learning rates that were declared for it, from the lowest."""
        return sorted({cell.settings.get("lr") for cell in self.cells}, key=lambda rate: (rate is None, rate))

    def at(self, rate: Value) -> list[Cell]:
        """Return its cells at a learning rate that have ended, by seed."""
        ended = [cell for cell in self.cells if cell.settings.get("lr") == rate and cell.status != NOT_RUN]
        return sorted(ended, key=lambda cell: str(cell.settings.get("seed")))

    def name(self, cell: Cell) -> str:
        """Return what one of its cells is called: the configuration with the rate and the seed."""
        rate, seed = cell.settings.get("lr"), cell.settings.get("seed")
        parts = [self.label, *([f"rate {text.rate(rate)}"] if rate is not None else [])]
        return ", ".join([*parts, *([f"seed {seed}"] if seed is not None else [])])

    @functools.cached_property
    def chosen(self) -> list[Cell]:
        """Its cells at the chosen learning rate that have ended, by seed."""
        return [] if self.choice is None else self.at(self.choice.rate)

    @property
    def seeds(self) -> list[Value]:
        """The seeds of `chosen`."""
        return [cell.settings.get("seed") for cell in self.chosen]

    def validation(self, rate: Value) -> list[float]:
        """Return the validation score at a rate of each seed."""
        return [self.validated(cell)[0] for cell in self.at(rate)]

    def validated(self, cell: Cell) -> tuple[float, float]:
        """Return the validation score and loss of a cell, as they count where a learning rate is chosen."""
        score, loss = cell.number("validation", "score"), cell.number("validation", "loss")
        failed = cell.status == "diverged" or math.isnan(score) or math.isnan(loss)
        return (self.scale.failed, math.inf) if failed else (score, loss)

    def test(self, seeds: Sequence[Value]) -> np.ndarray:
        """Return the test scores at the chosen rate, float [S, I]: a row for each of these seeds."""
        by_seed = dict(zip(self.seeds, self.chosen, strict=True))
        return np.stack([self._items(by_seed[seed]) for seed in seeds])

    def _items(self, cell: Cell) -> np.ndarray:
        if cell.status == "diverged":
            return np.full(self.scale.examples, self.scale.worst)
        if "test_score" not in cell.items:
            raise ValueError(
                f"{cell.directory / 'items.npz'}: no test scores, though the run has a result; was it removed?"
            )
        return cell.items["test_score"]

    @property
    def waiting(self) -> int:
        """How many of its cells have not ended."""
        return sum(cell.status == NOT_RUN for cell in self.cells)

    @property
    def diverged(self) -> list[Cell]:
        """Its cells that diverged, at whatever rate."""
        return [cell for cell in self.cells if cell.status == "diverged"]

    @property
    def on_edge(self) -> bool:
        """Whether the chosen rate is the first or the last of its grid."""
        return self.choice is not None and self.choice.edge is not None


def configurations(study: Study, *, seed: int) -> list[Configuration]:
    """Return the configurations of a study in the order of declaration.

    Args:
        study: the logs.
        seed: of the bootstrap.

    Raises:
        ValueError: if cells were scored on different examples.
    """
    scale = _scale([cell for cell in study.cells if cell.status != NOT_RUN])
    groups: dict[tuple[Value, ...], list[Cell]] = {}
    for cell in study.cells:
        key = tuple(value for axis, value in cell.settings.items() if axis not in WITHIN)
        groups.setdefault(key, []).append(cell)
    return [_judged(i, cells, study.varied, scale, seed) for i, cells in enumerate(groups.values())]


def words(axis: str, value: Value) -> str:
    """Return a setting as the page says it: names of methods and targets alone, numbers with what they are of.

    >>> words("rank", 4), words("targets", "qv"), words("alpha", "2rank"), words("rank", None)
    ('rank 4', 'qv', 'alpha 2rank', 'no rank')
    """
    if value is None:
        return f"no {axis.replace('_', ' ')}"
    return plain(value) if axis in ("method", "targets", "run") else f"{axis.replace('_', ' ')} {plain(value)}"


def together(settings: Mapping[str, Value], axes: Sequence[str]) -> str:
    """Return some settings as the page says them, without those that mean nothing here.

    >>> together({"method": "lora", "targets": None, "rank": 4}, ["method", "targets", "rank"])
    'lora, rank 4'
    """
    return ", ".join(words(axis, settings[axis]) for axis in axes if settings[axis] is not None)


def plain(value: Value) -> str:
    """Return the value of an axis alone, as it stands beside rows and columns.

    >>> plain(16.0), plain("qv"), plain(None)
    ('16', 'qv', 'none')
    """
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _scale(cells: Sequence[Cell]) -> Scale:
    scored = [cell for cell in cells if cell.status == "finished" and "test_score" in cell.items]
    if not scored:
        return Scale(fraction=True, worst=0.0, failed=0.0, best=1.0, examples=0)
    counts = {len(cell.items["test_score"]): cell for cell in scored}
    if len(counts) > 1:
        (a, one), (b, other), *_ = counts.items()
        raise ValueError(
            f"{other.directory}: scored on {b} test examples, {one.directory} on {a}; differences are taken example by "
            "example: report these studies apart"
        )
    low = min(float(cell.items["test_score"].min()) for cell in scored)
    high = max(float(cell.items["test_score"].max()) for cell in scored)
    fraction = low >= 0 and high <= 1
    worst, failed, best = (0.0, 0.0, 1.0) if fraction else (low, -math.inf, high)
    return Scale(fraction=fraction, worst=worst, failed=failed, best=best, examples=next(iter(counts)))


def _judged(index: int, cells: list[Cell], varied: Sequence[str], scale: Scale, seed: int) -> Configuration:
    settings = {axis: value for axis, value in cells[0].settings.items() if axis not in WITHIN}
    label = together(settings, varied) or "the configuration"
    one = Configuration(index=index, label=label, settings=settings, cells=cells, scale=scale)
    rows = [(rate, *one.validated(cell)) for rate in one.rates for cell in one.at(rate)]
    if not rows:
        return one
    one = dataclasses.replace(one, choice=selection.choose_rate(rows))
    if not scale.examples:
        return one
    mean = statistics.mean_interval(one.test(one.seeds), seed=seed, resamples=MEAN_RESAMPLES)
    within = Interval(value=mean.value, low=max(mean.low, scale.worst), high=min(mean.high, scale.best))
    return dataclasses.replace(one, interval=within)
