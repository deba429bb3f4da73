"""What the numbers of a study allow to say: which differences are separated, and the ranks that are possible.

A difference counts as separated if its simultaneous interval leaves out zero *and* the worse side had a fair chance: a
configuration whose rate lies on the edge of its grid may be better beyond it, so that it is worse is not established.
With one seed nothing is separated.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.report.study.configurations import Configuration, Scale, configurations, words
from experiments.report.study.reading import Study, Value
from experiments.study import statistics

COMPARED = 150  # of more configurations, those that are best on validation are compared
OPEN, UNSEPARATED, SEPARATED = "open", "not separated", "separated"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effect:
    """One axis: its values, each averaged over the same combinations of the other axes.

    Attributes:
        axis: its name.
        means: of the test score, by value.
        comparisons: of all pairs of values; simultaneous at 95 %.
        combinations: of the other axes, how many were averaged over.
        on_edge: by value, how many of the configurations averaged have their rate on the edge of its grid.
    """

    axis: str
    means: Mapping[str, float]
    comparisons: Sequence[statistics.Comparison]
    combinations: int
    on_edge: Mapping[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """Everything that the page says in words and numbers.

    Attributes:
        study: the logs.
        configurations: in the order of declaration.
        compared: those whose cells have all ended, on the seeds that they share; at most `COMPARED`.
        seeds: how many these are.
        reference: that of them with the best validation score: chosen without a look at the test examples.
        comparisons: all pairs of the compared ones; simultaneous at 95 %.
        ranks: best and worst rank among them that the comparisons allow; empty with one seed.
        effects: axis by axis, where there are several.
    """

    study: Study
    configurations: Sequence[Configuration]
    compared: Sequence[Configuration]
    seeds: int
    reference: Configuration | None
    comparisons: Sequence[statistics.Comparison]
    ranks: Mapping[str, tuple[int, int]]
    effects: Sequence[Effect]

    @property
    def score_name(self) -> str:
        """What the score is called."""
        return str(self.study.problem["score_name"])

    @property
    def scale(self) -> Scale:
        """What the scores are, and how they are written."""
        return self.configurations[0].scale

    @functools.cached_property
    def named(self) -> Mapping[str, Configuration]:
        """The configurations by their labels."""
        return {one.label: one for one in self.configurations}

    @functools.cached_property
    def best(self) -> Configuration | None:
        """That of the compared ones with the best validation score."""
        return best_on_validation(self.compared)

    @property
    def judged(self) -> list[Configuration]:
        """The configurations that have test scores, be it of a part of their cells."""
        return [one for one in self.configurations if one.interval is not None]

    def verdict(self, comparison: statistics.Comparison) -> str:
        """Return `separated`, `not separated`, or `open` where the worse side's rate lies on the edge of its grid."""
        if not comparison.separated or not comparison.speaks_for_seeds:
            return UNSEPARATED
        worse = comparison.a if comparison.difference.value < 0 else comparison.b
        return OPEN if self.named[worse].on_edge else SEPARATED


def find(study: Study, *, seed: int = 0, resamples: int = 10_000, reference: str = "") -> Findings:
    """Return what the study's numbers allow to say.

    Args:
        study: the logs.
        seed: of the bootstrap.
        resamples: of the bootstrap.
        reference: the label of the configuration that the others are compared with; that with the best validation
            score where empty.

    Raises:
        ValueError: if cells were scored on different examples, or there is no such reference.
    """
    every = configurations(study, seed=seed)
    ended, seeds = _ended(every)
    best_first = sorted(ended, key=lambda one: one.choice.score, reverse=True)
    compared = sorted(best_first[:COMPARED], key=lambda one: one.index)
    best = _reference(compared, reference)
    scores = {one.label: one.test(seeds) for one in compared}
    found = Findings(
        study=study,
        configurations=every,
        compared=compared,
        seeds=len(seeds),
        reference=best,
        comparisons=statistics.compare_all(scores, seed=seed, resamples=resamples),
        ranks={},
        effects=[],
    )
    # what is open, or rests on one seed, orders nothing
    counted = [dataclasses.replace(one, separated=found.verdict(one) == SEPARATED) for one in found.comparisons]
    axes = study.varied if len(study.varied) > 1 else []
    effects = [_effect(axis, study, ended, seeds, seed=seed, resamples=resamples) for axis in axes]
    return dataclasses.replace(
        found,
        ranks=statistics.rank_ranges(scores, counted) if len(seeds) > 1 else {},
        effects=[effect for effect in effects if effect is not None],
    )


def _ended(every: Sequence[Configuration]) -> tuple[list[Configuration], list[Value]]:
    """The configurations whose cells have all ended, and the seeds that all have; neither without a shared seed."""
    ended = [one for one in every if one.interval is not None and not one.waiting]
    shared = [seed for seed in (ended[0].seeds if ended else ()) if all(seed in one.seeds for one in ended)]
    return (ended, shared) if shared else ([], [])


def best_on_validation(compared: Sequence[Configuration]) -> Configuration | None:
    """Return the configuration with the best mean validation score; None of none."""
    return max(compared, key=lambda one: one.choice.score, default=None)


def _reference(compared: Sequence[Configuration], label: str) -> Configuration | None:
    if not label:
        return best_on_validation(compared)
    named = {one.label: one for one in compared}
    if label not in named:
        raise ValueError(f"no finished configuration is called {label!r}; there are: {'; '.join(named)}")
    return named[label]


def _effect(
    axis: str, study: Study, ended: Sequence[Configuration], seeds: Sequence[Value], *, seed: int, resamples: int
) -> Effect | None:
    """Compare the values of an axis over the combinations of the other axes that all values have."""
    combinations: dict[tuple[Value, ...], dict[Value, Configuration]] = {}
    for one in ended:
        others = tuple(one.settings[other] for other in study.varied if other != axis)
        combinations.setdefault(others, {})[one.settings[axis]] = one
    values = [value for value in study.axes[axis] if any(value in row for row in combinations.values())]
    whole = [row for row in combinations.values() if len(row) == len(values)]
    if len(values) < 2 or not whole:
        return None
    averaged = {words(axis, value): np.mean([row[value].test(seeds) for row in whole], axis=0) for value in values}
    return Effect(
        axis=axis,
        means={name: float(scores_SxI.mean()) for name, scores_SxI in averaged.items()},
        comparisons=statistics.compare_all(averaged, seed=seed, resamples=resamples),
        combinations=len(whole),
        on_edge={words(axis, value): sum(row[value].on_edge for row in whole) for value in values},
    )
