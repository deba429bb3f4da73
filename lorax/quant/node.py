"""A quantised weight: a pytree node that stands where a leaf of the parameters was.

Axes: S stacked (layers, experts), and of one slice M rows and K columns of its matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.experimental.layout
import numpy as np
from jax.sharding import NamedSharding

from lorax import compat
from lorax.quant.formats import Children, Format


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Quantized:
    """A weight in a quantised format, with the shape and dtype of the leaf that it stands for.

    The leading axes are stacked; one slice of the others is the matrix of torch's layout, outputs by inputs (of an
    embedding table rows by width), and blocks run along its rows, or along all of it where a row is no whole number of
    blocks. The children keep the stacked axes in front, so that a node is indexed, scanned over and mapped over like
    the array: `jax.tree.map(lambda x: x[0], node)` is the node of the first slice.

    Attributes:
      codes: uint8 of shape (*S, M, K/2), two codes a byte, the first in the high half; or int8 of shape (*S, M, K).
      absmax: the blocks' scales, float32 of shape (*S, M, K/block), or uint8 under double quantisation.
      absmax2: the scales of 256 such scales, float32 of shape (*S, groups), or None.
      offset: the mean of the scales, float32 of shape S, or the least weight of each block, or None.
      slice_shape: the shape of one slice of the leaf.
      rows: the axes of a slice that make up the matrix's rows, in order.
      columns: likewise its columns.
      dtype: of the weight that the node stands for.
      format: how the codes are read, such as `NF4()`.
    """

    codes: Any
    absmax: Any
    absmax2: Any = None
    offset: Any = None
    slice_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    rows: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    columns: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    format: Format = dataclasses.field(metadata={"static": True})

    is_parameter_leaf: ClassVar[bool] = True  # a path ends here, not at the children

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the stacked axes."""
        return tuple(self.codes.shape[:-2])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, stacked axes included."""
        return (*self.stack, *self.slice_shape)

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of all children."""
        return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """The bits of all children, a weight."""
        return 8 * self.nbytes / self.size

    @property
    def children(self) -> Children:
        """The arrays by name."""
        named = {name: getattr(self, name) for name in ("codes", "absmax", "absmax2", "offset")}
        return {name: x for name, x in named.items() if x is not None}

    def __repr__(self) -> str:
        return f"Quantized(shape={self.shape}, dtype={self.dtype}, format={self.format})"

    def dequantize(self) -> jax.Array:
        """Return the weight, of `shape` and `dtype`, computed in float32."""
        return _dequantize(self)

    def with_values(self, array: Any) -> Quantized:
        """Quantise another array of the same shape into this node's format, layout and dtype.

        Raises:
          ValueError: the shape differs.
        """
        if tuple(array.shape) != self.shape:
            raise ValueError(f"got values of shape {tuple(array.shape)} for a quantised weight of shape {self.shape}")
        made = encode(array, self.format, len(self.stack), self.rows, self.columns)
        return dataclasses.replace(made, dtype=self.dtype)

    @property
    def is_flat(self) -> bool:
        """Whether the matrix is stored as one row, because its rows are no whole number of blocks."""
        return _is_flat(self.format, self.slice_shape, self.columns)

    @property
    def sharding(self) -> NamedSharding | None:
        """The weight's sharding as far as that of the codes tells, or None if they are on no mesh."""
        return weight_sharding(self, self.ndim)

    def partition_specs(self, spec: jax.P | NamedSharding, mesh: Any = None) -> Quantized:
        """Derive how the children are split over a mesh from how the weight would be.

        Codes and scales follow the stacked axes, and the first axis of the rows and of the columns, where every
        device gets whole blocks; along the others, and the scales of scales along all but the stacked axes, each
        device holds everything.

        Args:
          spec: of the weight, or a sharding, which brings its mesh.
          mesh: tells the sizes of the mesh's axes. Without one, columns are split for the codes alone, which has to
            come out even.

        Returns:
          A node with a `jax.P` in place of each child.

        >>> from lorax.quant import NF4, quantize_leaf
        >>> node = quantize_leaf(np.ones((2, 256, 8), np.float32), NF4(), fan_in=(1,), fan_out=(2,), stack=1)
        >>> mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
        >>> specs = node.partition_specs(jax.P(None, "data", "model"), mesh)
        >>> tuple(specs.codes), tuple(specs.absmax), tuple(specs.absmax2)
        ((None, 'model', 'data'), (None, 'model', 'data'), (None, None))
        """
        if isinstance(spec, NamedSharding):
            spec, mesh = spec.spec, spec.mesh
        count = len(self.stack)
        entries = [*spec, *[None] * (self.ndim - len(spec))]
        stacked = entries[:count]
        row, column = (
            None if self.is_flat else entries[count + self._first(axes)] for axes in (self.rows, self.columns)
        )
        units = math.prod(self.slice_shape[a] for a in self.columns) // self.format.unit
        coarse = column  # of the scales, one a unit
        if mesh is None:
            coarse = None
        elif units % _ways(mesh, column):
            column = coarse = None

        def place(x: Any, is_codes: bool) -> jax.P:
            rest = x.ndim - count
            if rest < 2:
                return jax.P(*stacked, *[None] * rest)
            last = column if is_codes else coarse
            return jax.P(*stacked, row, last if x.shape[-1] > 1 else None)

        placed = {name: place(x, name == "codes") for name, x in self.children.items()}
        return dataclasses.replace(self, **placed)

    def _first(self, axes: tuple[int, ...]) -> int:
        """The axis whose parts are neighbours once the axes are flattened."""
        return next((a for a in axes if self.slice_shape[a] > 1), axes[0])


