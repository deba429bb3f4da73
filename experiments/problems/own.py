"""A user's own problem: `config.problem.name = "path/to/file.py:function"`.

The file is run, and the function has to return a `Problem`, which is any JAX function with its pretrained parameters, a
loss and data:

    def make():
        return Problem(
            name="mine",
            fn=lambda params, batch: model.apply({"params": params}, batch["x"]),
            params=params,
            loss=lambda y, batch: jnp.square(y - batch["y"]).mean(axis=-1),  # one number an example
            data={"train": {"x": ..., "y": ...}, "validation": {...}, "test": {...}},
            targets={"all": r".*kernel"},
        )

A function with a parameter gets the configuration, and with it its own settings in `config.problem`.
"""

import importlib.util
import inspect
import pathlib
import sys
from types import ModuleType

from ml_collections import config_dict

from experiments.problems.checks import nearest_name
from experiments.study.problem import Problem


def is_own(name: str) -> bool:
    """Return whether a problem's name is that of a function in a file.

    >>> is_own("studies/mine.py:make"), is_own("digits")
    (True, False)
    """
    return ":" in name


def load(config: config_dict.ConfigDict) -> Problem:
    """Run the file and return what its function makes.

    Args:
        config: with `config.problem.name`, "path/to/file.py:function"; the path is relative to the working directory.

    Raises:
        ValueError: there is no such file or function, or it returns something else.
    """
    name = config.problem.name
    path, _, called = name.rpartition(":")
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"config.problem.name = {name!r}: there is no file {file}; expected path/to/file.py:function")
    module = _run(file)
    functions = {key: value for key, value in vars(module).items() if inspect.isfunction(value)}
    if called not in functions:
        raise ValueError(
            f"config.problem.name = {name!r}: {file} has no function {called!r}; the nearest is "
            f"{nearest_name(called, functions)}"
        )
    function = functions[called]
    problem = function(config) if inspect.signature(function).parameters else function()
    if not isinstance(problem, Problem):
        raise ValueError(
            f"{name}: the function returned {type(problem).__name__}, wanted an experiments.study.problem.Problem"
        )
    return problem


def _run(file: pathlib.Path) -> ModuleType:
    """Run a file as a module of its own; what it defines can be found and pickled by its name."""
    spec = importlib.util.spec_from_file_location(f"own_problem_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file}: not a Python file; expected path/to/file.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
