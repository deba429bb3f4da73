"""Stacks over a mesh axis of their own, on eight fake devices: `python -m tests.eight_devices_stack KIND`."""

import re
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
from tests.agreement import FAST_COMPILE, assert_close, normal

TOL = 1e-4  # float32, and Adam's division by small numbers
PARAMS = {"layers": normal(1, 2, 16, 16), "head": normal(2, 16, 8)}
X, Y = normal(3, 8, 16), normal(4, 8, 8)
REPLICATED = P()
RATES = [1e-3, 3e-3, 1e-2, 3e-2] * 2


def fn(p: Any, x: Any) -> Any:
    """A scanned stack and a head."""
    return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["layers"])[0] @ p["head"]


def members() -> list[lorax.Adapter]:
    """Eight adapters of several ranks and targets."""
    sites = lorax.trace(fn, PARAMS, X)
    specs = [lorax.Spec({target: lorax.DoRA(rank=r)}) for r in (1, 4) for target in ("layers", "head", ".*", "layers")]
    return [lorax.init(jax.random.key(i), spec, sites, PARAMS) for i, spec in enumerate(specs)]


def step(tx: Any, axis: str | None) -> Any:
    """A compiled step of all members: `(params, stack, state, x, y) -> (stack, state, losses)`."""

    def loss(trained: Any, adapter: Any, params: Any, x: Any, y: Any) -> Any:
        return jnp.mean((lorax.adapt(fn)(params, adapter.replace(params=trained), x) - y) ** 2)

    def run(params: Any, stack: Any, state: Any, x: Any, y: Any) -> Any:
        each = jax.vmap(jax.value_and_grad(loss), (0, 0, None, None, None), spmd_axis_name=axis)
        losses, grads = each(stack.params, stack, params, x, y)
        updates, state = tx.update(grads, state, stack.params, value=losses)
        return stack.replace(params=optax.apply_updates(stack.params, updates)), state, losses

    return run


def train(mesh: Mesh | None, data: P = REPLICATED) -> tuple[Any, Any, Any]:
    """Five steps; where there is a mesh, with its members along the mesh's first axis. Return the compiled step too."""
    stack, params, x, y = lorax.stack(members()), PARAMS, X, Y
    tx = lorax.optim.stacked(lambda adapter, learning_rate: optax.adam(learning_rate), stack, learning_rate=RATES)
    state = tx.init(stack.params)
    run = step(tx, "member" if mesh is not None else None)
    if mesh is not None:
        put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
        stack, state, params, x, y = (
            put(stack, P("member")),
            put(state, P("member")),
            put(params, P()),
            put(x, data),
            put(y, data),
        )
    compiled = jax.jit(run).lower(params, stack, state, x, y).compile(FAST_COMPILE)
    for _ in range(5):
        stack, state, losses = compiled(params, stack, state, x, y)
    return stack, losses, compiled


def main(kind: str) -> None:
    """Compare with one device; see that members do not communicate."""
    types = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
    plain, plain_losses, _ = train(None)
    for shape, data in (((8, 1), REPLICATED), ((4, 2), P("data"))):
        mesh = Mesh(np.array(jax.devices()).reshape(shape), ("member", "data"), axis_types=(types[kind],) * 2)
        stack, losses, compiled = train(mesh, data)
        assert_close(np.asarray(losses), np.asarray(plain_losses), TOL)
        assert_close(jax.tree.map(np.asarray, stack.params), jax.tree.map(np.asarray, plain.params), TOL)
        for x in jax.tree.leaves(stack.params):
            assert x.sharding.shard_shape(x.shape)[0] == x.shape[0] // shape[0], x.sharding
        collectives = re.findall(r"all-reduce|all-gather|all-to-all|collective-permute", compiled.as_text())
        # Members with devices to themselves exchange nothing; over split data they sum their own gradients.
        assert bool(collectives) == (shape[1] > 1), collectives
        print(f"ok {kind} {shape}")


if __name__ == "__main__":
    main(sys.argv[1])
