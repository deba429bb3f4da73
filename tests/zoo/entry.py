"""What a zoo entry is, and the helpers that its model definitions share.

An entry is a function without arguments that returns `(fn, params, args)`, decorated with what lorax has to say
about every floating point leaf of `params`. Each expectation is a regex, full match on the leaf path:

* `factored`: adaptable, and no use of it builds the merged weight;
* `materialised`: adaptable, and some use of it builds the merged weight;
* `adaptable`: adaptable, either way is fine (a faster path may come later), but the result has to be right;
* `anything`: adaptable or not, but the result has to be right.

A leaf that no pattern claims must not be adaptable.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import meta

Built = tuple[Callable[..., Any], Any, tuple[Any, ...]]
ENTRIES: dict[str, "Entry"] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A model, and what to expect of its leaves.

    Attributes:
      name: unique name.
      build: makes the function, its parameters and its arguments.
      factored, materialised, adaptable, anything: regexes on leaf paths, see the module docstring.
      shapes: expected shapes of `a` and `b` at rank 2, by leaf path.
      kinds: expected `kind`, by leaf path.
      numbers: trainable numbers at rank 2 over all adaptable leaves.
      grad: whether the function can be differentiated in reverse mode.
      inert: regex of leaves whose factors are allowed to get no gradient at all.
      tol: largest difference, relative to the largest reference value.
    """

    name: str
    build: Callable[[], Built]
    factored: str = ""
    materialised: str = ""
    adaptable: str = ""
    anything: str = ""
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    numbers: int | None = None
    grad: bool = True
    inert: str = ""
    tol: float = 2e-5

    def expected(self, path: str) -> str:
        """The expectation of one leaf: the name of the first pattern that claims it, or "other"."""
        for how in ("factored", "materialised", "adaptable", "anything"):
            pattern = getattr(self, how)
            if pattern and re.fullmatch(pattern, path):
                return how
        return "other"


def entry(**expectations: Any) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    """Register the decorated builder under its own name."""

    def register(build: Callable[[], Built]) -> Callable[[], Built]:
        name = build.__name__.strip("_")
        assert name not in ENTRIES, f"two zoo entries are called {name}"
        ENTRIES[name] = Entry(name=name, build=build, **expectations)
        return build

    return register


def is_box(x: Any) -> bool:
    """Whether a node only wraps an array: a linen metadata box or an nnx variable."""
    return isinstance(x, meta.AxisMetadata | nnx.Variable)


def leaves_by_path(params: Any) -> dict[str, Any]:
    """Leaf path -> leaf, worked out without lorax: boxes are opened before paths are read."""
    plain = jax.tree.map(lambda x: x.unbox() if isinstance(x, meta.AxisMetadata) else x, params, is_leaf=is_box)

    def name(key: Any) -> str:
        for attribute in ("key", "idx", "name"):
            if hasattr(key, attribute):
                return str(getattr(key, attribute))
        raise TypeError(f"unknown key type {type(key)}")

    out = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(plain, is_leaf=is_box):
        out["/".join(map(name, path))] = leaf[...] if isinstance(leaf, nnx.Variable) else leaf
    return out


def is_float(x: Any) -> bool:
    """Whether a leaf is an array of floating point numbers."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def normal(seed: int, *shape: int, scale: float = 0.4, dtype: Any = jnp.float32) -> jax.Array:
    """A fixed array of normal numbers; each seed gives other numbers."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, dtype)


def tokens(seed: int, vocabulary: int, *shape: int) -> jax.Array:
    """A fixed int32 array of token ids."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocabulary, shape), jnp.int32)


def fill(abstract: Any, seed: int = 0, scale: float = 0.4) -> Any:
    """Replace each abstract leaf by normal numbers, without running any initialiser."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * scale, s.dtype), abstract)


def linen(module: Any, *args: Any, method: Any = None, stats: bool = False, **kwargs: Any) -> Built:
    """`module.apply` as a function of its parameters; other collections are closed over.

    Args:
      module: a linen module.
      *args: its inputs.
      method: the method to call, `__call__` by default.
      stats: whether other collections than `params` exist and have to be passed.
      **kwargs: static keyword arguments of the method.
    """
    abstract = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, method=method, **kwargs))
    params = fill(abstract["params"])
    rest = {k: jax.tree.map(lambda x: jnp.abs(x) + 0.5, fill(v, 1)) for k, v in abstract.items() if k != "params"}
    assert bool(rest) == stats, f"collections {list(rest)} beside params"
    return lambda p, *xs: module.apply({"params": p, **rest}, *xs, method=method, **kwargs), params, args


def nnx_split(
    make: Callable[[], Any],
    *args: Any,
    call: Callable[..., Any] = lambda m, *xs: m(*xs),
    abstract: bool = True,
) -> Built:
    """A function of the `nnx.State` of an nnx module's parameters.

    Args:
      make: makes the module.
      *args: its inputs.
      call: what to do with the module and the inputs.
      abstract: whether the module can be made without running its initialisers.
    """
    graph, state, rest = nnx.split(nnx.eval_shape(make) if abstract else make(), nnx.Param, ...)
    # Variables that are no parameters, such as batch statistics and counters of keys, need their real values.
    if abstract and jax.tree.leaves(rest):
        rest = nnx.split(make(), nnx.Param, ...)[2]

    def fn(state: Any, *xs: Any) -> Any:
        return call(nnx.merge(graph, state, jax.tree.map(lambda x: x, rest)), *xs)

    return fn, fill(state), args
