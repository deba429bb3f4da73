"""Adapted functions on a mesh of eight fake devices: `python -m tests.zoo.eight_devices`, in a process of its own.

Prints a line for each check; an assertion fails the process.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lorax
from tests.zoo.entry import normal

TOL = 2e-5
PARAMS = {"up": normal(3, 8, 16), "down": normal(4, 16, 8), "layers": normal(5, 3, 8, 8)}
SPECS = {"up": P(None, "model"), "down": P("model", None), "layers": P(None, None, "model")}
X_BxD = normal(1, 8, 8)


def mesh(kind: AxisType) -> Mesh:
    """A mesh of 2 × 4 devices."""
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"), axis_types=(kind,) * 2)


def dense(p: Any, x_BxD: jax.Array) -> jax.Array:
    """A gated layer and a scanned stack."""
    x_BxD = jnp.tanh(x_BxD @ p["up"]) @ p["down"]
    return lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None)), x_BxD, p["layers"])[0]


def explicit(p: Any, x_BxD: jax.Array) -> jax.Array:
    """The same where types carry shardings: the contracted axis is sharded, so that the result has to be named."""
    rows = P("data", None)
    x_BxD = jnp.einsum("bf,fd->bd", jnp.tanh(x_BxD @ p["up"]), p["down"], out_sharding=rows)
    return lax.scan(
        lambda c, w: (jnp.tanh(jnp.einsum("bd,de->be", c, w, out_sharding=rows)), None), x_BxD, p["layers"]
    )[0]


def by_hand(where: Mesh) -> Callable[..., jax.Array]:
    """The gated layer as a `shard_map` over column and row shards."""

    def block(up, down, x):
        return lax.psum(jnp.tanh(x @ up) @ down, "model")

    specs = (SPECS["up"], SPECS["down"], P("data", None))
    mapped = jax.shard_map(block, mesh=where, in_specs=specs, out_specs=P("data", None))
    return lambda p, x: mapped(p["up"], p["down"], x)


def side_by_side(p: Any) -> jax.Array:
    """Two weights in one."""
    return jnp.concatenate([p["up"], 2 * p["up"]], 1)


def joined_by_hand(where: Mesh) -> Callable[..., jax.Array]:
    """A product with both in a `shard_map` over columns."""
    specs = (SPECS["up"], P("data", None))
    mapped = jax.shard_map(lambda up, x: jnp.tanh(x @ up), mesh=where, in_specs=specs, out_specs=P("data", "model"))
    return lambda p, x: mapped(side_by_side(p), x)


def check(
    title: str,
    fn: Callable[..., Any],
    params: Any,
    x_BxD: jax.Array,
    plain: Callable[..., Any] | None = None,
    method: lorax.Method | None = None,
    stored: Any = None,
) -> None:
    """Compare the adapted function with the merged one, in value and gradient, under `jit`."""
    sites = lorax.trace(fn, params, x_BxD)
    params = lorax.quantize(params, {".*": stored}, sites=sites) if stored else params
    names = [s.path for s in sites if s.kind == "linear"]
    assert names, sites
    adapter = lorax.init(
        jax.random.key(0), lorax.Spec({re.escape(n): method or lorax.LoRA(rank=2) for n in names}), sites, params
    )
    rng = np.random.default_rng(0)
    adapter = adapter.replace(
        params=jax.tree.map(lambda a: a + 0.1 * jnp.asarray(rng.normal(size=a.shape), a.dtype), adapter.params)
    )
    assert all(row.how == "factored" for row in lorax.explain(fn, params, adapter, x_BxD)), title

    def step(run, params, x):
        loss = lambda p: jnp.sum(jnp.sin(run(params, adapter.replace(params=p), x)))
        return jax.jit(jax.value_and_grad(loss))(adapter.params)

    fast = step(lorax.adapt(fn), params, x_BxD)
    # The reference runs on one device, through merged weights.
    here = jax.tree.map(np.asarray, (lorax.dequantize(params), X_BxD))
    adapter = jax.tree.map(np.asarray, adapter)
    merged = step(lambda p, a, x: (plain or fn)(lorax.merge(p, a), x), *here)
    for got, want in zip(jax.tree.leaves(fast), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(got, want, rtol=10 * TOL, atol=TOL)
    print("ok", title)


def data_parallel(where: Mesh) -> None:
    """Adapt inside a `shard_map` over the batch: each device has its rows, and gradients are summed."""
    sites = lorax.trace(dense, PARAMS, X_BxD)
    adapter = lorax.init(jax.random.key(0), lorax.Spec({".*": lorax.LoRA(rank=2)}), sites, PARAMS)
    adapter = adapter.replace(params=jax.tree.map(lambda a: a + 0.1, adapter.params))
    loss = lambda run, p, x: jnp.sum(jnp.sin(run(PARAMS, adapter.replace(params=p), x)))

    def local(p, x):
        value, grad = jax.value_and_grad(lambda p: lax.psum(loss(lorax.adapt(dense), p, x), ("data", "model")))(p)
        return value, grad

    got = jax.jit(
        jax.shard_map(local, mesh=where, in_specs=(P(), P(("data", "model"))), out_specs=(P(), P())),
    )(adapter.params, X_BxD)
    through_merge = lambda p, a, x: dense(lorax.merge(p, a), x)
    want = jax.jit(jax.value_and_grad(lambda p: loss(through_merge, p, X_BxD)))(adapter.params)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=10 * TOL, atol=10 * TOL)
    print("ok adapted inside shard_map")


def main() -> None:
    """Run all checks."""
    assert len(jax.devices()) == 8
    auto = mesh(AxisType.Auto)
    put = lambda where: {k: jax.device_put(v, NamedSharding(where, SPECS[k])) for k, v in PARAMS.items()}
    rows = lambda where: jax.device_put(X_BxD, NamedSharding(where, P("data", None)))
    check("replicated", dense, PARAMS, X_BxD)
    check("auto mesh", dense, put(auto), rows(auto))
    where = mesh(AxisType.Explicit)
    with jax.set_mesh(where):
        check("explicit mesh", explicit, put(where), rows(where), plain=dense)
        for method in (lorax.LoRA(rank=2), lorax.DoRA(rank=2), lorax.IA3()):
            for stored in (None, lorax.Int8()):
                params = {"up": put(where)["up"]}
                title = f"{type(method).__name__} in a shard_map of an explicit mesh, {stored}"
                plain = lambda p, x: jnp.tanh(x @ side_by_side(p))
                check(title, joined_by_hand(where), params, rows(where), plain=plain, method=method, stored=stored)
    pair = {k: v for k, v in put(auto).items() if k != "layers"}
    gated = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    check("shard_map", by_hand(auto), pair, rows(auto), plain=gated)
    constrained = lambda p, x: dense(
        {k: lax.with_sharding_constraint(v, NamedSharding(auto, SPECS[k])) for k, v in p.items()}, x
    )
    check("sharding constraint", constrained, put(auto), rows(auto), plain=dense)
    data_parallel(auto)


if __name__ == "__main__":
    main()
