"""Takes an adapter apart into the modules of a torch model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from lorax.adapter import Adapter
from lorax.methods.adalora import AdaLoRA
from lorax.methods.base import Method
from lorax.methods.dora import DoRA
from lorax.methods.full import Full
from lorax.methods.lora import LoRA
from lorax.methods.lorafa import LoRAFA
from lorax.methods.trainable_tokens import TrainableTokens
from lorax.peft import targets
from lorax.peft.build import array
from lorax.peft.layout import Layout
from lorax.peft.names import Slot, Table
from lorax.peft.record import Record
from lorax.sites import Site

_LOW_RANK = (LoRA, LoRAFA, DoRA, AdaLoRA)


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """The factors of one module, A (experts, fan-in, R) and B (experts, R, fan-out) in the axes of its leaf."""

    name: str  # the module's path, or the parameter's
    slot: Slot
    layout: Layout
    method: Method
    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None
    bias: np.ndarray | None = None
    e: np.ndarray | None = None
    mask: tuple[bool, ...] | None = None

    @property
    def rank(self) -> int:
        """The module's rank."""
        return self.a.shape[-1]

    def alpha(self, *, is_stabilized: bool) -> int | float:
        """Return the numerator that gives the scaling: the method's, a whole number, or any, in this order.

        The scaling is known in float32, and several numerators give the same.
        """
        width = math.sqrt(self.rank) if is_stabilized else self.rank
        width = self.rank + 1e-5 if self.e is not None else width
        product = float(self.scale * width)
        settled = getattr(self.method, "alpha", None)
        for x in (settled, round(product), round(product, 6)):
            if x is not None and np.float32(x / width) == np.float32(self.scale):
                return int(x) if float(x).is_integer() else x
        return product

    def padded(self, rank: int) -> Piece:
        """Return AdaLoRA's piece with as many triplets, of which the new ones are pruned."""
        more = rank - self.rank
        if not more:
            return self
        assert self.e is not None
        b = np.pad(self.b, [(0, more), *((0, 0) for _ in self.b.shape[1:])])
        a = np.pad(self.a, [*((0, 0) for _ in self.a.shape[1:]), (0, more)])
        mask = (*(self.mask or (True,) * self.rank), *(False,) * more)
        return dataclasses.replace(self, a=a, b=b, e=np.pad(self.e, (0, more)), mask=mask)

    def folded(self, rank: int) -> Piece:
        """Return the piece with scale and singular values in B and A, padded with zeros to a rank."""
        wide = lambda x: np.asarray(x, np.float32)
        a = (wide(self.a) if self.e is None else wide(self.a) * wide(self.e)).astype(self.a.dtype)
        b = (wide(self.b) * np.float32(self.scale)).astype(self.b.dtype)
        if self.mask is not None:
            left = np.flatnonzero(self.mask)
            a, b = a[..., left], np.take(b, left, axis=self._bond)
        more = rank - a.shape[-1]
        a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)])
        b = np.pad(b, [(0, more if axis == self._bond else 0) for axis in range(b.ndim)])
        return dataclasses.replace(self, a=a, b=b, scale=1.0, e=None, mask=None)

    @property
    def _bond(self) -> int:
        return 0 if self.layout.experts is None else 1


def refuse_foreign(entries: Iterable[tuple[Site, Method]]) -> None:
    """Refuse methods for which PEFT's LoRA has no form.

    Raises:
      ValueError: there are some; all of them are listed.
    """
    known = (*_LOW_RANK, Full, TrainableTokens)
    foreign = [f"{site.path} ({type(m).__name__})" for site, m in entries if not isinstance(m, known)]
    if foreign:
        raise ValueError(
            f"a PEFT directory of LoRA cannot hold {', '.join(foreign)}. Merge these with lorax.merge and save the "
            "weights, or save the adapter with lorax.save"
        )


def low_rank(adapter: Adapter, table: Table, record: Record | None) -> list[Piece]:
    """Return the factors of every module, in the order of the sites.

    Layers of a stacked site that are not adapted (all of their factors are zero) are left out, and ranks that only
    padding fills are cut off, unless the directory that the adapter was read from had them.
    """
    made: list[Piece] = []
    for site, method in adapter.plan.entries:
        if isinstance(method, _LOW_RANK):
            pieces = [p for s in table.by_path[site.path] for p in _pieces(adapter, table, s, method, record)]
            used = [p for p in pieces if _is_recorded(p, record) or not _is_empty(p)] or pieces
            is_uneven = bool(np.ndim(adapter.arrays(site.path)["scale"]))
            made += [_cut(p, record, may_trim=is_uneven) for p in used]
    return made


