"""Writes an adapter as a PEFT directory."""

from __future__ import annotations

import collections
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lorax.adapter import Adapter, base_leaves
from lorax.methods.adalora import AdaLoRA
from lorax.methods.dora import DoRA
from lorax.methods.full import Full
from lorax.methods.trainable_tokens import TrainableTokens
from lorax.peft import pieces, targets, tensors
from lorax.peft.build import array
from lorax.peft.document import compose
from lorax.peft.files import CONFIG, PREFIX, WEIGHTS, replace
from lorax.peft.names import Names, Slot, Table
from lorax.peft.pieces import Piece
from lorax.peft.record import Record, record_of
from lorax.sites import Site, Sites


def save(
    directory: str | os.PathLike[str],
    adapter: Adapter,
    params: Any,
    *,
    names: Names,
    portable: bool = False,
    task_type: str | None = None,
    base_model: str | None = None,
) -> None:
    """Write an adapter as a directory that PEFT loads, with the same outputs.

    Two adapters with the same numbers give the same bytes. Modules of other rank or scaling than the most get patterns
    of their own; initialisers that start at the weight (`pissa`, `olora`) become plain factors of twice the rank,
    `[A | A₀]` and `[B; −B₀]`, since the base stays what it was. An adapter that `load` made is written with the very
    tensors that were read, unless they have such a start unconverted: PEFT would change the base by them again.

    Args:
      directory: is made where it does not exist. Files of other names in it stay; an adapter that it holds is replaced
        when the new one is complete.
      adapter: of `LoRA`, `LoRAFA`, `DoRA`, `AdaLoRA`, `Full` and `TrainableTokens`.
      params: the base.
      names: `{leaf path: module path}`, see `lorax.peft.names`, of all adapted leaves. The others' names help to write
        short `target_modules`; where some are missing, paths are written in full.
      portable: write for servers, which apply one global `alpha/r` and know no patterns: every scaling is folded into
        its `B`, all factors are padded to one rank, and `lora_alpha = r`.
      task_type: PEFT's, such as "SEQ_CLS", for which PEFT wants the classifier's weights whether they were trained or
        not (so `names` has to have them); None: what the adapter was read with, or "CAUSAL_LM" where `names` has a
        decoder's `lm_head` or `model.embed_tokens`.
      base_model: name or path of the base model; None: what the adapter was read with.

    Raises:
      ValueError: PEFT has no form for a method, or not for these methods together, a leaf has no name, or (`portable`)
        servers do not take it. Nothing is written then.
    """
    leaves, _ = base_leaves(params, adapter.sites)
    pieces.refuse_foreign(adapter.plan.entries)
    record = record_of(adapter)
    table = _table(names, leaves, adapter.sites, record)
    if task_type is None:
        task_type = record.task_type if record else _task_type(table)
    writer = _Writer(adapter, table, record)
    writer.fill(portable=portable, task_type=task_type)
    document = compose(
        writer.settings, writer.pieces, writer.saved, table, record, task_type=task_type, base_model=base_model
    )
    config = (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()
    replace(pathlib.Path(directory), {WEIGHTS: tensors.encode(writer.tensors), CONFIG: config})


def _table(names: Names, leaves: Mapping[str, Any], sites: Sites, record: Record | None) -> Table:
    more = record.sites if record else ()
    table = Table(names, leaves, [*sites, *(s for s in more if s.path not in sites.paths)])
    lacking = [site.path for site in sites if site.path not in table.layouts]
    if lacking:
        lines = ", ".join(table.suggest_module(path) for path in lacking)
        raise ValueError(
            f"names has no module for {', '.join(lacking)}. Perhaps add {{{lines}}}, with the torch model's own paths"
        )
    return table


class _Writer:
    """Fills the tensors and the config of one directory."""

    def __init__(self, adapter: Adapter, table: Table, record: Record | None) -> None:
        self.adapter, self.table, self.record = adapter, table, record
        self.tensors: dict[str, np.ndarray] = {}
        self.settings: dict[str, Any] = {}
        self.pieces = pieces.low_rank(adapter, table, record)
        self.saved: list[str] = []

    def fill(self, *, portable: bool, task_type: str | None) -> None:
        """Write all tensors, and what the config says of them.

        Raises:
          ValueError: these methods do not go together there, or lack what the task needs.
        """
        full = [site for site, method in self.adapter.plan.entries if isinstance(method, Full)]
        rows = [(site, m) for site, m in self.adapter.plan.entries if isinstance(m, TrainableTokens)]
        if portable:
            self._refuse_unportable(full, [site for site, _ in rows])
            rank = max(p.folded(p.rank).rank for p in self.pieces)
            self.pieces = [p.folded(rank) for p in self.pieces]
        self._refuse_mixtures()
        stabilized = [getattr(p.method, "rank_stabilized", False) for p in self.pieces]
        self._write_factors(is_stabilized=not portable and bool(stabilized) and all(stabilized))
        if not portable:
            self._write_values(full, task_type)
            self._write_rows(rows)
            self._write_copies()

    def _refuse_unportable(self, full: list[Site], rows: list[Site]) -> None:
        reasons = {f"{site.path} (trained in full)": None for site in full} | {
            f"{site.path} (trained rows)": None for site in rows
        }
        for p in self.pieces:
            if isinstance(p.method, DoRA):
                reasons[f"{p.slot.path} (DoRA)"] = None
            if p.bias is not None:
                reasons[f"{p.slot.path} (a bias on B)"] = None
            if p.layout.tied or p.layout.kind == "parameter":
                reasons[f"{p.slot.path} ({'a tied table' if p.layout.tied else 'experts'})"] = None
        if reasons or not self.pieces:
            raise ValueError(
                f"portable=True is for low-rank factors alone, and this adapter has {', '.join(reasons) or 'none'}: "
                "merge it with lorax.merge and serve the weights, or save it with portable=False for PEFT"
            )

    def _refuse_mixtures(self) -> None:
        kinds: dict[str, list[str]] = collections.defaultdict(list)
        for p in self.pieces:
            name = "LoRA" if p.e is None else "AdaLoRA"
            if isinstance(p.method, DoRA):
                name = "DoRA"
            if p.slot.path not in kinds[name]:
                kinds[name].append(p.slot.path)
            reason = _refused(p)
            if reason:
                raise ValueError(f"{p.slot.path}: PEFT has no {reason}. Merge it, or save it with lorax.save")
        if len(kinds) > 1:
            listed = "; ".join(f"{name} at {', '.join(where)}" for name, where in kinds.items())
            raise ValueError(f"a PEFT directory has one kind of factors, and this adapter has {listed}")

    # Factors.

    def _write_factors(self, *, is_stabilized: bool) -> None:
        own = self.pieces
        self.settings |= {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}}
        if own and own[0].e is not None:
            self._write_triplets(max(p.rank for p in own))
            return
        has_bias = any(p.bias is not None for p in own)
        alphas: dict[str, int | float] = {}
        for p in own:
            alphas[p.name] = p.alpha(is_stabilized=is_stabilized)
            stem = self._stem(p)
            a, b = p.layout.to_peft(p.a, p.b)
            if p.layout.kind == "embedding":
                self._put(f"{stem}.lora_embedding_A", a)
                self._put(f"{stem}.lora_embedding_B", b)
            else:
                self._put(f"{stem}.lora_A.weight", a)
                self._put(f"{stem}.lora_B.weight", b)
            if p.layout.tied and targets.stays_tied(p.name):
                self._put(f"{p.layout.tied}.lora_A.weight", b.T)
                self._put(f"{p.layout.tied}.lora_B.weight", a.T)
                self.settings["ensure_weight_tying"] = True
            if p.magnitude is not None:
                self._put(f"{stem}.lora_magnitude_vector", p.magnitude.reshape(p.layout.magnitude_shape()))
            if has_bias:
                bias = np.zeros(p.layout.out_size, p.b.dtype) if p.bias is None else p.bias
                self._put(f"{stem}.lora_B.bias", bias.reshape(-1))
        ranks = {p.name: p.rank for p in own}
        if own:
            self.settings["r"] = _most(ranks.values(), self.record.rank if self.record else None)
            self.settings["lora_alpha"] = _most(alphas.values(), self.record.alpha if self.record else None)
        self.settings |= {
            "rank_pattern": targets.patterns(ranks, self.settings["r"]),
            "alpha_pattern": targets.patterns(alphas, self.settings["lora_alpha"]),
            "use_rslora": is_stabilized,
            "use_dora": any(isinstance(p.method, DoRA) for p in own),
            "lora_bias": has_bias,
        }

    def _stem(self, piece: Piece) -> str:
        """Return where a module's factors are: those of several parameters of one module lie inside each other."""
        if piece.layout.kind != "parameter":
            return piece.name
        ours = [p.name for p in self.pieces if p.layout.kind == "parameter" and p.slot.module == piece.slot.module]
        order = [name for name, _ in self.record.ranks] if self.record else list(self.table.parameters())
        depth = len(ours) - 1 - sorted(ours, key=order.index).index(piece.name)
        return piece.slot.module + ".base_layer" * depth

    def _write_triplets(self, rank: int) -> None:
        self.pieces = own = [p.padded(rank) for p in self.pieces]
        alphas = {p.slot.path: p.alpha(is_stabilized=False) for p in own}
        if len(set(alphas.values())) > 1:
            raise ValueError(f"PEFT's AdaLoRA has one lora_alpha, and this adapter has {alphas}")
        masks = {}
        for p in own:
            left = np.flatnonzero(p.mask) if p.mask is not None else np.arange(rank)
            assert p.e is not None
            a, b = p.layout.to_peft(p.a[..., left], p.b[left], is_flat=True)
            self._put(f"{p.name}.lora_A", a)
            self._put(f"{p.name}.lora_B", b)
            self._put(f"{p.name}.lora_E", p.e[left, None])
            if p.mask is not None:
                masks[f"{p.name}.lora_E"] = list(p.mask)
        method = own[0].method
        schedule = dict(self.record.schedule) if self.record else {}
        schedule = {"target_r": getattr(method, "budget", rank), "total_step": 1, **schedule}
        self.settings |= {
            "peft_type": "ADALORA",
            "init_r": rank,
            "lora_alpha": next(iter(alphas.values())),
            "rank_pattern": masks or None,
            **schedule,
        }

    def _put(self, key: str, tensor: np.ndarray) -> None:
        assert PREFIX + key not in self.tensors, key
        self.tensors[PREFIX + key] = np.array(tensor, order="C")  # a copy: two names must not share memory

    # Whole parameters and rows.

    def _write_values(self, sites: list[Site], task_type: str | None) -> None:
        """Write what is trained in full: biases as PEFT's `bias` where it has a word for them, else whole modules.

        A head that PEFT saves for the task is written whether it was trained or not.
        """
        trained = [slot for site in sites for slot in self._trained_slots(site)]
        kept = set(self.record.saved) if self.record else set()
        by_task = targets.saved_by_task(task_type)
        heads = {slot.module for slot in self.table.slots.values() if slot.module.endswith(by_task)}
        if by_task and not heads:
            raise ValueError(
                f"task_type={task_type!r}: PEFT wants the weights of a module that ends in {' or '.join(by_task)}, and "
                "names has none. Add its lines, weight and bias, whether it was trained or not, or choose another "
                "task_type"
            )
        whole = heads | {s.module for s in trained if s.parameter != "bias" or s.module in kept}
        factored = {p.slot.module for p in self.pieces}
        both = sorted(whole & factored)
        if both:
            raise ValueError(f"{', '.join(both)}: PEFT cannot both train a module in full and give it factors")
        self.saved = [m for m in dict.fromkeys(s.module for s in self.table.slots.values()) if m in whole]
        for module in self.saved:
            self._write_module(module)
        biases = [s for s in trained if s.module not in whole]
        wanted = "none"
        if biases:
            wanted = "lora_only" if all(s.module in factored for s in biases) else "all"
        if self.record and self.record.bias != "none":
            wanted = "all" if wanted == "all" else self.record.bias
        self.settings["bias"] = wanted
        for slot in self.table.slots.values():
            inside = "base_layer." if slot.module in factored else ""
            if slot.parameter != "bias" or slot.module in whole or wanted == "none" or (wanted != "all" and not inside):
                continue
            self._put(f"{slot.module}.{inside}bias", self._value(slot))

    def _trained_slots(self, site: Site) -> list[Slot]:
        """Return the slices of a leaf that were trained: of one that was read, those that the directory had."""
        slots = self.table.by_path[site.path]
        if self.record is None:
            return slots
        kept = set(self.record.saved)
        changed = lambda s: not np.array_equal(self._value(s), self._value(s, of_base=True))
        ranks = dict(self.record.ranks)
        by_bias = {"all": lambda s: True, "lora_only": lambda s: s.module in ranks}.get(self.record.bias)
        was_bias = lambda s: s.parameter == "bias" and by_bias is not None and by_bias(s)
        return [s for s in slots if s.module in kept or was_bias(s) or changed(s)]

    def _write_module(self, module: str) -> None:
        for slot in self.table.parts(module):
            if slot.path not in self.adapter.params and self.table.layouts[slot.path].kind == "unknown":
                raise ValueError(f"{module} is saved as a whole, and {slot.path} is not trained: train both, or none")
            self._put(f"{module}.{slot.parameter}", self._value(slot))
            tied = self.table.layouts[slot.path].tied
            if tied:
                self._put(f"{tied}.weight", self._value(slot))
                self.settings["ensure_weight_tying"] = True
            parent = slot.path.rpartition("/")[0]
            lacking = [
                path
                for path in self.table.leaves
                if path not in self.table.layouts
                and path.rpartition("/")[0] == parent
                and path.rpartition("/")[2] == "bias"
            ]
            if lacking:
                line = f"{lacking[0]!r}: {self.table.by_path[slot.path][0].module + '.bias'!r}"
                raise ValueError(
                    f"{module} is saved as a whole, and names has no line for {', '.join(lacking)}. Perhaps {{{line}}}"
                )

    def _value(self, slot: Slot, *, of_base: bool = False) -> np.ndarray:
        layout, leaf = self.table.layouts[slot.path], self.table.leaves[slot.path]
        arrays = {} if of_base else self.adapter.params.get(slot.path, {})
        value = layout.part(array(arrays.get("value", leaf)), slot.index)
        return layout.weight_to_torch(value, is_flat=slot.parameter == "bias")

    def _write_rows(self, entries: list[tuple[Site, TrainableTokens]]) -> None:
        tokens: dict[str, list[int]] = {}
        for site, method in entries:
            layout = self.table.layouts[site.path]
            if layout.kind != "embedding":
                raise ValueError(f"{site.path}: names says it is a {layout.kind} layer; trained rows need an embedding")
            value = array(self.adapter.params[site.path]["value"])
            for slot in self.table.by_path[site.path]:
                tokens[slot.module] = list(method.tokens)
                part = value[slot.index].reshape(len(method.tokens), layout.out_size)
                self._put(f"{slot.module}.token_adapter.trainable_tokens_delta", part)
        if not tokens:
            return
        only = next(iter(tokens))
        is_plain = len(tokens) == 1 and only.rpartition(".")[2] == "embed_tokens"
        by_name = self.record.tokens_by_name if self.record else not is_plain
        self.settings["trainable_token_indices"] = tokens if by_name or not is_plain else tokens[only]

    def _write_copies(self) -> None:
        """Write the copies of the base that the directory had from which the adapter was read."""
        tied = {layout.tied: self.table.by_path[path][0] for path, layout in self.table.layouts.items() if layout.tied}
        for key in self.record.copies if self.record else ():
            owner, _, parameter = key.rpartition(".")
            module = owner.removesuffix(".base_layer").removesuffix(".modules_to_save").removesuffix(".original_module")
            slot = self.table.slots.get((module, parameter)) or tied.get(module)
            if slot is not None and PREFIX + key not in self.tensors:
                self._put(key, self._value(slot, of_base=not owner.endswith(".modules_to_save")))


