"""Adapted zoo models under vmap, higher derivatives and meshes, and what their programs do not compute."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from tests.agreement import equations
from tests.zoo import leaves_by_path
from tests.zoo.case import FAST_COMPILE, assert_close, case, randomised

STACKABLE = [
    "matmul",
    "tied_embedding",
    "einsum_heads",
    "scan_with_remat",
    "conv_grouped",
    "conv_depthwise",
    "gather_of_expert",
    "fused_qkv_cut_before_by_slices",
    "cond",
    "weight_norm",
    "custom_vjp_with_the_weight",
    "nnx_attention",
    "while_loop",
]


@pytest.mark.parametrize("name", STACKABLE)
def test_vmap_over_adapters_equals_the_loop(name: str) -> None:
    c = case(name)
    members = [randomised(c.initial, seed) for seed in (1, 2, 3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    mapped = jax.vmap(c.step(lorax.adapt(c.fn)), in_axes=(None, 0, *[None] * len(c.arrays)))
    got = jax.jit(mapped, compiler_options=FAST_COMPILE)(c.params, stacked, *c.arrays)
    want = [c.run(c.params, member) for member in members]
    assert_close(got, jax.tree.map(lambda *x: jnp.stack(x), *want), 5 * c.entry.tol)


TWICE = [
    "matmul",
    "tied_embedding",
    "scan_with_remat",
    "conv_2d",
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
        return lambda p: sum(
            jnp.sum(g**2) for g in jax.tree.leaves(run(c.params, c.adapter.replace(params=p), *c.arrays)[1])
        )

    steps = [c.step(lorax.adapt(c.fn)), c.step(c.through_merge)]
    got, want = (jax.jit(jax.grad(penalty(step)), compiler_options=FAST_COMPILE)(c.adapter.params) for step in steps)
    assert_close(got, want, 20 * c.entry.tol)
    assert any(np.any(np.asarray(x)) for x in jax.tree.leaves(want))


@pytest.mark.parametrize("name", ["while_loop", "matmul", "tied_embedding", "scan_with_remat", "conv_2d"])
def test_forward_mode(name: str) -> None:
    c = case(name)
    tangent = randomised(jax.tree.map(jnp.zeros_like, c.adapter), 5).params

    def along(run):
        first = lambda p: run(c.params, c.adapter.replace(params=p), *c.args)
        return jax.jvp(first, (c.adapter.params,), (tangent,))[1]

    got, want = along(lorax.adapt(c.fn)), along(c.through_merge)
    assert_close(got, want, 10 * c.entry.tol)
    assert any(np.any(np.asarray(x)) for x in jax.tree.leaves(want))


def unique_sizes() -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """A model in which no activation has the shape of a weight, or of one of its slices."""
    n = lambda i, *s: jax.random.normal(jax.random.key(i), s) * 0.3
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
        loss = lambda p: sum(
            jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(run(params, adapter.replace(params=p), *args))
        )
        jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(adapter.params)
        layout = {
            "transpose",
            "reshape",
            "slice",
            "split",
            "squeeze",
            "broadcast_in_dim",
            "convert_element_type",
            "rev",
            "copy",
        }
        return {
            (eqn.primitive.name, tuple(sorted(v.aval.shape)))
            for eqn in equations(jaxpr)
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
    step = jax.make_jaxpr(c.step(lorax.adapt(c.fn)))(c.params, c.adapter, *c.arrays)
    stack = leaves_by_path(c.params)["w"].shape
    products = [e for e in equations(step) if e.primitive.name in ("dot_general", "add", "mul", "add_any", "sub")]
    assert products
    assert all(v.aval.shape != stack for e in products for v in e.outvars)


@pytest.mark.slow
def test_eight_devices() -> None:
    """Sharded parameters, `shard_map`, Explicit and Auto meshes, in a process with eight fake devices."""
    root = Path(__file__).parents[1]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "tests.zoo.eight_devices"]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 12, done.stdout
