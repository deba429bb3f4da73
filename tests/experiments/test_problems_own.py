"""Problems by name, a user's own, and the checks that every problem passes."""

import dataclasses
import doctest
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import config_dict

import lorax
from experiments import problems
from experiments.problems import own
from experiments.study.problem import Problem, Retained

OWN = '''
    """A line fitted to points."""
    from __future__ import annotations

    import dataclasses

    import jax.numpy as jnp
    import numpy as np

    from experiments.study.problem import Problem

    @dataclasses.dataclass
    class Line:  # looks its module up by name
        slope: float = 2.0

    def make() -> Problem:
        x = np.linspace(0, 1, 12, dtype=np.float32)[:, None]
        data = {split: {"x": x, "y": Line().slope * x} for split in ("train", "validation", "test")}
        return Problem(
            name="line",
            fn=lambda params, batch: batch["x"] @ params["out"]["kernel"],
            params={"out": {"kernel": jnp.zeros((1, 1))}},
            loss=lambda y, batch: jnp.square(y - batch["y"]).mean(axis=-1),
            data=data,
            targets={"all": r"out/kernel"},
        )

    def configured(config):
        made = make()
        return dataclasses.replace(made, name=f"line of {config.problem.points}")

    def nothing():
        return None
'''


def settings(name: str, **changes) -> config_dict.ConfigDict:
    return config_dict.ConfigDict({"problem": {"name": name, **changes}})


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(OWN))
    return path


def test_own_problem_is_what_the_function_returns(file):
    problem = problems.load(settings(f"{file}:make"))
    assert problem.name == "line"
    batch = problem.data["train"]
    outputs = problem.fn({"out": {"kernel": jnp.ones((1, 1))}}, batch)
    np.testing.assert_allclose(problem.loss(outputs, batch), batch["x"][:, 0] ** 2, rtol=1e-6)


def test_own_function_with_a_parameter_gets_the_configuration(file):
    assert problems.load(settings(f"{file}:configured", points=12)).name == "line of 12"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{file}:mkae", "has no function 'mkae'; the nearest is make"),
        ("{file}:jnp", "has no function 'jnp'"),
        ("{file}:nothing", "returned NoneType, wanted an experiments.study.problem.Problem"),
        ("{file}x:make", r"there is no file .*mine\.pyx; expected path/to/file\.py:function"),
    ],
)
def test_own_problem_that_is_none_is_an_error(file, name, message):
    with pytest.raises(ValueError, match=message):
        problems.load(settings(name.format(file=file)))


def test_file_that_is_not_python_is_an_error(tmp_path):
    (tmp_path / "mine.txt").write_text("make")
    with pytest.raises(ValueError, match="not a Python file"):
        problems.load(settings(f"{tmp_path / 'mine.txt'}:make"))


def test_error_of_the_file_itself_is_raised(tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_module_here\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_here"):
        problems.load(settings(f"{tmp_path / 'broken.py'}:make"))


@pytest.mark.parametrize(
    ("name", "nearest"), [("digit", "digits"), ("sentence", "sentences"), ("json_answers", "json")]
)
def test_unknown_problem_names_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=rf"config\.problem\.name = '{name}': unknown, the nearest is {nearest}"):
        problems.load(settings(name))
    with pytest.raises(ValueError, match="and your own as path/to/file.py:function"):
        problems.defaults(name)


# The checks.


def toy(**changes) -> Problem:
    draw = np.random.default_rng(0)

    def split(count):
        return {"x": draw.normal(size=(count, 3)).astype("f"), "label": np.arange(count, dtype=np.int32) % 2}

    given = {
        "name": "toy",
        "fn": lambda params, batch: batch["x"] @ params["layers"]["out"]["kernel"] + params["layers"]["out"]["bias"],
        "params": {"layers": {"out": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}},
        "loss": lambda y, batch: -jnp.take_along_axis(y, batch["label"][:, None], axis=1)[:, 0],
        "score": lambda y, batch: (y.argmax(axis=1) == batch["label"]).astype(jnp.float32),
        "data": {"train": split(10), "validation": split(4), "test": split(5)},
        "targets": {"all": r"layers/out/kernel", "both": (r".*/kernel", r".*/bias")},
        "placements": {"bitfit": r".*/bias"},
        "always": {r"layers/out/bias": lorax.Full()},
        "quantizable": (r".*/kernel",),
    }
    return Problem(**given | changes)


