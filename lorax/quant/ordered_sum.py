"""A float32 mean whose additions have a fixed order, that of torch on a CPU.

The order of a sum decides its last bits, and under double quantisation they decide the code of a scale that lies on
the bound of two codes: with torch's order the codes are bitsandbytes' own.

Axes: T numbers to sum, the first axis; `...` all others.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

_LANES = 8  # of a vector register
_VECTORS = 4  # summed side by side
_CHUNK = 16  # additions in a row before the sum is handed to the next level
_LEVELS = 4


def ordered_mean(x: jax.Array) -> jax.Array:
    """Return the mean along the first axis, of shape (...), for float32 of shape (T, ...).

    >>> ordered_mean(jnp.arange(1000.0)).item()
    499.5
    """
    total = _ordered_sum(x)
    # XLA multiplies by the reciprocal of a divisor that it knows, which rounds otherwise.
    count = jnp.where(jnp.isnan(total), total, np.float32(x.shape[0]))
    return total / count


def _ordered_sum(x: jax.Array) -> jax.Array:
    rest = x.shape[1:]
    count = x.shape[0] // _LANES
    vectors = x[: count * _LANES].reshape(count, _LANES, *rest)
    rows = count // _VECTORS
    sums = _in_levels(vectors[: rows * _VECTORS].reshape(rows, _VECTORS, _LANES, *rest))
    lanes = _in_order(vectors[rows * _VECTORS :], start=sums[0])
    lanes = _in_order(sums[1:], start=lanes)
    return _in_order(lanes, start=_in_order(x[count * _LANES :]))


def _in_levels(rows: jax.Array) -> jax.Array:
    """Sum along the first axis: chunks one after another, then chunks of their sums, and so on."""
    left_over = []
    for _ in range(_LEVELS - 1):
        chunks = rows.shape[0] // _CHUNK
        left_over.append(_in_order(rows[chunks * _CHUNK :]))
        whole = rows[: chunks * _CHUNK].reshape(chunks, _CHUNK, *rows.shape[1:])
        rows = _in_order(jnp.moveaxis(whole, 1, 0))
    return _in_order(jnp.stack([*left_over, _in_order(rows)]))


def _in_order(x: jax.Array, start: jax.Array | None = None) -> jax.Array:
    """Sum along the first axis, one after another."""
    total = jnp.zeros(x.shape[1:], x.dtype) if start is None else start
    for k in range(x.shape[0]):
        total = total + x[k]
    return total
