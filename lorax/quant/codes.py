"""Codes of four and eight bits: their values, the nearest one, how they are packed, and scales stored as codes.

Axes: `...` stacked matrices, M rows, K columns, N blocks of a row, G groups of blocks of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax.quant.ordered_sum import ordered_mean

GROUP = 256  # scales that share a scale of their own under double quantisation

# Quantiles of a normal distribution on [-1, 1] with an exact zero, ascending: Dettmers et al. 2023 (arXiv:2305.14314,
# section 3 and appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# A sign bit and three bits of magnitude: bitsandbytes' own assignment, and that of the OCP microscaling formats.
_MAGNITUDES = {
    "bnb": [x / 12 for x in (0, 0.0625, 8, 12, 4, 6, 2, 3)],
    "e2m1": [x / 6 for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6)],
}
FP4 = {name: (*m, *(-x for x in m)) for name, m in _MAGNITUDES.items()}


def midpoints(ascending: np.ndarray) -> np.ndarray:
    """Return the bounds between neighbouring values; a number on a bound belongs to the lower value."""
    return (ascending[:-1] + ascending[1:]) / ascending.dtype.type(2)


def dynamic_map() -> np.ndarray:
    """Return the 256 values of bitsandbytes' signed dynamic type of eight bits, ascending.

    Every decade from 1e-6 to 1 has twice as many values as the one below: the middles of 2ᵏ equal parts of [0.1, 1]
    times 10ᵏ⁻⁶, of both signs; besides these 0 and 1. Dettmers 2015 (arXiv:1511.04561, section 2).

    >>> values = dynamic_map()
    >>> len(values), values[127].item(), values[255].item(), round(values[0].item(), 5)
    (256, 0.0, 1.0, -0.99297)
    """
    values = [0.0, 1.0]
    for k in range(7):
        # A float32 step, counted from the nearer end and rounded once: the same bits as bitsandbytes' table.
        start, count = np.float32(0.1), np.arange(2**k + 1)
        step = float((np.float32(1) - start) / np.float32(2**k))
        is_near_start = count < len(count) // 2
        edges = np.where(is_near_start, float(start) + step * count, 1 - step * count[::-1]).astype(np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (k - 6))
        values += [*middles, *-middles]
    return np.sort(np.array(values, np.float32))


DYNAMIC = dynamic_map()
# On a CPU bitsandbytes rounds to 65536 steps of [-1, 1] before it looks for the nearest value (on a GPU it does not,
# which matters within a step of a bound). These are, in such steps, the least numbers of the codes above 0.
_DYNAMIC_STARTS = np.ceil((midpoints(DYNAMIC).astype(np.float64) + 1) * 32767.5).astype(np.float32) - np.float32(0.5)


def normalised(values: jax.Array, largest: jax.Array) -> jax.Array:
    """Return `values / largest` in [-1, 1], in float32, and 0 where the largest magnitude is 0.

    It is a product with the reciprocal, as in bitsandbytes: a quotient may round to another code. A power of two keeps
    the reciprocal of very large and very small scales a normal number.
    """
    up, down = np.float32(2.0**64), np.float32(2.0**-64)
    shift = jnp.where(largest > 2.0**100, down, jnp.where(largest < 2.0**-100, up, np.float32(1)))
    shifted = largest * shift
    inverse = np.float32(1) / jnp.where(shifted == 0, np.float32(1), shifted)
    return jnp.clip(values.astype(jnp.float32) * shift * inverse, -1, 1)


def nearest(table: Sequence[float], x: jax.Array) -> jax.Array:
    """Return the code (uint8, shaped like `x`) of the value of a short table that is nearest."""
    values = np.asarray(table, np.float32)
    order = np.argsort(values, kind="stable")
    rank = jnp.zeros(x.shape, jnp.uint8)
    for bound in midpoints(values[order]):  # comparisons of one element each, which fuse
        rank += (x > bound).astype(jnp.uint8)
    return rank if (order == np.arange(len(order))).all() else lookup(order.astype(np.uint8), rank)


def lookup(table: Sequence[float] | np.ndarray, codes: jax.Array) -> jax.Array:
    """Return `table[codes]` for a table whose length is a power of two, in float32 if it is of Python numbers.

    It selects by one bit of the code after another: elementwise, so that it fuses and keeps any sharding. A gather
    does neither on every backend. The first bit selects by a sum of which one part is zero: of a `where` of constants,
    JAX would keep each constant in the weight's size outside a scan.
    """
    dtype = table.dtype if isinstance(table, np.ndarray) else np.dtype("float32")
    numbers = [dtype.type(x) for x in table]
    odd = (codes & 1).astype(dtype)
    even = dtype.type(1) - odd
    values: list[Any] = [a * even + b * odd for a, b in zip(numbers[::2], numbers[1::2], strict=True)]
    bit = 2
    while len(values) > 1:
        is_set = (codes & bit) != 0
        values = [jnp.where(is_set, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
        bit *= 2
    return values[0]


def pack(codes: jax.Array) -> jax.Array:
    """Put two codes of four bits along the last axis into one byte, the first in the high half."""
    pairs = codes.reshape(*codes.shape[:-1], -1, 2)
    return pairs[..., 0] << 4 | pairs[..., 1]


def unpack(packed: jax.Array) -> jax.Array:
    """Undo `pack`.

    >>> unpack(pack(jnp.array([[1, 15, 0, 7]], jnp.uint8))).tolist()
    [[1, 15, 0, 7]]
    """
    halves = packed[..., None] >> np.array([4, 0], np.uint8) & np.uint8(15)
    return halves.reshape(*packed.shape[:-1], -1)


def compress_scales(scales: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantise scales to eight bits: double quantisation, Dettmers et al. 2023 (arXiv:2305.14314, section 3).

    The mean is subtracted from the scales of one matrix, and the difference stored in `dynamic_map`'s codes, in groups
    of 256 with the largest magnitude each.

    Args:
      scales: float32, shape (..., M, N); each leading index is a matrix of its own.

    Returns:
      The codes (uint8, shape (..., M, N)), the groups' scales (float32, shape (..., G)) and the mean (float32, shape
      (...)) of each matrix.
    """
    flat = scales.reshape(*scales.shape[:-2], -1)
    offset = ordered_mean(jnp.moveaxis(flat, -1, 0))
    centred = flat - offset[..., None]
    short = -centred.shape[-1] % GROUP
    padding = [(0, 0)] * (centred.ndim - 1) + [(0, short)]
    grouped = jnp.pad(centred, padding).reshape(*centred.shape[:-1], -1, GROUP)
    largest = jnp.max(jnp.abs(grouped), axis=-1)
    steps = (normalised(grouped, largest[..., None]) + np.float32(1)) * np.float32(32767.5)
    starts = jnp.asarray(_DYNAMIC_STARTS)
    codes = jnp.searchsorted(starts, steps, side="right").astype(jnp.uint8)
    codes = jnp.where(largest[..., None] == 0, np.uint8(0), codes)  # any would do; it is bitsandbytes' choice
    codes = codes.reshape(*flat.shape[:-1], -1)[..., : flat.shape[-1]]
    return codes.reshape(scales.shape), largest, offset


def expand_scales(codes: jax.Array, largest: jax.Array, offset: jax.Array) -> jax.Array:
    """Return the scales that `compress_scales` stored, in float32 and shaped like the codes."""
    each = jnp.broadcast_to(largest[..., None], (*largest.shape, GROUP)).reshape(*largest.shape[:-1], -1)
    each = each[..., : codes.shape[-2] * codes.shape[-1]].reshape(codes.shape)
    return jnp.take(jnp.asarray(DYNAMIC), codes, mode="clip") * each + offset[..., None, None]
