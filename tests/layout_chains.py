"""Random chains of layout operations on a weight in front of a product, for hypothesis.

Every axis of the leaf is on one side: `I` contracted by the product, `O` left free, `S` side by side (a batch axis);
`N` is a free axis that a stack made. A chain keeps track of the shape and of each present axis's side.
"""

import dataclasses
import math
import string
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax


@dataclasses.dataclass
class Chain:
    """A leaf's shape and a list of operations on it.

    Attributes:
      leaf, leaf_sides: the leaf's shape and each axis's side.
      shape, sides: the present shape and each axis's side.
      ops: what was done, with its name.
      restricts: whether every operation acts on each of the weight's arrays by itself.
    """

    leaf: tuple[int, ...]
    leaf_sides: tuple[str, ...]
    shape: tuple[int, ...]
    sides: tuple[str, ...]
    ops: list[tuple[str, Callable[[Any], Any]]] = dataclasses.field(default_factory=list)
    restricts: bool = True
    is_rounded: bool = False

    def add(self, name: str, op: Callable[[Any], Any], sides: tuple[str, ...]) -> None:
        """Append an operation."""
        self.ops.append((name, op))
        self.shape = tuple(jax.eval_shape(op, jax.ShapeDtypeStruct(self.shape, jnp.float32)).shape)
        self.sides = sides
        assert len(self.shape) == len(self.sides), name

    def __call__(self, w: Any) -> Any:
        for _, op in self.ops:
            w = op(w)
        return w

    def einsum(self, weight_first: bool) -> tuple[str, tuple[int, ...]]:
        """The product's einsum and the activation's shape: a token axis, then the weight's I and S axes."""
        w = string.ascii_lowercase[: len(self.shape)]
        mine = [i for i, side in enumerate(self.sides) if side in "IS"]
        x = "z" + "".join(w[i] for i in mine)
        out = "".join(w[i] for i, s in enumerate(self.sides) if s == "S") + "z"
        out += "".join(w[i] for i, s in enumerate(self.sides) if s in "ON")
        return f"{w},{x}->{out}" if weight_first else f"{x},{w}->{out}", (3, *(self.shape[i] for i in mine))

    def __repr__(self) -> str:
        return f"Chain({self.leaf}, {[name for name, _ in self.ops]} -> {self.shape} {''.join(self.sides)})"


def _transpose(draw: Any, c: Chain) -> None:
    perm = draw(st.permutations(range(len(c.shape))))
    c.add(f"transpose{tuple(perm)}", lambda w: jnp.transpose(w, perm), tuple(c.sides[i] for i in perm))


