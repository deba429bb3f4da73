"""Digests of the base: the same wherever an array lives, and another one for any other contents."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax.fingerprint import digests

DTYPES = [
    "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "int16", "int32", "uint8", "uint16",
    "uint32", "int4", "uint4", "bool", "complex64",
]  # fmt: skip


def digest(x: Any) -> str:
    return digests({"x": x})["x"]["digest"]


def array(dtype: str, seed: int = 0, shape: tuple[int, ...] = (5, 7)) -> jax.Array:
    """Random bits; of narrow types every pattern occurs."""
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return jnp.asarray(rng.integers(0, 2, shape), bool)
    if dtype == "complex64":
        return jnp.asarray(rng.normal(size=shape) + 1j * rng.normal(size=shape), dtype)
    if dtype in ("int4", "uint4"):
        return jnp.asarray(rng.integers(-8 if dtype == "int4" else 0, 8, shape), dtype)
    if "int" in dtype:
        limits = np.iinfo(dtype)
        return jnp.asarray(rng.integers(limits.min, limits.max, shape, endpoint=True), dtype)
    return jnp.asarray(rng.normal(size=shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_has_a_digest_that_its_contents_decide(dtype: str) -> None:
    x = array(dtype)
    found = digests({"a": {"b": x}})["a/b"]
    assert found["shape"] == [5, 7]
    assert found["dtype"] == dtype
    assert len(found["digest"]) == 16
    assert found == digests({"a": {"b": jnp.array(np.asarray(x))}})["a/b"]
    rows = np.array(np.asarray(x))
    first = tuple(np.argwhere(rows != rows[0, 0])[0])
    rows[0, 0], rows[first] = rows[first], rows[0, 0]
    assert digest(jnp.asarray(rows)) != found["digest"], "two elements were swapped"
    rows[0, 0], rows[first] = rows[first], rows[0, 0]
    assert digest(jnp.asarray(rows)) == found["digest"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8"])
def test_each_bit_of_each_element_counts(dtype: str) -> None:
    x = np.asarray(array(dtype, shape=(2, 2)))
    bits = np.dtype(f"uint{8 * x.dtype.itemsize}")
    seen = {digest(jnp.asarray(x))}
    flipped = []
    for at in range(x.size):
        for bit in range(8 * x.dtype.itemsize):
            y = x.copy().reshape(-1).view(bits)
            y[at] ^= bits.type(1 << bit)
            flipped.append(jnp.asarray(y.view(x.dtype).reshape(x.shape)))
    found = [d["digest"] for d in digests({str(i): y for i, y in enumerate(flipped)}).values()]
    assert not seen & set(found)
    assert len(set(found)) == len(flipped)


def test_signs_of_zero_and_kinds_of_nan_are_told_apart() -> None:
    patterns = [0x00000000, 0x80000000, 0x7FC00000, 0x7FC00001, 0xFFC00000, 0x7F800000, 0x00000001, 0x80000001]
    floats = [jnp.asarray(np.array([p], np.uint32).view(np.float32)) for p in patterns]
    assert len({digest(x) for x in floats}) == len(patterns)


def test_shape_and_dtype_are_recorded_beside_the_digest() -> None:
    x = array("float32", shape=(4, 6))
    assert digests({"x": x})["x"] != digests({"x": x.reshape(6, 4)})["x"]
    assert digests({"x": x})["x"] != digests({"x": x.astype(jnp.bfloat16)})["x"]
    assert digest(jnp.zeros((2, 3))) != digest(jnp.zeros((3, 3)))


def test_transposed_and_reversed_contents_differ() -> None:
    x = array("float32", shape=(6, 6))
    views = [x, x.T, x[::-1], x[:, ::-1], jnp.roll(x, 1, 0), jnp.roll(x, 1, 1), x.at[2].set(x[3]).at[3].set(x[2])]
    assert len({digest(v) for v in views}) == len(views)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data())
def test_permutations_and_changes_in_pairs_differ(data: Any) -> None:
    """What a plain sum of elements would not see: `x + d` here and `x - d` there, and any other order."""
    x = np.arange(24, dtype=np.int32)
    at = data.draw(st.lists(st.integers(0, 23), min_size=2, max_size=2, unique=True))
    change = data.draw(st.integers(1, 2**31 - 100))
    y = x.copy()
    y[at[0]] += change
    y[at[1]] -= change
    order = np.array(data.draw(st.permutations(range(24))))
    found = digests({"x": jnp.asarray(x), "y": jnp.asarray(y), "z": jnp.asarray(x[order])})
    assert found["x"]["digest"] != found["y"]["digest"]
    assert (found["x"]["digest"] == found["z"]["digest"]) == bool((order == np.arange(24)).all())


def test_keys_scalars_and_empty_arrays() -> None:
    keys = [jax.random.key(0), jax.random.key(1), jax.random.key(0, impl="rbg"), jax.random.split(jax.random.key(0))]
    found = [digests({"k": k})["k"] for k in keys]
    assert len({str(d) for d in found}) == len(keys)
    assert found[0]["dtype"] == "key<fry>"
    assert digest(jax.random.key(0)) == digest(jax.random.key(0))
    assert digest(jnp.float32(1.5)) != digest(jnp.float32(-1.5))
    assert digests({"e": jnp.zeros((0, 3))})["e"]["shape"] == [0, 3]
    assert digest(jnp.zeros((0, 3))) == digest(jnp.ones((0, 3)))


def test_numpy_and_jax_agree_and_other_leaves_are_left_out() -> None:
    x = array("bfloat16")
    assert digest(np.asarray(x)) == digest(x)
    assert np.asarray(x).dtype == ml_dtypes.bfloat16
    assert list(digests({"x": x, "none": None, "name": "text", "number": 3})) == ["x"]
    assert digests({}) == {}


def test_64_bit_numbers_in_a_process_of_their_own() -> None:
    check = """
import jax, numpy as np
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
from lorax.fingerprint import digests
for dtype in ("float64", "int64", "uint64", "complex128"):
    x = jnp.asarray(np.arange(1, 7).reshape(2, 3), dtype) / (1 if "int" in dtype else 3)
    bits = np.asarray(x).copy().view(np.uint64).reshape(-1)
    d = lambda y: digests({"x": jnp.asarray(y.view(x.dtype).reshape(x.shape))})["x"]["digest"]
    seen = {d(bits)}
    for bit in (0, 1, 31, 32, 33, 62):
        flipped = bits.copy()
        flipped[-1] ^= np.uint64(1 << bit)
        seen.add(d(flipped))
    assert len(seen) == 7, dtype
    print("ok", dtype)
"""
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.count("ok ") == 4, done.stdout + done.stderr


ROOT = Path(__file__).parents[1]
