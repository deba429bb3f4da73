"""Reads the factors of modules and parameters."""

from __future__ import annotations

import re

import numpy as np

from lorax.peft import targets
from lorax.peft.build import Slice
from lorax.peft.config import Config
from lorax.peft.ledger import Ledger
from lorax.peft.names import Slot, Table


class FactorReader:
    """Takes the factors that the config means out of the ledger.

    Attributes:
      slices: the factors by leaf path and index along its stacked axes.
      ranks: the rank of every module (or parameter) that has some.
      masks: of AdaLoRA, which triplets of a module the config keeps.
    """

    def __init__(self, config: Config, table: Table, ledger: Ledger) -> None:
        self.config, self.table, self.ledger = config, table, ledger
        self.slices: dict[str, dict[tuple[int, ...], Slice]] = {}
        self.ranks: dict[str, int] = {}
        self.masks: dict[str, tuple[bool, ...]] = {}

    def read(self) -> None:
        """Read all factors."""
        self._read_modules()
        self._read_parameters()

    def _read_modules(self) -> None:
        own = self.table.targets()
        heads = {layout.tied: path for path, layout in self.table.layouts.items() if layout.tied}
        candidates = {m: self.table.layouts[slot.path].kind for m, slot in own.items()} | dict.fromkeys(heads, "tied")
        found = {re.sub(r"\.lora_[A-Za-z_]+(\.weight|\.bias)?$", "", k) for k in self.ledger.found if ".lora_" in k}
        chosen, complaint = targets.selected(self.config, candidates, found)
        self.ledger.wrong += [complaint] if complaint else []
        for module in chosen:
            slot = own.get(module) or self.table.by_path[heads[module]][0]
            layout = self.table.layouts[slot.path]
            is_twofold = layout.tied is not None and not self._is_tied(slot)
            if is_twofold and not {slot.module, layout.tied} <= set(chosen):
                self.ledger.wrong.append(
                    f"{module} is targeted without ensure_weight_tying, or is none that PEFT ties: the factors act "
                    f"on one use of the tied table {slot.path} and not on the other, and an adapter here on the leaf"
                )
            elif slot.module not in self.ranks:
                self._read_module(slot, own_key=slot.module)
                if is_twofold:
                    self._read_twin(slot, str(layout.tied))

    def _is_tied(self, slot: Slot) -> bool:
        """Whether PEFT itself keeps the factors of a tied table's two uses the same."""
        return self.config.ensure_weight_tying and targets.stays_tied(slot.module)

    def _read_module(self, slot: Slot, own_key: str, setting: str | None = None) -> None:
        config, layout = self.config, self.table.layouts[slot.path]
        setting = setting or slot.module
        what = targets.factors(config, setting)
        stem = f"{own_key}."
        scaling = np.float32(what.scaling)
        if config.is_adalora:
            self._read_triplets(slot, stem)
            return
        if layout.shares_experts:
            self.ledger.wrong.append(
                f"{slot.path}: all experts are fed the same activation, so that their axis is fan-out here, and in "
                "PEFT every expert has factors of its own: broadcast the activation over the experts"
            )
        a_shape, b_shape = layout.factor_shapes(what.rank)
        if layout.kind == "embedding":
            a, b = (
                self.ledger.take(f"{stem}lora_embedding_A", a_shape),
                self.ledger.take(f"{stem}lora_embedding_B", b_shape),
            )
        else:
            a, b = self.ledger.take(f"{stem}lora_A.weight", a_shape), self.ledger.take(f"{stem}lora_B.weight", b_shape)
        magnitude = bias = None
        if config.use_dora:
            magnitude = self.ledger.take(f"{stem}lora_magnitude_vector", layout.magnitude_shape())
            if layout.is_swapped or layout.kind == "parameter":
                self.ledger.wrong.append(
                    f"{slot.module}: PEFT has no DoRA of {'tied tables' if layout.tied else 'parameters'}"
                )
        if config.lora_bias:
            if layout.kind in ("embedding", "parameter"):
                self.ledger.wrong.append(f"{slot.module}: PEFT has no lora_bias of a module of kind {layout.kind}")
            else:
                bias = self.ledger.take(f"{stem}lora_B.bias", (layout.out_size,))
        self.ranks[setting] = what.rank
        if a is None or b is None:
            return
        if layout.tied and self._is_tied(slot):
            self.ledger.same(f"{layout.tied}.lora_A.weight", b.T)
            self.ledger.same(f"{layout.tied}.lora_B.weight", a.T)
        ours = layout.from_peft(a, b, what.rank)
        self.slices.setdefault(slot.path, {})[slot.index] = Slice(
            *ours, scale=scaling, alpha=what.alpha, magnitude=magnitude, bias=bias
        )

    def _read_twin(self, slot: Slot, head: str) -> None:
        """Take the factors of the output layer that shares a table: they have to be the table's."""
        what, theirs = (targets.factors(self.config, module) for module in (slot.module, head))
        shapes = self.table.layouts[slot.path].twin().factor_shapes(theirs.rank)
        for name, shape in zip(("lora_A", "lora_B"), shapes, strict=True):
            self.ledger.take(f"{head}.{name}.weight", shape)
        self.ranks[head] = theirs.rank
        a, b = (self.ledger.found.get(f"{slot.module}.lora_embedding_{x}") for x in "AB")
        of_head = [self.ledger.found.get(f"{head}.lora_{x}.weight") for x in "AB"]
        if a is not None and b is not None:
            same = [x is not None and np.array_equal(x, y.T) for x, y in zip(of_head, (b, a), strict=True)]
            if not all(same) or what.scaling != theirs.scaling:
                self.ledger.wrong.append(
                    f"the factors of {slot.module} and {head} differ, which share the table {slot.path}, while an "
                    "adapter here acts on the leaf"
                )

    def _read_triplets(self, slot: Slot, stem: str) -> None:
        config, layout = self.config, self.table.layouts[slot.path]
        if layout.kind == "embedding":
            self.ledger.wrong.append(f"{slot.module}: PEFT has no AdaLoRA of embeddings")
            return
        names = (f"{stem}lora_E", f"{stem}lora_E.default")
        mask = next((config.rank_pattern[name] for name in names if name in config.rank_pattern), None)
        flat = [bool(x) for x in np.ravel(mask)] if mask is not None else [True] * config.init_r
        if len(flat) != config.init_r:
            self.ledger.wrong.append(
                f"rank_pattern of {slot.module} has {len(flat)} entries, expected init_r={config.init_r}"
            )
            return
        rank = sum(flat)
        a_shape, b_shape = layout.factor_shapes(rank, is_flat=True)
        a, b = self.ledger.take(f"{stem}lora_A", a_shape), self.ledger.take(f"{stem}lora_B", b_shape)
        e = self.ledger.take(f"{stem}lora_E", (rank, 1))
        self.ranks[slot.module] = config.init_r
        if mask is not None:
            self.masks[slot.module] = tuple(flat)
        if a is None or b is None or e is None:
            return
        at = np.flatnonzero(flat)
        small_a, small_b = layout.from_peft(a, b, rank)
        full_a = np.zeros((*small_a.shape[:-1], config.init_r), a.dtype)
        full_b = np.zeros((config.init_r, *small_b.shape[1:]), b.dtype)
        full_e = np.zeros(config.init_r, e.dtype)
        full_a[..., at], full_b[at], full_e[at] = small_a, small_b, e[:, 0]
        alpha = config.lora_alpha if config.lora_alpha > 0 else float(config.init_r)
        scale = np.float32(alpha) / (np.float32(config.init_r) + np.float32(1e-5))
        self.slices.setdefault(slot.path, {})[slot.index] = Slice(
            full_a, full_b, scale=scale, alpha=config.lora_alpha, e=full_e
        )

    def _read_parameters(self) -> None:
        """Read factors of parameters: of several in one module the first to be wrapped lies innermost."""
        known = self.table.parameters()
        owners: dict[str, list[tuple[str, Slot]]] = {}
        for entry in self.config.target_parameters or ():
            if not any(targets.ends_with(p, [entry]) for p in known):
                self.ledger.wrong.append(f"target_parameters: {entry!r} means no parameter of names")
        for full in targets.selected_parameters(self.config, known):
            owners.setdefault(known[full].module, []).append((full, known[full]))
        for module, listed in owners.items():
            stems = [module + ".base_layer" * depth for depth in reversed(range(len(listed)))]
            if not self._fits(listed, stems) and self._fits(listed[::-1], stems):
                listed = listed[::-1]
            for (full, slot), stem in zip(listed, stems, strict=True):
                self._read_module(slot, own_key=stem, setting=full)

    def _fits(self, listed: list[tuple[str, Slot]], stems: list[str]) -> bool:
        for (full, slot), stem in zip(listed, stems, strict=True):
            shape = self.table.layouts[slot.path].factor_shapes(targets.factors(self.config, full).rank)[0]
            found = self.ledger.found.get(f"{stem}.lora_A.weight")
            if found is not None and found.shape != shape:
                return False
        return True
