"""A study's settings: sizes, axes from files and the command line, and what is wrong said before any work."""

import subprocess
import sys

import pytest

from experiments import ablate
from experiments.study import settings
from tests.experiments import toy_study
from tests.experiments.toy_study import ROOT


def sized():
    config = toy_study.get_config()
    config.sizes = {"full": {"axes": {"rank": (1, 2, 4), "lr": (1e-3,)}, "train": {"batch": 64}}}
    return config


def test_the_default_size_is_the_file_as_it_is():
    config = settings.resolve(sized(), {}, "Why?")
    assert config.axes.rank == (1, 3)
    assert config.train.batch == 8
    assert config.question == "Why?"
    assert "sizes" not in config


def test_a_size_changes_settings_and_the_command_line_wins_over_it():
    config = sized()
    config.size = "full"
    config.train.batch = 4  # as the command line sets it
    found = settings.resolve(config, {"train.batch": 4, "axes.lr": (0.5, 0.1)}, "")
    assert (found.axes.rank, found.axes.lr, found.train.batch) == ((1, 2, 4), (0.5, 0.1), 4)


def test_an_unknown_size_names_those_there_are():
    config = sized()
    config.size = "ful"
    with pytest.raises(ValueError, match="config.size = 'ful': expected one of default, full"):
        settings.resolve(config, {}, "")


def test_a_size_that_sets_what_is_unknown_names_the_nearest():
    config = sized()
    config.sizes.full.train.batsh = 3
    config.size = "full"
    with pytest.raises(ValueError, match=r"config.sizes.full: .*config.train.batsh: the nearest is config.train.batch"):
        settings.resolve(config, {}, "")


def test_axes_are_given_as_single_values_ranges_and_named_patterns():
    config = toy_study.get_config()
    config.axes.update(rank=8, seed=range(3), targets={"mine": "layers/up/kernel"})
    assert config.axes.seed == (0, 1, 2)  # what the command line can override
    found = settings.resolve(config, {}, "")
    assert (found.axes.rank, found.axes.seed, found.axes.targets) == ((8,), (0, 1, 2), ("mine",))
    assert found.targets.to_dict() == {"mine": "layers/up/kernel"}


@pytest.mark.parametrize(
    "axis, values, message",
    [
        ("rank", (0,), "config.axes.rank = .0,.: expected whole numbers of at least 1"),
        ("rank", (4, 4), "expected one or more different values"),
        ("seed", (), "expected one or more different values"),
        ("lr", (0.0,), "expected positive numbers"),
        ("alpha", ("twice",), "expected numbers, or multiples of the rank"),
        ("dropout", (1.0,), "expected probabilities below 1"),
        ("quantize", ("nf5",), "expected none or nf4"),
        ("steps", (10,), "config.evaluation.points = 3: expected a divisor of config.axes.steps = 10"),
        ("targets", ("a/b",), "expected names"),
    ],
)
def test_a_wrong_value_of_an_axis_is_refused(axis, values, message):
    with pytest.raises(ValueError, match=message):
        toy_study.resolved(**{axis: values})


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("keep", "some", "config.keep = 'some': expected all or best or none"),
        ("train.schedule", "step", "expected linear or cosine or constant"),
        ("train.warmup", 1.0, "expected a part of the steps"),
        ("evaluation.batch", 0, "expected at least 1"),
        ("grouping.padding", -0.1, "expected 0 or more"),
        ("train.batch", "8", "got str, expected int"),
    ],
)
def test_a_wrong_setting_is_refused(name, value, message):
    config = toy_study.get_config()
    config.update_from_flattened_dict({name: value})
    with pytest.raises(ValueError, match=message):
        settings.resolve(config, {}, "")


def test_an_unknown_axis_in_a_file_names_the_nearest():
    config = toy_study.get_config()
    config.axes.rnk = (1,)
    with pytest.raises(ValueError, match="config.axes.rnk: the nearest is config.axes.rank"):
        settings.resolve(config, {}, "")


@pytest.mark.parametrize(
    "given", [["--config.axes.rank=1,2"], ["--config.axes.rank", "1,2"], ["-config.axes.rank=1,2"]]
)
def test_lists_of_axis_values_are_kept_from_the_parser_of_settings(given):
    before, after = ["python", "--config=c.py"], ["--config.name=a,b"]
    assert ablate._axes_apart([*before, *given, *after]) == [*before, "--axis=rank=1,2", *after]


def test_an_unknown_axis_on_the_command_line_names_the_nearest(tmp_path):
    command = [sys.executable, "-m", "experiments.ablate", "--config=unused.py", "--config.axes.rnak=1,2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: unknown axis config.axes.rnak: the nearest is config.axes.rank\n"


def test_the_question_is_the_first_paragraph_of_the_file(tmp_path):
    file = tmp_path / "study.py"
    file.write_text('r"""Does it\nwork?\n\n    python -m experiments.ablate\n"""\n')
    assert ablate.question(str(file)) == "Does it work?"
