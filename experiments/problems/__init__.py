"""What studies train on: `load(config)` gives the problem that `config.problem.name` names."""

import difflib
import importlib
from typing import Any

from ml_collections import config_dict

from experiments.problems import own
from experiments.problems.checks import check
from experiments.problems.settings import merge
from experiments.study.problem import Problem

__all__ = ["NAMES", "check", "defaults", "load"]

# name -> module with `DEFAULTS`, the settings that it reads of `config.problem`, and `load(config) -> Problem`
NAMES = {
    "sentences": "experiments.problems.sentences",
    "digits": "experiments.problems.digits",
    "json": "experiments.problems.json_answers",
}


def defaults(name: str) -> dict[str, Any]:
    """Return every setting of a problem with its default: what `config.problem` of a configuration file starts from.

    Raises:
        ValueError: there is no such problem.

    >>> defaults("digits")["name"]
    'digits'
    """
    return {"name": name, **_module(name).DEFAULTS}


def load(config: config_dict.ConfigDict) -> Problem:
    """Load the problem of a study, and check that it fits together.

    Args:
        config: with `config.problem.name`, one of `NAMES` or "file.py:function" (see `own`), and those settings of the
            problem that are not as in `defaults(name)`.

    Raises:
        ValueError: there is no such problem or setting, or the problem is not one that a study can train on.
    """
    name = config.problem.name
    if own.is_own(name):
        problem = own.load(config)
    else:
        config = config_dict.ConfigDict(config.to_dict() | {"problem": merge(config.problem, defaults(name))})
        problem = _module(name).load(config)
    check(problem)
    return problem


def _module(name: str) -> Any:
    if name not in NAMES:
        (nearest,) = difflib.get_close_matches(name, NAMES, n=1, cutoff=0)
        raise ValueError(
            f"config.problem.name = {name!r}: unknown, the nearest is {nearest}; there are {', '.join(NAMES)}, "
            "and your own as path/to/file.py:function"
        )
    return importlib.import_module(NAMES[name])
