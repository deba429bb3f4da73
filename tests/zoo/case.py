"""A zoo entry with its sites, an adapter of random factors, and the compiled steps that tests compare."""

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorax
from tests.zoo import ENTRIES, Entry, is_float

EXACT = 1e-6
# The programs are tiny and run once: time goes into compiling them.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Case:
    """A zoo entry with its sites and an adapter of random factors for all that can be adapted."""

    entry: Entry
    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    sites: Any
    initial: Any
    adapter: Any

    @functools.cached_property
    def rows(self) -> dict[str, Any]:
        """How each site is evaluated, by path."""
        return {row.path: row for row in lorax.explain(self.fn, self.params, self.adapter, *self.args)}

    def run(self, params: Any, adapter: Any) -> tuple[Any, Any]:
        """The adapted function's arrays, and their gradients with respect to the adapter's params."""
        return self.fast(params, adapter, *self.arrays)

    def reference(self, params: Any, adapter: Any) -> tuple[Any, Any]:
        """The same through the merged weights."""
        return self.merged(params, adapter, *self.arrays)

    @property
    def arrays(self) -> list[Any]:
        return [x for x in jax.tree.leaves(self.args) if hasattr(x, "dtype")]

    def with_arrays(self, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with their arrays replaced, for passing those through `jit`."""
        leaves, tree = jax.tree.flatten(self.args)
        it = iter(arrays)
        return tree.unflatten([next(it) if hasattr(x, "dtype") else x for x in leaves])

    def step(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Make a function of (params, adapter, *arrays) that returns the outputs and the gradients."""

        def outputs(trained, params, adapter, arrays):
            out = fn(params, adapter.replace(params=trained), *self.with_arrays(arrays))
            out = [x for x in jax.tree.leaves(out) if hasattr(x, "dtype")]
            terms = [jnp.mean(jnp.sin(x.astype(jnp.float32))) for x in out if jnp.issubdtype(x.dtype, jnp.floating)]
            return sum(terms), out

        def both(params, adapter, *arrays):
            if self.entry.grad:
                grad, out = jax.grad(outputs, has_aux=True)(adapter.params, params, adapter, arrays)
                return out, grad
            return outputs(adapter.params, params, adapter, arrays)[1], {}

        return both

    @functools.cached_property
    def fast(self) -> Callable[..., Any]:
        """The step of the adapted function."""
        return jax.jit(self.step(lorax.adapt(self.fn)), compiler_options=FAST_COMPILE)

    @functools.cached_property
    def merged(self) -> Callable[..., Any]:
        """The step through the merged weights: the reference."""
        return jax.jit(self.step(self.through_merge), compiler_options=FAST_COMPILE)

    def through_merge(self, params: Any, adapter: Any, *args: Any) -> Any:
        """What the adapted function means."""
        return self.fn(lorax.merge(params, adapter), *args)


@functools.cache
def case(name: str) -> Case:
    """Build an entry and its adapter, once for all tests."""
    entry = ENTRIES[name]
    fn, params, args = entry.build()
    sites = lorax.trace(fn, params, *args)
    paths = [s.path for s in sites if s.kind != "other"]
    if not paths:
        return Case(entry, fn, params, args, sites, None, None)
    spec = lorax.Spec({re.escape(p): lorax.LoRA(rank=2, alpha=3) for p in paths})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # rank 2 is above the side of a weight with one output
        initial = lorax.init(jax.random.key(0), spec, sites, params)
    return Case(entry, fn, params, args, sites, initial, randomised(initial))


def randomised(adapter: Any, seed: int = 0) -> Any:
    """An adapter whose trained arrays are all random, `b` too: zeros would hide most mistakes."""
    rng = np.random.default_rng(seed)
    return adapter.replace(
        params=jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), adapter.params)
    )


def assert_close(got: Any, want: Any, tol: float) -> None:
    """Compare trees in structure, shapes and dtypes exactly, and in values relative to the largest value."""
    (got, got_tree), (want, want_tree) = jax.tree.flatten(got), jax.tree.flatten(want)
    assert got_tree == want_tree
    floor = 1e-2 * max(
        (float(jnp.max(jnp.abs(x.astype(jnp.float32)))) for x in want if is_float(x) and x.size), default=0.0
    )
    for g, w in zip(got, want, strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        if is_float(w):
            g, w = np.asarray(g, np.float32), np.asarray(w, np.float32)
            assert np.isfinite(w).all()
            np.testing.assert_allclose(g, w, rtol=0, atol=tol * max(float(np.max(np.abs(w), initial=0)), floor))
        elif jnp.issubdtype(w.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(jax.random.key_data(g), jax.random.key_data(w))
        else:
            np.testing.assert_array_equal(g, w)
