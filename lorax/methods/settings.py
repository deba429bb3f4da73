"""Checks of the settings that methods share by name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _is_count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 1


def _is_floating(x: Any) -> bool:
    try:
        return x is not None and jnp.issubdtype(jnp.dtype(x), jnp.floating)  # dtype(None) is float64
    except TypeError:
        return False


_CHECKS = {
    "rank": (_is_count, "a whole number of at least 1"),
    "target_rank": (_is_count, "a whole number of at least 1"),
    "length": (_is_count, "a whole number of at least 1"),
    "alpha": (lambda x: _is_number(x) and math.isfinite(x), "a finite number"),
    "dropout": (lambda x: _is_number(x) and 0 <= x < 1, "a number in [0, 1)"),
    "dtype": (_is_floating, "the name of a floating-point dtype"),
}


def check(method: Any) -> None:
    """Check the settings of a method that have a name of the table, and write its dtype as a name.

    Where None is the default, it is sound too.

    Raises:
      ValueError: a setting is not what it has to be.
    """
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if field.name not in _CHECKS or (value is None and field.default is None):
            continue
        is_sound, wanted = _CHECKS[field.name]
        if not is_sound(value):
            raise ValueError(f"{type(method).__name__}: {field.name} is {value!r}; it has to be {wanted}")
        if field.name == "dtype":
            object.__setattr__(method, "dtype", jnp.dtype(value).name)
