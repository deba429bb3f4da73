"""Statistics of studies: against textbook formulas where there are any, and how often their intervals hold."""

import dataclasses
import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
from scipy import stats

from experiments.study.crossed import Errors, errors, moderated
from experiments.study.frontiers import Sweep, compare_matched, forgotten_at
from experiments.study.selection import choose_rate
from experiments.study.statistics import Comparison, band, compare_all, mean_interval, pareto, rank_ranges
from experiments.training.intervals import Interval
from tests.experiments.crossed_effects import KINDS, MOSTLY_SEEDS, Effects, coverage, plain, study

RESAMPLED = 0.03  # of an interval's width, by which 10,000 resamples may be off
LEAST = 0.93  # of intervals that are to hold 95 times of 100
FALSE = 0.07


def drawn(seed: int, configurations: int = 3, seeds: int = 5, items: int = 40, effects: Effects = MOSTLY_SEEDS) -> Any:
    return effects.draw(np.random.default_rng(seed), np.linspace(0, 0.1, configurations), seeds, items)


# What a mean's error is made of


def test_the_two_parts_add_up_to_the_variance_of_a_difference() -> None:
    effects = Effects(seed=0.3, item=0.5, rest=2.0)
    rng, contrast = np.random.default_rng(0), np.array([[1.0, -1.0]])
    found = [errors(effects.draw(rng, np.zeros(2), 4, 30), contrast) for _ in range(3000)]
    by_seed, by_item = (np.mean([getattr(e, name) for e in found]) for name in ("seed_C", "item_C"))
    # the floors of both parts add a little on average
    assert by_seed == pytest.approx(2 * (0.3**2 + 2.0**2 / 30) / 4, rel=0.15) and by_seed > 0.11
    assert by_item == pytest.approx(2 * 0.5**2 / 30, rel=0.4)


def test_seeds_whose_means_agree_by_chance_still_differ_by_the_rest() -> None:
    scores = np.random.default_rng(0).normal(size=(2, 3, 500))
    scores -= scores.mean(axis=2, keepdims=True)
    found = errors(scores, np.array([[1.0, -1.0]]))
    assert found.seed_C[0] == pytest.approx(2 / (3 * 500), rel=0.15)


def test_half_widths_are_students_of_each_part() -> None:
    parts = lambda seed, item: Errors(
        seed_C=np.array([seed]), seed_df_C=np.array([2.0]), item_C=np.array([item]), item_df=99
    )
    t = lambda df: stats.t.ppf(0.975, df)
    assert parts(4.0, 0.0).half_widths(1.959964)[0] == pytest.approx(2 * t(2), rel=1e-5)
    assert parts(0.0, 9.0).half_widths(1.959964)[0] == pytest.approx(3 * t(99), rel=1e-5)
    both = parts(4.0, 9.0)
    assert both.half_widths(1.959964)[0] == pytest.approx(math.hypot(2 * t(2), 3 * t(99)), rel=1e-5)
    for z in (0.01, 1.0, 4.0, 9.0):
        assert both.z_scores(both.half_widths(z))[0] == pytest.approx(z, rel=1e-6)


def test_variances_are_moderated_as_far_as_they_look_alike() -> None:
    rng = np.random.default_rng(0)
    alike = rng.chisquare(4, size=4000) / 4
    made, df = moderated(alike, 4, largest_df=1000)
    assert df[0] > 40 and np.median(made) == pytest.approx(1, abs=0.05)
    np.testing.assert_array_equal(made[alike > 1.2], alike[alike > 1.2])
    # of a prior of 6 degrees of freedom
    uneven = alike * 6 / rng.chisquare(6, size=4000)
    assert moderated(uneven, 4, largest_df=1000)[1][0] == pytest.approx(4 + 6, rel=0.3)
    assert moderated(alike, 4, largest_df=7)[1][0] == 7


def test_a_wild_variance_moves_no_other() -> None:
    calm = np.linspace(0.5, 1.5, 30)
    wild = np.append(calm, [1e4, 1e5])
    assert moderated(wild, 2, 50)[0][:30].max() < 2
    assert moderated(wild, 2, 50)[0][-1] == 1e5


