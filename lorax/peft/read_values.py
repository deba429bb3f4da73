"""Reads what is trained in full: saved modules, biases and rows, and the copies of tables that PEFT adds."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from lorax.peft import targets
from lorax.peft.build import array
from lorax.peft.config import Config
from lorax.peft.files import PREFIX
from lorax.peft.ledger import Ledger
from lorax.peft.names import Slot, Table
from lorax.sites import Site

_TABLES = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")


class ValueReader:
    """Takes whole parameters and rows out of the ledger.

    Attributes:
      values: whole parameters by leaf path and index along its stacked axes.
      rows: trained rows and their numbers, likewise.
      saved: the modules of `modules_to_save`.
      copied: the sites of leaves that copies repeat.
    """

    def __init__(self, config: Config, table: Table, ledger: Ledger, factored: Collection[str]) -> None:
        self.config, self.table, self.ledger, self.factored = config, table, ledger, factored
        self.values: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
        self.rows: dict[str, tuple[tuple[int, ...], dict[tuple[int, ...], np.ndarray]]] = {}
        self.saved: list[str] = []
        self.copied: dict[str, Site] = {}

    def read(self) -> None:
        """Read all values and copies."""
        self._read_saved()
        self._read_biases()
        self._read_tokens()
        self._read_copies()

    def _read_saved(self) -> None:
        for slot in self.table.slots.values():
            if not targets.is_saved(self.config, slot.module):
                continue
            layout = self.table.layouts[slot.path]
            value = self._value(f"{slot.module}.{slot.parameter}", slot)
            if slot.module not in self.saved:
                self.saved.append(slot.module)
            if layout.tied and self.config.ensure_weight_tying:
                if value is not None:
                    self.ledger.same(f"{layout.tied}.weight", value)
            elif layout.tied:
                self.ledger.wrong.append(
                    f"{slot.module} is saved without ensure_weight_tying: only one use of the tied table {slot.path} "
                    "was trained, while an adapter here acts on the leaf"
                )
        if self.config.modules_to_save and not self.saved:
            self.ledger.wrong.append(f"modules_to_save={self.config.modules_to_save!r} means no module of names")

    def _read_biases(self) -> None:
        if self.config.bias == "none":
            return
        for slot in list(self.table.slots.values()):
            if slot.parameter != "bias":
                continue
            module, is_target = slot.module, slot.module in self.factored
            if module in self.saved:
                if self.config.bias == "all":
                    self.ledger.same(f"{module}.modules_to_save.bias", self.ledger.found.get(f"{module}.bias"))
                    self.ledger.copy(f"{module}.original_module.bias")
            elif is_target or self.config.bias == "all":
                self._value(f"{module}.{'base_layer.' if is_target else ''}bias", slot)

    def _value(self, key: str, slot: Slot) -> np.ndarray | None:
        layout = self.table.layouts[slot.path]
        shape = layout.weight_shape()
        value = self.ledger.take(key, (int(np.prod(shape)),) if slot.parameter == "bias" else shape)
        if value is not None:
            self.values.setdefault(slot.path, {})[slot.index] = layout.weight_from_torch(value)
        return value

    def _read_tokens(self) -> None:
        wanted = self.config.trainable_token_indices
        if not wanted:
            return
        embeddings = {m: s for m, s in self.table.targets().items() if self.table.layouts[s.path].kind == "embedding"}
        if isinstance(wanted, list):
            named = [m for m in embeddings if m.rpartition(".")[2] == "embed_tokens"] or list(embeddings)
            if len(named) != 1:
                self.ledger.wrong.append(f"trainable_token_indices is about the input embedding, and {named} may be it")
                return
            wanted = {named[0]: wanted}
        tied = {self.table.layouts[s.path].tied: m for m, s in embeddings.items()}
        for key, tokens in wanted.items():
            modules = [m for m in embeddings if m.endswith(key)]
            twin = next((m for head, m in tied.items() if head and head.endswith(key)), None)
            if not modules and twin and tokens == next((t for k, t in wanted.items() if twin.endswith(k)), None):
                continue  # the tied output layer, named beside the table
            if not modules:
                self.ledger.wrong.append(
                    f"trainable_token_indices of {key!r}: names has no looked-up table that ends so; its tables are "
                    f"{', '.join(embeddings) or 'none'}"
                )
            for module in modules:
                self._read_rows(embeddings[module], tuple(tokens))

    def _read_rows(self, slot: Slot, tokens: tuple[int, ...]) -> None:
        layout = self.table.layouts[slot.path]
        value = self.ledger.take(f"{slot.module}.token_adapter.trainable_tokens_delta", (len(tokens), layout.out_size))
        outside = [t for t in tokens if not 0 <= t < layout.in_size]
        if outside or len(set(tokens)) != len(tokens):
            self.ledger.wrong.append(
                f"trainable_token_indices {list(tokens)}: {slot.path} has rows 0 to {layout.in_size - 1}"
            )
        elif value is not None:
            known, parts = self.rows.setdefault(slot.path, (tokens, {}))
            if known != tokens:
                self.ledger.wrong.append(f"trainable_token_indices: the layers of {slot.path} train different rows")
            parts[slot.index] = value

    def _read_copies(self) -> None:
        """Take copies of tables that PEFT adds where one is targeted or the vocabulary was resized."""
        tied = {layout.tied: self.table.by_path[path][0] for path, layout in self.table.layouts.items() if layout.tied}
        for key in list(self.ledger.left):
            owner, _, parameter = key.rpartition(".")
            module = owner.removesuffix(".base_layer")
            slot = self.table.slots.get((module, parameter)) or (tied.get(module) if parameter == "weight" else None)
            layout = self.table.layouts[slot.path] if slot else None
            if slot is None or layout is None:
                continue
            if layout.kind != "embedding" and module.rpartition(".")[2] not in _TABLES:
                continue
            base = layout.weight_to_torch(
                layout.part(array(self.table.leaves[slot.path]), slot.index), is_flat=parameter == "bias"
            )
            tensor = self.ledger.found[key]
            self.ledger.copy(key)
            if slot.path in self.table.sites:
                self.copied[slot.path] = self.table.sites[slot.path]
            if tensor.shape != base.shape:
                self.ledger.wrong.append(
                    f"{PREFIX}{key} has shape {list(tensor.shape)} and the params {list(base.shape)}: the vocabulary "
                    "was resized. Resize the params alike"
                )
            elif not np.array_equal(tensor.astype(np.float32), base.astype(np.float32)):
                self.ledger.wrong.append(
                    f"{PREFIX}{key} is a copy of the base and differs from the params: another base, or a table that "
                    "was trained without being listed in modules_to_save"
                )
