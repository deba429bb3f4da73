"""Where an optimiser's state lies, given where the adapter does."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding

from lorax.adapter import Adapter
from lorax.optim.members import StackedState


def shardings(opt_state: Any, adapter: Adapter, where: Adapter, *, memory_kind: str | None = None) -> Any:
    """Derive where an optimiser's state lies from where the adapter does: a moment beside its parameter.

    An array of the state belongs to the adapter's array at which its path ends (`…/leaf path/array name`) if it has its
    shape too, whatever optax transformations it is inside of; all others (counts, factored moments) are on every
    device. In a state of `lorax.optim.stacked` those are split as the members are.

    `tx.init(adapter.params)` of concrete params gives such a state by itself. This is for states made under `jit`, for
    `jax.eval_shape`, and for restoring one.

    Args:
      opt_state: `tx.init(adapter.params)` or its `jax.eval_shape`.
      adapter: concrete or abstract.
      where: from `lorax.shardings`.
      memory_kind: of all arrays, such as `"pinned_host"` for `lorax.optim.offload`; None is the device's own.

    Returns:
      The state with a sharding in place of each array.

    >>> import jax.numpy as jnp, lorax, optax
    >>> mesh = jax.sharding.AbstractMesh((2,), ("data",))
    >>> params = {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, jax.P("data")))}
    >>> sites = lorax.trace(lambda p, x: x @ p["kernel"], params, jnp.ones((2, 8)))
    >>> spec, tx = lorax.Spec({"kernel": lorax.LoRA(rank=2)}), optax.adam(1e-3)
    >>> adapter = jax.eval_shape(lambda: lorax.init(jax.random.key(0), spec, sites, params))
    >>> state = jax.eval_shape(tx.init, adapter.params)
    >>> placed = shardings(state, adapter, lorax.shardings(params, adapter))
    >>> tuple(placed[0].mu["kernel"]["a"].spec), tuple(placed[0].count.spec)
    (('data', None), ())
    """
    known = {}
    for partition in ("params", "state"):
        arrays, places = getattr(adapter, partition), getattr(where, partition)
        known |= {(path, name): (x.shape, places[path][name]) for path in arrays for name, x in arrays[path].items()}
    first = next(iter(jax.tree.leaves(where.params)))

    def place(keys: Any, x: Any, rest: jax.P) -> NamedSharding:
        names = tuple(str(getattr(k, "key", k)) for k in keys[-2:])
        shape, own = known.get(names, (None, None))
        own = own if own is not None and tuple(shape) == tuple(x.shape) else NamedSharding(first.mesh, rest)
        return own if memory_kind is None else own.with_memory_kind(memory_kind)

    def of(keys: Any, x: Any) -> Any:
        if isinstance(x, StackedState):
            members = jax.P(first.spec[0])
            return jax.tree_util.tree_map_with_path(lambda keys, leaf: place(keys, leaf, members), x)
        return place(keys, x, jax.P())

    is_leaf = lambda x: isinstance(x, StackedState)
    return jax.tree_util.tree_map_with_path(of, opt_state, is_leaf=is_leaf)
