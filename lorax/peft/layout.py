"""How a leaf and the arrays that adapt it are laid out in torch.

Axes: I fan-in, O fan-out (each flattened there), R rank, E experts that share a parameter, V rows of a table, L the
width of a row. `nn.Linear` holds O × I, and PEFT its factors as R × I and O × R, whatever the base is.

All functions take one slice along the stacked axes (a layer of a scan); the leaf's own axes are in their own order.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from lorax.sites import Site

KINDS = ("linear", "embedding", "conv", "norm", "parameter")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """One leaf.

    Attributes:
      path: the leaf's path.
      shape: its shape.
      kind: `linear`, `embedding`, `conv`, `parameter`, `vector` (biases and norms: no factors), or `unknown`: a matrix
        that no product reads, so that nothing says which side is which.
      stack: stacked axes that module names count.
      experts: the axis of experts within one parameter, or None.
      in_axes: fan-in, in the order of torch (of a convolution: channels, then space).
      out_axes: fan-out; of an embedding these two are the rows and the width.
      is_swapped: whether lorax's fan-in is PEFT's fan-out: a tied embedding, named after its product.
      transposed: whether the weight is stored there as out × in.
      tied: the module that shares the table, or None.
    """

    path: str
    shape: tuple[int, ...]
    kind: str
    stack: tuple[int, ...] = ()
    experts: int | None = None
    in_axes: tuple[int, ...] = ()
    out_axes: tuple[int, ...] = ()
    is_swapped: bool = False
    transposed: bool = True
    tied: str | None = None

    @classmethod
    def of(
        cls,
        path: str,
        shape: tuple[int, ...],
        site: Site | None,
        *,
        fields: int,
        kind: str | None,
        transposed: bool | None,
        fan_in: int | None,
        tied: str,
    ) -> Layout:
        """Return a leaf's layout: what a line of the table says, completed by the trace.

        Raises:
          ValueError: the module's fields do not fit the stacked axes.
        """
        if kind not in (None, "vector", *KINDS):
            raise ValueError(f"names[{path!r}]: kind is {kind!r}; known are {', '.join(KINDS)}")
        rows = site.axes("V") if site else ()
        if kind in ("norm", "vector"):
            return cls(path=path, shape=shape, kind="vector", stack=_leading(path, shape, fields))
        if site is None or not site.is_adaptable:
            return cls._untraced(path, shape, fields, kind, transposed, fan_in)
        if kind is None:
            kind = "embedding" if rows else "conv" if site.kind == "conv" else "linear"
        transposed = kind != "embedding" if transposed is None else transposed
        ins, outs, stack, experts = site.fan_in, site.fan_out, site.stack, None
        if kind == "embedding" and rows:
            ins, outs = rows, tuple(a for a in range(len(shape)) if a not in (*rows, *stack))
        if kind == "conv" and ins and outs and ins[0] < outs[0]:
            ins = (ins[-1], *ins[:-1])  # flax and Haiku keep the input channels last, torch and Equinox first
        if kind == "parameter" and len(stack) == fields + 1:
            stack, experts = stack[:-1], stack[-1]
        if len(stack) != fields:
            raise ValueError(
                f"names[{path!r}]: the module's path has {fields} fields in braces and the weight of shape {shape} "
                f"{len(stack)} stacked axes. Name every one, as in 'model.layers.{{layer}}.self_attn.q_proj'; experts "
                "of one parameter need lorax.peft.Module(..., kind='parameter')"
            )
        return cls(
            path=path,
            shape=shape,
            kind=kind,
            stack=stack,
            experts=experts,
            in_axes=ins,
            out_axes=outs,
            is_swapped=bool(rows) and kind == "embedding" and site.fan_in != rows,
            transposed=transposed,
            tied=tied if rows and kind == "embedding" and site.fan_in != rows else None,
        )

    @classmethod
    def _untraced(
        cls,
        path: str,
        shape: tuple[int, ...],
        fields: int,
        kind: str | None,
        transposed: bool | None,
        fan_in: int | None,
    ) -> Layout:
        """Return the layout of a leaf that no product reads, by the table alone: fan-in first, after the stack."""
        stack, rest = _leading(path, shape, fields), tuple(range(fields, len(shape)))
        if kind is None and len(rest) < 2:
            return cls(path=path, shape=shape, kind="vector", stack=stack)
        if kind not in ("linear", "embedding") or len(rest) < 2:
            return cls(path=path, shape=shape, kind="unknown", stack=stack)
        split = fan_in or 1
        return cls(
            path=path,
            shape=shape,
            kind=kind,
            stack=stack,
            in_axes=rest[:split],
            out_axes=rest[split:],
            transposed=kind == "linear" if transposed is None else transposed,
        )

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The sizes of the stacked axes."""
        return tuple(self.shape[a] for a in self.stack)

    @property
    def groups(self) -> int:
        """How many experts share the parameter."""
        return 1 if self.experts is None else self.shape[self.experts]

    @property
    def shares_experts(self) -> bool:
        """Whether experts of one parameter have a common fan-in factor here: the trace sees their axis as fan-out.

        PEFT's have one each, which is another adapter.
        """
        return self.kind == "parameter" and self.experts is None and len(self.in_axes) + len(self.out_axes) > 2

    def twin(self) -> Layout:
        """Return the layout of the output layer that shares this table."""
        assert self.tied and self.is_swapped
        sides = {"in_axes": self.out_axes, "out_axes": self.in_axes}
        return dataclasses.replace(self, kind="linear", **sides, is_swapped=False, transposed=True, tied=None)

    @property
    def in_size(self) -> int:
        """The flattened fan-in."""
        return math.prod(self.shape[a] for a in self.in_axes)

    @property
    def out_size(self) -> int:
        """The flattened fan-out."""
        return math.prod(self.shape[a] for a in self.out_axes)

    def part(self, array: Any, index: tuple[int, ...]) -> np.ndarray:
        """Return one slice of an array with all of the leaf's axes."""
        array = np.asarray(array)
        return np.moveaxis(array, self.stack, range(len(self.stack)))[index]

    def stacked(self, parts: dict[tuple[int, ...], np.ndarray]) -> np.ndarray:
        """Return the array with all of the leaf's axes whose slices these are."""
        first = next(iter(parts.values()))
        array = np.empty((*self.stack_shape, *first.shape), first.dtype)
        for index, x in parts.items():
            array[index] = x
        return np.moveaxis(array, range(len(self.stack)), self.stack)

    # Factors. lorax's A is (experts, fan-in, R) and its B (experts, R, fan-out), axes in the leaf's order.

    def factor_shapes(self, rank: int, *, is_flat: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of PEFT's A and B; AdaLoRA's (`is_flat`) are matrices of a convolution too."""
        if self.kind == "conv" and not is_flat:
            dims = tuple(self.shape[a] for a in self.in_axes)
            return (rank, *dims), (self.out_size, rank, *(1 for _ in dims[1:]))
        return (self.groups * rank, self.in_size), (self.out_size, rank * self.groups)

    def magnitude_shape(self) -> tuple[int, ...]:
        """Return the shape of PEFT's DoRA magnitude."""
        return (1, self.out_size, *(1 for _ in self.in_axes[1:])) if self.kind == "conv" else (self.out_size,)

    def to_peft(self, a: np.ndarray, b: np.ndarray, *, is_flat: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return a slice's factors as PEFT has them."""
        rank = a.shape[-1]
        if self.is_swapped:
            a, b = np.moveaxis(b, 0, -1), np.moveaxis(a, -1, 0)
        a = np.moveaxis(a, -1, 0 if self.experts is None else 1)  # (E) R fan-in
        if self.experts is None:
            order = sorted(self.in_axes)
            a = a.transpose(0, *(1 + order.index(axis) for axis in self.in_axes))
        else:
            b = np.moveaxis(b.reshape(self.groups, rank, self.out_size), 0, 1)  # R E O
        a_shape, b_shape = self.factor_shapes(rank, is_flat=is_flat)
        return a.reshape(a_shape), b.reshape(rank * self.groups, self.out_size).T.reshape(b_shape)

    def from_peft(self, a: np.ndarray, b: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Undo `to_peft`."""
        dims = lambda axes: tuple(self.shape[i] for i in axes)
        order = sorted(self.in_axes)
        group = () if self.experts is None else (self.groups,)
        a = a.reshape(*group, rank, *dims(self.in_axes))
        if self.experts is None:
            a = a.transpose(0, *(1 + self.in_axes.index(axis) for axis in order))
        a = np.moveaxis(a, len(group), -1)
        b = b.reshape(self.out_size, rank, *group)
        b = np.moveaxis(b, 0, -1)  # R (E) O
        b = (np.moveaxis(b, 1, 0) if group else b).reshape(*group, rank, *dims(self.out_axes))
        return (np.moveaxis(b, 0, -1), np.moveaxis(a, -1, 0)) if self.is_swapped else (a, b)

    # Whole parameters.

    def weight_shape(self) -> tuple[int, ...]:
        """Return the shape of the parameter there.

        Raises:
          ValueError: it cannot be told.
        """
        if self.kind == "unknown":
            raise ValueError(
                f"{self.path} {self.shape}: no product reads it, so that nothing says how torch stores it. Say so in "
                "names, with lorax.peft.Module(..., kind='linear'), 'embedding' or (as it is) 'norm'"
            )
        if self.kind == "vector":
            return tuple(n for a, n in enumerate(self.shape) if a not in self.stack)
        if self.kind == "conv":
            return (self.out_size, *(self.shape[a] for a in self.in_axes))
        sides = (self.out_size, self.in_size) if self.transposed else (self.in_size, self.out_size)
        return (*(() if self.experts is None else (self.groups,)), *sides)

    def weight_to_torch(self, part: np.ndarray, *, is_flat: bool = False) -> np.ndarray:
        """Return a slice of the leaf as the parameter there (`is_flat`: as a bias, a vector)."""
        if self.kind == "vector":
            return part.reshape(-1) if is_flat else part
        shape = self.weight_shape()
        return part.transpose(self._order()).reshape(shape)

    def weight_from_torch(self, weight: np.ndarray) -> np.ndarray:
        """Undo `weight_to_torch`."""
        rest = [a for a in range(len(self.shape)) if a not in self.stack]
        if self.kind == "vector":
            return weight.reshape([self.shape[a] for a in rest])
        order = self._order()
        return weight.reshape([self.shape[rest[i]] for i in order]).transpose(np.argsort(order))

    def _order(self) -> tuple[int, ...]:
        rest = [a for a in range(len(self.shape)) if a not in self.stack]
        sides = (self.out_axes, self.in_axes) if self.transposed else (self.in_axes, self.out_axes)
        return tuple(rest.index(a) for a in (*(() if self.experts is None else (self.experts,)), *sides[0], *sides[1]))


def _leading(path: str, shape: tuple[int, ...], fields: int) -> tuple[int, ...]:
    if fields > len(shape):
        raise ValueError(
            f"names[{path!r}]: the module's path has {fields} fields in braces and the leaf of shape {shape} only "
            f"{len(shape)} axes. Fields count stacked axes"
        )
    return tuple(range(fields))
