"""How far a mean over seeds and items can be from the truth: both were drawn, and every run answers every item.

A score is `mean + seed + item + rest`, the last for each run and item by itself (crossed random effects). The variance
of a mean of S runs on I items, or of a difference of two such means in pairs, is

    (σ²_seed + σ²_rest/I) / S  +  σ²_item / I

The first part is estimated from the S means of the runs, with S - 1 degrees of freedom, the second from the I means of
the items less their share of the rest. A normal interval takes both for known, which with a few seeds is far from true.
Here each part has its own quantile, `h² = t²(S-1)·first + t²(I-1)·second`, which covers at least as often as it says
whatever the two variances are (Banerjee 1960, Sankhya 22). Satterthwaite's single number of degrees of freedom does
not, for it is large just when the first part came out too small.

Three seeds leave 2 degrees of freedom, at which a quantile for many comparisons is in the tens. So the first parts of
all pairs of configurations are moderated (Smyth 2004, doi:10.2202/1544-6115.1027): one that came out small is raised
towards what is typical of the study, as far as they look alike, and all gain degrees of freedom, at most as many as one
variance pooled over all configurations has. Two configurations have nothing to be moderated by.

Axes: K configurations, C contrasts of them, S seeds, I items.
"""

import dataclasses

import numpy as np
from scipy import special

LARGEST_Z = 30.0  # a two-sided p-value of 1e-197
LEAST_SHARE = 0.01  # of the median variance: what a variance of zero, a tie of discrete scores, counts as


@dataclasses.dataclass(frozen=True, kw_only=True)
class Errors:
    """The variance of each contrast of means in its two parts, with their degrees of freedom.

    Attributes:
        seed_C: the part due to the seeds; zero where there is but one.
        seed_df_C: its degrees of freedom.
        item_C: the part due to the items.
        item_df: its degrees of freedom.
    """

    seed_C: np.ndarray
    seed_df_C: np.ndarray
    item_C: np.ndarray
    item_df: float

    def half_widths(self, z: np.ndarray | float) -> np.ndarray:
        """Return half the intervals' widths at the level that a normal interval of `z` standard errors has."""
        p = special.ndtr(-np.asarray(z))
        t_seed_C, t_item = -special.stdtrit(self.seed_df_C, p), -special.stdtrit(self.item_df, p)
        return np.sqrt(t_seed_C**2 * self.seed_C + t_item**2 * self.item_C)

    def z_scores(self, distance_C: np.ndarray) -> np.ndarray:
        """Return the `z` at which an interval just reaches so far: the inverse of `half_widths`, by bisection."""
        low, high = np.zeros(len(distance_C)), np.full(len(distance_C), LARGEST_Z)
        for _ in range(50):
            middle = (low + high) / 2
            reaches = self.half_widths(middle) >= distance_C
            low, high = np.where(reaches, low, middle), np.where(reaches, middle, high)
        return np.where(distance_C > 0, high, 0.0)


def errors(scores_KxSxI: np.ndarray, contrasts_CxK: np.ndarray) -> Errors:
    """Return the variances of contrasts of the configurations' means, not moderated."""
    _, seeds, items = scores_KxSxI.shape
    means_KxS, means_KxI = scores_KxSxI.mean(axis=2), scores_KxSxI.mean(axis=1)
    rest = scores_KxSxI - means_KxS[:, :, None] - means_KxI[:, None, :] + means_KxS.mean(axis=1)[:, None, None]
    rest_KxN = rest.reshape(len(rest), -1)
    gram_KxK = rest_KxN @ rest_KxN.T / (max(seeds - 1, 1) * (items - 1))
    of_rest_C = np.sum((contrasts_CxK @ gram_KxK) * contrasts_CxK, axis=1) / (seeds * items)
    item_C = np.maximum((contrasts_CxK @ means_KxI).var(axis=1, ddof=1) / items - of_rest_C, 0)
    if seeds == 1:  # what the seeds would change is unknown, and the rest cannot be told from the items
        zero_C = np.zeros(len(contrasts_CxK))
        return Errors(seed_C=zero_C, seed_df_C=np.ones(len(zero_C)), item_C=item_C, item_df=items - 1)
    seed_C = (contrasts_CxK @ means_KxS).var(axis=1, ddof=1) / seeds
    return Errors(
        seed_C=np.maximum(seed_C, of_rest_C),  # it holds the rest, which is well known
        seed_df_C=np.full(len(seed_C), seeds - 1.0),
        item_C=item_C,
        item_df=items - 1,
    )


def moderated(variances_C: np.ndarray, df: float, largest_df: float) -> tuple[np.ndarray, np.ndarray]:
    """Raise variances that came out small towards what is typical of all, as far as they look alike.

    They are taken for draws around true ones that follow a scaled inverse χ² distribution, so that they follow a scaled
    F distribution (Smyth 2004, section 4). Its scale and second degrees of freedom are fitted to the quartiles, which a
    configuration with one wild seed does not move. A variance above what it would be drawn to stays as it is.

    Args:
        variances_C: two or more, else they are returned as they are.
        df: the degrees of freedom of each.
        largest_df: the most that one can have afterwards.

    Returns:
        The moderated variances and their degrees of freedom.

    >>> alike, gained = moderated(np.array([0.8, 1.0, 1.0, 1.2]), 2, largest_df=6)
    >>> alike.round(2).tolist(), gained.tolist()
    ([1.44, 1.44, 1.44, 1.44], [6.0, 6.0, 6.0, 6.0])
    >>> apart, gained = moderated(np.array([1e-9, 1e-3, 1e3, 1e9]), 2, largest_df=6)
    >>> bool(np.all(gained < 2.5))
    True
    """
    median = np.median(variances_C) if len(variances_C) > 1 else 0.0
    if median == 0:
        return variances_C, np.full(len(variances_C), df, np.float64)
    lower, upper = np.quantile(np.maximum(variances_C, LEAST_SHARE * median), [0.25, 0.75])
    prior_df = _second_df(np.log(upper / lower), df)
    prior = median / _f_quantile(0.5, df, prior_df)
    weight = prior_df / (prior_df + df)
    made_C = np.maximum(weight * prior + (1 - weight) * variances_C, variances_C)
    return made_C, np.full(len(made_C), min(prior_df + df, largest_df), np.float64)


def _second_df(log_ratio: float, df: float) -> float:
    """Return the second degrees of freedom at which the quartiles of F have that ratio, by bisection of the log."""
    low, high = np.log(0.1), np.log(1e6)
    for _ in range(60):
        middle = (low + high) / 2
        quartiles = [_f_quantile(p, df, np.exp(middle)) for p in (0.25, 0.75)]
        low, high = (middle, high) if np.log(quartiles[1] / quartiles[0]) > log_ratio else (low, middle)
    return float(np.exp(high))


def _f_quantile(p: float, df: float, second_df: float) -> float:
    return float(special.fdtri(df, second_df, p))
