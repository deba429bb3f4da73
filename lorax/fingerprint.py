"""Fingerprints of arrays: a digest that any sharding and any backend agree on, computed where the array lives.

Every element's bits are mixed with its position and the results are added modulo 2³²; addition commutes, so each shard
sums its own elements and only the sums travel. Two such sums with different seeds make 64 bits. Every byte is read
once, at memory speed, and nothing is gathered: of a 70B model over 16 chips that is 9 GB a chip.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax import paths

_SEEDS = (0x9E3779B9, 0x85EBCA6B)


def digests(tree: Any) -> dict[str, dict[str, Any]]:
    """Return shape, dtype and digest of every array leaf, by path; of a quantised leaf those of its arrays.

    >>> digests({"kernel": jnp.zeros((2, 3))})["kernel"]["shape"]
    [2, 3]
    """
    leaves = {}
    for path, x in paths.flatten(tree)[0].items():
        if paths.is_quantized(x):
            leaves.update((f"{path}/{name}", child) for name, child in paths.flatten(x.children)[0].items())
        elif paths.is_array(x):
            leaves[path] = x
    groups: dict[Any, list[str]] = {}  # arrays that live on different devices do not meet in one program
    for path, x in leaves.items():
        groups.setdefault(frozenset(x.sharding.device_set) if isinstance(x, jax.Array) else None, []).append(path)
    sums = {}
    for group in groups.values():
        sums.update(zip(group, _sums([leaves[path] for path in group]), strict=True))
    sums = jax.device_get(sums)
    return {
        path: {
            "shape": list(x.shape),
            "dtype": str(x.dtype),
            "digest": f"{int(sums[path][0]):08x}{int(sums[path][1]):08x}",
        }
        for path, x in leaves.items()
    }


@jax.jit
def _sums(arrays: list[Any]) -> list[Any]:
    return [_sum(jax.device_put(x, jax.memory.Space.Device)) for x in arrays]  # optimiser state may be on the host


def _sum(x: Any) -> jax.Array:
    words = _words(x)
    position = functools.reduce(
        lambda index, axis: (
            index * np.uint32(words.shape[axis] % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        ),
        range(words.ndim),
        jnp.zeros(words.shape, jnp.uint32),
    )
    return jnp.stack(
        [jnp.sum(_mixed(words, position * np.uint32(seed) + np.uint32(seed)), dtype=jnp.uint32) for seed in _SEEDS]
    )


def _words(x: Any) -> jax.Array:
    """View an array as 32-bit words, narrower elements one a word, wider ones along a new last axis."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], -1)
    bits = jnp.finfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).bits
    if bits < 8:
        return x.astype(jnp.int8).view(jnp.uint8).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(x, f"uint{min(bits, 32)}").astype(jnp.uint32)


def _mixed(words: jax.Array, salt: jax.Array) -> jax.Array:
    """Mix each word with its salt: the finaliser of MurmurHash3 (Appleby, public domain)."""
    h = words ^ salt
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * np.uint32(factor)
    return h ^ (h >> 16)
