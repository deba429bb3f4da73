"""Two things that trade: what a sweep of learning rates learns and what it forgets, compared where they learn alike.

A higher rate learns more and forgets more. Two methods at one rate each differ in both, and either may look better; the
question is which forgets less for the same learning. Each seed's sweep gives a frontier, the runs that no other is
better than in both, and a straight line between two neighbours; nothing is extended beyond the ends.

Axes: S seeds, R learning rates, T targets.
"""

import dataclasses

import numpy as np

from experiments.study.statistics import Band, band, pareto
from experiments.training.intervals import Interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What one configuration learned and forgot, by seed and learning rate.

    Attributes:
        learned_SxR: higher is better: a score, or minus a loss. NaN where a run diverged.
        forgotten_SxR: lower is better: a loss that rose, a score that fell.
    """

    learned_SxR: np.ndarray
    forgotten_SxR: np.ndarray

    def range(self) -> tuple[float, float]:
        """Return the least and the most that all seeds' frontiers reach."""
        ends = np.array([_frontier(*seed)[0][[0, -1]] for seed in self._seeds()])
        return float(ends[:, 0].max()), float(ends[:, 1].min())

    def at(self, targets_T: np.ndarray) -> np.ndarray:
        """Return what each seed's frontier forgets where it has learned so much, S×T."""
        return np.stack([forgotten_at(*seed, targets_T) for seed in self._seeds()])

    def _seeds(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return list(zip(self.learned_SxR, self.forgotten_SxR, strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matched:
    """How much more one configuration forgets than another, where both have learned the same.

    Attributes:
        targets_T: what was learned, from the least to the most that all frontiers of both reach.
        at_target: the difference at each, mean and 95 % interval over seeds.
        difference: its mean over the targets, with a 95 % interval over seeds.
    """

    targets_T: np.ndarray
    at_target: Band
    difference: Interval


def forgotten_at(learned_R: np.ndarray, forgotten_R: np.ndarray, targets_T: np.ndarray) -> np.ndarray:
    """Return what is forgotten where so much is learned, on the frontier of one sweep; NaN beyond its ends.

    >>> learned, forgotten = np.array([0.2, 0.6, 0.5, 0.8]), np.array([0.0, 0.1, 0.4, 0.5])
    >>> forgotten_at(learned, forgotten, np.array([0.1, 0.4, 0.6, 0.7, 0.9])).round(2).tolist()
    [nan, 0.05, 0.1, 0.3, nan]
    """
    x, y = _frontier(learned_R, forgotten_R)
    return np.interp(targets_T, x, y, left=np.nan, right=np.nan)


def compare_matched(a: Sweep, b: Sweep, *, targets: int = 9) -> Matched | None:
    """Return how much more `a` forgets than `b` at equal learning, in pairs by seed.

    Args:
        a: a configuration's sweep.
        b: another one's, of the same seeds in the same order.
        targets: at how many amounts of learning.

    Returns:
        The difference; None where the frontiers have no amount in common, as when one learns more at its lowest rate
        than the other at its highest: then wider sweeps are needed. Of one seed the intervals are NaN.

    Raises:
        ValueError: if the seeds differ in number, or a seed has no run that did not diverge.

    >>> rates = np.array([[0.2, 0.4, 0.6, 0.8]] * 3)
    >>> noise = 0.01 * np.random.default_rng(0).normal(size=(3, 1))
    >>> full = Sweep(learned_SxR=rates, forgotten_SxR=rates)
    >>> lora = Sweep(learned_SxR=rates, forgotten_SxR=rates / 2 + noise)
    >>> found = compare_matched(full, lora)
    >>> found.targets_T[[0, -1]].tolist(), round(found.difference.value, 1), found.difference.low > 0.15
    ([0.2, 0.8], 0.2, True)
    """
    if len(a.learned_SxR) != len(b.learned_SxR):
        raise ValueError(f"sweeps of {len(a.learned_SxR)} and {len(b.learned_SxR)} seeds; pairs need the same seeds")
    low, high = (pick(ends) for pick, ends in zip((max, min), zip(a.range(), b.range(), strict=True), strict=True))
    if low > high:
        return None
    targets_T = np.linspace(low, high, targets)
    more_SxT = a.at(targets_T) - b.at(targets_T)
    mean = band(more_SxT.mean(axis=1, keepdims=True))
    ends = {name: float(getattr(mean, name)[0]) for name in ("low", "high")}
    return Matched(
        targets_T=targets_T, at_target=band(more_SxT), difference=Interval(value=float(mean.mean[0]), **ends)
    )


def _frontier(learned_R: np.ndarray, forgotten_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the points of a sweep that no other is better than in both, by what was learned."""
    best = pareto(learned_R, forgotten_R)
    if not best:
        raise ValueError("a seed has no run that did not diverge: leave the seed out of both sweeps")
    x, y = np.asarray(learned_R)[best], np.asarray(forgotten_R)[best]
    x, at = np.unique(x, return_index=True)  # ascending; points that coincide once
    return x, y[at]
