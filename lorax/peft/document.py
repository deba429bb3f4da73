"""Composes an `adapter_config.json`: the shortest that means exactly the modules that were written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lorax.peft import targets
from lorax.peft.config import Config, parse
from lorax.peft.names import Table
from lorax.peft.pieces import Piece
from lorax.peft.record import Record

# Keys that every release of PEFT knows; the others are written only where they say something.
_ALWAYS = ("peft_type", "r", "lora_alpha", "target_modules", "lora_dropout", "fan_in_fan_out", "bias") + (
    ("modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "task_type")
    + ("base_model_name_or_path", "revision", "rank_pattern", "alpha_pattern")
)


def compose(
    settings: Mapping[str, Any],
    pieces: Sequence[Piece],
    saved: Sequence[str],
    table: Table,
    record: Record | None,
    *,
    task_type: str | None,
    base_model: str | None,
) -> dict[str, Any]:
    """Return the config.

    Args:
      settings: what the tensors ask for: ranks, alphas, `use_dora` and the like.
      pieces: the modules with factors.
      saved: the modules of `modules_to_save`.
      table: all modules that are known.
      record: the directory that the adapter was read from.
      task_type: PEFT's word for the task.
      base_model: the user's.

    Raises:
      ValueError: nothing in PEFT's language means these modules alone.
    """
    dropouts = {float(getattr(p.method, "dropout", 0.0)) for p in pieces}
    every = {
        **settings,
        **_targets(pieces, saved, table),
        "fan_in_fan_out": any(p.layout.kind == "linear" and not p.layout.transposed for p in pieces),
        "lora_dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,
        "task_type": task_type,
        "base_model_name_or_path": base_model or (record.base_model if record else None),
        "revision": record.revision if record and base_model is None else None,
        "init_lora_weights": True,  # PEFT would apply any that changes the base to the base again
        "inference_mode": True,
    }
    defaults = {f.name: None if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(Config)}
    defaults |= {"rank_pattern": {}, "alpha_pattern": {}}
    document = {key: every.get(key, defaults[key]) for key in _ALWAYS}
    document |= {k: v for k, v in every.items() if v not in (None, [], {}) and v != defaults.get(k)}
    _check(document, pieces, saved, table)
    return document


def _targets(pieces: Sequence[Piece], saved: Sequence[str], table: Table) -> dict[str, Any]:
    """Return names that mean the modules with factors, the parameters with factors, and the saved modules."""
    modules = [p.name for p in pieces if p.layout.kind != "parameter"]
    parameters = [p.name for p in pieces if p.layout.kind == "parameter"]
    tied = {p.layout.tied for p in pieces if targets.stays_tied(p.name)}
    others = [m for m in table.modules if m not in modules and m not in tied]
    at_dot = lambda name, path: targets.ends_with(path, [name])
    anywhere = lambda name, path: path.endswith(name)
    unsaved = [m for m in table.modules if m not in saved]
    named = targets.shortest(modules, others, at_dot, is_short=table.is_complete)
    return {
        "target_modules": named or ([] if parameters else targets.NOTHING),
        "target_parameters": sorted(parameters) or None,
        "modules_to_save": targets.shortest(saved, unsaved, anywhere, is_short=table.names_all) or None,
    }


def _check(document: Mapping[str, Any], pieces: Sequence[Piece], saved: Sequence[str], table: Table) -> None:
    """Read the config as `load` would, and compare."""
    config, problems = parse(json.loads(json.dumps(document)))
    assert config is not None and not problems, problems
    candidates = {m: table.layouts[slot.path].kind for m, slot in table.targets().items()}
    candidates |= {p.name: p.layout.kind for p in pieces if p.layout.kind != "parameter"}
    chosen, complaint = targets.selected(config, candidates, ())
    assert complaint is None, complaint
    chosen += targets.selected_parameters(config, table.parameters())
    wanted = [p.name for p in pieces]
    if sorted(chosen) != sorted(wanted):
        raise ValueError(f"no target_modules mean {sorted(wanted)} alone; they mean {sorted(chosen)}")
    meant = [m for m in dict.fromkeys(slot.module for slot in table.slots.values()) if targets.is_saved(config, m)]
    if meant != list(saved):
        raise ValueError(f"no modules_to_save mean {list(saved)} alone; they mean {meant}")
    for p in pieces:
        what = targets.factors(config, p.name)
        scaling = what.alpha / (what.rank + 1e-5) if config.is_adalora else what.scaling
        assert what.rank == p.rank, (p.name, what)
        assert np.isclose(scaling, p.scale, rtol=1e-6, atol=0), (p.name, what, p.scale)