def _pieces(adapter: Adapter, table: Table, slot: Slot, method: Method, record: Record | None) -> list[Piece]:
    """Return the factors of a module, and of the output layer that shares its table where PEFT needs them twice."""
    piece = _piece(adapter, table, slot, method, record)
    tied = piece.layout.tied
    if not tied or targets.stays_tied(slot.module):
        return [piece]
    return [piece, dataclasses.replace(piece, name=tied, layout=piece.layout.twin())]


def _piece(adapter: Adapter, table: Table, slot: Slot, method: Method, record: Record | None) -> Piece:
    layout, arrays = table.layouts[slot.path], adapter.arrays(slot.path)
    at = {name: array(x) for name, x in arrays.items()}
    for name, x in at.items():
        if not np.isfinite(np.asarray(x, np.float32)).all():
            raise ValueError(f"{slot.path}: the adapter's {name!r} holds NaN or infinity; it was not saved")
    part = lambda name: at[name][slot.index] if name in at else None
    a, b = at["a"][slot.index], at["b"][slot.index]
    bond = 0 if layout.experts is None else 1
    if "a0" in at:  # s·(A·B − A₀·B₀) is one product of twice the rank
        a = np.concatenate([a, at["a0"][slot.index]], -1)
        b = np.concatenate([b, -at["b0"][slot.index]], bond)
    elif "b0" in at:
        b = (np.asarray(b, np.float32) - np.asarray(at["b0"][slot.index], np.float32)).astype(b.dtype)
    scale = np.unique(at["scale"][slot.index] if at["scale"].ndim else at["scale"])
    if len(scale) != 1:
        raise ValueError(f"{slot.path}: experts of one parameter have scales {scale.tolist()}; PEFT has one for all")
    parameter = f"{slot.module}.{slot.parameter}"
    mask = _mask(slot.module, at["e"][slot.index], float(at["updates"]), record) if "e" in at else None
    is_adapted = method.__class__ is not DoRA or np.any(at["squared_norm"][slot.index])
    return Piece(
        parameter if layout.kind == "parameter" else slot.module,
        slot,
        layout,
        method,
        a,
        b,
        float(scale[0]),
        magnitude=part("magnitude") if is_adapted else None,
        bias=part("bias"),
        e=part("e"),
        mask=mask,
    )


def _mask(module: str, e: np.ndarray, updates: float, record: Record | None) -> tuple[bool, ...] | None:
    """Return which triplets of a module are left; None where no budget update was made."""
    if not updates:
        return None
    left = tuple(bool(x) for x in e != 0)
    if record is None or updates != 1:
        return left
    known = dict(record.masks).get(module)  # no update since it was read
    return None if known is None else tuple(x or y for x, y in zip(known, left, strict=True))


def _is_recorded(piece: Piece, record: Record | None) -> bool:
    return record is not None and piece.name in dict(record.ranks)


def _is_empty(piece: Piece) -> bool:
    arrays = (piece.a, piece.b, piece.bias) if piece.e is None else (piece.a, piece.b, piece.e)
    return piece.magnitude is None and not any(x is not None and np.any(x) for x in arrays)


def _cut(piece: Piece, record: Record | None, *, may_trim: bool) -> Piece:
    """Cut off the ranks that only padding fills."""
    if piece.e is not None:
        return piece
    bond = 0 if piece.layout.experts is None else 1
    others = tuple(axis for axis in range(piece.b.ndim) if axis != bond)
    used = np.flatnonzero(np.any(piece.a != 0, axis=tuple(range(piece.a.ndim - 1))) | np.any(piece.b != 0, axis=others))
    needed = int(used[-1]) + 1 if len(used) else 1
    known = dict(record.ranks).get(piece.name) if record else None
    rank = max(known, needed) if known is not None else needed if may_trim else piece.rank
    rank = min(rank, piece.rank)
    keep = (slice(None),) * bond + (slice(rank),)
    return dataclasses.replace(piece, a=piece.a[..., :rank], b=piece.b[keep])