@pytest.mark.parametrize("variances", [[], [2.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 5.0]])
def test_variances_with_nothing_to_go_by_stay(variances: list[float]) -> None:
    made, df = moderated(np.array(variances), 2, largest_df=9)
    assert made.tolist() == variances and df.tolist() == [2.0] * len(variances)


def test_ties_are_no_infinity() -> None:
    with np.errstate(all="raise"):
        made, df = moderated(np.array([0.0, 0.0, 0.0, 1.0, 1.2, 0.8, 1.0]), 2, largest_df=8)
    assert made[0] > 0 and 2 < df[0] < 8


# Comparisons


def test_two_configurations_of_which_only_seeds_vary_are_a_paired_t_test() -> None:
    by_seed = np.random.default_rng(0).normal(size=(2, 5)) + np.array([[0.5], [0]])
    scores = {name: np.repeat(x[:, None], 8, axis=1) for name, x in zip("ab", by_seed, strict=True)}
    (found,) = compare_all(scores, seed=0)
    want = stats.ttest_rel(*by_seed)
    assert found.p_value == pytest.approx(want.pvalue, rel=1e-6)
    interval = want.confidence_interval()
    half = (interval.high - interval.low) / 2
    assert found.difference.low == pytest.approx(interval.low, abs=RESAMPLED * half)
    assert found.difference.high == pytest.approx(interval.high, abs=RESAMPLED * half)
    assert found.adjusted_p == pytest.approx(found.p_value, abs=0.02)


def test_one_seed_is_a_paired_t_test_over_items_and_says_nothing_of_seeds() -> None:
    scores = drawn(0, configurations=2, seeds=1, items=50)
    (found,) = study(scores, seed=0)
    assert found.p_value == pytest.approx(stats.ttest_rel(*scores[:, 0]).pvalue, rel=1e-6)
    assert found.seeds == 1 and not found.speaks_for_seeds
    assert all(c.speaks_for_seeds for c in study(drawn(0), seed=0))


def test_what_seeds_and_items_do_to_all_alike_is_no_difference() -> None:
    scores = drawn(1)
    shift = np.random.default_rng(0).normal(size=(1, 5, 1)) + np.random.default_rng(1).normal(size=(1, 1, 40))
    for one, other in zip(study(scores, seed=0), study(scores + 10 * shift, seed=0), strict=True):
        assert one.adjusted_p == other.adjusted_p
        for end in ("value", "low", "high"):
            assert getattr(one.difference, end) == pytest.approx(getattr(other.difference, end), abs=1e-9)


def test_an_adjusted_p_value_says_what_its_interval_says() -> None:
    found = [c for seed in range(12) for c in study(drawn(seed, configurations=5), seed=seed, resamples=999)]
    for c in found:
        assert c.separated == (c.difference.low > 0 or c.difference.high < 0) == (c.adjusted_p <= 0.05)
        assert c.adjusted_p >= min(c.p_value, 0.9)
    assert {c.separated for c in found} == {True, False}


def test_more_comparisons_make_wider_intervals() -> None:
    scores = {str(k): x for k, x in enumerate(drawn(2, configurations=8))}
    width = lambda c: c.difference.high - c.difference.low
    pairs = {(c.a, c.b): width(c) for c in compare_all(scores, seed=0)}
    against = compare_all(scores, seed=0, baseline="3")
    assert [(c.a, c.b) for c in against] == [(name, "3") for name in scores if name != "3"]
    for c in against:
        assert width(c) < 0.95 * pairs[min(c.a, c.b), max(c.a, c.b)]
    signs = {c.a: c.difference.value for c in compare_all(scores, seed=0) if c.b == "3"}
    assert signs == pytest.approx({c.a: c.difference.value for c in against if c.a in signs})


def test_the_same_seed_gives_the_same_numbers() -> None:
    scores = drawn(3)
    assert study(scores, seed=5) == study(scores, seed=5) != study(scores, seed=6)


