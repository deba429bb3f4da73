"""A run that saves a step after another until it is killed: `python -m tests.checkpoint_writer DIRECTORY`.

Prints each step's number when it has started to save it.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lorax
from lorax.checkpoint import TrainCheckpoints

PARAMS = {"up": jnp.arange(64 * 128.0).reshape(64, 128) / 8192, "down": jnp.ones((128, 64)) / 128}
TX = optax.adamw(1e-2)


def fn(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["up"]) @ p["down"]


def start() -> tuple[Any, Any]:
    """The first adapter and optimiser state."""
    sites = lorax.trace(fn, PARAMS, jnp.ones((2, 64)))
    adapter = lorax.init(jax.random.key(0), lorax.Spec({".*": lorax.LoRA(rank=64)}), sites, PARAMS)
    return adapter, TX.init(adapter.params)


@jax.jit
def train(adapter: Any, opt_state: Any, key: Any) -> tuple[Any, Any]:
    """A step on a batch that the key draws."""
    x_BxD = jax.random.normal(key, (4, 64))
    loss = lambda p: jnp.mean((lorax.adapt(fn)(PARAMS, adapter.replace(params=p), x_BxD) - 1.0) ** 2)
    updates, opt_state = TX.update(jax.grad(loss)(adapter.params), opt_state, adapter.params)
    return adapter.replace(params=optax.apply_updates(adapter.params, updates)), opt_state


def main() -> None:
    """Train and save until killed."""
    (adapter, opt_state), key = start(), jax.random.key(1)
    checkpoints = TrainCheckpoints(sys.argv[1], keep=100)
    for step in range(1, 10_000):
        key, batch_key = jax.random.split(key)
        adapter, opt_state = train(adapter, opt_state, batch_key)
        checkpoints.save(step, adapter, opt_state=opt_state, base=PARAMS, rng=key, data_state={"position": step})
        print(step, flush=True)


if __name__ == "__main__":
    main()
