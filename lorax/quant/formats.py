"""Quantised formats: how a matrix of weights becomes small integers and scales, and back.

Axes: `...` stacked matrices, M rows, K columns, N blocks of a row.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lorax.quant import codes as code

Children = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """How a matrix is stored: subclass it as a frozen, keyword-only dataclass to add a format.

    Settings are numbers, strings and bools, so that `dataclasses.asdict` gives JSON. Both functions are traceable and
    treat every leading index as a matrix of its own.
    """

    @property
    def unit(self) -> int:
        """The number of neighbouring columns that share a scale and cannot be kept apart."""
        return 1

    def pad(self, flat: jax.Array, count: int) -> jax.Array:
        """Return a flattened matrix with `count` more columns, which must not change how the others are stored."""
        return jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, count)])

    def encode(self, matrix: jax.Array) -> Children:
        """Return the arrays that stand for a matrix.

        Args:
          matrix: floating point, shape (..., M, K), K a multiple of `unit`.

        Returns:
          `codes` and `absmax` and, where the format has them, `absmax2` and `offset`: the children of a `Quantized`.
          `codes` and arrays of as many axes have rows and columns last.
        """
        raise NotImplementedError

    def decode(self, children: Children) -> jax.Array:
        """Return the matrix that the arrays stand for, in float32."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blockwise(Format):
    """Four bits a weight, and a scale for each block of a row.

    Attributes:
      block: weights that share a scale, an even number.
    """

    block: int = 64

    def __post_init__(self) -> None:
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 2 or self.block % 2:
            raise ValueError(f"{type(self).__name__}: block is {self.block!r}; it has to be an even number above 0")

    @property
    def unit(self) -> int:
        """The block."""
        return self.block

    def blocks(self, matrix: jax.Array) -> jax.Array:
        """Return the matrix in float32 and of shape (..., M, N, block)."""
        return matrix.reshape(*matrix.shape[:-1], -1, self.block).astype(jnp.float32)

    def packed(self, codes: jax.Array) -> jax.Array:
        """Return codes of shape (..., M, N, block) as bytes of shape (..., M, K/2)."""
        return code.pack(codes.reshape(*codes.shape[:-2], -1))

    def unpacked(self, codes: jax.Array) -> jax.Array:
        """Undo `packed`."""
        flat = code.unpack(codes)
        return flat.reshape(*flat.shape[:-1], -1, self.block)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codebook(Blockwise):
    """Sixteen values between -1 and 1 times the largest magnitude of each block.

    Attributes:
      block: weights that share a scale, an even number.
      double: whether the scales are stored in eight bits, less their mean, with a scale for 256 of them.
    """

    double: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.double, bool):
            raise ValueError(f"{type(self).__name__}: double is {self.double!r}; it has to be True or False")

    @property
    def table(self) -> tuple[float, ...]:
        """The values of the codes 0 to 15."""
        raise NotImplementedError

    def encode(self, matrix: jax.Array) -> Children:
        """Return the nearest codes, and the largest magnitude of each block."""
        blocks = self.blocks(matrix)
        absmax = jnp.max(jnp.abs(blocks), axis=-1)
        codes = self.packed(code.nearest(self.table, code.normalised(blocks, absmax[..., None])))
        if not self.double:
            return {"codes": codes, "absmax": absmax}
        absmax, absmax2, offset = code.compress_scales(absmax)
        return {"codes": codes, "absmax": absmax, "absmax2": absmax2, "offset": offset}

    def decode(self, children: Children) -> jax.Array:
        """Return the values of the codes times their block's scale."""
        absmax = children["absmax"]
        if self.double:
            absmax = code.expand_scales(absmax, children["absmax2"], children["offset"])
        blocks = code.lookup(self.table, self.unpacked(children["codes"])) * absmax[..., None]
        return blocks.reshape(*blocks.shape[:-2], -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NF4(Codebook):
    """Four-bit NormalFloat: Dettmers et al. 2023 (QLoRA, arXiv:2305.14314, section 3).

    The codes are quantiles of a normal distribution; codes, scales and values are those of bitsandbytes. With double
    quantisation it takes 4 + 8/64 + 32/(64·256) = 4.127 bits a weight, without 4.5.

    Attributes:
      block: weights that share a scale, an even number.
      double: whether the scales are stored in eight bits, less their mean, with a scale for 256 of them.

    >>> format = NF4(double=False)
    >>> children = format.encode(jnp.linspace(-2.0, 2.0, 64)[None])
    >>> children["codes"].shape, children["absmax"].tolist()
    ((1, 32), [[2.0]])
    >>> [round(x, 3) for x in format.decode(children)[0, :6].tolist()]
    [-2.0, -2.0, -2.0, -2.0, -2.0, -1.392]
    """

    double: bool = True

    @property
    def table(self) -> tuple[float, ...]:
        """The sixteen quantiles, ascending."""
        return code.NF4


@dataclasses.dataclass(frozen=True, kw_only=True)
class FP4(Codebook):
    """Four-bit floating point, with a scale for each block.

    Attributes:
      block: weights that share a scale, an even number.
      double: whether the scales are stored in eight bits, less their mean, with a scale for 256 of them.
      variant: `bnb`, bitsandbytes' own sixteen values (0, .0052, 1/6, 1/4, 1/3, 1/2, 2/3, 1 and their negatives), or
        `e2m1`, those of the OCP microscaling formats (0, .5, 1, 1.5, 2, 3, 4, 6, over 6), which are nearer to normal
        weights.
    """

    variant: Literal["bnb", "e2m1"] = "bnb"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in code.FP4:
            raise ValueError(f"FP4: variant is {self.variant!r}; known are {', '.join(code.FP4)}")

    @property
    def table(self) -> tuple[float, ...]:
        """The values by code: a sign bit and three bits of magnitude."""
        return code.FP4[self.variant]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8(Format):
    """Eight-bit integers from -127 to 127, with a scale for each output: `w ≈ code·absmax/127`.

    Of an embedding table each row has its scale. The weights of Dettmers et al. 2022 (LLM.int8(), arXiv:2208.07339,
    section 3.1), without outliers kept apart.

    >>> children = Int8().encode(jnp.array([[1.0, -0.5], [0.0, 0.0]]))
    >>> children["codes"].tolist(), children["absmax"].tolist()
    ([[127, -64], [0, 0]], [[1.0], [0.0]])
    """

    def encode(self, matrix: jax.Array) -> Children:
        """Round each row to 1/127 of its largest magnitude."""
        absmax = jnp.max(jnp.abs(matrix.astype(jnp.float32)), axis=-1, keepdims=True)
        codes = jnp.round(code.normalised(matrix, absmax) * np.float32(127)).astype(jnp.int8)
        return {"codes": codes, "absmax": absmax}

    def decode(self, children: Children) -> jax.Array:
        """Return the codes times their row's step."""
        return children["codes"].astype(jnp.float32) * (children["absmax"] / np.float32(127))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4(Blockwise):
    """Four-bit integers, with a scale for each block.

    Symmetric: `w ≈ code·absmax/7` with codes from -7 to 7, stored as `code + 8`. Affine: `w ≈ offset + code·absmax/15`
    with codes from 0 to 15, where `offset` is the least weight of the block and `absmax` its range; half a bit a weight
    more, and a smaller error than NF4's on normal weights.

    Attributes:
      block: weights that share a scale, an even number.
      symmetric: whether zero is in the middle and there is no offset.
    """

    symmetric: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"Int4: symmetric is {self.symmetric!r}; it has to be True or False")

    def pad(self, flat: jax.Array, count: int) -> jax.Array:
        """Pad with zeros, or with the last weight where a zero would widen the range."""
        if self.symmetric:
            return super().pad(flat, count)
        return jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, count)], mode="edge")

    def encode(self, matrix: jax.Array) -> Children:
        """Round each block to 1/7 of its largest magnitude, or 1/15 of its range."""
        blocks = self.blocks(matrix)
        if self.symmetric:
            absmax = jnp.max(jnp.abs(blocks), axis=-1)
            codes = jnp.round(code.normalised(blocks, absmax[..., None]) * np.float32(7)) + np.float32(8)
            return {"codes": self.packed(codes.astype(jnp.uint8)), "absmax": absmax}
        offset = jnp.min(blocks, axis=-1)
        absmax = jnp.max(blocks, axis=-1) - offset
        unit = code.normalised(blocks - offset[..., None], absmax[..., None])
        codes = jnp.round(unit * np.float32(15)).astype(jnp.uint8)
        return {"codes": self.packed(codes), "absmax": absmax, "offset": offset}

    def decode(self, children: Children) -> jax.Array:
        """Return the codes times their block's step, less or plus the offset."""
        codes, absmax = self.unpacked(children["codes"]).astype(jnp.float32), children["absmax"][..., None]
        if self.symmetric:
            blocks = (codes - np.float32(8)) * (absmax / np.float32(7))
        else:
            blocks = codes * (absmax / np.float32(15)) + children["offset"][..., None]
        return blocks.reshape(*blocks.shape[:-2], -1)