def test_configurations_that_answer_alike() -> None:
    one = drawn(0)[0]
    same, shifted = compare_all({"a": one, "b": one, "c": one + 1}, seed=0, resamples=500)[:2]
    assert (same.difference.low, same.difference.value, same.difference.high) == pytest.approx((0, 0, 0), abs=1e-12)
    assert (same.p_value, same.adjusted_p, same.separated) == (1.0, 1.0, False)
    is_right = np.random.default_rng(0).random((1, 30)) < 0.5
    of_one_seed = compare_all({"a": is_right, "b": is_right, "c": ~is_right}, seed=0, resamples=500)
    assert [c.adjusted_p for c in of_one_seed][0] == 1 and np.isfinite([c.difference.high for c in of_one_seed]).all()
    assert shifted.separated and shifted.adjusted_p < 0.01 and shifted.difference.value == pytest.approx(-1)


def test_fewer_than_two_configurations_have_no_comparison() -> None:
    assert compare_all({}, seed=0) == compare_all({"a": np.zeros((3, 4))}, seed=0) == []


@pytest.mark.parametrize(
    ("scores", "settings", "needle"),
    [
        ({"a": np.zeros((3, 4)), "b": np.zeros((2, 4))}, {}, "b: scores of shape (2, 4), and a has (3, 4)"),
        ({"a": np.zeros((3, 1))}, {}, "a: scores of shape (3, 1); wanted seeds by items, at least 1 by 2"),
        ({"a": np.zeros(4)}, {}, "a: scores of shape (4,)"),
        ({"a": np.full((2, 2), np.nan)}, {}, "a: a score is not finite"),
        ({"r=4": np.zeros((2, 2))}, {"baseline": "r=8"}, "no configuration is called 'r=8'; nearest: r=4"),
    ],
)
def test_scores_that_do_not_compare_are_refused(scores: Any, settings: Any, needle: str) -> None:
    with pytest.raises(ValueError, match=re.escape(needle)):
        compare_all(scores, seed=0, **settings)


def test_a_mean_and_its_interval() -> None:
    by_seed = np.array([0.2, 0.5, 0.8])
    found = mean_interval(np.repeat(by_seed[:, None], 10, axis=1), seed=0)
    assert found.value == pytest.approx(0.5)
    assert found.high - 0.5 == pytest.approx(stats.t.ppf(0.975, 2) * 0.3 / math.sqrt(3), rel=1e-6)
    rare = np.arange(200) < 4
    items = mean_interval(np.stack([rare] * 3), seed=0)
    assert items.low >= 0 and items.high - items.value > items.value - items.low, "percentiles know the skew"
    assert items == mean_interval(rare[None], seed=0)
    both = mean_interval(rare + by_seed[:, None], seed=0)
    assert both.high - both.value == pytest.approx(math.hypot(items.high - 0.02, found.high - 0.5), rel=1e-2)


def test_ranks_are_ranges() -> None:
    value = Interval(value=1.0, low=0.5, high=1.5)
    made = lambda a, b, is_separated: Comparison(
        a=a, b=b, difference=value, p_value=0.01, adjusted_p=0.02, separated=is_separated, seeds=3
    )
    found = [made("x", "y", True), made("x", "z", False), made("y", "z", False), made("w", "y", True)]
    assert rank_ranges(dict.fromkeys("wxyz", np.zeros(0)), found) == {
        "w": (1, 3),
        "x": (1, 3),
        "y": (3, 4),
        "z": (1, 4),
    }


# How often it is right


def test_all_intervals_of_a_study_hold_where_a_plain_bootstrap_fails() -> None:
    settings = {"effects": MOSTLY_SEEDS, "configurations": 6, "seeds": 3, "studies": 200}
    assert coverage(**settings) >= LEAST
    assert coverage(**settings, of=plain) < 0.8, "the simulation tells them apart"


