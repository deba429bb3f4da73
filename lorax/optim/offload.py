"""Optimiser state in host memory."""

from __future__ import annotations

from typing import Any

import jax
import optax

from lorax import compat

HOST = "pinned_host"


def offload(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Keep an optimiser's state in host memory, and move it to the device for the update and back.

    The state's arrays have the memory kind `pinned_host` between steps, whether steps are compiled or not, and keep
    their shardings; the device holds them during the update only, and the numbers are those of `inner` bit for bit. It
    is the paged optimiser of QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3) in JAX's terms: it buys device
    memory with transfers of twice the state's bytes a step. Factors have small moments; `Full` sites have large ones.

    With params on a mesh, call `init` outside `jit`, where it sees their shardings. An array of the state that lies
    elsewhere, as a step count does, is put on all of their devices.

    A compiled step that donates the state has to donate the params too, and to return both in the order in which it got
    them, before all else. On a single device JAX (0.10 to 0.12) gives a donated buffer to the first output of its shape
    and dtype, and the process is aborted where that is in another memory. JAX 0.10.0 returns a donated state in device
    memory (0.10.2 does not).

    Args:
      inner: the optimiser.

    Returns:
      A transformation with `inner`'s state and updates.

    >>> import jax.numpy as jnp
    >>> params = {"b": jnp.ones(3)}
    >>> tx = offload(optax.adam(1e-2))
    >>> opt_state = tx.init(params)
    >>> updates, opt_state = jax.jit(tx.update)(params, opt_state, params)
    >>> {x.sharding.memory_kind for x in jax.tree.leaves(opt_state)}
    {'pinned_host'}
    """
    optimiser = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        return to_host(optimiser.init(params), like=params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, state = optimiser.update(updates, to_device(state), params, **extra)
        return updates, to_host(state)

    return optax.GradientTransformationExtraArgs(init, update)


def to_host(tree: Any, like: Any = None) -> Any:
    """Return the tree with its arrays in pinned host memory; what is no array stays as it is.

    Args:
      tree: any pytree.
      like: params on whose devices the arrays have to be: one that is elsewhere is copied to all of them.
    """
    home = next((x.sharding for x in jax.tree.leaves(like) if _has_place(x)), None)

    def move(x: Any) -> Any:
        if home is not None and _has_place(x) and x.sharding.device_set != home.device_set:
            return jax.device_put(x, _everywhere(home))
        return jax.device_put(x, jax.memory.Space.Host)

    return jax.tree.map(lambda x: move(x) if isinstance(x, jax.Array) else x, tree)


def to_device(tree: Any) -> Any:
    """Return the tree with its arrays in device memory; what is no array stays as it is."""
    move = lambda x: jax.device_put(x, jax.memory.Space.Device) if isinstance(x, jax.Array) else x
    return jax.tree.map(move, tree)


def _has_place(x: Any) -> bool:
    return isinstance(x, jax.Array) and not compat.is_traced(x)


def _everywhere(home: jax.sharding.Sharding) -> jax.sharding.Sharding:
    if isinstance(home, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(home.mesh, jax.P(), memory_kind=HOST)
    return home.with_memory_kind(HOST)
