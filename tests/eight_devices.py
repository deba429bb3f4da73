"""Checks on a mesh of eight fake devices: `python -m tests.eight_devices CHECK`, in a process of its own.

Prints a line for each check; an assertion fails the process. It runs in float64 (JAX_ENABLE_X64=1): in float32, sums
over devices in another order change the gradients of attention by 1e-3, as much as a mistake might.
"""

import collections
import functools
import re
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lorax
from lorax.checkpoint import TrainCheckpoints
from lorax.fingerprint import digests
from tests.agreement import adapter_for, assert_close, assert_identical, how, normal

TOL = 1e-9  # float64, amplified a thousandfold by the attention
D, F, H, K, L, B, T = 16, 32, 4, 4, 3, 8, 4
wide = functools.partial(normal, dtype=jnp.float64)
PARAMS = {
    "mlp": {"up": wide(1, D, F), "down": wide(2, F, D)},
    "attn": {n: wide(i, D, H, K) for i, n in enumerate(("query", "key", "value"), 3)} | {"out": wide(6, H, K, D)},
    "layers": wide(7, L, D, D),
}  # fmt: skip
X = wide(8, B, T, D)

SPECS = {
    "tensor parallel": {
        "mlp": {"up": P(None, "model"), "down": P("model", None)},
        "attn": dict.fromkeys(("query", "key", "value"), P(None, "model")) | {"out": P("model")},
        "layers": P(None, None, "model"),
    },
    "fsdp": {
        "mlp": {"up": P("data", None), "down": P("data", None)},
        "attn": dict.fromkeys(("query", "key", "value"), P("data")) | {"out": P(None, None, "data")},
        "layers": P(None, "data", None),
    },
    "both": {
        "mlp": {"up": P("data", "model"), "down": P("model", "data")},
        "attn": dict.fromkeys(("query", "key", "value"), P("data", "model")) | {"out": P("model", None, "data")},
        "layers": P(None, "data", "model"),
    },
    "one axis over both": {
        "mlp": {"up": P(None, ("data", "model")), "down": P(("data", "model"), None)},
        "attn": dict.fromkeys(("query", "key", "value"), P()) | {"out": P(None, None, ("data", "model"))},
        "layers": P(None, None, ("data", "model")),
    },
}


def mesh(kind: AxisType) -> Mesh:
    """A mesh of 2 × 4 devices."""
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"), axis_types=(kind,) * 2)


def model(out: Any = None) -> Callable[[Any, Any], Any]:
    """A gated layer, attention and a scanned stack; `out` names the sharding of ambiguous products."""

    def einsum(sums: str, *xs: Any) -> Any:
        return jnp.einsum(sums, *xs, out_sharding=out(sums.split("->")[1])) if out else jnp.einsum(sums, *xs)

    def fn(p: Any, x: Any) -> Any:
        x = x + einsum("btf,fd->btd", jnp.tanh(einsum("btd,df->btf", x, p["mlp"]["up"])), p["mlp"]["down"])
        q, k, v = (einsum("btd,dhk->bthk", x, p["attn"][n]) for n in ("query", "key", "value"))
        weights = jax.nn.softmax(einsum("bthk,bshk->bhts", q, k))
        x = x + einsum("bthk,hkd->btd", einsum("bhts,bshk->bthk", weights, v), p["attn"]["out"])
        layer = jax.checkpoint(lambda c, w: (jnp.tanh(einsum("btd,de->bte", c, w)), None))
        return lax.scan(layer, x, p["layers"])[0]

    return fn


def put(where: Mesh, specs: Any, tree: Any = PARAMS) -> Any:
    """Lay a tree out on a mesh."""
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(where, s)), tree, specs)


