"""What the scores of a study separate: means and differences with intervals, over seeds and items.

Every run of a study answers the same items, and runs of one seed share what the seed decides; so differences are taken
in pairs, by seed and by item. Test scores are of the learning rate that was chosen on the validation set: the choice
has seen no test score, and an interval of a test score needs no correction for it.

*Many comparisons.* All intervals of a study hold at once, 95 times of 100: their width is the 95th percentile of the
largest studentised difference, `max |d* - d|/se`, of a bootstrap that draws all configurations jointly (Romano and Wolf
2005, doi:10.1111/j.1468-0262.2005.00615.x). It knows that neighbours have much in common, which Bonferroni's inequality
does not. An adjusted p-value is the share of resamples whose largest is at least so large, so that it is at most 0.05
where the interval excludes zero, and only there. Holm's procedure would reject a few more, of which the intervals say
nothing.

*Few seeds.* Items are resampled with replacement, the same for all configurations. Resampling three seeds likewise
(Owen 2007, doi:10.1214/07-AOAS122) would be wrong twice over. It takes their variance for known, and too small by
(S - 1)/S: `crossed` has the remedy, by which the percentile becomes the quantile of Student's t of the same level. And
it confines what they do to all the differences to S - 1 dimensions, so that the largest of many is too small: here the
seeds' part of each configuration's mean is drawn by itself, normal, beside what a seed does to all of them alike. How
often all intervals of a study of K configurations held, per cent of 500 simulated ones in which seeds make up most of a
difference's variance (`python -m tests.experiments.crossed_effects`):

    K                  2                 6                12                24
    S              3    5   10       3    5   10       3    5   10       3    5   10
    resampled   89.8 94.2 95.4    74.2 87.2 93.4    58.0 83.2 92.0    37.6 69.6 93.2
    here        98.2 97.4 96.4    96.8 97.4 96.0    96.6 97.0 95.6    96.0 97.2 98.2

Where items do, both are at 94 to 100. Where some configurations' seeds vary more than others' (by a factor of 1.35, one
standard deviation), or every second one's have 80 % of their effect in common, it is 92 to 99 here; where one of them
varies ten times as much, 89 to 95 with three seeds and 95 to 98 with more.

Axes: K configurations, C comparisons, S seeds, I items, R resamples.
"""

import dataclasses
import difflib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy import special

from experiments.study.crossed import Errors, errors, moderated
from experiments.training.intervals import Z_95, Interval

