"""Which learning rate a configuration is judged at: the best on the validation set, and whether the grid reached far.

Methods and ranks want different rates, so that a comparison at one rate for all is mostly one of rates. Each has its
own, chosen without a look at the test examples. An optimum at the first or the last rate of a grid is none: beyond it
the configuration may do better, and a comparison that it loses is void.
"""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

Rate = float | str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The learning rate that a configuration is judged at.

    Attributes:
        rate: the one with the best mean validation score over its runs, mostly one a seed.
        score: that mean.
        edge: `low` or `high` if it is the first or the last of the grid; None inside, and of a grid of one.
        swept: whether there was more than one to choose from.
    """

    rate: Rate
    score: float
    edge: str | None
    swept: bool


def choose_rate(rows: Iterable[tuple[Rate, float, float]]) -> Choice:
    """Return the learning rate with the best mean validation score; of equals that with the lower mean loss.

    If that decides nothing either, it is the lower rate.

    Args:
        rows: learning rate, validation score and validation loss of each run of one configuration. A run that diverged
            has the worst score that there is, 0 of a fraction; a number that is not known (NaN) counts as worse still.

    Raises:
        ValueError: if there are no rows.

    >>> rows = [(1e-3, 0.7, 0.9), (3e-3, 0.8, 0.5), (3e-3, 0.7, 0.6), (1e-2, 0.9, 0.4), (1e-2, 0.0, math.inf)]
    >>> choose_rate(rows)
    Choice(rate=0.003, score=0.75, edge=None, swept=True)
    >>> choose_rate(rows[:3]).edge, choose_rate(rows[:1]).edge
    ('high', None)
    """
    runs: dict[Rate, list[tuple[float, float]]] = {}
    for rate, score, loss in rows:
        known = (-math.inf if math.isnan(score) else score, math.inf if math.isnan(loss) else loss)
        runs.setdefault(rate, []).append(known)
    if not runs:
        raise ValueError("choose_rate: got no runs to choose a learning rate by; wanted (rate, score, loss) of each")
    grid = sorted(runs, key=lambda rate: (rate is None, rate))
    means = {rate: np.mean(runs[rate], axis=0) for rate in grid}
    best = max(grid, key=lambda rate: (means[rate][0], -means[rate][1]))
    ends = {grid[0]: "low", grid[-1]: "high"} if len(grid) > 1 else {}
    return Choice(rate=best, score=float(means[best][0]), edge=ends.get(best), swept=len(grid) > 1)
