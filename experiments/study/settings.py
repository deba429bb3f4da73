"""Every setting of a study with its default, and the checks a configuration passes before any work.

A file in `configs/` starts from `defaults()`, sets the axes and what else its question needs. `config.sizes` may
hold other sizes of the same study, such as `{"full": {"axes": {"rank": (1, 2, 4, 8)}}}`: `--config.size=full` takes
these settings, and what else the command line gives wins over them.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from experiments.training import settings as training
from experiments.training.settings import dotted, unknown_setting

Config = config_dict.ConfigDict

KEEP = ("all", "best", "none")
SCHEDULES = ("linear", "cosine", "constant")
OPEN = ("axes", "problem", "sizes", "targets")  # sections whose names a configuration file may add to
_OF_METHODS = ("adalora", "lora_plus", "vera", "lokr", "bottleneck", "ia3", "tuning")  # as when fine-tuning


class Axes(Config):
    """The axes of a study. A range is kept as the tuple that it stands for: the command line knows none."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, tuple(value) if isinstance(value, range) else value)


def defaults() -> Config:
    """Return a fresh configuration."""
    shared = training.defaults()
    config = Config(
        {
            "name": "ablation",
            "run_dir": "runs/ablation",  # one directory a study; started again, it goes on from there
            "question": "",  # what the study asks; empty: the first paragraph of the configuration file's docstring
            "seed": 0,  # of the bootstrap
            "size": "default",  # or a name of `sizes`
            "sizes": {},
            "problem": {"name": "sentences"},  # a name of experiments/problems, or file.py:function; and its settings
            "axes": {  # one value or several; every combination is a run
                "method": ("lora",),  # names of experiments/training/recipes.py, head, qlora
                "targets": ("all",),  # names of the problem or of `targets` below, or {name: patterns}
                "rank": (8,),
                "budget": (0,),  # trainable numbers; the rank is the largest within it; 0: the rank as given
                "alpha": (16.0,),  # a number, "rank" (a scaling of 1) or a multiple such as "2rank"
                "initializer": ("uniform",),
                "dropout": (0.0,),
                "quantize": ("none",),  # the frozen base: none, nf4, fp4, int8 or int4
                "weight_decay": (0.0,),
                "examples": (0,),  # to train on, drawn by the run's seed; 0: all
                "steps": (100,),  # optimiser updates
                "lr": (1e-3,),  # at the end of the warm-up
                "seed": (0,),  # of the adapter's start, its dropout and the order of the data
            },
            "targets": {},  # own names for regular expressions that match whole leaf paths
            "lora": {"dtype": "float32", "rank_stabilized": False},
            **{name: shared[name].to_dict() for name in _OF_METHODS},
            "train": {
                "batch": 32,  # examples in an update
                "warmup": 0.1,  # part of the steps in which the learning rate rises
                "schedule": "linear",  # how it falls after them: linear, cosine or constant
                "beta1": 0.9,
                "beta2": 0.999,
                "clip_norm": 1.0,  # of a run's whole gradient
            },
            "evaluation": {
                "points": 4,
                "batch": 16,
            },  # validations while training, at equal distances; examples at once
            "grouping": {
                "padding": 0.1,  # of a step's work: how much may go into the zeros of ranks and targets of others
                "members": 0,  # the most runs in a program; 0: what fits to memory, on a CPU at most 8
                "memory_gib": 0.0,  # for a program; 0: 60 % of what is free
            },
            "checkpoint_seconds": 60.0,  # between what a killed study goes on from; a signal saves in any case
            "keep": "best",  # adapters: all, those of the chosen learning rates (best), none
            "latency": {"examples": 1, "repeats": 20},  # of a forward pass, merged and not
            "analysis": {"sites": (), "subspace_rank": 16},  # leaf paths to compare subspaces of; none: two are chosen
        },
        convert_dict=True,
        type_safe=False,  # an axis may be a range, a list, a single value
    )
    config.axes = Axes(config.axes)
    config.lock()
    for name in OPEN:
        config[name].unlock()
    return config


def axis_values(text: str) -> tuple[Any, ...]:
    """Return the values of an axis as the command line gives them: a list with commas, or a Python tuple.

    >>> axis_values("1,2"), axis_values("qv, mlp"), axis_values("(0.1, '2rank')"), axis_values("2rank")
    ((1, 2), ('qv', 'mlp'), (0.1, '2rank'), ('2rank',))
    """
    whole = _value(text)
    if isinstance(whole, str):
        return tuple(_value(part.strip()) for part in text.split(","))
    return tuple(whole) if isinstance(whole, tuple | list) else (whole,)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a name
        return text