def step(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Value and gradients of a function of (params, adapter, x)."""
    loss = lambda t, params, adapter, x: jnp.mean(jnp.sin(fn(params, adapter.replace(params=t), x)))
    return jax.jit(lambda params, adapter, x: jax.value_and_grad(loss)(adapter.params, params, adapter, x))


def reference() -> tuple[Any, Any]:
    """The adapter, and value and gradients through the merged weights on one device."""
    fn = model()
    adapter = adapter_for(fn, PARAMS, X, method=lorax.LoRA(rank=2, alpha=3, dtype="float64"))
    assert len(adapter.params) == 7
    return adapter, jax.device_get(step(lambda p, a, x: fn(lorax.merge(p, a), x))(PARAMS, adapter, X))


def check_layout(kind: AxisType) -> None:
    """Every layout of the base, on one kind of mesh: value and gradient are those of one device."""
    adapter, want = reference()
    where = mesh(kind)
    for name, specs in SPECS.items():
        params = put(where, specs)
        before = jax.tree.map(lambda x: x.sharding, params)
        x = jax.device_put(X, NamedSharding(where, P("data")))
        if kind == AxisType.Explicit:
            letters = {"b": "data", "h": "model", "f": "model"}
            if name == "one axis over both":
                letters = {"b": "data"}
            out = lambda axes, letters=letters: NamedSharding(where, P(*(letters.get(a) for a in axes)))
            with jax.set_mesh(where):
                fn = model(out)
                sites = lorax.trace(fn, params, x)
                assert [s for s in sites if s.is_adaptable] == [s for s, _ in adapter.plan.entries], name
                assert set(how(fn, params, adapter, x).values()) == {"factored"}
                got = step(lorax.adapt(fn))(params, adapter, x)
        else:
            fn = model()
            assert set(how(fn, params, adapter, x).values()) == {"factored"}
            got = step(lorax.adapt(fn))(params, adapter, x)
        assert_close(jax.device_get(got), want, TOL)
        assert jax.tree.map(lambda x: x.sharding, params) == before
        print("ok", kind, name)


def check_sharded_adapter() -> None:
    """Factors that are laid out themselves, made by `init` under jit on the mesh."""
    adapter, want = reference()
    where, fn = mesh(AxisType.Auto), model()
    params = put(where, SPECS["tensor parallel"])
    x = jax.device_put(X, NamedSharding(where, P("data")))
    sites = lorax.trace(fn, params, x)
    build = lambda key, params: lorax.init(key, adapter.spec, sites, params)
    shape = jax.eval_shape(build, jax.random.key(0), params)
    spec = lambda path, a: P(*("model" if n % 4 == 0 and n > 4 else None for n in a.shape))
    shardings = jax.tree_util.tree_map_with_path(lambda k, a: NamedSharding(where, spec(k, a)), shape)
    made = jax.jit(build, out_shardings=shardings)(jax.random.key(0), params)
    assert jax.tree.map(lambda a: a.sharding, made) == shardings
    laid_out = jax.tree.map(jax.device_put, adapter, shardings)
    assert any(not a.sharding.is_fully_replicated for a in jax.tree.leaves(laid_out))
    assert_close(jax.device_get(step(lorax.adapt(fn))(params, laid_out, x)), want, TOL)
    merged = jax.jit(lorax.merge)(params, laid_out)
    assert_close(jax.device_get(merged), jax.device_get(lorax.merge(PARAMS, adapter)), TOL)
    eager = lorax.merge(params, laid_out)
    assert_close(jax.device_get(eager), jax.device_get(lorax.merge(PARAMS, adapter)), TOL)
    print("ok sharded adapter")


def check_restore() -> None:
    """Saved from one layout, restored onto others; the base may lie anywhere."""
    adapter, want = reference()
    where, fn = mesh(AxisType.Auto), model()
    params = put(where, SPECS["both"])
    everywhere = NamedSharding(where, P())
    spread = lambda a: NamedSharding(where, P(*("data" if n % 2 == 0 and n > 4 else None for n in a.shape)))
    laid_out = jax.tree.map(lambda a: jax.device_put(a, spread(a)), adapter)
    x = jax.device_put(X, NamedSharding(where, P("data")))
    with tempfile.TemporaryDirectory() as path:
        lorax.save(f"{path}/adapter", laid_out, base=params)
        for base in (PARAMS, params, put(where, SPECS["fsdp"])):
            assert_identical(jax.device_get(lorax.restore(f"{path}/adapter", base=base)), jax.device_get(adapter))
        for shardings in (everywhere, jax.tree.map(spread, adapter), jax.tree.map(lambda _: everywhere, adapter)):
            back = lorax.restore(f"{path}/adapter", base=params, shardings=shardings)
            wanted = shardings if not isinstance(shardings, NamedSharding) else jax.tree.map(lambda _: shardings, back)
            assert jax.tree.map(lambda a: a.sharding, back) == wanted
            assert_identical(jax.device_get(back), jax.device_get(adapter))
            assert_close(jax.device_get(step(lorax.adapt(fn))(params, back, x)), want, TOL)
        print("ok restore onto other shardings")
        checkpoints = TrainCheckpoints(f"{path}/run")
        opt_state = {"mu": laid_out.params, "count": jnp.array(3)}
        checkpoints.save(1, laid_out, opt_state=opt_state, base=params, rng=jax.random.key(3))
        checkpoints.wait()
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), opt_state)
        state = checkpoints.restore(base=PARAMS, opt_state_like=like, shardings=everywhere)
        assert {a.sharding for a in jax.tree.leaves((state.adapter, state.opt_state))} == {everywhere}
        assert_identical(jax.device_get(state.opt_state), jax.device_get(opt_state))
        checkpoints.close()
        print("ok training state onto other shardings")
        back = lorax.restore(f"{path}/adapter", base=params)
        assert_close(jax.device_get(step(lorax.adapt(fn))(params, back, x)), want, TOL)
        print("ok restored without shardings beside a sharded base")


def check_collectives() -> None:
    """An activation that is split along batch and sequence is not gathered: the program is that of LoRA by hand."""
    where = mesh(AxisType.Auto)
    fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    params = put(where, {"up": P(), "down": P()}, PARAMS["mlp"])
    adapter = jax.device_put(adapter_for(fn, params, X), NamedSharding(where, P()))
    x = jax.device_put(X, NamedSharding(where, P("data", "model")))

    def by_hand(p: Any, a: Any, x: Any) -> Any:
        dense = lambda n, x: x @ p[n] + (x @ a.params[n]["a"] * a.state[n]["scale"]) @ a.params[n]["b"]
        return dense("down", jnp.tanh(dense("up", x)))

    programs = [step(f).lower(params, adapter, x).compile() for f in (lorax.adapt(fn), by_hand)]
    kinds = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    got, want = (collections.Counter(re.findall(kinds, c.as_text())) for c in programs)
    assert got == want, (got, want)
    assert "all-reduce" in want
    flops, flops_by_hand = (c.cost_analysis()["flops"] for c in programs)
    assert flops < 1.02 * flops_by_hand
    print("ok collectives", dict(want))


def check_fingerprint() -> None:
    """The digest is the same under any layout."""
    arrays = {
        "f32": normal(1, 8, 16),
        "bf16": normal(2, 16, 8, dtype=jnp.bfloat16),
        "fp8": normal(3, 8, 8).astype(jnp.float8_e4m3fn),
        "int8": jnp.arange(64, dtype=jnp.int8).reshape(8, 8),
        "int4": (jnp.arange(64) % 16 - 8).astype(jnp.int4).reshape(8, 8),
        "bool": (jnp.arange(64) % 3 == 0).reshape(8, 8),
        "odd": normal(4, 3, 5),
    }
    want = digests(arrays)
    for kind in (AxisType.Auto, AxisType.Explicit):
        where = mesh(kind)
        for spec in (P(), P("data"), P("model"), P(None, "model"), P("model", "data"), P(("data", "model"))):
            layout = lambda name, spec=spec: P() if name == "odd" else spec
            placed = {n: jax.device_put(x, NamedSharding(where, layout(n))) for n, x in arrays.items()}
            assert digests(placed) == want, spec
            touched = {**placed, "f32": jax.device_put(arrays["f32"].at[7, 15].add(1e-3), placed["f32"].sharding)}
            assert [n for n, d in digests(touched).items() if d != want[n]] == ["f32"]
    print("ok fingerprint")


CHECKS = {
    "auto": lambda: check_layout(AxisType.Auto),
    "explicit": lambda: check_layout(AxisType.Explicit),
    "adapter": check_sharded_adapter,
    "restore": check_restore,
    "fingerprint": check_fingerprint,
    "collectives": check_collectives,
}

if __name__ == "__main__":
    assert len(jax.devices()) == 8
    assert X.dtype == jnp.float64
    for name in sys.argv[1:]:
        CHECKS[name]()