def with_split(name, **arrays):
    data = dict(toy().data)
    data[name] = {key: value for key, value in (data[name] | arrays).items() if value is not None}
    return toy(data=data)


def retaining(**changes):
    made = toy()
    return toy(retained=Retained(**{"fn": made.fn, "loss": made.loss, "data": dict(made.data["test"])} | changes))


def test_whole_problem_passes():
    problems.check(toy())
    problems.check(toy(score=None))
    problems.check(toy(score=lambda y, batch: y.argmax(axis=1) == batch["label"]))
    problems.check(retaining())


def test_quantised_base_passes():
    wide = {"layers": {"out": {"kernel": jnp.ones((64, 64)), "bias": jnp.zeros(64)}}}
    data = {name: arrays | {"x": np.zeros((len(arrays["x"]), 64), np.float32)} for name, arrays in toy().data.items()}
    plain = toy(params=wide, data=data)
    sites = lorax.trace(plain.fn, wide, data["train"])
    problems.check(dataclasses.replace(plain, params=lorax.quantize(wide, {".*/kernel": lorax.NF4()}, sites=sites)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "a problem", "got str, wanted an experiments.study.problem.Problem"),
        (
            lambda: toy(data={"train": toy().data["train"]}),
            "data has no validation and no test; it has train, wanted train, validation, test",
        ),
        (
            lambda: with_split("test", label=np.zeros(4, np.int32)),
            r"data\['test'\]: arrays of \{'x': 5, 'label': 4\} examples",
        ),
        (lambda: toy(data=toy().data | {"test": {}}), r"data\['test'\]: arrays of no examples"),
        (
            lambda: with_split("test", x=np.zeros((0, 3), "f"), label=np.zeros(0, "i")),
            r"data\['test'\]: no examples, wanted at least one",
        ),
        (
            lambda: with_split("validation", x=np.zeros((4, 2), np.float32)),
            r"data\['validation'\]\['x'\]: an example is float32\[2\], in data\['train'\] it is float32\[3\]",
        ),
        (
            lambda: with_split("test", label=np.zeros(5, np.int64)),
            r"an example is int64\[\], in data\['train'\] it is int32",
        ),
        (lambda: with_split("test", label=None), r"data\['test'\]\['label'\]: an example is not there"),
        (lambda: with_split("train", x=[[1.0]] * 10), r"data\['train'\]\['x'\]: got \[\[1.0\].*, wanted an array"),
        (
            lambda: toy(targets={"out": r"layer/out/kernel"}),
            r"targets\['out'\]: 'layer/out/kernel' matches no parameter as a whole path; nearest: layers/out/kernel",
        ),
        (lambda: toy(targets={"out": (r".*", r"kernel")}), r"targets\['out'\]: 'kernel' matches no parameter"),
        (lambda: toy(targets={"out": r"layers/(out"}), "'layers/.out' is no regular expression"),
        (lambda: toy(placements={"norm": r".*norm"}), r"placements\['norm'\]: '\.\*norm' matches no parameter"),
        (lambda: toy(always={r"classifier/.*": lorax.Full()}), "always: 'classifier/.*' matches no parameter"),
        (lambda: toy(quantizable=r"kernel"), "quantizable: 'kernel' matches no parameter"),
        (
            lambda: toy(loss=lambda y, batch: y.mean()),
            r"^loss: got .* for a batch of 7 examples, wanted float32 of shape \(7,\), one number an example",
        ),
        (lambda: toy(loss=lambda y, batch: y.argmax(axis=1) == 0), "^loss: got .* wanted float32"),
        (lambda: toy(loss=lambda y, batch: y), "^loss: got .* wanted float32 of shape"),
        (lambda: toy(loss=lambda y, batch: (y[:, 0], y[:, 1])), "^loss: got .* wanted float32"),
        (
            lambda: toy(score=lambda y, batch: y.argmax(axis=1)),
            "^score: got .* wanted float32",
        ),
        (lambda: retaining(loss=lambda y, batch: y.sum()), "^retained.loss: got"),
        (
            lambda: retaining(data={"x": np.zeros((2, 3), "f"), "label": np.zeros(3, "i")}),
            r"^retained\.data: arrays of",
        ),
    ],
)
def test_problem_that_does_not_fit_together_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        problems.check(make())


def test_examples_in_docstrings_hold():
    found = doctest.testmod(own)
    assert found.attempted
    assert not found.failed
