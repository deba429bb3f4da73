"""What an adapter that was read from a directory remembers of it, so that writing it again changes nothing.

The arrays of a stacked site say what every layer computes, and not everything about the files: a layer of smaller rank
is padded with zeros, and a layer without factors has zeros alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lorax.adapter import Adapter
from lorax.methods.base import Method
from lorax.sites import Site
from lorax.spec import Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """The facts about a directory that an adapter's arrays do not tell.

    Attributes:
      rank: the config's `r` (AdaLoRA: `init_r`).
      alpha: the config's `lora_alpha`.
      ranks: the rank of every module with factors.
      masks: of AdaLoRA, which of a module's triplets are in the file; empty where the config names none.
      saved: the modules of `modules_to_save`.
      bias: the config's `bias`.
      copies: names of tensors that only repeat the base or another tensor.
      sites: those of the leaves that they repeat.
      tokens_by_name: whether `trainable_token_indices` names its table.
      task_type: the config's.
      base_model: the config's `base_model_name_or_path`.
      revision: the config's.
      schedule: of AdaLoRA, the settings of its budget.
    """

    rank: int
    alpha: float
    ranks: tuple[tuple[str, int], ...]
    masks: tuple[tuple[str, tuple[bool, ...]], ...] = ()
    saved: tuple[str, ...] = ()
    bias: str = "none"
    copies: tuple[str, ...] = ()
    sites: tuple[Site, ...] = ()
    tokens_by_name: bool = False
    task_type: str | None = None
    base_model: str | None = None
    revision: str | None = None
    schedule: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True, init=False)
class RecordedSpec(Spec):
    """The spec of an adapter that came from a directory."""

    record: Record

    def __init__(self, rules: Mapping[str, Method | None], record: Record) -> None:
        super().__init__(rules)
        object.__setattr__(self, "record", record)


def record_of(adapter: Adapter) -> Record | None:
    """Return what an adapter remembers of the directory it was read from, if it was."""
    return adapter.spec.record if isinstance(adapter.spec, RecordedSpec) else None
