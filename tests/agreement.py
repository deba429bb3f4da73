"""What most tests compare: the adapted function against the same function of the merged weights."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorax

F32_TOL = 2e-5  # relative to the largest value, sums of tens of products in another order
BF16_TOL = 4e-2  # bfloat16 keeps 8 bits
# The programs are tiny and run once: time goes into compiling them.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def normal(seed: int, *shape: int, scale: float = 0.5, dtype: Any = jnp.float32) -> jax.Array:
    """A fixed array of normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, dtype)


def abstract(tree: Any) -> Any:
    """The tree's shapes and dtypes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def randomised(adapter: Any, seed: int = 0, scale: float = 0.5) -> Any:
    """The adapter with random numbers added to all that is trained: B = 0 would hide most mistakes."""
    rng = np.random.default_rng(seed)
    add = lambda x: x + jnp.asarray(scale * rng.normal(size=x.shape), x.dtype)
    return adapter.replace(params=jax.tree.map(add, adapter.params))


def adapter_for(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    method: Any = None,
    only: str | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> Any:
    """A random adapter of all adaptable leaves, or of those that a pattern selects."""
    sites = lorax.trace(fn, params, *args, **kwargs)
    method = method or lorax.LoRA(rank=2, alpha=3)
    chosen = [s.path for s in sites if not method.refuses(s) and (only is None or re.fullmatch(only, s.path))]
    assert chosen, f"nothing to adapt:\n{sites}"
    spec = lorax.Spec({re.escape(p): method for p in chosen})
    build = lambda: lorax.init(jax.random.key(seed), spec, sites, params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # rank 2 is above the side of a weight with one output
        made = jax.eval_shape(build)
        state = jax.jit(lambda: build().state).lower().compile(FAST_COMPILE)()
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), made.params)  # drawing as init does would be compiled
    return randomised(made.replace(params=zeros, state=state), seed)


def is_floating(x: Any) -> bool:
    """Whether a leaf is an array of floating point numbers."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def assert_close(got: Any, want: Any, tol: float = F32_TOL, what: str = "") -> None:
    """Compare structure, shapes and dtypes exactly, and values relative to the largest of the reference leaf."""
    (got, got_tree), (want, want_tree) = jax.tree.flatten(got), jax.tree.flatten(want)
    assert got_tree == want_tree, what
    for g, w in zip(got, want, strict=True):
        assert (jnp.shape(g), jnp.result_type(g)) == (jnp.shape(w), jnp.result_type(w)), what
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.isfinite(w).all(), what
        np.testing.assert_allclose(g, w, rtol=0, atol=tol * max(np.max(np.abs(w), initial=0), 1e-2), err_msg=what)


def assert_identical(got: Any, want: Any) -> None:
    """Compare structure, dtypes, shapes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (g.dtype, g.shape) == (w.dtype, w.shape)
        if jnp.issubdtype(g.dtype, jax.dtypes.prng_key):
            g, w = jax.random.key_data(g), jax.random.key_data(w)
        assert np.asarray(g).tobytes() == np.asarray(w).tobytes()


def assert_changes_nothing(fn: Callable[..., Any], params: Any, adapter: Any, *args: Any) -> None:
    """Not a bit of the output differs, an operation at a time: a compiler may round two programs differently."""
    with jax.disable_jit():
        assert_identical(lorax.adapt(fn)(params, adapter, *args), fn(params, *args))


def value_and_grads(run: Callable[..., Any], adapter: Any, *args: Any) -> Any:
    """Outputs of `run(adapter, *args)` and gradients with respect to the adapter's params and floating arguments."""
    moving = [i for i, x in enumerate(args) if is_floating(x)]

    def loss(trained: Any, floats: list[Any], adapter: Any, args: tuple[Any, ...]) -> Any:
        args = list(args)
        for i, x in zip(moving, floats, strict=True):
            args[i] = x
        out = run(adapter.replace(params=trained), *args)
        total = sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in jax.tree.leaves(out) if is_floating(x))
        return total, out

    grads, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(adapter.params, [args[i] for i in moving], adapter, args)
    return out, grads


def assert_agrees(fn: Callable[..., Any], params: Any, adapter: Any, *args: Any, tol: float = F32_TOL) -> None:
    """The adapted function equals the function of the merged weights, in value and in all gradients."""

    def both(params: Any, adapter: Any, *args: Any) -> Any:
        fast = value_and_grads(lambda a, *xs: lorax.adapt(fn)(params, a, *xs), adapter, *args)
        slow = value_and_grads(lambda a, *xs: fn(lorax.merge(params, a), *xs), adapter, *args)
        return fast, slow

    fast, slow = run(both, params, adapter, *args)
    assert_close(fast[0], slow[0], tol, "value")
    assert_close(fast[1], slow[1], 5 * tol, "gradient")
    assert any(np.any(np.asarray(x)) for x in jax.tree.leaves(slow[1][0])), "no gradient at all: the check is void"


def run(fn: Callable[..., Any], *args: Any) -> Any:
    """Compile with little optimisation and call: quicker than one small program for each operation."""
    return jax.jit(fn).lower(*args).compile(FAST_COMPILE)(*args)


def how(fn: Callable[..., Any], params: Any, adapter: Any, *args: Any) -> dict[str, str]:
    """How each site is evaluated."""
    return {row.path: row.how for row in lorax.explain(fn, params, adapter, *args)}


def equations(jaxpr: Any) -> list[Any]:
    """All equations of a jaxpr and of those inside it."""
    found = []
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        found.append(eqn)
        is_jaxpr = lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += equations(inner)
    return found
