"""Simulated studies: scores with effects of seeds, items and runs, and how often all intervals of a study hold.

    python -m tests.experiments.crossed_effects [studies]

prints the table of `experiments/study/statistics.py`: how often all differences of a study are inside their intervals.

Axes: K configurations, S seeds, I items.
"""

import dataclasses
import itertools
import sys

import numpy as np

from experiments.study.statistics import Comparison, compare_all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effects:
    """Standard deviations of what a score is made of.

    Args:
        seed: a seed's effect on a configuration, about its effect on all alike, which is as large.
        item: an item's on a configuration, about its difficulty for all.
        rest: a run's on an item.
        unevenness: of the logarithm of `seed` over configurations.
        wild: by what factor the seeds of the first configuration vary more.
        kinship: the share of a seed's effect that every second configuration has in common.
    """

    seed: float
    item: float
    rest: float
    unevenness: float = 0.0
    wild: float = 1.0
    kinship: float = 0.0

    def draw(self, rng: np.random.Generator, means_K: np.ndarray, seeds: int, items: int) -> np.ndarray:
        """Return scores K×S×I of a study with these true means."""
        count = len(means_K)
        scale_K = self.seed * np.exp(self.unevenness * rng.normal(size=count))
        scale_K[0] *= self.wild
        common_KxS = rng.normal(size=(2, seeds))[np.arange(count) % 2]
        own_KxS = np.sqrt(self.kinship) * common_KxS + np.sqrt(1 - self.kinship) * rng.normal(size=(count, seeds))
        by_seed_KxS = scale_K[:, None] * own_KxS + self.seed * rng.normal(size=seeds)
        by_item_KxI = self.item * rng.normal(size=(count, items)) + 0.3 * rng.normal(size=items)
        rest_KxSxI = self.rest * rng.normal(size=(count, seeds, items))
        return means_K[:, None, None] + by_seed_KxS[:, :, None] + by_item_KxI[:, None] + rest_KxSxI


MOSTLY_SEEDS = Effects(seed=0.03, item=0.05, rest=0.1)
KINDS = {
    "mostly seeds": MOSTLY_SEEDS,
    "mostly items": Effects(seed=0.01, item=0.1, rest=0.2),
    "uneven seeds": dataclasses.replace(MOSTLY_SEEDS, unevenness=0.3),
    "related seeds": dataclasses.replace(MOSTLY_SEEDS, kinship=0.8),
    "a wild one": dataclasses.replace(MOSTLY_SEEDS, wild=10),
}


def study(scores_KxSxI: np.ndarray, **settings: object) -> list[Comparison]:
    """Compare the configurations of a study, named by their numbers."""
    return compare_all({str(k): x for k, x in enumerate(scores_KxSxI)}, **settings)


def ours(scores_KxSxI: np.ndarray) -> list[tuple[float, float]]:
    """Return the intervals of all pairs."""
    return [(c.difference.low, c.difference.high) for c in study(scores_KxSxI, seed=0, resamples=1000)]


def plain(scores_KxSxI: np.ndarray) -> list[tuple[float, float]]:
    """Return the intervals of a bootstrap of seeds and items, with the percentile of its largest studentised error."""
    _, seeds, items = scores_KxSxI.shape
    rng = np.random.default_rng(0)
    share = lambda n: rng.multinomial(n, np.full(n, 1 / n), size=1000) / n
    by_item = np.einsum("rs,ksi->rki", share(seeds), scores_KxSxI)
    drawn_RxK = np.einsum("rki,ri->rk", by_item, share(items))
    a, b = np.array(list(itertools.combinations(range(len(scores_KxSxI)), 2))).T
    means_K = scores_KxSxI.mean(axis=(1, 2))
    differences, drawn_RxC = means_K[a] - means_K[b], drawn_RxK[:, a] - drawn_RxK[:, b]
    errors = drawn_RxC.std(axis=0)
    half = errors * np.quantile(np.max(np.abs(drawn_RxC - differences) / errors, axis=1), 0.95)
    return list(zip(differences - half, differences + half, strict=True))


def coverage(effects: Effects, configurations: int, seeds: int, studies: int, items: int = 60, of=ours) -> float:
    """Return the share of studies in which every difference is inside its interval; the true means differ."""
    rng, means_K = np.random.default_rng(0), np.linspace(0, 0.1, configurations)
    true = [means_K[a] - means_K[b] for a, b in itertools.combinations(range(configurations), 2)]
    holds = lambda found: all(low <= d <= high for (low, high), d in zip(found, true, strict=True))
    return float(np.mean([holds(of(effects.draw(rng, means_K, seeds, items))) for _ in range(studies)]))


def main(studies: int) -> None:
    """Print the shares of a plain bootstrap and of ours, in per cent."""
    for name, effects in KINDS.items():
        for configurations, seeds in itertools.product((2, 6, 12, 24), (3, 5, 10)):
            shares = [coverage(effects, configurations, seeds, studies, of=of) for of in (plain, ours)]
            print(f"{name:14} K = {configurations:2} S = {seeds:2}", *(f"{100 * x:6.1f}" for x in shares), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 1000)