@pytest.mark.parametrize("kind", ["mostly seeds", "mostly items"])
def test_the_interval_of_a_mean_holds(kind: str) -> None:
    rng, holds = np.random.default_rng(0), []
    for _ in range(300):
        found = mean_interval(KINDS[kind].draw(rng, np.array([0.7]), 3, 60)[0], seed=0, resamples=500)
        holds.append(found.low <= 0.7 <= found.high)
    assert np.mean(holds) >= LEAST


def false_separations(configurations: int, seeds: int, studies: int, is_binary: bool) -> float:
    """The share of studies of configurations that are all alike in which some two come out separated."""
    rng, wrong = np.random.default_rng(1), 0
    for _ in range(studies):
        scores = MOSTLY_SEEDS.draw(rng, np.zeros(configurations), seeds, 60)
        scores = (scores > -0.2).astype(float) if is_binary else scores
        wrong += any(c.separated for c in study(scores, seed=0, resamples=1000))
    return wrong / studies


def test_configurations_that_are_alike_are_not_separated() -> None:
    assert false_separations(4, 3, 150, is_binary=True) <= FALSE


def test_a_difference_that_matters_is_found() -> None:
    """Of seven standard errors, among fifteen of three seeds."""
    rng, means = np.random.default_rng(2), np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.2])
    found = [study(MOSTLY_SEEDS.draw(rng, means, 3, 60), seed=0, resamples=1000) for _ in range(40)]
    assert np.mean([c.separated for comparisons in found for c in comparisons if c.b == "5"]) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("configurations", "seeds"), list(itertools.product((2, 6, 12), (3, 5, 10))))
@pytest.mark.parametrize("kind", ["mostly seeds", "mostly items"])
def test_all_intervals_hold(kind: str, configurations: int, seeds: int) -> None:
    assert coverage(KINDS[kind], configurations, seeds, studies=300) >= LEAST


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uneven seeds", "related seeds", "a wild one"])
@pytest.mark.parametrize("seeds", [3, 5])
def test_all_intervals_mostly_hold_where_seeds_do_not_behave(kind: str, seeds: int) -> None:
    assert coverage(KINDS[kind], 12, seeds, studies=300) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("is_binary", [False, True])
@pytest.mark.parametrize(("configurations", "seeds"), [(2, 3), (12, 3), (6, 5), (12, 10), (6, 1)])
def test_false_separations_are_as_rare_as_they_may_be(configurations: int, seeds: int, is_binary: bool) -> None:
    if seeds == 1:  # what one seed does is taken for what the configuration does, and the field says so
        effects = dataclasses.replace(MOSTLY_SEEDS, seed=0.0)
        assert coverage(effects, configurations, seeds, studies=300) >= LEAST
        return
    assert false_separations(configurations, seeds, 300, is_binary) <= FALSE


# Curves, fronts, rates


def test_a_band_is_students_at_every_step() -> None:
    values = np.random.default_rng(0).normal(size=(4, 3))
    found = band(values)
    for t in range(3):
        low, high = stats.t.interval(0.95, 3, values[:, t].mean(), stats.sem(values[:, t]))
        assert (found.mean[t], found.low[t], found.high[t]) == pytest.approx((values[:, t].mean(), low, high))
    values[0, 1:], values[1:3, 2] = np.nan, np.inf
    late = band(values)
    assert late.mean[1] == pytest.approx(values[1:, 1].mean()) and np.isfinite(late.high[1])
    assert late.mean[2] == values[3, 2] and np.isnan([late.low[2], late.high[2]]).all()
    alone = band(values[3:])
    assert np.array_equal(alone.mean, values[3]) and np.isnan(alone.low).all()


def test_a_front_has_the_points_that_none_is_better_than() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        quality, cost = rng.integers(0, 5, size=(2, 12)).astype(float)
        is_worse = lambda i, j: (
            quality[j] >= quality[i] and cost[j] <= cost[i] and (quality[j], cost[j]) != (quality[i], cost[i])
        )
        assert pareto(quality, cost) == [i for i in range(12) if not any(is_worse(i, j) for j in range(12))]
    assert pareto([0.5, math.nan, 0.9], [1.0, 0.5, math.nan]) == [0]
    assert pareto([], []) == []


