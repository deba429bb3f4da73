"""Safetensors files, read and written with numpy, bit for bit.

The format: eight bytes with the header's length, a JSON header of dtypes, shapes and byte ranges, and the numbers.
(`safetensors.numpy` cannot read bfloat16, and leaves the order of the bytes to its release.)
"""

from __future__ import annotations

import json
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

# In the order in which the format's own writer lays them out: widest first.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "BF16": jnp.dtype(jnp.bfloat16),
    "F16": np.dtype("f2"),
}
_METADATA = {"format": "pt"}


def encode(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Return the file that holds the tensors: the same bytes for the same tensors, in whatever order they come.

    Raises:
      ValueError: a tensor is no array of 16-, 32- or 64-bit floating point numbers.

    >>> decode(encode({"x": np.ones(2, np.float32)}), "memory")
    {'x': array([1., 1.], dtype=float32)}
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    foreign = [f"{name} ({x.dtype})" for name, x in tensors.items() if x.dtype not in codes]
    if foreign:
        raise ValueError(f"{', '.join(foreign)}: expected one of {', '.join(str(d) for d in codes)}; convert the dtype")
    order = list(codes)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": _METADATA}
    at = 0
    for name in names:
        x = tensors[name]
        header[name] = {"dtype": codes[x.dtype], "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *(_bytes(tensors[name]) for name in names)])


def decode(data: bytes, source: str) -> dict[str, np.ndarray]:
    """Return the tensors of a file, by name.

    Args:
      data: the file's bytes.
      source: what errors call it.

    Raises:
      ValueError: the file is damaged or truncated, or holds numbers that are not floating point.
    """
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        ranges = {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()}
    except (struct.error, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{source} is no safetensors file, or a damaged one: {error}. Copy it again") from error
    body, tensors, problems = memoryview(data)[8 + length :], {}, []
    for name, (code, shape, start, end) in ranges.items():
        dtype = DTYPES.get(code)
        if dtype is None:
            problems.append(f"{name} has dtype {code}, expected one of {', '.join(DTYPES)}")
        elif not 0 <= start <= end <= len(body) or end - start != dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
            problems.append(
                f"{name} {list(shape)} lies at bytes {start} to {end} of {len(body)}: the file is truncated"
            )
        else:
            tensors[name] = np.frombuffer(body[start:end], dtype).reshape(shape)
    if problems:
        raise ValueError(f"{source}: {'; '.join(problems)}")
    used = max((end for *_, end in ranges.values()), default=0)
    if used != len(body):
        raise ValueError(f"{source}: the header describes {used} bytes and {len(body)} follow it. Copy the file again")
    return tensors


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the tensors of a file on disk, by name."""
    return decode(path.read_bytes(), str(path))


def _bytes(x: np.ndarray) -> bytes:
    assert x.dtype.byteorder in "=|<", x.dtype
    return np.ascontiguousarray(x).tobytes()
