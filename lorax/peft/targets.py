"""Which modules a config means, as PEFT matches them, and how to name modules so that PEFT matches these alone."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from lorax.peft.config import Config

ALL_LINEAR = "all-linear"
# A target that matches no module: PEFT's own word for an adapter without factors.
NOTHING = "dummy-target-modules"
# Output layers, which "all-linear" leaves out: of language models by their name, of classifiers by theirs.
_OUTPUT_LAYERS = ("lm_head", "embed_out", "output_layer", "cls.predictions.decoder", "generator_lm_head")
CLASSIFIER_HEADS = ("score", "classifier")
# What PEFT adds to `modules_to_save` for a task, whether the config names it or not.
_SAVED_BY_TASK = {"SEQ_CLS": CLASSIFIER_HEADS, "TOKEN_CLS": CLASSIFIER_HEADS, "QUESTION_ANS": ("qa_outputs",)}
_TIED_BY_PEFT = ("embed_tokens", "lm_head")  # the last words of the modules that `ensure_weight_tying` is for
# What PEFT fills in where target_modules is null: by architecture, which a directory does not name.
_BY_ARCHITECTURE = (
    ("q_proj", "v_proj"),
    ("q", "v"),
    ("query", "value"),
    ("query_proj", "value_proj"),
    ("c_attn",),
    ("query_key_value",),
    ("in_proj",),
    ("Wqkv",),
    ("qkv_proj",),
    ("c_proj", "c_attn"),
    ("q_proj", "v_proj", "fc1", "fc2"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
)


@dataclasses.dataclass(frozen=True)
class Factors:
    """The settings of one module: its rank and its scaling, `alpha/rank` or `alpha/√rank`."""

    rank: int
    alpha: float
    is_stabilized: bool

    @property
    def scaling(self) -> float:
        """The factor in front of `B·A`."""
        return self.alpha / (math.sqrt(self.rank) if self.is_stabilized else self.rank)


def is_excluded(config: Config, module: str) -> bool:
    """Whether `exclude_modules` or `modules_to_save` take a module out."""
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        if excluded and re.fullmatch(excluded, module):
            return True
    elif excluded and ends_with(module, excluded):
        return True
    return any(re.match(rf"(^|.*\.){m}($|\..*)", module) for m in config.modules_to_save or ())


def ends_with(module: str, suffixes: Iterable[str]) -> bool:
    """Whether a path equals a suffix or ends with it at a dot.

    >>> ends_with("layers.0.q_proj", ["q_proj"]), ends_with("layers.0.q_proj", ["proj"])
    (True, False)
    """
    return any(module == s or module.endswith(f".{s}") for s in suffixes)


def is_target(config: Config, module: str) -> bool:
    """Whether `target_modules`, `layers_to_transform` and `layers_pattern` select a module that nothing excludes."""
    targets = config.target_modules
    if is_excluded(config, module) or targets is None:
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    if module in targets:
        return True
    layers = config.layers_to_transform
    if not ends_with(module, targets):
        return False
    if layers is None or layers == []:
        return True
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    if patterns and patterns != [""]:
        matches = (re.match(rf"(?:^|.*?\.){p}\.(?P<index>\d+)\.", module) for p in patterns)
        match = next((m for m in matches if m), None)
    else:
        match = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", module)
    index = int(match["index"]) if match else None
    return index == layers if isinstance(layers, int) else index in layers


def selected(config: Config, candidates: Mapping[str, str], found: Collection[str]) -> tuple[list[str], str | None]:
    """Return the modules that a config gives factors.

    Args:
      config: the config.
      candidates: the modules that may have some, with their kinds.
      found: those that the file has some of, by which alone a missing `target_modules` can be filled in.

    Returns:
      The modules, and a complaint where it cannot be told which they are.
    """
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        heads = _OUTPUT_LAYERS if config.task_type != "SEQ_CLS" else (*_OUTPUT_LAYERS, *CLASSIFIER_HEADS)
        every = [m for m, kind in candidates.items() if kind == "linear" and not ends_with(m, heads)]
        return [m for m in every if not is_excluded(config, m)], None
    if targets is None and config.target_parameters is None:
        for row in _BY_ARCHITECTURE:
            filled = dataclasses.replace(config, target_modules=list(row))
            chosen = [m for m in candidates if is_target(filled, m)]
            if set(chosen) == set(found) and chosen:
                return chosen, None
        return [], "target_modules is null, which PEFT fills in by architecture: name the modules in the config"
    try:
        return [m for m in candidates if is_target(config, m)], None
    except re.error as error:
        return [], f"target_modules={targets!r} is no regular expression: {error}"


def selected_parameters(config: Config, candidates: Iterable[str]) -> list[str]:
    """Return the parameters that `target_parameters` gives factors."""
    return [p for p in candidates if ends_with(p, config.target_parameters or ())]


def factors(config: Config, module: str) -> Factors:
    """Return a module's rank and scaling: of the first pattern that matches, else the config's."""
    if config.is_adalora:
        return Factors(config.init_r, config.lora_alpha, False)
    rank = config.rank_pattern.get(_first(config.rank_pattern, module), config.r)
    alpha = config.alpha_pattern.get(_first(config.alpha_pattern, module), config.lora_alpha)
    return Factors(int(rank), alpha, config.use_rslora)


def _first(patterns: Iterable[str], module: str) -> str:
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), module)


def is_saved(config: Config, module: str) -> bool:
    """Whether `modules_to_save` means a module or one that contains it; PEFT compares the ends of paths as they are."""
    parts = module.split(".")
    owners = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(owner.endswith(key) for owner in owners for key in config.modules_to_save or ())


def saved_by_task(task_type: str | None) -> tuple[str, ...]:
    """Return the ends of modules that PEFT saves, and wants to find, because of the task."""
    return _SAVED_BY_TASK.get(task_type or "", ())


def stays_tied(module: str) -> bool:
    """Whether PEFT keeps factors of this table and of the output layer that shares it the same, if it is asked to."""
    return module.rpartition(".")[2] in _TIED_BY_PEFT


def shortest(
    wanted: Sequence[str], others: Collection[str], matches: Callable[[str, str], bool], *, is_short: bool = True
) -> list[str]:
    """Return names that match the wanted modules and none of the others, sorted.

    Args:
      wanted: module paths.
      others: those that must not be matched.
      matches: whether a name matches a path.
      is_short: whether to try the last part of a path before the whole.

    >>> same = lambda name, path: ends_with(path, [name])
    >>> shortest(["a.0.q", "a.1.q", "a.1.v"], ["a.0.v"], same)
    ['a.1.v', 'q']
    """
    names = set()
    for path in wanted:
        last = path.rpartition(".")[2]
        is_exact = is_short and not last.isdigit() and not any(matches(last, other) for other in others)
        names.add(last if is_exact else path)
    return sorted(names)


def patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return explicit patterns for the modules whose value is not the default."""
    return {f"^{re.escape(module)}": value for module, value in sorted(values.items()) if value != default}