def test_the_rate_with_the_best_mean_score_is_chosen() -> None:
    rows = [
        (lr, s, 1.0) for lr, scores in {1e-4: (0.5, 0.9), 1e-3: (0.8, 0.8), 1e-2: (0.95, 0.0)}.items() for s in scores
    ]
    choice = choose_rate(rows)
    assert (choice.rate, choice.score, choice.edge, choice.swept) == (1e-3, pytest.approx(0.8), None, True)
    assert choose_rate(rows[::-1]) == choice


@pytest.mark.parametrize(
    ("rows", "rate", "edge"),
    [
        ([(1.0, 0.5, 0.3), (2.0, 0.5, 0.2), (3.0, 0.4, 0.1)], 2.0, None),  # of equal scores the lower loss
        ([(1.0, 0.5, 0.2), (2.0, 0.5, 0.2), (3.0, 0.4, 0.1)], 1.0, "low"),  # of equals the lower rate
        ([(1.0, 0.5, 0.2), (2.0, 0.6, 0.2)], 2.0, "high"),
        ([(1.0, 0.5, 0.2), (2.0, math.nan, math.nan)], 1.0, "low"),
        ([(1.0, math.nan, math.nan), (2.0, 0.5, 0.2)], 2.0, "high"),
        ([(1.0, 0.0, math.inf), (2.0, 0.0, math.inf)], 1.0, "low"),  # all diverged
        ([(1.0, -math.inf, math.inf), (2.0, -0.7, 0.7), (3.0, -0.8, 0.8)], 2.0, None),
        ([(5.0, 0.5, 0.2), (5.0, 0.7, 0.2)], 5.0, None),
        ([(None, 0.5, 0.2)], None, None),
    ],
)
def test_ties_edges_and_runs_that_diverged(rows: Any, rate: Any, edge: Any) -> None:
    choice = choose_rate(rows)
    assert (choice.rate, choice.edge, choice.swept) == (rate, edge, len({lr for lr, *_ in rows}) > 1)


def test_no_runs_have_no_rate() -> None:
    with pytest.raises(ValueError, match="got no runs"):
        choose_rate([])


def sweep(learned: Any, forgotten: Any) -> Sweep:
    return Sweep(learned_SxR=np.array(learned, float), forgotten_SxR=np.array(forgotten, float))


def test_forgetting_is_compared_at_equal_learning() -> None:
    """At their highest rates `a` has learned more and forgotten more; where both learned 2 it forgot 1 less."""
    a = sweep([[1, 2, 3], [1, 2, 3]], [[0, 1, 5], [0, 1, 5]])
    b = sweep([[0, 1, 2], [0, 1, 2.5]], [[0, 1, 2], [0, 1, 2.5]])
    found = compare_matched(a, b, targets=3)
    assert found is not None
    assert found.targets_T.tolist() == [1, 1.5, 2]
    np.testing.assert_allclose(found.at_target.mean, [-1, -1, -1])
    assert found.difference.value == pytest.approx(-1) and found.difference.high == pytest.approx(-1)
    assert compare_matched(a, sweep([[5, 6]] * 2, [[0, 1]] * 2)) is None


def test_dominated_and_diverged_runs_are_no_part_of_a_frontier() -> None:
    learned, forgotten = np.array([1.0, 3.0, 2.0, np.nan]), np.array([0.0, 2.0, 9.0, np.nan])
    np.testing.assert_array_equal(forgotten_at(learned, forgotten, np.array([2.0, 0.5, 3.5])), [1, np.nan, np.nan])
    with pytest.raises(ValueError, match="no run that did not diverge"):
        compare_matched(sweep([[np.nan]], [[np.nan]]), sweep([[1]], [[1]]))
    with pytest.raises(ValueError, match="sweeps of 1 and 2 seeds"):
        compare_matched(sweep([[1, 2]], [[1, 2]]), sweep([[1, 2]] * 2, [[1, 2]] * 2))