LEVEL = 0.95
DRAWS_AT_ONCE = 2**23  # numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The difference of two configurations' mean scores.

    Attributes:
        a: name of the one.
        b: name of the other.
        difference: a's mean less b's, with an interval that holds together with those of all other comparisons.
        p_value: of this comparison alone, two-sided.
        adjusted_p: corrected for the number of comparisons.
        separated: whether the interval excludes zero, which is whether `adjusted_p` is at most 0.05.
        seeds: how many there are. Of one seed the interval is over items alone: another seed may say the opposite.
    """

    a: str
    b: str
    difference: Interval
    p_value: float
    adjusted_p: float
    separated: bool
    seeds: int

    @property
    def speaks_for_seeds(self) -> bool:
        """Whether it says anything about seeds that were not run."""
        return self.seeds > 1


def mean_interval(scores_SxI: np.ndarray, *, seed: int, resamples: int = 10_000) -> Interval:
    """Return the mean score of a configuration with its 95 % interval over seeds and items.

    Items are resampled and give the percentiles of their part, which stays within the scores' range; the seeds' part
    is Student's t with S - 1 degrees of freedom. The two add up in squares, see `crossed`.

    Args:
        scores_SxI: a score for each seed and item. Of one seed the interval is over items alone.
        seed: of the resampling.
        resamples: how many bootstrap replicates.

    Raises:
        ValueError: if there are fewer than two items, or a score is not finite.

    >>> one_seed = mean_interval(np.tile([0.0, 1.0], (1, 50)), seed=0)
    >>> one_seed.value, round(one_seed.low, 1), round(one_seed.high, 1)
    (0.5, 0.4, 0.6)
    >>> alike = mean_interval(np.tile([0.0, 1.0], (3, 50)), seed=0)
    >>> alike == one_seed
    True
    """
    scores_1xSxI = _stacked({"the configuration": scores_SxI})
    _, _, items = scores_1xSxI.shape
    found = errors(scores_1xSxI, np.ones((1, 1)))
    by_item_I = scores_1xSxI[0].mean(axis=0)
    drawn_R = np.concatenate(
        [w_RxI @ by_item_I for w_RxI in _item_weights(np.random.default_rng(seed), items, resamples, 1)]
    )
    low, high = np.quantile(drawn_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    mean, spread = float(by_item_I.mean()), float(by_item_I.var(ddof=1)) / items
    share = math.sqrt(found.item_C[0] / spread) if spread else 0.0  # less what the rest has in it
    by_seed = float(dataclasses.replace(found, item_C=np.zeros(1)).half_widths(Z_95)[0])
    half = lambda part: math.hypot(by_seed, share * part)
    return Interval(value=mean, low=mean - half(mean - low), high=mean + half(high - mean))


def compare_all(
    scores: Mapping[str, np.ndarray], *, seed: int, resamples: int = 10_000, baseline: str | None = None
) -> list[Comparison]:
    """Compare the mean scores of all pairs of configurations, or of all others with a baseline.

    Args:
        scores: by configuration the scores, S×I, of the same seeds and items in the same order.
        seed: of the resampling.
        resamples: how many bootstrap replicates.
        baseline: the configuration to compare all others with, as `b`; None compares all pairs.

    Returns:
        The comparisons, in the order of `scores`; none of fewer than two configurations.

    Raises:
        ValueError: if shapes differ, a score is not finite, there are fewer than two items, or there is no such
            baseline.

    >>> rng = np.random.default_rng(0)
    >>> easy = rng.random(200)
    >>> runs = lambda gain: np.clip(easy + gain + 0.1 * rng.normal(size=(5, 200)), 0, 1)
    >>> found = compare_all({"r=1": runs(0), "r=8": runs(0.1), "r=64": runs(0.1)}, seed=0)
    >>> [(c.a, c.b, c.separated) for c in found]
    [('r=1', 'r=8', True), ('r=1', 'r=64', True), ('r=8', 'r=64', False)]
    """
    names = list(scores)
    if baseline is not None and baseline not in scores:
        near = ", ".join(difflib.get_close_matches(baseline, names, n=3, cutoff=0.0))
        raise ValueError(f"compare_all: no configuration is called {baseline!r}; nearest: {near or 'there is none'}")
    scores_KxSxI = _stacked(scores)
    everything = list(itertools.combinations(range(len(names)), 2))
    if not everything:
        return []
    chosen = [(a, b) for a, b in everything if baseline is None or baseline in (names[a], names[b])]
    turned = [(b, a) if names[a] == baseline else (a, b) for a, b in chosen]
    found = _moderated_errors(scores_KxSxI, everything, chosen)
    means_K = scores_KxSxI.mean(axis=(1, 2))
    difference_C = np.array([means_K[a] - means_K[b] for a, b in turned])
    z_C = found.z_scores(np.abs(difference_C))
    largest_R = np.sort(_largest(scores_KxSxI, np.array(turned), seed, resamples))
    critical = largest_R[min(math.ceil(LEVEL * (resamples + 1)), resamples) - 1]
    half_C = found.half_widths(critical)
    as_large_C = resamples - np.searchsorted(largest_R, z_C)
    return [
        Comparison(
            a=names[a],
            b=names[b],
            difference=Interval(value=float(d), low=float(d - half), high=float(d + half)),
            p_value=float(2 * special.ndtr(-z)),
            adjusted_p=float((1 + as_large) / (1 + resamples)),
            separated=bool(abs(d) > half),
            seeds=scores_KxSxI.shape[1],
        )
        for (a, b), d, half, z, as_large in zip(turned, difference_C, half_C, z_C, as_large_C, strict=True)
    ]


def rank_ranges(scores: Mapping[str, np.ndarray], comparisons: Sequence[Comparison]) -> dict[str, tuple[int, int]]:
    """Return the best and the worst rank that a configuration can have by what the comparisons separate; 1 is best.

    The best is one more than the number of configurations that are separately better, the worst the number of all
    less those that are separately worse. Pairs that were not compared separate nothing.

    >>> runs = lambda mean: mean + np.random.default_rng(0).normal(size=(3, 100)) * np.array([[0.01]])
    >>> scores = {"worst": runs(0.1), "good": runs(0.5), "as good": runs(0.5)}
    >>> rank_ranges(scores, compare_all(scores, seed=0))
    {'worst': (3, 3), 'good': (1, 2), 'as good': (1, 2)}
    """
    better, worse = dict.fromkeys(scores, 0), dict.fromkeys(scores, 0)
    for c in comparisons:
        if c.separated:
            winner, loser = (c.a, c.b) if c.difference.value > 0 else (c.b, c.a)
            better[loser] += 1
            worse[winner] += 1
    return {name: (1 + better[name], len(scores) - worse[name]) for name in scores}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Band:
    """A mean at every step, with the ends of its 95 % interval over seeds; each an array over the steps."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def band(values_SxT: np.ndarray) -> Band:
    """Return the mean over seeds at every step, with its interval by Student's t, at each step by itself.

    Args:
        values_SxT: a value for each seed and step; NaN where a run has none, as after it diverged. The others count.

    Returns:
        The mean, NaN where no seed has a value, and the ends, NaN where fewer than two have.

    >>> one = band(np.array([[1.0, 2.0, np.nan], [3.0, 2.0, 5.0]]))
    >>> one.mean.tolist(), one.low.round(1).tolist(), one.high.round(1).tolist()
    ([2.0, 2.0, 5.0], [-10.7, 2.0, nan], [14.7, 2.0, nan])
    """
    values_SxT = np.asarray(values_SxT, np.float64)
    is_there_SxT = np.isfinite(values_SxT)
    count_T = is_there_SxT.sum(axis=0)
    mean_T = np.where(is_there_SxT, values_SxT, 0).sum(axis=0) / np.where(count_T > 0, count_T, np.nan)
    squares_T = np.square(np.where(is_there_SxT, values_SxT - mean_T, 0)).sum(axis=0)
    df_T = np.where(count_T > 1, count_T - 1, np.nan)
    half_T = special.stdtrit(df_T, (1 + LEVEL) / 2) * np.sqrt(squares_T / df_T / count_T.clip(1))
    return Band(mean=mean_T, low=mean_T - half_T, high=mean_T + half_T)