@functools.partial(jax.jit, inline=True)
def _dequantize(node: Quantized) -> jax.Array:
    mesh = compat.explicit_mesh(node.codes)
    if mesh is None:
        return _decode(node)
    to = NamedSharding(mesh, _weight_spec(node, jax.typeof(node.codes).sharding, len(node.stack)))
    return jax.sharding.auto_axes(_decode, out_sharding=to)(node)  # pyright: ignore[reportReturnType]


def _decode(node: Quantized) -> jax.Array:
    # As they lie in memory: a TPU's compiler prefers another layout to unpack from, and for a stack that a loop goes
    # through it would make a second copy of all of it in front of the loop.
    rows = jax.experimental.layout.Layout(tuple(range(node.codes.ndim)))
    codes = jax.experimental.layout.with_layout_constraint(node.codes, rows)
    values = node.format.decode({**node.children, "codes": codes}).astype(node.dtype)
    stack, order = node.stack, (*node.rows, *node.columns)
    if node.is_flat:
        values = values.reshape(*stack, -1)[..., : math.prod(node.slice_shape)]
    values = values.reshape(*stack, *(node.slice_shape[a] for a in order))
    return values.transpose(*range(len(stack)), *(len(stack) + order.index(a) for a in range(len(order))))


@functools.partial(jax.jit, static_argnames=("format", "stack", "rows", "columns"), inline=True)
def encode(array: jax.Array, format: Format, stack: int, rows: tuple[int, ...], columns: tuple[int, ...]) -> Quantized:
    """Quantise an array: see `lorax.quant.quantize_leaf`.

    Args:
      array: the weight, floating point.
      format: the format.
      stack: the number of leading axes that are stacked.
      rows: the axes of a slice that make up the rows of its matrix, in order.
      columns: likewise the columns.
    """
    run = functools.partial(_encode, format=format, stack=stack, rows=rows, columns=columns)
    mesh = compat.explicit_mesh(array)
    if mesh is None:
        return run(array)
    specs = jax.eval_shape(run, jax.ShapeDtypeStruct(array.shape, array.dtype)).partition_specs(
        jax.typeof(array).sharding
    )
    to = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.sharding.auto_axes(run, out_sharding=to)(array)  # pyright: ignore[reportReturnType]


def _encode(array: jax.Array, format: Format, stack: int, rows: tuple[int, ...], columns: tuple[int, ...]) -> Quantized:
    slice_shape = tuple(array.shape[stack:])
    order = (*range(stack), *(stack + a for a in (*rows, *columns)))
    width = math.prod(slice_shape[a] for a in columns)
    matrix = array.transpose(order).reshape(*array.shape[:stack], -1, width)
    if _is_flat(format, slice_shape, columns):
        flat = matrix.reshape(*array.shape[:stack], 1, -1)
        matrix = format.pad(flat, -flat.shape[-1] % format.unit)
    return Quantized(
        **format.encode(matrix),
        slice_shape=slice_shape,
        rows=rows,
        columns=columns,
        dtype=np.dtype(array.dtype),
        format=format,
    )


def _is_flat(format: Format, slice_shape: tuple[int, ...], columns: tuple[int, ...]) -> bool:
    return math.prod(slice_shape[a] for a in columns) % format.unit != 0


def weight_sharding(node: Quantized, ndim: int) -> NamedSharding | None:
    """Return the sharding of a node's weight, as far as that of its codes tells, or None if they are on no mesh.

    Args:
      node: its children are arrays, abstract arrays, or shardings in place of them.
      ndim: the number of the weight's axes, which shardings do not tell.
    """
    held = node.codes if isinstance(node.codes, NamedSharding) else getattr(node.codes, "sharding", None)
    if not isinstance(held, NamedSharding):
        return None
    return NamedSharding(held.mesh, _weight_spec(node, held, ndim - len(node.slice_shape)))


def _weight_spec(node: Quantized, held: Any, count: int) -> jax.P:
    """The weight's spec from that of its codes, which have `count` stacked axes."""
    entries = [*held.spec, *[None] * (count + 2 - len(held.spec))]
    spec: list[Any] = [*entries[:count], *[None] * len(node.slice_shape)]
    for axes, entry in ((node.rows, entries[count]), (node.columns, entries[count + 1])):
        first = node._first(axes)
        if not node.is_flat and node.slice_shape[first] % _ways(held.mesh, entry) == 0:
            spec[count + first] = entry
    return jax.P(*spec)


def _ways(mesh: Any, entry: Any) -> int:
    """In how many parts an entry of a spec splits an axis."""
    names = (entry,) if isinstance(entry, str) else tuple(entry or ())
    return math.prod(mesh.shape[name] for name in names)
