"""Reads a PEFT directory into an adapter: all of it, or nothing."""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from lorax import paths
from lorax.adapter import Adapter, Plan
from lorax.peft import build, tensors
from lorax.peft.config import Config, parse
from lorax.peft.files import CONFIG, WEIGHTS, find
from lorax.peft.ledger import Ledger
from lorax.peft.names import Names, Table
from lorax.peft.read_factors import FactorReader
from lorax.peft.read_values import ValueReader
from lorax.peft.record import Record, RecordedSpec
from lorax.sites import Site, Sites


def load(directory: str | os.PathLike[str], params: Any, sites: Iterable[Site], *, names: Names) -> Adapter:
    """Read an adapter that PEFT, or `save`, wrote.

    The adapted function computes what PEFT's model computes: with the rank and scaling of every module, `s = alpha/r`
    or `alpha/√r` (AdaLoRA: `alpha/(init_r + 1e-5)`). Modules of a stacked leaf become slices of one array: smaller
    ranks are padded with zeros, which training leaves at zero, and layers that the config does not target have zeros.

    Args:
      directory: holds `adapter_config.json` and `adapter_model.safetensors`, or one subfolder that does.
      params: the base that the adapter was trained on; full weights, norms and copies of tables are compared with it.
      sites: all sites of the function, from `lorax.trace`.
      names: `{leaf path: module path}`, see `lorax.peft.names`; `llama_names()` for a decoder of that family.

    Returns:
      The adapter, in the file's dtypes: `LoRA`, `DoRA` or `AdaLoRA` where the config targets, `Full` for saved modules
      and trained biases, `TrainableTokens` for trained rows.

    Raises:
      ValueError: a key of the config is not understood, or tensors are missing, left over or of another shape than
        config and params say. The message lists all of them.
    """
    path = find(pathlib.Path(directory))
    try:
        document = json.loads((path / CONFIG).read_text())
    except ValueError as error:
        raise ValueError(f"{path / CONFIG} is no JSON document: {error}") from error
    config, problems = parse(document) if isinstance(document, dict) else (None, [f"{CONFIG} holds no object"])
    if config is None or problems:
        raise ValueError(f"{path}: {CONFIG} asks for what lorax does not do: " + "; ".join(problems))
    sites = sites if isinstance(sites, Sites) else Sites(sites)
    leaves, _ = paths.flatten(params)
    table = Table(names, leaves, sites)
    ledger = Ledger(path, tensors.read(path / WEIGHTS))
    factors = FactorReader(config, table, ledger)
    factors.read()
    values = ValueReader(config, table, ledger, factors.ranks)
    values.read()
    _refuse_two_methods(ledger, factors, values)
    ledger.refuse(table, is_empty=not (factors.slices or values.values or values.rows))
    made: dict[str, build.Made] = {}
    for leaf_path, slices in factors.slices.items():
        layout = table.layouts[leaf_path]
        made[leaf_path] = build.factors(config, sites[leaf_path], layout, leaves[leaf_path], slices)
    for leaf_path, parts in values.values.items():
        made[leaf_path] = build.values(table.layouts[leaf_path], leaves[leaf_path], parts)
    for leaf_path, (tokens, parts) in values.rows.items():
        layout = table.layouts[leaf_path]
        made[leaf_path] = build.rows(sites[leaf_path], layout, leaves[leaf_path], tokens, parts)
    return _adapter([s for s in sites if s.path in made], made, _record(config, factors, values, ledger))


def _adapter(sites: list[Site], made: Mapping[str, build.Made], record: Record) -> Adapter:
    spec = RecordedSpec({re.escape(s.path): made[s.path][0] for s in sites}, record)
    plan = Plan(tuple((s, made[s.path][0]) for s in sites), spec)
    on_device = lambda arrays: {name: jnp.asarray(x) for name, x in arrays.items()}
    trained, fixed = ({s.path: on_device(made[s.path][i]) for s in sites} for i in (1, 2))
    return Adapter(trained, fixed, plan)


def _record(config: Config, factors: FactorReader, values: ValueReader, ledger: Ledger) -> Record:
    return Record(
        rank=config.init_r if config.is_adalora else config.r,
        alpha=config.lora_alpha,
        ranks=tuple(factors.ranks.items()),
        masks=tuple(factors.masks.items()),
        saved=tuple(values.saved),
        bias=config.bias,
        copies=tuple(ledger.copies),
        sites=tuple(values.copied.values()),
        tokens_by_name=isinstance(config.trainable_token_indices, dict),
        task_type=config.task_type,
        base_model=config.base_model_name_or_path,
        revision=config.revision,
        schedule=tuple(sorted(config.schedule.items())),
    )


def _refuse_two_methods(ledger: Ledger, factors: FactorReader, values: ValueReader) -> None:
    """Note leaves that two methods would be for, and leaves without a site."""
    given = [set(factors.slices), set(values.values), set(values.rows)]
    twice = (given[0] & given[1]) | (given[0] & given[2]) | (given[1] & given[2])
    ledger.wrong += [
        f"{path}: some of its layers or rows have factors and others trained values, and a leaf has one method: give "
        "every layer a leaf of its own"
        for path in sorted(twice)
    ]
    absent = sorted(set().union(*given) - set(factors.table.sites))
    ledger.wrong += [f"{path} has no site: give all that lorax.trace returns" for path in absent]
