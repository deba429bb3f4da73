"""The settings of a problem: its defaults, with what `config.problem` sets."""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from experiments.training.settings import check_type, dotted, unknown_setting


def merge(given: config_dict.ConfigDict, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults with what is given in their place.

    Args:
        given: some of the settings.
        defaults: all of them, nested, and the problem's name.

    Raises:
        ValueError: for a setting that `defaults` lacks, with the nearest it has, or one of another type.

    >>> merge(config_dict.ConfigDict({"model": {"layers": 2}}), {"name": "digits", "model": {"dim": 64, "layers": 4}})
    {'model': {'dim': 64, 'layers': 2}, 'name': 'digits'}
    """
    merged = config_dict.ConfigDict(dict(defaults), convert_dict=True, type_safe=False)
    known = dotted(defaults, "problem.")
    for name, value in dotted(given, "problem.").items():
        if name not in known:
            start = f"experiments.problems.defaults({defaults['name']!r})"
            raise ValueError(f"{unknown_setting(name, known)}; a configuration of this problem starts from {start}")
        check_type(name, value, known[name])
        merged.update_from_flattened_dict({name.removeprefix("problem."): value})
    return merged.to_dict()


def whole_number(name: str, value: int, least: int) -> int:
    """Return a setting of a problem that counts something.

    Raises:
        ValueError: it is below `least`.
    """
    if value < least:
        raise ValueError(f"config.problem.{name} = {value!r}: expected a whole number of at least {least}")
    return value


def one_of(name: str, value: str, known: Sequence[str]) -> str:
    """Return a setting of a problem that is a name.

    Raises:
        ValueError: it is not one of the known ones.
    """
    if value not in known:
        raise ValueError(f"config.problem.{name} = {value!r}: expected {' or '.join(known)}")
    return value
