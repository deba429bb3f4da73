"""Shardings of an adapter, derived axis by axis from those of the weights that it adapts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lorax import paths
from lorax.adapter import Adapter
from lorax.interpret.weight import Part
from lorax.methods import Method
from lorax.quant.node import weight_sharding
from lorax.sites import Site

Entry = str | tuple[str, ...] | None  # what a spec says of one axis


def shardings(params: Any, adapter: Adapter, *, members: Entry = None) -> Adapter:
    """Derive where an adapter's arrays lie from where the base lies.

    An axis that an array has in common with its weight is split as the weight's is: fan-in axes of `A`, fan-out axes of
    `B` and of magnitudes, layers and experts of both, every axis of a trained copy. The rank and other bonds are not
    split, and what sites share is split only where all of them agree. So a product with a factor needs no more
    communication than the product with the weight beside it, of `rank` columns.

    Args:
      params: the base: a pytree of arrays, abstract arrays with shardings, or shardings, also of quantised nodes. A
        leaf on no mesh counts as not split; a base that lies on one device gives a mesh of that device.
      adapter: from `init`, concrete or abstract (`jax.eval_shape`); of a stack the base's axes follow the members'.
      members: the mesh axis (or axes) over which the members of a stack are split; None: each device has all of them.

    Returns:
      The adapter with a `NamedSharding` in place of each array: for `jax.device_put`, `lorax.restore`, and
      the `out_shardings` of a jitted `init` and of a training step, whose results XLA otherwise lays out as it likes
      where mesh axes are not explicit. `lorax.optim.shardings` has the optimiser state's.

    Raises:
      ValueError: no leaf lies anywhere (numpy, or abstract without shardings); a leaf is missing or of another shape
        than the adapter's site; `members` is given without a stack, or splits a weight already.

    >>> import jax.numpy as jnp, lorax
    >>> mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
    >>> fn = lambda params, x: x @ params["kernel"]
    >>> kernel = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=NamedSharding(mesh, jax.P("data", "model")))
    >>> sites = lorax.trace(fn, {"kernel": kernel}, jax.ShapeDtypeStruct((2, 16), jnp.float32))
    >>> make = lambda key: lorax.init(key, lorax.Spec({"kernel": lorax.LoRA(rank=4)}), sites, {"kernel": kernel})
    >>> adapter = jax.eval_shape(make, jax.random.key(0))
    >>> where = shardings({"kernel": kernel}, adapter)
    >>> [tuple(where.params["kernel"][name].spec) for name in "ab"]
    [('data', None), (None, 'model')]
    """
    held, mesh = _of_base(params, adapter)
    lead = _leading_axes(adapter)
    if members is not None and not lead:
        raise ValueError(f"shardings: members={members!r} is for a stack, and this adapter is none; see lorax.stack")
    front = (members, *[None] * (lead - 1)) if lead else ()
    trained, fixed, shared = {}, {}, {}
    for site, method in adapter.plan.entries:
        own = held[site.path] or NamedSharding(mesh, jax.P())
        _refuse_used(site, own, members)
        trained[site.path] = _placed(adapter.params[site.path], site, method, own, front)
        fixed[site.path] = _placed(adapter.state[site.path], site, method, own, front)
        if (name := adapter.plan.shared.get(site.path)) is not None:
            mine = _placed(adapter.state[name], site, method, own, front)
            shared[name] = {n: _common(shared[name][n], s) for n, s in mine.items()} if name in shared else mine
    return adapter.replace(params=trained, state=fixed | shared)


def _of_base(params: Any, adapter: Adapter) -> tuple[dict[str, NamedSharding | None], Any]:
    """Return the sharding of each adapted leaf, None where it lies on no mesh, and a mesh that some leaf lies on."""
    leaves, _ = paths.flatten(params)
    held: dict[str, NamedSharding | None] = {}
    ranks = {site.path: len(site.shape) for site in adapter.sites}
    for path, leaf in leaves.items():
        if paths.is_quantized(leaf):
            held[path] = weight_sharding(leaf, ranks.get(path, len(leaf.slice_shape)))
            continue
        sharding = leaf if isinstance(leaf, jax.sharding.Sharding) else getattr(leaf, "sharding", None)
        held[path] = sharding if isinstance(sharding, NamedSharding) else None
    for site in adapter.sites:
        if site.path not in leaves:
            near = ", ".join(paths.nearest(site.path, leaves)) or "the tree is empty"
            raise ValueError(
                f"{site.path}: the adapter has this site, and the params have no such leaf. Nearest: {near}"
            )
        leaf = leaves[site.path]
        shape = None if isinstance(getattr(leaf, "codes", leaf), jax.sharding.Sharding) else leaf.shape
        if shape is not None and tuple(shape) != site.shape:
            raise ValueError(
                f"{site.path}: the params have shape {tuple(shape)}, the adapter was made for {site.shape}"
            )
    meshes = [sharding.mesh for sharding in held.values() if sharding is not None]
    return held, meshes[0] if meshes else _of_one_device(leaves.values())


def _of_one_device(leaves: Iterable[Any]) -> Mesh:
    """Return a mesh of the one device on which leaves lie that are on no mesh."""
    found = (getattr(x, "sharding", None) for leaf in leaves for x in jax.tree.leaves(leaf))
    devices = next((s.device_set for s in found if isinstance(s, jax.sharding.Sharding)), set())
    if len(devices) != 1:
        raise ValueError(
            "shardings: no leaf of the params lies on a mesh or a device. Put them on one first, such as with "
            "jax.device_put(params, jax.NamedSharding(mesh, jax.P())), or give their shardings"
        )
    return Mesh(np.array(list(devices)), ("device",))


def _leading_axes(adapter: Adapter) -> int:
    """How many axes an array has in front of those that its method describes: the members of a stack."""
    site, method = adapter.plan.entries[0]
    name, array = next(iter(adapter.params[site.path].items()))
    return len(array.shape) - len(method.axes(site, name))


def _placed(
    arrays: Mapping[str, Any], site: Site, method: Method, own: NamedSharding, front: tuple[Entry, ...]
) -> dict[str, NamedSharding]:
    """Return where the arrays of a site lie, given where its weight does."""
    entries = _entries(own, site)

    def spec(name: str, ndim: int) -> jax.P:
        axes = method.axes(site, name)
        if ndim != len(front) + len(axes):  # a scalar stands for an array that is the same everywhere
            axes = (None,) * (ndim - len(front))
        return jax.P(*front, *(_entry(axis, entries, own.mesh) for axis in axes))

    return {name: NamedSharding(own.mesh, spec(name, len(x.shape))) for name, x in arrays.items()}


def _entries(own: NamedSharding, site: Site) -> list[Entry]:
    return [*own.spec, *[None] * (len(site.shape) - len(own.spec))]


def _entry(axis: Any, entries: list[Entry], mesh: Any) -> Entry:
    """What an array's spec says of an axis: one of the weight's, a part of one, or a bond."""
    if isinstance(axis, int):
        return entries[axis]
    if isinstance(axis, Part) and axis.which == 0 and axis.size % _ways(entries[axis.axis], mesh) == 0:
        return entries[axis.axis]  # of the slow part, neighbours are on one device, as in the weight
    return None


def _ways(entry: Entry, mesh: Any) -> int:
    return math.prod(mesh.shape[name] for name in _names(entry))


def _names(entry: Entry) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def _common(one: NamedSharding, other: NamedSharding) -> NamedSharding:
    """Split what sites share where they agree."""
    return NamedSharding(one.mesh, jax.P(*(a if a == b else None for a, b in zip(one.spec, other.spec, strict=True))))


def _refuse_used(site: Site, own: NamedSharding, members: Entry) -> None:
    used = {name for entry in own.spec for name in _names(entry)}
    if taken := used & set(_names(members)):
        raise ValueError(
            f"{site.path}: the mesh axis {min(taken)!r} splits this weight, so members cannot be split over it too; "
            "give the stack an axis of its own"
        )
