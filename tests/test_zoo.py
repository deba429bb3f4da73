"""Every model of the zoo: its sites are found, evaluated as expected, and right in value and gradient."""

import dataclasses
import functools
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lorax
import numpy as np
import pytest
from zoo import ENTRIES, Entry, is_float, leaves_by_path

EXACT = 1e-6
# The programs are tiny and run once: time goes into compiling them.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

all_entries = pytest.mark.parametrize("name", ENTRIES)


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
        return self._fast(params, adapter, *self._dynamic)

    def reference(self, params: Any, adapter: Any) -> tuple[Any, Any]:
        """The same through the merged weights."""
        return self._merged(params, adapter, *self._dynamic)

    @property
    def _dynamic(self) -> list[Any]:
        return [x for x in jax.tree.leaves(self.args) if hasattr(x, "dtype")]

    def with_arrays(self, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with their arrays replaced, for passing those through `jit`."""
        leaves, tree = jax.tree.flatten(self.args)
        it = iter(arrays)
        return tree.unflatten([next(it) if hasattr(x, "dtype") else x for x in leaves])

    def _compile(self, fn: Callable[..., Any]) -> Callable[..., Any]:
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

        return jax.jit(both, compiler_options=FAST_COMPILE)

    @functools.cached_property
    def _fast(self) -> Callable[..., Any]:
        return self._compile(lorax.adapt(self.fn))

    @functools.cached_property
    def _merged(self) -> Callable[..., Any]:
        return self._compile(lambda params, adapter, *args: self.fn(lorax.merge(params, adapter), *args))


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
    return adapter.replace(params=jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), adapter.params))


def assert_close(got: Any, want: Any, tol: float) -> None:
    """Compare trees in structure, shapes and dtypes exactly, and in values relative to the largest value."""
    (got, got_tree), (want, want_tree) = jax.tree.flatten(got), jax.tree.flatten(want)
    assert got_tree == want_tree
    floor = 1e-2 * max((float(jnp.max(jnp.abs(x.astype(jnp.float32)))) for x in want if is_float(x) and x.size), default=0.0)
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


@all_entries
def test_sites_are_found(name: str) -> None:
    c = case(name)
    entry, leaves = c.entry, leaves_by_path(c.params)
    sites = {s.path: s for s in c.sites}
    for path, leaf in leaves.items():
        if not is_float(leaf):
            assert path not in sites or sites[path].kind == "other", path
            continue
        site, expected = sites[path], entry.expected(path)
        assert site.shape == leaf.shape and jnp.dtype(site.dtype) == leaf.dtype, path
        if expected != "anything":
            assert (site.kind != "other") == (expected != "other"), (path, site.kind, expected)
        if site.kind != "other":
            assert sorted([*site.stack, *site.fan_in, *site.fan_out]) == list(range(leaf.ndim)), path
    assert set(sites) <= set(leaves)
    assert {path: sites[path].kind for path in entry.kinds} == entry.kinds


@all_entries
def test_abstract_params_give_the_same_sites(name: str) -> None:
    c = case(name)
    leaves, tree = jax.tree.flatten((c.params, c.args))
    abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x for x in leaves]
    params, args = tree.unflatten(abstract)
    again = lorax.trace(c.fn, params, *args)
    fields = [(s.path, s.kind, s.fan_in, s.fan_out, s.stack) for s in c.sites]
    assert [(s.path, s.kind, s.fan_in, s.fan_out, s.stack) for s in again] == fields


@all_entries
def test_factors_have_the_expected_shapes(name: str) -> None:
    c = case(name)
    trained = c.adapter.params if c.adapter else {}
    assert {path: (trained[path]["a"].shape, trained[path]["b"].shape) for path in c.entry.shapes} == c.entry.shapes
    if c.entry.numbers is not None:
        assert sum(x.size for x in jax.tree.leaves(trained)) == c.entry.numbers


@all_entries
def test_explain_says_how(name: str) -> None:
    c = case(name)
    if c.adapter is None:
        pytest.skip("nothing to adapt")
    assert set(c.rows) == set(c.adapter.params)
    for path, row in c.rows.items():
        expected = c.entry.expected(path)
        assert row.how in ("factored", "materialised")
        if expected in ("factored", "materialised"):
            assert row.how == expected, (path, row.how, row.reason)
        assert row.reason, path


@all_entries
def test_strict_refuses_exactly_what_is_materialised(name: str) -> None:
    c = case(name)
    if c.adapter is None:
        pytest.skip("nothing to adapt")
    built = [path for path, row in c.rows.items() if row.how == "materialised"]

    def abstract():
        run = lambda params, adapter, *arrays: [  # noqa: E731
            x
            for x in jax.tree.leaves(lorax.adapt(c.fn, strict=True)(params, adapter, *c.with_arrays(arrays)))
            if hasattr(x, "dtype")
        ]
        return jax.eval_shape(run, c.params, c.adapter, *c._dynamic)

    if built:
        with pytest.raises(ValueError, match="strict") as error:
            abstract()
        assert all(path in str(error.value) for path in built)
    else:
        abstract()


@all_entries
def test_adapted_equals_merged(name: str) -> None:
    c = case(name)
    if c.adapter is None:
        pytest.skip("nothing to adapt")
    (out, grad), (want, want_grad) = c.run(c.params, c.adapter), c.reference(c.params, c.adapter)
    assert_close(out, want, c.entry.tol)
    assert_close(grad, want_grad, 5 * c.entry.tol)
    for path, arrays in want_grad.items():
        if not re.fullmatch(c.entry.inert, path):
            assert all(np.any(np.asarray(x)) for x in arrays.values()), f"{path}: no gradient, the check is void"


@all_entries
def test_initial_adapter_changes_nothing(name: str) -> None:
    c = case(name)
    if c.initial is None:
        pytest.skip("nothing to adapt")
    base, merged = leaves_by_path(c.params), leaves_by_path(lorax.merge(c.params, c.initial))
    assert list(base) == list(merged)
    for path in c.initial.params:
        np.testing.assert_array_equal(np.asarray(merged[path]), np.asarray(base[path]))
    out, _ = c.run(c.params, c.initial)
    want, _ = c.reference(c.params, c.initial)
    assert_close(out, want, max(EXACT, c.entry.tol / 10))


STACKABLE = [
    "matmul",
    "tied_embedding",
    "einsum_heads",
    "scan_with_remat",
    "conv_grouped",
    "conv_depthwise",
    "gather_of_expert",
    "ragged_dot",
    "fused_qkv_cut_before_by_slices",
    "cond",
    "weight_norm",
    "custom_vjp_with_the_weight",
    "nnx_attention",
    "while_loop",
    "llama",
]


@pytest.mark.parametrize("name", STACKABLE)
def test_vmap_over_adapters_equals_the_loop(name: str) -> None:
    c = case(name)
    members = [randomised(c.initial, seed) for seed in (1, 2, 3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    got = jax.jit(jax.vmap(c._fast, in_axes=(None, 0, *[None] * len(c._dynamic))))(c.params, stacked, *c._dynamic)
    want = [c.run(c.params, member) for member in members]
    assert_close(got, jax.tree.map(lambda *x: jnp.stack(x), *want), 5 * c.entry.tol)


TWICE = [
    "matmul",
    "tied_embedding",
    "scan_with_remat",
    "conv_2d",
    "ragged_dot",
    "checkpoint_policies",
    "weight_norm",
    "custom_jvp_on_activations",
    "gradient_inside",
    "linen_attention",
]


@pytest.mark.parametrize("name", TWICE)
def test_second_order_reverse_mode(name: str) -> None:
    c = case(name)

    def penalty(run):
        return lambda p: sum(jnp.sum(g**2) for g in jax.tree.leaves(run(c.params, c.adapter.replace(params=p), *c._dynamic)[1]))

    got, want = (jax.jit(jax.grad(penalty(run)))(c.adapter.params) for run in (c._fast, c._merged))
    assert_close(got, want, 20 * c.entry.tol)
    assert any(np.any(np.asarray(x)) for x in jax.tree.leaves(want))


@pytest.mark.parametrize("name", ["while_loop", "matmul", "tied_embedding", "scan_with_remat", "conv_2d"])
def test_forward_mode(name: str) -> None:
    c = case(name)
    tangent = randomised(jax.tree.map(jnp.zeros_like, c.adapter), 5).params

    def along(run):
        first = lambda p: run(c.params, c.adapter.replace(params=p), *c.args)  # noqa: E731
        return jax.jvp(first, (c.adapter.params,), (tangent,))[1]

    got = along(lorax.adapt(c.fn))
    want = along(lambda params, adapter, *args: c.fn(lorax.merge(params, adapter), *args))
    assert_close(got, want, 10 * c.entry.tol)
    assert any(np.any(np.asarray(x)) for x in jax.tree.leaves(want))


def equations(jaxpr: Any) -> Any:
    """All equations of a jaxpr and of those inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def unique_sizes() -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """A model in which no activation has the shape of a weight, or of one of its slices."""
    n = lambda i, *s: jax.random.normal(jax.random.key(i), s) * 0.3  # noqa: E731
    params = {
        "embedding": n(1, 31, 12),
        "query": n(2, 12, 2, 6),
        "out": n(3, 2, 6, 12),
        "layers": n(4, 3, 12, 12),
        "conv": n(5, 3, 12, 10),
        "experts": n(6, 3, 10, 14),
        "fused": n(7, 14, 33),
    }

    def fn(p, ids_BxT):
        x = p["embedding"][ids_BxT]
        q = jnp.einsum("btd,dhk->bthk", x, p["query"])
        x = x + jnp.einsum("bthk,hkd->btd", jnp.tanh(q), p["out"])
        x, _ = jax.lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None)), x, p["layers"])
        logits = x @ p["embedding"].T
        x = jax.lax.conv_general_dilated(x, p["conv"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
        x = jax.lax.ragged_dot(x.reshape(-1, 10), p["experts"], jnp.array([10, 5, 20], jnp.int32))
        return logits, [x @ w for w in jnp.split(p["fused"], 3, axis=1)]

    return fn, params, (jnp.arange(35).reshape(5, 7) % 31,)


def test_nothing_of_a_weights_shape_is_computed() -> None:
    """In the whole step no product, sum or saved residual has the shape of a weight."""
    fn, params, args = unique_sizes()
    sites = lorax.trace(fn, params, *args)
    adapter = randomised(lorax.init(jax.random.key(0), lorax.Spec({".*": lorax.LoRA(rank=2)}), sites, params))
    assert set(adapter.params) == set(params)

    def sizes(run):
        loss = lambda p: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(run(params, adapter.replace(params=p), *args)))  # noqa: E731
        jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(adapter.params)
        layout = {"transpose", "reshape", "slice", "split", "squeeze", "broadcast_in_dim", "convert_element_type", "rev", "copy"}
        return {
            (eqn.primitive.name, tuple(sorted(v.aval.shape)))
            for eqn in equations(jaxpr.jaxpr)
            for v in eqn.outvars
            if eqn.primitive.name not in layout and hasattr(v.aval, "shape")
        }

    weights = {tuple(sorted(x.shape)) for x in params.values()} | {(12, 12), (3, 10, 14), (10, 14), (14, 11)}
    found = {(name, shape) for name, shape in sizes(lorax.adapt(fn)) if shape in weights}
    assert not found
    # The same search does find the merged weights' products and gradients: it is able to fail.
    merged = {shape for _, shape in sizes(lambda p, a, *xs: fn(lorax.merge(p, a), *xs)) if shape in weights}
    assert {tuple(sorted(x.shape)) for x in params.values()} <= merged


def test_materialising_stays_inside_the_scan() -> None:
    """A normalised weight is built one layer at a time, never for the whole stack."""
    c = case("weight_norm_inside_a_rematerialised_scan")
    step = jax.make_jaxpr(c.run)(c.params, c.adapter)
    stack = leaves_by_path(c.params)["w"].shape
    products = [e for e in equations(step.jaxpr) if e.primitive.name in ("dot_general", "add", "mul", "add_any", "sub")]
    assert products and all(v.aval.shape != stack for e in products for v in e.outvars)


def test_eight_devices() -> None:
    """Sharded parameters, `shard_map`, Explicit and Auto meshes, in a process with eight fake devices."""
    tests = Path(__file__).parent
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "zoo.eight_devices"], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 5, done.stdout
