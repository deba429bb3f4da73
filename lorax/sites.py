"""Sites: how a traced function uses each of its parameters."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax import paths
from lorax.interpret.context import Context, Use
from lorax.interpret.evaluate import densify, evaluate
from lorax.interpret.stage import stage
from lorax.interpret.weight import Expression, Factor, Term, leaf_weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteUse:
    """One product (or other reading) of a parameter: the leaf's axes that it contracts, leaves free, or batches."""

    kind: str
    primitive: str
    contracted: tuple[int, ...]
    free: tuple[int, ...]
    batch: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """A parameter and how the traced function uses it.

    Attributes:
      path: the leaf's path, entries joined by `/`.
      kind: `linear`, `conv`, `embedding`, `grouped` (one weight a group of rows) or `other` (not adaptable).
      shape: the leaf's shape.
      dtype: the leaf's dtype, by name.
      fan_in: axes that the product contracts (of an embedding: the axis that is looked up).
      fan_out: axes that it leaves free.
      stack: all other axes: layers of a scan, experts. Every slice along them is a weight of its own.
      uses: every place that reads the leaf.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    fan_in: tuple[int, ...] = ()
    fan_out: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()
    uses: tuple[SiteUse, ...] = ()

    @property
    def is_adaptable(self) -> bool:
        """Whether some use contracts an axis and leaves another free."""
        return self.kind != "other"

    @property
    def is_floating(self) -> bool:
        """Whether the leaf has a gradient: no integers, booleans or PRNG keys."""
        return not self.dtype.startswith("key<") and jnp.issubdtype(jnp.dtype(self.dtype), jnp.floating)

    def axes(self, dims: str) -> tuple[Any, ...]:
        """Return the axes that an array spans: S stack, I fan-in, O fan-out, W all in order; other letters are bonds.

        V is the axis of the rows that are looked up and L those of a row, where the leaf is a table: for a tied
        embedding, whose fan-in and fan-out are those of its product.

        >>> axes = {"stack": (0,), "fan_in": (1,), "fan_out": (2,)}
        >>> stacked = Site(path="k", kind="linear", shape=(3, 8, 4), dtype="float32", **axes)
        >>> stacked.axes("SIR")
        (0, 1, 'R')
        """
        return tuple(a for letter in dims for a in self._named_axes.get(letter, (letter,)))

    @functools.cached_property
    def _named_axes(self) -> dict[str, tuple[int, ...]]:
        lookup = next((u for u in self.uses if u.kind == "embedding" and u.contracted), None)
        rows, row = (lookup.contracted, lookup.free) if lookup else ((), ())
        named = {"S": self.stack, "I": self.fan_in, "O": self.fan_out, "W": tuple(range(len(self.shape)))}
        return {**named, "V": rows, "L": row}

    def dims(self, dims: str, **bonds: int) -> tuple[int, ...]:
        """Return the shape of an array that spans `dims`, with the sizes of its bonds given by letter.

        >>> heads = Site(path="k", kind="linear", shape=(8, 2, 4), dtype="float32", fan_in=(0,), fan_out=(1, 2))
        >>> heads.dims("RO", R=16)
        (16, 2, 4)
        """
        return tuple(bonds[a] if isinstance(a, str) else self.shape[a] for a in self.axes(dims))

    def without_leading(self, count: int) -> Site:
        """Return the site of what is left when its first stacked axes are indexed away: of one layer."""
        if not count:
            return self
        lower = lambda axes: tuple(a - count for a in axes if a >= count)
        uses = tuple(
            dataclasses.replace(u, contracted=lower(u.contracted), free=lower(u.free), batch=lower(u.batch))
            for u in self.uses
        )
        sides = {"fan_in": lower(self.fan_in), "fan_out": lower(self.fan_out), "stack": lower(self.stack)}
        return dataclasses.replace(self, shape=self.shape[count:], uses=uses, **sides)

    def size(self, dims: str) -> int:
        """Return the number of elements along `dims`, such as `site.size("I")` for the fan-in."""
        return math.prod(self.dims(dims))


class Sites(Sequence[Site]):
    """The sites of a function, in the order of its parameters; `print` shows a table, `sites[path]` finds one."""

    def __init__(self, sites: Iterable[Site]) -> None:
        sites = list(sites)
        for s in sites:
            if not isinstance(s, Site):
                raise TypeError(f"expected sites, as lorax.trace returns them, and got a {type(s).__name__}")
        self._sites = {s.path: s for s in sites}

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites.values())

    def __len__(self) -> int:
        return len(self._sites)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            if key not in self._sites:
                raise KeyError(f"no parameter has the path {key!r}; nearest: {paths.nearest(key, self._sites)}")
            return self._sites[key]
        return list(self._sites.values())[key]

    def __contains__(self, key: object) -> bool:
        return key in self._sites if isinstance(key, str) else key in self._sites.values()

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all parameters."""
        return tuple(self._sites)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("path", "kind", "shape", "dtype", "fan-in", "fan-out", "stack", "uses")]
        for s in self:
            axes = [str(list(a)) if s.is_adaptable else "" for a in (s.fan_in, s.fan_out, s.stack)]
            shape = "×".join(map(str, s.shape)) or "scalar"
            rows.append((s.path, s.kind, shape, s.dtype, *axes, str(len(s.uses))))
        widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows)

    __repr__ = __str__