def _task_type(table: Table) -> str | None:
    """Return PEFT's word for a language model, whose body and head make one module, or None."""
    known = table.modules
    is_classifier = any(targets.ends_with(m, targets.CLASSIFIER_HEADS) for m in known)
    is_language_model = any(m in known for m in ("lm_head", "model.embed_tokens"))
    return "CAUSAL_LM" if is_language_model and not is_classifier else None


def _refused(piece: Piece) -> str | None:
    """Return what PEFT lacks for a module, or None."""
    kind, is_dora = piece.layout.kind, isinstance(piece.method, DoRA)
    if piece.layout.shares_experts:
        return "factors of experts that are fed the same activation (their axis is fan-out here): broadcast it to them"
    if kind == "vector":
        return "factors of what names calls a norm or a bias"
    if piece.layout.is_swapped and is_dora:
        return "DoRA of a tied table"
    if kind == "embedding" and (isinstance(piece.method, AdaLoRA) or piece.bias is not None):
        return "AdaLoRA of embeddings" if piece.bias is None else "bias on the factors of an embedding"
    if kind == "parameter" and (is_dora or piece.bias is not None or isinstance(piece.method, AdaLoRA)):
        return "DoRA, AdaLoRA or bias of a parameter without a module of its own"
    return None


def _most(values: Iterable[Any], known: Any) -> Any:
    """Return the known value if it is among them, else the commonest (the largest of those)."""
    counts = collections.Counter(values)
    return known if known in counts else max(counts, key=lambda x: (counts[x], x))
