"""Confidence intervals for rates measured on one set of held-out examples.

Each rate has Wilson's score interval, which stays inside [0, 1] and does not collapse at 0 or 1 as the normal
approximation does. The same examples are answered before and after training, so the difference of two rates
is bootstrapped over examples, in pairs: that keeps the correlation between the two answers to one question.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959963984540054  # two-sided 95 % point of the standard normal distribution


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with the ends of its 95 % interval, as fractions."""

    value: float
    low: float
    high: float


def wilson(successes: int, trials: int) -> Interval:
    """Return the rate `successes / trials` with its 95 % score interval (Wilson 1927).

    Args:
        successes: how many trials succeeded, 0 to `trials`.
        trials: how many there were, at least 1.

    Raises:
        ValueError: if there are no trials, or more successes than trials.

    >>> i = wilson(8, 10)
    >>> round(i.value, 2), round(i.low, 3), round(i.high, 3)
    (0.8, 0.49, 0.943)
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"wilson: got {successes} successes of {trials} trials; want 0 <= successes <= trials >= 1")
    rate = successes / trials
    z2 = Z_95 * Z_95
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 / (1 + z2 / trials) * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials * trials))
    # min and max: at a rate of 0 or 1 round-off would put the end a hair outside the estimate
    return Interval(value=rate, low=max(0.0, min(centre - half, rate)), high=min(1.0, max(centre + half, rate)))


def paired_bootstrap(before: Sequence[bool], after: Sequence[bool], *, seed: int, resamples: int = 10_000) -> Interval:
    """Return mean(after) - mean(before) with its 95 % percentile interval over resampled examples.

    Args:
        before: one outcome an example.
        after: the outcomes of the same examples, in the same order.
        seed: of the resampling.
        resamples: how many bootstrap replicates.

    Raises:
        ValueError: if the two differ in length or are empty.

    >>> i = paired_bootstrap([False] * 50, [True] * 50, seed=0)
    >>> (i.value, i.low, i.high)
    (1.0, 1.0, 1.0)
    """
    if len(before) != len(after) or not before:
        raise ValueError(
            f"paired_bootstrap: got {len(before)} outcomes before and {len(after)} after; "
            "want the same examples, at least one, in the same order"
        )
    # An example changes by -1, 0 or +1, so a resample is a multinomial draw over those three counts.
    change = np.asarray(after, np.int64) - np.asarray(before, np.int64)
    count = len(change)
    lost, gained = int((change < 0).sum()), int((change > 0).sum())
    draws = np.random.default_rng(seed).multinomial(
        count, [lost / count, (count - lost - gained) / count, gained / count], size=resamples
    )
    differences = (draws[:, 2] - draws[:, 0]) / count
    low, high = np.quantile(differences, [0.025, 0.975])
    return Interval(value=float(change.mean()), low=float(low), high=float(high))
