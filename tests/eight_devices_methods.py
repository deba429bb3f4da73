"""Methods and quantised bases on eight fake devices: `python -m tests.eight_devices_methods auto|explicit mixed|each`.

`mixed` has a method a leaf, another one in the next round; `each` has one method on all leaves after another.
In a process of its own; prints a line for each check, an assertion fails the process. It runs in float64, as
`tests.eight_devices` does.
"""

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorax
from tests.agreement import FAST_COMPILE, assert_close, normal, randomised
from tests.eight_devices import mesh

TOL, F32_TOL = 1e-8, 1e-5  # float64; DoRA's norm and a quantised weight are computed in float32
D, F, H, K, L = 16, 32, 4, 4, 2
wide = lambda seed, *shape: normal(seed, *shape, dtype=jnp.float64)
PARAMS = {"up": wide(1, D, F), "down": wide(2, F, D), "query": wide(3, D, H, K), "layers": wide(4, L, D, D)}
LAYOUT = {
    "up": P("data", "model"),
    "down": P("model", "data"),
    "query": P("data", "model"),
    "layers": P(None, "data", "model"),
}
X = wide(5, 8, 4, D)
METHODS = {
    "LoRA with a bias": lorax.LoRA(rank=2, alpha=3, bias=True, dtype="float64"),
    "DoRA": lorax.DoRA(rank=2, alpha=3, dtype="float64"),
    "AdaLoRA": lorax.AdaLoRA(rank=3, dtype="float64"),
    "VeRA": lorax.VeRA(rank=6, dtype="float64"),
    "LoHa": lorax.LoHa(rank=2, dtype="float64"),
    "LoKr": lorax.LoKr(rank=2, dtype="float64"),
    "IA3": lorax.IA3(dtype="float64"),
    "Bottleneck": lorax.Bottleneck(rank=3, dtype="float64"),
}


def model(out: Any) -> Callable[[Any, Any], Any]:
    """A feed-forward layer, heads and a scanned stack; `out` names the sharding of ambiguous products."""

    def einsum(sums: str, *xs: Any) -> Any:
        return jnp.einsum(sums, *xs, out_sharding=out(sums.split("->")[1])) if out else jnp.einsum(sums, *xs)

    def fn(p: Any, x: Any) -> Any:
        x = x + einsum("btf,fd->btd", jnp.tanh(einsum("btd,df->btf", x, p["up"])), p["down"])
        layer = jax.checkpoint(lambda c, w: (jnp.tanh(einsum("btd,de->bte", c, w)), None))
        return einsum("btd,dhk->bthk", lax.scan(layer, x, p["layers"])[0], p["query"])

    return fn


def step(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Value and gradients of a function of (params, adapter, x)."""
    loss = lambda t, params, adapter, x: jnp.mean(jnp.sin(fn(params, adapter.replace(params=t), x)))
    both = lambda params, adapter, x: jax.value_and_grad(loss)(adapter.params, params, adapter, x)
    return jax.jit(both, compiler_options=FAST_COMPILE)


# The first one on a quantised base. DoRA and LoKr are where fan-in and fan-out are split, and in a stack.
ROUNDS = [
    {"up": "DoRA", "down": "VeRA", "query": "LoHa", "layers": "LoKr"},
    {"up": "LoKr", "down": "AdaLoRA", "query": "IA3", "layers": "DoRA"},
]


def check(kind: AxisType, what: str) -> None:
    """On one kind of mesh, value and gradients are those of one device."""
    where = mesh(kind)
    x = jax.device_put(X, NamedSharding(where, P("data")))
    letters = {"b": "data", "h": "model", "f": "model"}
    out = (lambda axes: NamedSharding(where, P(*map(letters.get, axes)))) if kind == AxisType.Explicit else None
    sites = lorax.trace(model(None), PARAMS, X)
    assert all(s.is_adaptable for s in sites)

    def compare(name: str, rules: dict[str, Any], placed: Any, params: Any, tol: float) -> None:
        adapter = randomised(lorax.init(jax.random.key(0), lorax.Spec(rules), sites, params), scale=0.2)
        want = jax.device_get(step(lorax.adapt(model(None)))(params, adapter, X))
        with jax.set_mesh(where) if out else contextlib.nullcontext():
            got = jax.device_get(step(lorax.adapt(model(out)))(placed, adapter, x))
        assert_close(got, want, tol, name)
        print("ok", kind, name, flush=True)

    on_mesh = {n: jax.device_put(w, NamedSharding(where, LAYOUT[n])) for n, w in PARAMS.items()}
    if what == "each":
        for name, method in METHODS.items():
            compare(name, {".*": method}, on_mesh, PARAMS, F32_TOL if name == "DoRA" else TOL)
        return
    rules = [{path: METHODS[name] for path, name in methods.items()} for methods in ROUNDS]
    compare(str(ROUNDS[1]), rules[1], on_mesh, PARAMS, F32_TOL)

    quantised = lorax.quantize(PARAMS, {".*": lorax.NF4(block=4, double=False)}, sites=sites)
    put = lambda node, spec: jax.tree.map(
        lambda part, s: jax.device_put(part, NamedSharding(where, s)), node, node.partition_specs(spec, where)
    )
    placed = {n: put(node, LAYOUT[n]) for n, node in quantised.items()}
    assert not any(node.codes.sharding.is_fully_replicated for node in placed.values())
    compare("NF4 base", rules[0], placed, lorax.dequantize(quantised), F32_TOL)


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    assert X.dtype == jnp.float64
    check({"auto": AxisType.Auto, "explicit": AxisType.Explicit}[sys.argv[1]], sys.argv[2])