def _split_axis(draw: Any, c: Chain) -> None:
    composite = [i for i, n in enumerate(c.shape) if any(n % k == 0 for k in range(2, n))]
    if composite and len(c.shape) < 6:
        i = draw(st.sampled_from(composite))
        k = draw(st.sampled_from([k for k in range(2, c.shape[i]) if c.shape[i] % k == 0]))
        new = (*c.shape[:i], k, c.shape[i] // k, *c.shape[i + 1 :])
        c.add(f"reshape{new}", lambda w: w.reshape(new), (*c.sides[: i + 1], *c.sides[i:]))


def _join_axes(draw: Any, c: Chain) -> None:
    pairs = [i for i in range(len(c.shape) - 1) if c.sides[i] == c.sides[i + 1]]
    if pairs:
        i = draw(st.sampled_from(pairs))
        new = (*c.shape[:i], c.shape[i] * c.shape[i + 1], *c.shape[i + 2 :])
        c.restricts &= c.sides[i] != "N"  # two stacks may sit on different arrays
        c.add(f"reshape{new}", lambda w: w.reshape(new), (*c.sides[:i], *c.sides[i + 1 :]))


def _join_sides(draw: Any, c: Chain) -> None:
    """Flatten all axes, scale, and restore them: fan-in and fan-out are one axis for a while."""
    old = c.shape
    c.add(f"flat{old}", lambda w: (w.reshape(-1) * 2.0).reshape(old), c.sides)
    c.restricts &= len({s for s, n in zip(c.sides, old, strict=True) if n > 1}) < 2


def _slice(draw: Any, c: Chain) -> None:
    i = draw(st.integers(0, len(c.shape) - 1))
    start = draw(st.integers(0, c.shape[i] - 1))
    stop = draw(st.integers(start + 1, c.shape[i]))
    stride = draw(st.integers(1, 2))
    c.add(f"slice{i, start, stop, stride}", lambda w: lax.slice_in_dim(w, start, stop, stride, i), c.sides)


def _split(draw: Any, c: Chain) -> None:
    """Keep one piece of a split, or all pieces in another order."""
    i = draw(st.integers(0, len(c.shape) - 1))
    if c.shape[i] > 1:
        at = draw(st.integers(1, c.shape[i] - 1))
        which = draw(st.sampled_from(["first", "last", "swapped"]))

        def op(w: Any) -> Any:
            first, last = jnp.split(w, [at], axis=i)
            return {"first": first, "last": last}.get(which, jnp.concatenate([last, first], axis=i))

        c.add(f"split{i, at, which}", op, c.sides)


def _pad(draw: Any, c: Chain) -> None:
    """Join a constant to the weight along an axis."""
    i, n = draw(st.integers(0, len(c.shape) - 1)), draw(st.integers(1, 2))
    if math.prod(c.shape) < 400:

        def op(w: Any) -> Any:
            more = jnp.full((*w.shape[:i], n, *w.shape[i + 1 :]), 0.5, w.dtype)
            return jnp.concatenate([more, w], axis=i)

        c.add(f"concatenate{i, n}", op, c.sides)


def _stack(draw: Any, c: Chain) -> None:
    """Stack the weight and its reverse along a new free axis."""
    if len(c.shape) < 6 and math.prod(c.shape) < 400:
        at, i = draw(st.integers(0, len(c.shape))), draw(st.integers(0, len(c.shape) - 1))
        c.add(
            f"stack{at, i}",
            lambda w: jnp.stack([w, lax.rev(w, (i,))], axis=at),
            (*c.sides[:at], "N", *c.sides[at:]),
        )


def _expand(draw: Any, c: Chain) -> None:
    if len(c.shape) < 6:
        at, side = draw(st.integers(0, len(c.shape))), draw(st.sampled_from("IO"))
        c.add(f"expand_dims{at}", lambda w: jnp.expand_dims(w, at), (*c.sides[:at], side, *c.sides[at:]))


def _squeeze(draw: Any, c: Chain) -> None:
    ones = [i for i, n in enumerate(c.shape) if n == 1]
    if ones:
        i = draw(st.sampled_from(ones))
        c.add(f"squeeze{i}", lambda w: jnp.squeeze(w, i), (*c.sides[:i], *c.sides[i + 1 :]))


def _rev(draw: Any, c: Chain) -> None:
    axes = tuple(draw(st.sets(st.integers(0, len(c.shape) - 1), min_size=1)))
    c.add(f"rev{axes}", lambda w: lax.rev(w, axes), c.sides)


def _convert(draw: Any, c: Chain) -> None:
    c.add("convert", lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), c.sides)
    c.is_rounded = True


def _scale(draw: Any, c: Chain) -> None:
    how = draw(st.sampled_from(["number", "array", "divided", "negated", "vector", "vector divides"]))
    i = draw(st.integers(0, len(c.shape) - 1))
    vector = np.linspace(0.5, 1.5, c.shape[i], dtype=np.float32).reshape(
        [-1 if j == i else 1 for j in range(len(c.shape))]
    )
    op = {
        "number": lambda w: w * 0.5,
        "array": lambda w: jnp.float32(1.5) * w,
        "divided": lambda w: w / 2,
        "negated": lambda w: -w,
        "vector": lambda w: vector * w,
        "vector divides": lambda w: w / vector,
    }[how]
    c.add(f"{how}{i}", op, c.sides)


def _gather(draw: Any, c: Chain) -> None:
    """Pick rows by an array of numbers: right, however it is done."""
    i = draw(st.integers(0, len(c.shape) - 1))
    rows = draw(st.lists(st.integers(0, c.shape[i] - 1), min_size=1, max_size=4))
    c.add(f"take{i, rows}", lambda w: jnp.take(w, jnp.asarray(rows), axis=i), c.sides)
    c.restricts = False


def _barrier(draw: Any, c: Chain) -> None:
    c.add("optimization_barrier", lax.optimization_barrier, c.sides)


STEPS = [
    _transpose, _split_axis, _join_axes, _join_sides, _slice, _split, _pad, _stack, _expand, _squeeze, _rev, _convert,
    _scale, _gather, _barrier,
]  # fmt: skip


@st.composite
def chains(draw: Any, steps: list[Any] | None = None, most: int = 6) -> Chain:
    """A leaf with an axis on either side, and up to `most` operations on it."""
    sides = tuple(draw(st.permutations(["I", "O", *draw(st.lists(st.sampled_from("IOS"), max_size=2))])))
    leaf = tuple(draw(st.integers(2, 6)) for _ in sides)
    c = Chain(leaf, sides, leaf, sides)
    for step in draw(st.lists(st.sampled_from(steps or STEPS), min_size=1, max_size=most)):
        step(draw, c)
    return c
