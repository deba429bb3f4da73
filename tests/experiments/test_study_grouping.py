"""Which runs are trained together: what one program can hold, without much work for zeros, within the memory."""

import doctest

import pytest

from experiments.study import axes, grouping
from experiments.study.adaptation import Adaptations
from tests.experiments import toy_problem, toy_study

MUCH = 1e9


@pytest.fixture(scope="module")
def problem():
    return toy_problem.make()


def families(problem, padding=MUCH, **changes):
    config = toy_study.resolved(**({"lr": (1e-2,), "seed": (0,)} | changes))
    adaptations = Adaptations(config, problem)
    return grouping.families(axes.cells(config, adaptations), adaptations, padding=padding)


def told(found, *names):
    """The values of the named axes, of each family."""
    return [
        sorted(tuple(cell.settings[name] for name in names) for cells in family.configurations for cell in cells)
        for family in found
    ]


def test_ranks_targets_scalings_starts_and_dropout_go_together(problem):
    found = families(
        problem, method=("lora", "rslora", "pissa"), rank=(1, 6), targets=("up", "all"), alpha=("rank", 8),
        dropout=(0.0, 0.1), weight_decay=(0.0, 0.1), examples=(0, 20), lr=(1e-2, 1e-3), seed=(0, 1),
    )  # fmt: skip
    assert len(found) == 1
    assert sum(map(len, found[0].configurations)) == 3 * 2 * 2 * 2 * 2 * 2 * 2 * 2 * 2
    assert len(found[0].configurations) == 3 * 2 * 2 * 2 * 2


@pytest.mark.parametrize(
    "axis, values", [("method", ("lora", "dora")), ("steps", (12, 24)), ("quantize", ("none", "nf4"))]
)
def test_what_makes_another_program_goes_apart(problem, axis, values):
    found = told(families(problem, rank=(1, 3), **{axis: values}), axis, "rank")
    assert sorted(found) == sorted([(value, 1), (value, 3)] for value in values)


def test_other_optimisers_and_placeholders_go_apart(problem):
    found = families(problem, method=("lora", "lora_plus", "head", "prompt"), rank=(2,))
    # the head alone is trained beside LoRA as an adapter without targets
    assert sorted(map(sorted, told(found, "method"))) == [[("head",), ("lora",)], [("lora_plus",)], [("prompt",)]]


def test_ranks_far_apart_are_no_family_if_zeros_would_be_most_of_the_work(problem):
    # `down` has 96 weights, a rank 22 numbers, the head 21 beside: one run of rank 1 with one of rank 16 does
    # 6·(373 - 43) operations on zeros for 4·2·210 + 6·(43 + 373) that the two need
    part = 6 * (373 - 43) / (4 * 2 * 210 + 6 * (43 + 373))
    frozen = families(problem, targets=("down",), rank=(1,))[0].frozen
    assert frozen == 96 + 96 + 18  # both layers and the head
    changes = {"targets": ("down",), "rank": (1, 16)}
    with pytest.warns(UserWarning, match="above the smaller side"):
        less, more = (families(problem, padding=part + change, **changes) for change in (-0.01, 0.01))
    assert told(less, "rank") == [[(16,)], [(1,)]]
    assert told(more, "rank") == [[(1,), (16,)]]


def ids(parts):
    return [[cell.id for cell in part] for part in parts]


def test_a_group_that_does_not_fit_is_halved_until_it_does(problem):
    (family,) = families(problem, rank=(1, 3), lr=(1e-2, 3e-2), seed=(0, 1, 2))
    tried = []

    def fits(cells):
        tried.append(len(cells))
        return len(cells) <= 4

    parts = grouping.groups(family, fits, most=0)
    assert tried == [12, 6, 2]  # six are three rates and seeds of both ranks; of three, one of both
    assert sorted(sum(ids(parts), [])) == sorted(cell.id for cells in family.configurations for cell in cells)
    assert max(map(len, parts)) <= 4


def test_groups_have_every_configuration_so_that_they_share_a_program(problem):
    (family,) = families(problem, rank=(1, 3), lr=(1e-2, 3e-2), seed=(0, 1, 2))
    parts = grouping.groups(family, lambda cells: True, most=5)
    assert [len(part) for part in parts] == [4, 4, 4]
    assert all([cell.settings["rank"] for cell in part] == [3, 3, 1, 1] for part in parts)


def test_a_group_of_one_is_tried_whatever_it_takes(problem):
    (family,) = families(problem, rank=(1, 3))
    assert [len(part) for part in grouping.groups(family, lambda cells: False, most=0)] == [1, 1]


def test_a_cpu_takes_few_runs_at_once_unless_told_otherwise():
    result = doctest.testmod(grouping)
    assert result.attempted
    assert not result.failed


def test_the_memory_of_the_settings_wins(problem):
    assert grouping.memory_limit(1.5) == 3 * 2**29
    assert 0 < grouping.memory_limit(0) < 2**50
