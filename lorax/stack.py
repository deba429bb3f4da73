"""Many adapters as one: `stack`, `unstack`, `select`.

A stack is an adapter whose arrays have a leading axis, a member each. Its sites are those of all members and its ranks
the largest; what a member lacks is zero, or is marked so, in a way that training leaves it alone.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax.adapter import Adapter, Member, Plan
from lorax.methods import Method
from lorax.sites import Site
from lorax.spec import Spec

PARTITIONS = ("params", "state")
Key = tuple[str, str, str]  # partition, entry (a leaf path, or the name of what sites share), array


def stack(adapters: Iterable[Adapter]) -> Adapter:
    """Make one adapter of several, with a leading axis of members; `jax.vmap` evaluates and trains them together.

    The adapters may differ in targets, ranks and lengths (whatever a method names in `sizes`), scalings, initial values
    and dropout, without recompiling. Ranks are filled up with zeros, whose gradients are zero; where that is not so the
    state carries a mask. Each member trains as if alone, with any optimiser that is elementwise, or but for norms of a
    member's arrays or gradient (`lorax.optim.stacked`): one that asks for shapes or rows, as Adafactor and Muon do,
    sees the common shape where ranks differ. The base is no part of it: `jax.vmap(lorax.adapt(fn), in_axes=(None, 0,
    None))` keeps one product with each base weight for all members.

    Args:
      adapters: at least one, of one base and function.

    Returns:
      An adapter of the common plan; `adapter.plan.members` says what each was.

    Raises:
      ValueError: members adapt one leaf in ways that no common program evaluates (other methods, other dtypes, settings
        such as LoKr's `factor`), were traced on different params, or are stacks themselves.

    >>> import lorax, jax.numpy as jnp
    >>> fn = lambda params, x: x @ params["kernel"]
    >>> params, x = {"kernel": jnp.eye(4)}, jnp.ones((2, 4))
    >>> sites = lorax.trace(fn, params, x)
    >>> ranks = [lorax.Spec({"kernel": lorax.LoRA(rank=r)}) for r in (1, 3)]
    >>> both = stack([lorax.init(jax.random.key(0), spec, sites, params) for spec in ranks])
    >>> both.params["kernel"]["a"].shape, jax.vmap(lorax.adapt(fn), (None, 0, None))(params, both, x).shape
    ((2, 4, 3), (2, 2, 4))
    >>> [adapter.params["kernel"]["a"].shape for adapter in unstack(both)]
    [(4, 1), (4, 3)]
    """
    if isinstance(adapters, Adapter):
        raise TypeError("stack: there is one adapter alone; expected a list of them")
    members = list(adapters)
    for place, adapter in enumerate(members):
        if not isinstance(adapter, Adapter):
            raise TypeError(f"stack: number {place} is a {type(adapter).__name__}, expected an adapter of lorax.init")
        if adapter.plan.members:
            raise ValueError(f"stack: number {place} is a stack itself; give the adapters that lorax.unstack returns")
    if not members:
        raise ValueError("stack: there is no adapter")
    entries = _common_entries(members)
    spec = Spec([(re.escape(site.path), method) for site, method in entries])
    plan = Plan(entries, spec, tuple(Member(a.plan, _shapes(a)) for a in members))
    methods = {site.path: method for site, method in entries}
    columns = [_by_common_entry(a, plan, methods) for a in members]
    bonds = _bonds(plan, columns)
    trees: dict[str, dict[str, dict[str, Any]]] = {part: {s.path: {} for s, _ in entries} for part in PARTITIONS}
    for key in dict.fromkeys(key for column in columns for key in column):
        partition, entry, name = key
        _refuse_partial(key, members, columns)
        fills_with_zeros = partition == "state" or bool(methods[entry].sizes)
        arrays = [column.get(key) for column in columns]
        trees[partition].setdefault(entry, {})[name] = _stacked(key, arrays, bonds[key], fills_with_zeros)
    for path in methods:
        is_present = [path in a.params for a in members]
        if not all(is_present):
            trees["state"][path]["is_present"] = jnp.asarray(is_present)
    return Adapter(trees["params"], trees["state"], plan)


def unstack(adapter: Adapter) -> list[Adapter]:
    """Undo `stack`: return the members with their own ranks, targets and methods.

    Also takes apart what `jax.vmap` of `lorax.init` made: adapters of one plan.

    Raises:
      ValueError: it is no stack.
    """
    return [select(adapter, i) for i in range(count_members(adapter))]


def select(adapter: Adapter, index: Any) -> Adapter:
    """Return one member of a stack, or several.

    Args:
      adapter: a stack.
      index: an int gives the member as it was before it was stacked. An integer array, traced or not, gives members in
        the stack's common shape, with the array's axes in front, so that one program serves all: a scalar swaps
        adapters without recompiling, and one index an example is a batch of examples with an adapter each,
        `jax.vmap(adapted, (None, 0, 0))(params, lorax.select(stack, ids), x)`. They keep that shape when they are
        unstacked. As in JAX, a number in an array that is too high gives the last member.

    Raises:
      ValueError: it is no stack, or has no member of that number.
      TypeError: the index is neither an int nor an array.
    """
    if isinstance(index, jax.Array | np.ndarray):
        if not jnp.issubdtype(index.dtype, jnp.integer):
            raise ValueError(f"select: an index of dtype {index.dtype}; expected whole numbers")
        params, state = jax.tree.map(lambda x: jnp.asarray(x)[index], (adapter.params, adapter.state))
        return Adapter(params, state, dataclasses.replace(adapter.plan, is_selection=True))
    if not hasattr(index, "__index__"):
        raise TypeError(f"select: the index is a {type(index).__name__}, expected an int or an array of ints")
    count, place = count_members(adapter), operator.index(index)
    if not -count <= place < count:
        raise ValueError(f"select: no member {place}; the stack has {count}")
    place %= count
    if not _tells_members_apart(adapter.plan):
        return jax.tree.map(lambda x: x[place], adapter)
    member = adapter.plan.members[place]
    entry_of = {own: common for common, own in _entries(adapter.plan, member.plan).items()}
    trees: dict[str, dict[str, dict[str, Any]]] = {
        part: {s.path: {} for s, _ in member.plan.entries} for part in PARTITIONS
    }
    for (partition, entry, name), shape in member.shapes:
        array = getattr(adapter, partition)[entry_of[entry]][name][place]
        array = array[tuple(slice(n) for n in shape) if len(shape) == array.ndim else (0,) * array.ndim]
        trees[partition].setdefault(entry, {})[name] = array
    return Adapter(trees["params"], trees["state"], member.plan)


def _common_entries(members: Sequence[Adapter]) -> tuple[tuple[Site, Method], ...]:
    found: dict[str, list[tuple[int, Site, Method]]] = {}
    for place, adapter in enumerate(members):
        for site, method in adapter.plan.entries:
            found.setdefault(site.path, []).append((place, site, method))
    return tuple((listed[0][1], _common_method(path, listed)) for path, listed in found.items())


def _common_method(path: str, listed: Sequence[tuple[int, Site, Method]]) -> Method:
    first, site, method = listed[0]
    axes = lambda s: (s.shape, s.dtype, s.kind, s.fan_in, s.fan_out, s.stack)
    for place, other, its in listed:
        if axes(other) != axes(site):
            raise ValueError(
                f"{path}: adapters {first} and {place} of the stack were traced on different uses or shapes, "
                f"{axes(site)} and {axes(other)}; make all of them with the sites of one lorax.trace"
            )
        if type(its) is not type(method):
            raise ValueError(
                f"{path}: adapters {first} and {place} of the stack have {type(method).__name__} and "
                f"{type(its).__name__} there, which are different programs; stack those of one method"
            )
    try:
        return type(method).common([m for _, _, m in listed])
    except ValueError as error:
        raise ValueError(f"{path}: {error} cannot be members of one stack; stack those that agree") from None


def _entries(common: Plan, own: Plan) -> dict[str, str]:
    """Return the entries of a stack that a member has, with the member's own names of them."""
    paths = {site.path: site.path for site, _ in own.entries}
    return paths | {common.shared[path]: name for path, name in own.shared.items()}


def _arrays(adapter: Adapter) -> dict[Key, Any]:
    return {
        (partition, entry, name): x
        for partition in PARTITIONS
        for entry, arrays in getattr(adapter, partition).items()
        for name, x in arrays.items()
    }


def _shapes(adapter: Adapter) -> tuple[tuple[Key, tuple[int, ...]], ...]:
    return tuple((key, tuple(x.shape)) for key, x in _arrays(adapter).items())


def _by_common_entry(adapter: Adapter, plan: Plan, methods: Mapping[str, Method]) -> dict[Key, Any]:
    """Return a member's arrays under the stack's names, and what its state says besides."""
    own = _arrays(adapter)
    named = {
        (partition, common, name): x
        for common, entry in _entries(plan, adapter.plan).items()
        for (partition, at, name), x in own.items()
        if at == entry
    }
    for site, method in adapter.plan.entries:
        carried = method.carried(site, methods[site.path])
        named |= {("state", site.path, name): x for name, x in carried.items()}
    return named


def _refuse_partial(key: Key, members: Sequence[Adapter], columns: Sequence[Mapping[Key, Any]]) -> None:
    partition, entry, name = key
    have = [key in column for column in columns]
    should = [entry in a.params for a in members]
    if partition == "params" and have != should:
        lacking = [place for place, (has, ought) in enumerate(zip(have, should, strict=True)) if ought and not has]
        raise ValueError(f"{entry}: adapters {lacking} of the stack train no {name!r} there, and others do")


def _bonds(plan: Plan, columns: Sequence[Mapping[Key, Any]]) -> dict[Key, tuple[int, ...]]:
    """Return for each axis of each array the size of its bond in the stack: the largest of any array; 0 for others."""
    described = {site.path: (site, method) for site, method in plan.entries}
    described |= {common: described[path] for path, common in plan.shared.items()}
    labels: dict[Key, tuple[Any, ...]] = {}
    largest: dict[tuple[str, str], int] = {}
    for column in columns:
        for key, x in column.items():
            site, method = described[key[1]]
            labels[key] = method.axes(site, key[2])
            for label, size in zip(labels[key], x.shape, strict=False):  # a scalar may stand for any array
                if isinstance(label, str):
                    largest[key[1], label] = max(size, largest.get((key[1], label), 0))
    return {
        key: tuple(largest[key[1], label] if isinstance(label, str) else 0 for label in axes)
        for key, axes in labels.items()
    }


def _stacked(key: Key, arrays: Sequence[Any], bonds: Sequence[int], fills_with_zeros: bool) -> jax.Array:
    """Stack arrays of one name; those that are smaller than their bonds, or not there, are filled up."""
    there = [x for x in arrays if x is not None]
    dtypes = list(dict.fromkeys(str(x.dtype) for x in there))
    if len(dtypes) > 1:
        raise ValueError(
            f"{key[1]}: {key[2]!r} is {' and '.join(dtypes)} in adapters of one stack; give them one dtype"
        )
    largest = max(there, key=lambda x: x.ndim)
    shape = tuple(bond or size for bond, size in zip(bonds, largest.shape, strict=False))

    def filled(x: Any) -> Any:
        if x is None:
            return jnp.zeros(shape, there[0].dtype) if fills_with_zeros else filled(there[0])
        if x.ndim < len(shape):  # a scalar stands for one that is the same everywhere
            return jnp.broadcast_to(x, shape)
        return x if x.shape == shape else jnp.pad(x, [(0, n - m) for m, n in zip(x.shape, shape, strict=True)])

    return jnp.stack([filled(x) for x in arrays])


def _tells_members_apart(plan: Plan) -> bool:
    return bool(plan.members) and not plan.is_selection


def count_members(adapter: Adapter) -> int:
    """Return the number of members of a stack.

    Raises:
      TypeError: it is no adapter.
      ValueError: it has no axis of members, or is a part of a stack.
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(f"expected a stack of adapters, got a {type(adapter).__name__}")
    site, method = adapter.plan.entries[0]
    name, array = next(iter(adapter.params[site.path].items()))
    expected = len(method.axes(site, name)) + 1
    listed = f"{site.path}: {name!r} has shape {tuple(array.shape)}"
    if array.ndim != expected and not _tells_members_apart(adapter.plan):
        raise ValueError(f"{listed}, which has no axis of members; lorax.stack makes a stack of adapters")
    count = array.shape[0] if array.ndim else 0
    if _tells_members_apart(adapter.plan) and (count != len(adapter.plan.members) or array.ndim != expected):
        raise ValueError(f"{listed}, and {len(adapter.plan.members)} adapters were stacked; it is a part of a stack")
    return count
