"""Optimisers on a mesh of eight fake devices: `python -m tests.eight_devices_optim CHECK`, in a process of its own."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lorax
from lorax import optim
from lorax.methods.adalora import AdaLoRA
from tests.agreement import FAST_COMPILE, assert_close, assert_identical, normal

TOL = 1e-4  # float32, sums over devices in another order, and Adam's division by small numbers
PARAMS = {"layers": normal(1, 2, 16, 16), "heads": normal(2, 16, 4, 8)}
X = normal(3, 4, 16)
SPEC = lorax.Spec({"layers|heads": AdaLoRA(rank=4, target_rank=2)})
LAYOUT = {
    "layers": {"a": P(None, "model"), "e": P(), "b": P(None, None, "model"), "updates": P()},
    "heads": {"a": P("data"), "e": P(), "b": P(None, "model"), "updates": P()},
}


def mesh(kind: AxisType) -> Mesh:
    """A mesh of 2 × 4 devices."""
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"), axis_types=(kind,) * 2)


def fn(p: Any, x: Any) -> Any:
    """A scanned stack and heads."""
    x = lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["layers"])[0]
    return jnp.einsum("bd,dhk->bhk", x, p["heads"])


ADAPTER = lorax.init(jax.random.key(0), SPEC, lorax.trace(fn, PARAMS, X), PARAMS)


def gradients(params: Any, step: int) -> Any:
    """Made up: what counts is the optimiser."""
    leaves, tree = jax.tree.flatten(params)
    made = [jnp.sin(x * 50 + step + i) * (x.ndim > 0) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(tree, made)


def train(tx: Any, params: Any, donate: tuple[int, ...] = ()) -> tuple[Any, list[Any]]:
    """Six compiled steps, and the states between them."""

    def step(params: Any, state: Any, t: Any) -> Any:
        updates, state = tx.update(gradients(params, t), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    states = [state]
    run = jax.jit(step, compiler_options=FAST_COMPILE, donate_argnums=donate)
    for t in range(6):
        params, state = run(params, state, t)
        states.append(state)
    return params, states


def placed(where: Mesh) -> Any:
    """A copy of the trained values, laid out on a mesh."""
    put = lambda x, spec: jax.device_put(np.asarray(x), NamedSharding(where, spec))
    return jax.tree.map(put, ADAPTER.params, LAYOUT)


def check_offload(kind: AxisType) -> None:
    """Memory kinds and shardings are kept from step to step, and the numbers are those without."""
    params = placed(mesh(kind))
    want, plain = train(optax.adamw(1e-2), params)
    tx = optim.offload(optax.adamw(1e-2))
    got, states = train(tx, params)
    assert_identical(jax.device_get(got), jax.device_get(want))
    assert_identical(jax.device_get(states[-1]), jax.device_get(plain[-1]))
    for state in states:
        assert {x.sharding.memory_kind for x in jax.tree.leaves(state)} == {"pinned_host"}
        for moments in (state[0].mu, state[0].nu):
            for path, arrays in LAYOUT.items():
                for name, spec in arrays.items():
                    sharding = moments[path][name].sharding
                    whole = NamedSharding(params[path][name].sharding.mesh, spec, memory_kind="pinned_host")
                    assert sharding.is_equivalent_to(whole, moments[path][name].ndim), (path, name, sharding)
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(states[-1]))
    _, eager = tx.update(params, states[0], params)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(eager)} == {"pinned_host"}
    assert jax.tree.map(lambda x: x.sharding, eager) == jax.tree.map(lambda x: x.sharding, states[0])
    donated, last = train(tx, placed(mesh(kind)), donate=(0, 1))
    assert_identical(jax.device_get(donated), jax.device_get(want))
    assert {x.sharding.memory_kind for x in jax.tree.leaves(last[-1])} == {"pinned_host"}
    print("ok offload", kind)


def check_adalora(kind: AxisType) -> None:
    """Factors split along fan-in and fan-out give the live ranks and values of one device."""
    make = lambda: optim.adalora(optax.adam(1e-2), ADAPTER, total_steps=6, warmup_steps=1, interval=2)
    want, _ = train(make(), ADAPTER.params)
    got, states = train(optim.offload(make()), placed(mesh(kind)))
    assert_close(jax.device_get(got), jax.device_get(want), TOL)
    live = [jax.tree.leaves(optim.live_ranks(ADAPTER.replace(params=jax.device_get(p)))) for p in (got, want)]
    assert sum(int(x.sum()) for x in live[0]) == 6
    assert all(np.array_equal(g, w) for g, w in zip(*live, strict=True))
    assert {x.sharding.memory_kind for x in jax.tree.leaves(states[-1])} == {"pinned_host"}
    distance = optim.orthogonality(ADAPTER.replace(params=got))
    np.testing.assert_allclose(distance, optim.orthogonality(ADAPTER.replace(params=want)), rtol=TOL)
    print("ok adalora", kind)


CHECKS = {"offload": check_offload, "adalora": check_adalora}

if __name__ == "__main__":
    assert len(jax.devices()) == 8
    for name in sys.argv[1:]:
        for kind in (AxisType.Auto, AxisType.Explicit):
            CHECKS[name](kind)
