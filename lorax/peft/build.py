"""Makes a leaf's method and arrays of the slices that a directory has."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from lorax import paths
from lorax.methods.adalora import AdaLoRA
from lorax.methods.base import Method
from lorax.methods.dora import DoRA
from lorax.methods.full import Full
from lorax.methods.lora import LoRA
from lorax.methods.trainable_tokens import TrainableTokens
from lorax.peft.config import Config
from lorax.peft.layout import Layout
from lorax.sites import Site

Made = tuple[Method, dict[str, Any], dict[str, Any]]
Index = tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Slice:
    """The arrays of one module, in the axes of its leaf: A (experts, fan-in, R) and B (experts, R, fan-out).

    Attributes:
      a: A.
      b: B.
      scale: the factor in front of `A·B`.
      alpha: the config's numerator of it.
      magnitude: of DoRA.
      bias: the bias on B.
      e: AdaLoRA's singular values (R,).
    """

    a: np.ndarray
    b: np.ndarray
    scale: np.floating
    alpha: float
    magnitude: np.ndarray | None = None
    bias: np.ndarray | None = None
    e: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """The module's rank."""
        return self.a.shape[-1]


def array(leaf: Any) -> np.ndarray:
    """Return a leaf's numbers.

    Raises:
      ValueError: it has none (abstract), or not all of them are here.
    """
    leaf = leaf.dequantize() if paths.is_quantized(leaf) else leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ValueError(f"the params are abstract, {leaf}, and their values are needed: give arrays")
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise ValueError(
            "an array is spread over several processes: gather it first, with "
            "jax.experimental.multihost_utils.process_allgather"
        )
    return np.asarray(leaf)


def factors(config: Config, site: Site, layout: Layout, leaf: Any, slices: dict[Index, Slice]) -> Made:
    """Return a low-rank method and its arrays: slices that are missing are zero, smaller ranks padded with zeros."""
    parts = list(slices.values())
    widest = max(parts, key=lambda s: s.rank)
    rank = widest.rank
    dtypes = {s.a.dtype.name for s in parts} | {s.b.dtype.name for s in parts}
    if len(dtypes) > 1:
        raise ValueError(f"{site.path}: its factors have dtypes {', '.join(sorted(dtypes))}; convert them to one")
    trained = {
        "a": np.zeros(site.dims("SIR", R=rank), widest.a.dtype),
        "b": np.zeros(site.dims("SRO", R=rank), widest.b.dtype),
    }
    fixed: dict[str, Any] = {"scale": _scale(site, layout, slices)}
    bond = 0 if layout.experts is None else 1
    for index, s in slices.items():
        trained["a"][index][..., : s.rank] = s.a
        trained["b"][index][(slice(None),) * bond + (slice(s.rank),)] = s.b
    settings: dict[str, Any] = {"rank": rank, "alpha": widest.alpha, "dropout": config.lora_dropout}
    settings["dtype"] = next(iter(dtypes))
    if config.is_adalora:
        assert widest.e is not None
        trained["e"] = np.zeros(site.dims("SR", R=rank), widest.e.dtype)
        for index, s in slices.items():
            trained["e"][index] = s.e
        was_pruned = bool(config.rank_pattern) or any(np.any(s.e) for s in parts)
        trained["updates"] = np.asarray(was_pruned, np.float32)
        return AdaLoRA(**settings), trained, fixed
    settings["rank_stabilized"] = config.use_rslora
    outputs = {"bias": [s.bias for s in parts], "magnitude": [s.magnitude for s in parts]}
    for name, given in outputs.items():
        if given[0] is None:
            continue
        trained[name] = np.zeros(site.dims("SO"), given[0].dtype)
        for (index, s), x in zip(slices.items(), given, strict=True):
            assert x is not None and s is not None
            trained[name][index] = x.reshape(site.dims("O"))
    if config.start and layout.kind == "linear":
        fixed |= _starts(config.start, site, layout, leaf, slices, rank)
    if not config.use_dora:
        return LoRA(**settings, bias=config.lora_bias), trained, fixed
    made = DoRA(**settings)
    _, start = made.init(jax.random.key(0), site, leaf)
    norm = np.array(start["squared_norm"])
    for index in np.ndindex(layout.stack_shape):
        if index not in slices:
            norm[index] = 0  # which makes the gain exactly 1
    return made, trained, {**fixed, "squared_norm": norm}


def _starts(
    kind: str, site: Site, layout: Layout, leaf: Any, slices: dict[Index, Slice], rank: int
) -> dict[str, np.ndarray]:
    """Return the factors that PEFT takes off the base when it loads: `s·A₀·B₀` is the start of PiSSA or OLoRA."""
    a0 = np.zeros(site.dims("SIR", R=rank), np.float32)
    b0 = np.zeros(site.dims("SRO", R=rank), np.float32)
    base = array(leaf).astype(np.float32)
    for index, s in slices.items():
        w_OxI = dataclasses.replace(layout, transposed=True).weight_to_torch(layout.part(base, index))
        if kind == "olora":
            left, right = np.linalg.qr(w_OxI)
            b, a = left[:, : s.rank], right[: s.rank]
        else:
            left, values, right = np.linalg.svd(w_OxI, full_matrices=False)
            root = np.sqrt(values[: s.rank] / s.scale)
            b, a = left[:, : s.rank] * root, root[:, None] * right[: s.rank]
        a0[index][..., : s.rank], b0[index][: s.rank] = layout.from_peft(a, b, s.rank)
    return {"a0": a0, "b0": b0}


def _scale(site: Site, layout: Layout, slices: dict[Index, Slice]) -> np.ndarray:
    """Return one number, or one a stacked layer where ranks or scalings differ."""
    known = {(float(s.scale), s.rank) for s in slices.values()}
    first = next(iter(slices.values())).scale
    if len(known) == 1:
        return np.asarray(first, np.float32)
    scale = np.full(site.dims("S"), first, np.float32)
    for index, s in slices.items():
        scale[index] = s.scale
    return scale


def values(layout: Layout, leaf: Any, parts: dict[Index, np.ndarray]) -> Made:
    """Return `Full` and a leaf's trained values; slices that are missing are the base's."""
    base, dtype = array(leaf), next(iter(parts.values())).dtype
    every = {
        index: parts[index] if index in parts else layout.part(base, index).astype(dtype)
        for index in np.ndindex(layout.stack_shape)
    }
    return Full(dtype=None if dtype == base.dtype else dtype.name), {"value": layout.stacked(every)}, {}


def rows(site: Site, layout: Layout, leaf: Any, tokens: tuple[int, ...], parts: dict[Index, np.ndarray]) -> Made:
    """Return `TrainableTokens` and the trained rows of a table; slices that are missing are the base's."""
    made = TrainableTokens(tokens=tokens, dtype=next(iter(parts.values())).dtype.name)
    reason = made.refuses(site)
    if reason:
        raise ValueError(f"{site.path}: rows of it cannot be trained: {reason}")
    trained, _ = made.init(jax.random.key(0), site, leaf)
    value = np.array(trained["value"])
    for index, part in parts.items():
        value[index] = part.reshape(value[index].shape)
    return made, {"value": value}, {}