def pareto(quality: Sequence[float] | np.ndarray, cost: Sequence[float] | np.ndarray) -> list[int]:
    """Return which points no other is better than: of at least its quality at no more than its cost, and not its equal.

    Args:
        quality: of each point, higher is better.
        cost: of each point, lower is better. Points with a NaN are left out.

    Returns:
        Their indices, ascending; points that are equal in both are all there.

    Raises:
        ValueError: if the two differ in length.

    >>> pareto([0.9, 0.8, 0.7, 0.8, 0.9], [4.0, 2.0, 2.0, 1.0, 4.0])
    [0, 3, 4]
    """
    points = list(enumerate(zip(quality, cost, strict=True)))
    known = [(i, q, c) for i, (q, c) in points if not (math.isnan(q) or math.isnan(c))]
    front, best, cheapest = [], -math.inf, math.inf
    for i, q, c in sorted(known, key=lambda point: (point[2], -point[1])):
        if q > best or (q == best and c == cheapest):
            front, best, cheapest = [*front, i], q, c
    return sorted(front)


def _stacked(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the scores as one array K×S×I of float64, once they fit together."""
    arrays = {name: np.asarray(x, np.float64) for name, x in scores.items()}
    first = next(iter(arrays), None)
    for name, x in arrays.items():
        if x.ndim != 2 or x.shape[0] < 1 or x.shape[1] < 2:
            raise ValueError(f"{name}: scores of shape {x.shape}; wanted seeds by items, at least 1 by 2")
        if x.shape != arrays[first].shape:
            raise ValueError(
                f"{name}: scores of shape {x.shape}, and {first} has {arrays[first].shape}; pairs need the same seeds "
                "and items. Leave out the seeds that are not in all configurations"
            )
        if not np.isfinite(x).all():
            raise ValueError(f"{name}: a score is not finite; give a diverged run the worst score")
    return np.stack(list(arrays.values())) if arrays else np.zeros((0, 1, 2))


def _contrasts(pairs: Sequence[tuple[int, int]], count: int) -> np.ndarray:
    rows = np.arange(len(pairs))
    made_CxK = np.zeros((len(pairs), count))
    made_CxK[rows, [a for a, _ in pairs]], made_CxK[rows, [b for _, b in pairs]] = 1, -1
    return made_CxK


def _moderated_errors(
    scores_KxSxI: np.ndarray, everything: list[tuple[int, int]], chosen: list[tuple[int, int]]
) -> Errors:
    """Return the errors of the chosen pairs, their seeds' parts moderated by those of all pairs."""
    configurations, seeds, _ = scores_KxSxI.shape
    found = errors(scores_KxSxI, _contrasts(everything, configurations))
    if seeds > 1:
        seed_C, df_C = moderated(found.seed_C, seeds - 1, largest_df=(configurations - 1) * (seeds - 1))
        found = dataclasses.replace(found, seed_C=seed_C, seed_df_C=df_C)
    at = [everything.index(pair) for pair in chosen] if len(chosen) < len(everything) else slice(None)
    return dataclasses.replace(found, seed_C=found.seed_C[at], seed_df_C=found.seed_df_C[at], item_C=found.item_C[at])


def _item_weights(rng: np.random.Generator, items: int, resamples: int, width: int) -> Iterator[np.ndarray]:
    """Yield the share of each item in the resamples, R×I, some at a time so that R×width numbers are not many."""
    rows = max(1, DRAWS_AT_ONCE // max(items, width))
    for start in range(0, resamples, rows):
        yield rng.multinomial(items, np.full(items, 1 / items), size=min(rows, resamples - start)) / items


def _largest(scores_KxSxI: np.ndarray, pairs_Cx2: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Return the largest difference of each resample, each difference in its own standard errors."""
    rng, (configurations, seeds, items) = np.random.default_rng(seed), scores_KxSxI.shape
    means_KxS, means_KxI = scores_KxSxI.mean(axis=2), scores_KxSxI.mean(axis=1)
    from_mean_KxI = means_KxI - means_KxI.mean(axis=1, keepdims=True)
    own_KxS = means_KxS - means_KxS.mean(axis=1, keepdims=True)
    own_KxS -= own_KxS.mean(axis=0)
    freedom = max(seeds - 1, 1) * (configurations - 1) / configurations
    seed_K = np.sum(own_KxS**2, axis=1) / freedom / seeds
    a, b = pairs_Cx2.T
    error_C = np.sqrt((from_mean_KxI[a] - from_mean_KxI[b]).var(axis=1) / items + seed_K[a] + seed_K[b])
    error_C[error_C == 0] = np.inf  # configurations that answer alike never differ
    found = []
    for weights_RxI in _item_weights(rng, items, resamples, len(a)):
        drawn_RxK = weights_RxI @ from_mean_KxI.T
        drawn_RxK += rng.normal(size=drawn_RxK.shape) * np.sqrt(seed_K)
        found.append(np.max(np.abs(drawn_RxK[:, a] - drawn_RxK[:, b]) / error_C, axis=1))
    return np.concatenate(found)
