"""Whether a problem fits together: checked on shapes, before anything is computed."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import lorax
from experiments.study.problem import SPLITS, Arrays, Function, Patterns, PerExample, Problem, examples
from lorax import paths

BATCH = 7  # examples in the batch that is traced: a size that hardly any other axis has


def check(problem: Problem) -> None:
    """Check the data, the patterns and what the functions return.

    Raises:
        ValueError: a split is missing or empty, its arrays differ in length, or from those of the other splits in name,
            shape or dtype; a pattern is no regular expression, or matches no parameter; the loss or the score is
            not one number an example.
    """
    if not isinstance(problem, Problem):
        raise ValueError(f"got {type(problem).__name__}, wanted an experiments.study.problem.Problem")
    _check_splits(problem.data)
    _check_patterns(problem)
    _check_numbers("", problem.fn, problem.loss, problem.score, problem.params, problem.data["train"])
    if (retained := problem.retained) is not None:
        _check_length("retained.data", retained.data)
        _check_numbers("retained.", retained.fn, retained.loss, retained.score, problem.params, retained.data)


def _check_splits(data: Mapping[str, Arrays]) -> None:
    if missing := [split for split in SPLITS if split not in data]:
        raise ValueError(
            f"data has no {' and no '.join(missing)}; it has {', '.join(data)}, wanted {', '.join(SPLITS)}"
        )
    for split in SPLITS:
        _check_length(f"data[{split!r}]", data[split])
    train = _examples_like(data["train"])
    for split in SPLITS[1:]:
        other = _examples_like(data[split])
        for name in train.keys() | other.keys():
            if train.get(name) != other.get(name):
                raise ValueError(
                    f"data[{split!r}][{name!r}]: an example is {other.get(name, 'not there')}, in data['train'] it is "
                    f"{train.get(name, 'not there')}; all splits have the same arrays"
                )


def _check_length(where: str, arrays: Arrays) -> None:
    for name, array in arrays.items():
        if not paths.is_array(array) or not array.ndim:
            raise ValueError(
                f"{where}[{name!r}]: got {array!r:.60}, wanted an array whose first axis runs over examples"
            )
    try:
        count = examples(arrays)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not count:
        raise ValueError(f"{where}: no examples, wanted at least one")


def _examples_like(arrays: Arrays) -> dict[str, str]:
    return {name: f"{array.dtype}{list(array.shape[1:])}" for name, array in arrays.items()}


def _check_patterns(problem: Problem) -> None:
    leaves = list(paths.flatten(problem.params)[0])
    named = {f"targets[{name!r}]": patterns for name, patterns in problem.targets.items()}
    named |= {f"placements[{name!r}]": patterns for name, patterns in problem.placements.items()}
    named |= {"always": tuple(problem.always), "quantizable": problem.quantizable}
    for where, patterns in named.items():
        for pattern in as_patterns(patterns):
            if not _matches(where, pattern, leaves):
                near = ", ".join(paths.nearest(pattern, leaves)) or "there are none"
                raise ValueError(f"{where}: {pattern!r} matches no parameter as a whole path; nearest: {near}")


def as_patterns(patterns: Patterns) -> Iterable[str]:
    """Return the regular expressions of a target or placement, one or several."""
    return (patterns,) if isinstance(patterns, str) else patterns


def _matches(where: str, pattern: str, leaves: Iterable[str]) -> bool:
    try:
        return any(re.fullmatch(pattern, leaf) for leaf in leaves)
    except re.error as error:
        raise ValueError(f"{where}: {pattern!r} is no regular expression ({error})") from None


def _check_numbers(
    where: str, fn: Function, loss: PerExample, score: PerExample | None, params: Any, data: Arrays
) -> None:
    batch = {name: jax.ShapeDtypeStruct((BATCH, *x.shape[1:]), x.dtype) for name, x in data.items()}
    outputs = jax.eval_shape(lorax.adapt(fn), params, None, batch)  # adapt, since the base may be quantised
    _check_number(f"{where}loss", loss, outputs, batch, jnp.floating)
    if score is not None:
        _check_number(f"{where}score", score, outputs, batch, jnp.floating, jnp.bool_)  # right or not


def _check_number(where: str, function: PerExample, outputs: Any, batch: Mapping[str, Any], *kinds: Any) -> None:
    found = jax.eval_shape(function, outputs, batch)
    is_one_each = getattr(found, "shape", None) == (BATCH,)
    if not (is_one_each and any(jnp.issubdtype(found.dtype, kind) for kind in kinds)):
        raise ValueError(
            f"{where}: got {found} for a batch of {BATCH} examples, wanted float32 of shape ({BATCH},), one number an "
            "example: take means and sums over the other axes only"
        )


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return the known name that looks most like one that is not, for error messages."""
    return (difflib.get_close_matches(name, list(known), n=1, cutoff=0) or ["(there are none)"])[0]
