"""The runs that a study declares: values that mean nothing are None, budgets become ranks, errors name the nearest."""

import pytest

import lorax
from experiments.study import axes
from experiments.study.adaptation import STUDY_RECIPES, Adaptations
from tests.experiments import toy_problem, toy_study

DEFAULT = ("head", "ia3", "lora", "prefix", "qlora")  # those that take a way of their own
LR_AND_SEED = {"lr": (1e-2,), "seed": (0,)}


@pytest.fixture(scope="module")
def problem():
    return toy_problem.make()


def cells(problem, **changes):
    config = toy_study.resolved(**changes)
    return axes.cells(config, Adaptations(config, problem))


def settings_of(problem, *names, **changes):
    """The values of the named axes, a tuple a run."""
    return [tuple(cell.settings[name] for name in names) for cell in cells(problem, **changes)]


def test_every_combination_is_a_run_with_a_name_of_its_own(problem):
    found = cells(problem)
    assert len(found) == 8
    assert [cell.id for cell in found[:3]] == [
        "rank=1,lr=0.01,seed=0",
        "rank=1,lr=0.01,seed=1",
        "rank=1,lr=0.03,seed=0",
    ]
    assert len({cell.id for cell in found}) == 8
    assert len({cell.configuration for cell in found}) == 2


def test_what_means_nothing_to_a_method_is_none_and_no_reason_for_another_run(problem):
    found = settings_of(
        problem, "method", "rank", "targets", "alpha", "initializer", **LR_AND_SEED,
        method=("lora", "pissa", "full", "head"), targets=("up", "all"),
    )  # fmt: skip
    wanted = [("lora", r, t, 4, "uniform") for t in ("up", "all") for r in (1, 3)]
    wanted += [("pissa", r, t, 4, None) for t in ("up", "all") for r in (1, 3)]
    assert found == [*wanted, ("full", None, None, None, None), ("head", None, None, None, None)]


def test_sizes_that_are_no_rank_are_told_as_one(problem):
    found = settings_of(problem, "method", "rank", **LR_AND_SEED, method=("bottleneck", "prompt", "vera", "bitfit"))
    assert found == [("bottleneck", 4), ("prompt", 2), ("vera", 4), ("bitfit", None)]


def test_alpha_follows_the_rank(problem):
    config = toy_study.resolved(alpha=("rank", "2rank", 5), rank=(3,), **LR_AND_SEED)
    adaptations = Adaptations(config, problem)
    specs = [adaptations.spec(cell.settings) for cell in axes.cells(config, adaptations)]
    assert [spec.rules[-1][1].alpha for spec in specs] == [3, 6, 5]


def test_a_budget_becomes_the_largest_rank_within_it(problem):
    # rank r trains r(6 + 16) numbers at `up`, and twice that at `all`
    found = settings_of(
        problem, "targets", "budget", "rank", targets=("up", "all"), budget=(110,), rank=(1,), **LR_AND_SEED
    )
    assert found == [("up", 110, 5), ("all", 110, 2)]


def test_a_budget_becomes_a_width_or_a_length_where_there_is_no_rank(problem):
    found = settings_of(
        problem, "budget", "rank", method=("bottleneck_pfeiffer", "prompt", "bitfit"), budget=(60,), **LR_AND_SEED
    )
    # 2·6·w + w + 6 numbers of width w; 6 a position; biases have no size
    assert found[:2] == [(60, 4), (60, 10)]
    assert found[2:] == [(None, None)]


def test_a_budget_below_the_smallest_rank_says_what_that_takes(problem):
    with pytest.raises(ValueError, match="config.axes.budget = 21, lora at up: rank 1 trains 22 numbers"):
        cells(problem, targets=("up",), budget=(21,))


def test_examples_are_counted_and_more_than_there_are_is_refused(problem):
    assert settings_of(problem, "examples", examples=(0, 20), rank=(1,), **LR_AND_SEED) == [(96,), (20,)]
    with pytest.raises(ValueError, match="config.axes.examples = 97: the problem toy has 96 examples"):
        cells(problem, examples=(97,))


def test_qlora_says_how_the_base_is_stored(problem):
    assert settings_of(problem, "quantize", method=("lora", "qlora"), rank=(1,), **LR_AND_SEED) == [("none",), ("nf4",)]


def test_the_axes_values_are_those_that_occur(problem):
    found = axes.values(cells(problem, method=("full", "lora"), rank=(3, 1), targets=("up", "all")))
    assert (found["method"], found["rank"], found["targets"]) == (["full", "lora"], [1, 3], ["up", "all"])


def test_an_unknown_method_names_the_nearest(problem):
    with pytest.raises(ValueError, match="'lorra' is unknown to a study, the nearest is lora"):
        cells(problem, method=("lorra",))


@pytest.mark.parametrize("method", ["eva", "loftq"])
def test_methods_that_need_the_data_or_the_bits_of_a_run_are_no_part_of_a_study(problem, method):
    assert method not in STUDY_RECIPES
    with pytest.raises(ValueError, match="is unknown to a study"):
        cells(problem, method=(method,))


def test_unknown_targets_name_the_nearest_and_a_file_can_add_its_own(problem):
    config = toy_study.resolved(targets=("dwn",), rank=(1,), **LR_AND_SEED)
    adaptations = Adaptations(config, problem)
    with pytest.raises(ValueError, match="'dwn' is no target of the problem toy; the nearest is down"):
        adaptations.spec(axes.cells(config, adaptations)[0].settings)
    own = toy_study.resolved(targets={"dwn": "layers/down/kernel"}, rank=(1,), **LR_AND_SEED)
    adaptations = Adaptations(own, problem)
    (cell,) = axes.cells(own, adaptations)
    assert set(adaptations.abstract(cell.settings).params) == {"layers/down/kernel", "head/kernel", "head/bias"}


def test_a_method_without_a_place_in_the_problem_is_refused(problem):
    bare = toy_problem.Problem(**(vars(problem) | {"placements": {}, "with_placeholders": None}))
    for method, message in [("bitfit", "has no placement 'bitfit'"), ("prompt", "has no placement 'prompt'")]:
        config = toy_study.resolved(method=(method,))
        adaptations = Adaptations(config, bare)
        with pytest.raises(ValueError, match=message):
            adaptations.spec({"method": method, "targets": None, "steps": 1})


@pytest.mark.parametrize(
    "method",
    [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in sorted(STUDY_RECIPES)],
)
def test_every_method_has_an_adapter_that_changes_nothing_yet(problem, method):
    config = toy_study.resolved(method=(method,), rank=(3,), **LR_AND_SEED)
    adaptations = Adaptations(config, problem)
    (cell,) = axes.cells(config, adaptations)
    base, adapter = adaptations.base(cell.settings), adaptations.adapter(cell.settings)
    assert "head/kernel" in adapter.params
    batch = {name: array[:4] for name, array in base.problem.data["test"].items()}
    hidden = lambda params, batch: toy_problem.hidden(params, batch)
    before = lorax.adapt(hidden)(base.params, None, batch)
    if method not in ("prompt", "prefix"):  # placeholders stand where the prompt is, and are other tokens
        assert abs(lorax.adapt(hidden)(base.params, adapter, batch) - before).max() < 1e-5