def trace(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Sites:
    """Find how `fn(params, *args, **kwargs)` uses each of its parameters, without running it.

    Args:
      fn: any JAX function of a parameter pytree: `lambda p, x: model.apply({"params": p}, x)` for linen, a function of
        the `nnx.State` for nnx, plain JAX, Haiku's `apply`, Equinox with `eqx.combine`.
      params: the pytree, of arrays or `jax.ShapeDtypeStruct`s.
      *args: further arguments, likewise; Python values are held fixed.
      **kwargs: likewise.

    Returns:
      A sequence of `Site`s, one a parameter.

    >>> def fn(params, x):
    ...     return jax.nn.relu(x @ params["up"]) @ params["down"] + params["bias"]
    >>> shape = lambda *s: jax.ShapeDtypeStruct(s, "float32")
    >>> print(trace(fn, {"up": shape(4, 16), "down": shape(16, 4), "bias": shape(4)}, shape(2, 4)))
    path  kind    shape  dtype    fan-in  fan-out  stack  uses
    bias  other   4      float32                          1
    down  linear  16×4   float32  [0]     [1]      []     1
    up    linear  4×16   float32  [0]     [1]      []     1
    """
    staged = stage(fn, paths.flatten(params), args, kwargs)
    leaves = [staged.aval(path) for path in staged.params]
    seen: dict[Use, None] = {}

    def run(leaves: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        ctx = Context(lambda use: seen.setdefault(use), tracing=True)
        values = [
            leaf_weight(path, x, Expression((Term((Factor(x, tuple(range(jnp.ndim(x)))),)),)))
            if jnp.issubdtype(x.dtype, jnp.floating)
            else x
            for path, x in zip(staged.params, leaves, strict=True)
        ]
        return [densify(ctx, x, "the function's output") for x in evaluate(staged.jaxpr, [*values, *args], ctx)]

    jax.eval_shape(run, leaves, list(staged.args))
    by_path: dict[str, list[Use]] = {path: [] for path in staged.params}
    for use in seen:
        for path in use.paths:
            by_path[path].append(use)
    return Sites([_site(path, x, by_path[path]) for path, x in staged.params.items()])


def _site(path: str, leaf: Any, uses: Sequence[Use]) -> Site:
    mine = lambda axes: tuple(sorted(entry[1] for entry in axes if entry[0] == path))
    listed = tuple(
        SiteUse(
            kind="other" if u.kind == "embedding" and not mine(u.contracted) else u.kind,
            primitive=u.primitive,
            contracted=mine(u.contracted),
            free=mine(u.free),
            batch=mine(u.batch),
        )
        for u in uses
    )
    shape, dtype = tuple(leaf.shape), str(leaf.dtype)
    # An axis along which some product has a weight for each batch entry (experts) is one of weights side by side.
    batch = {a for u in listed if u.contracted and u.free for a in u.batch}
    # A lookup is not a contraction: a tied embedding is named after its product.
    for use in sorted(listed, key=lambda u: u.kind == "embedding"):
        # An axis that was split, one part contracted and one left free, belongs to one side.
        contracted = tuple(a for a in use.contracted if a not in batch) or use.contracted
        fan_in = tuple(a for a in contracted if a not in use.free) or contracted
        fan_out = tuple(a for a in use.free if a not in (*fan_in, *batch)) or tuple(
            a for a in use.free if a not in fan_in
        )
        if use.kind != "other" and fan_in and fan_out:
            stack = tuple(a for a in range(len(shape)) if a not in (*fan_in, *fan_out))
            return Site(
                path=path,
                kind=use.kind,
                shape=shape,
                dtype=dtype,
                fan_in=fan_in,
                fan_out=fan_out,
                stack=stack,
                uses=listed,
            )
    return Site(path=path, kind="other", shape=shape, dtype=dtype, uses=listed)