def resolve(config: Config, given: Mapping[str, Any], question: str) -> Config:
    """Return the settings of the chosen size as plain values, with the values of every axis in a tuple.

    Args:
        config: of a configuration file and, but for its axes, the command line.
        given: the settings of the command line, by dotted name: they win over the size's.
        question: the study's, where the configuration says none.

    Raises:
        ValueError: there is no such size, it sets something unknown, or a setting is wrong.
    """
    config = Config(config.to_dict(), type_safe=False)
    sizes = {"default": {}, **config.sizes.to_dict()}
    if config.size not in sizes:
        raise ValueError(f"config.size = {config.size!r}: expected one of {', '.join(sizes)}")
    for name, value in dotted(sizes[config.size]).items():
        if name not in dotted(config):
            raise ValueError(f"config.sizes.{config.size}: {unknown_setting(name, dotted(config))}")
        if name not in given:
            section, _, last = name.rpartition(".")
            (config[section] if section else config)[last] = value
    config.question = config.question or question
    for name, values in config.axes.items():
        if isinstance(values, Config):  # {name: patterns}, of targets
            config.targets.update(values.to_dict())
        values = given.get(f"axes.{name}", values)
        config.axes[name] = (values,) if isinstance(values, str | int | float) else tuple(values)
    del config.sizes
    check(config)
    return config


def check(config: Config) -> None:
    """Check names, types and values.

    Raises:
        ValueError: that names the setting, what it is, what was expected.
    """
    wanted, given = dotted(defaults()), dotted(config)
    is_open = lambda name: name.split(".")[0] in ("problem", "targets")
    for name in given:
        if name not in wanted and not is_open(name):
            raise ValueError(unknown_setting(name, wanted))
    for name, default in wanted.items():
        if name not in given:
            raise ValueError(f"config.{name} is missing: start the file from experiments.study.settings.defaults()")
        if not is_open(name):
            training.check_type(name, given[name], default)

    def want(name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"config.{name} = {given[name]!r}: expected {expected}")

    want("run_dir", bool(given["run_dir"]), "a directory")
    want("keep", config.keep in KEEP, " or ".join(KEEP))
    want("train.schedule", config.train.schedule in SCHEDULES, " or ".join(SCHEDULES))
    want("train.warmup", 0 <= config.train.warmup < 1, "a part of the steps: 0 or more, less than 1")
    want("train.clip_norm", config.train.clip_norm > 0, "a positive number")
    want("grouping.padding", config.grouping.padding >= 0, "0 or more")
    for name in ("train.batch", "evaluation.points", "evaluation.batch", "latency.examples", "latency.repeats"):
        want(name, given[name] >= 1, "at least 1")
    for name in ("grouping.members", "grouping.memory_gib", "checkpoint_seconds"):
        want(name, given[name] >= 0, "0 or more")
    for name, (holds, expected) in _VALUES.items():
        values = given[f"axes.{name}"]
        want(f"axes.{name}", len(values) > 0 and len(set(values)) == len(values), "one or more different values")
        want(f"axes.{name}", all(holds(value) for value in values), expected)
    for steps in config.axes.steps:
        want(
            "evaluation.points",
            steps % config.evaluation.points == 0,
            f"a divisor of config.axes.steps = {steps}: validations are at equal distances",
        )


def _is_count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 1


def _is_number(x: Any, least: float = 0) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and least <= x < float("inf")


def alpha_at(alpha: Any, rank: int) -> float:
    """Return the number that a value of `axes.alpha` stands for at a rank.

    Raises:
        ValueError: it is neither a number nor a multiple of the rank.

    >>> alpha_at("2rank", 8), alpha_at("rank", 8), alpha_at(16, 8)
    (16.0, 8.0, 16.0)
    """
    multiple, is_multiple, rest = str(alpha).partition("rank")
    if rest:
        raise ValueError(f"{alpha!r} is no multiple of the rank, such as '2rank'")
    return float(multiple or 1) * (rank if is_multiple else 1)


def _is_alpha(alpha: Any) -> bool:
    try:
        return math.isfinite(alpha_at(alpha, 1)) and not isinstance(alpha, bool)
    except ValueError:
        return False


_NAMES = (lambda x: isinstance(x, str) and re.fullmatch(r"[\w+.-]+", x) is not None, "names")
_COUNT_OR_ZERO = (lambda x: x == 0 or _is_count(x), "whole numbers, 0 or more")
_VALUES = {
    "method": _NAMES,
    "targets": _NAMES,
    "rank": (_is_count, "whole numbers of at least 1"),
    "budget": _COUNT_OR_ZERO,
    "alpha": (_is_alpha, "numbers, or multiples of the rank such as 'rank' and '2rank'"),
    "initializer": _NAMES,
    "dropout": (lambda x: _is_number(x) and x < 1, "probabilities below 1"),
    "quantize": (lambda x: x in training.QUANTIZE, " or ".join(training.QUANTIZE)),
    "weight_decay": (_is_number, "numbers, 0 or more"),
    "examples": _COUNT_OR_ZERO,
    "steps": (_is_count, "whole numbers of at least 1"),
    "lr": (lambda x: _is_number(x) and x > 0, "positive numbers"),
    "seed": (lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 0, "whole numbers, 0 or more"),
}
AXES = tuple(_VALUES)  # the last one is what changes first from run to run
