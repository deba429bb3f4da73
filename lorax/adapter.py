"""The adapter: the trainable partition of a model's parameters, and its views for optax."""

from __future__ import annotations

import dataclasses
import functools
import warnings
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from lorax import paths
from lorax.methods import Method
from lorax.methods.lowrank import LowRank
from lorax.sites import Site, Sites
from lorax.spec import Spec


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an adapter is, apart from its arrays: every adapted site with its method, and the spec they came from.

    That of a stack has what its members have in common, and the members'; in a selection by an array these are the
    members that were chosen from, which no longer says which of the arrays is whose.
    """

    entries: tuple[tuple[Site, Method], ...]
    spec: Spec
    members: tuple[Member, ...] = ()
    is_selection: bool = False

    def __hash__(self) -> int:  # jit asks for it at every call
        if "_hash" not in self.__dict__:
            object.__setattr__(self, "_hash", hash((self.entries, self.spec, self.members, self.is_selection)))
        return self.__dict__["_hash"]

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Plan)
            and hash(self) == hash(other)
            and self.entries == other.entries
            and self.spec == other.spec
            and self.members == other.members
            and self.is_selection == other.is_selection
        )

    @functools.cached_property
    def shared(self) -> dict[str, str]:
        """For each path whose site has arrays in common with others, the entry of `adapter.state` that holds them.

        In a stack, sites have them in common if they do in each member.
        """
        if self.members:
            names = {s.path: [m.plan.shared.get(s.path, "") for m in self.members] for s, _ in self.entries}
            return {path: _joined(of) for path, of in names.items() if any(of)}
        found = ((site.path, _shared(site, method)) for site, method in self.entries)
        return {path: entry[0] for path, entry in found if entry}


@dataclasses.dataclass(frozen=True)
class Member:
    """What one adapter of a stack is by itself: its plan, and the shapes of its arrays, `(partition, entry, name)`."""

    plan: Plan
    shapes: tuple[tuple[tuple[str, str, str], tuple[int, ...]], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """The trainable partition, a pytree.

    Attributes:
      params: `{leaf path: {array name: array}}`, what gets gradients.
      state: likewise, what does not: scales, masks, frozen projections. `adapter.state[path]["scale"]` of LoRA is an
        array, so that another alpha needs no compilation.
      plan: static: sites, methods, spec.
    """

    params: Any
    state: Any
    plan: Plan = dataclasses.field(metadata={"static": True})

    def replace(self, **changes: Any) -> Adapter:
        """Return the adapter with new values, such as `adapter.replace(params=new)`."""
        return dataclasses.replace(self, **changes)

    @property
    def sites(self) -> Sites:
        """The adapted sites."""
        return Sites([site for site, _ in self.plan.entries])

    @property
    def methods(self) -> dict[str, Method]:
        """The method of each adapted path."""
        return {site.path: method for site, method in self.plan.entries}

    @property
    def spec(self) -> Spec:
        """The spec that the adapter was made from."""
        return self.plan.spec

    def arrays(self, path: str) -> dict[str, Any]:
        """Return all arrays of one site: trained and not, its own and those that it shares with others."""
        common = self.state[self.plan.shared[path]] if path in self.plan.shared else {}
        return {**common, **self.params[path], **self.state[path]}


def init(key: jax.Array, spec: Spec, sites: Iterable[Site], params: Any) -> Adapter:
    """Make an adapter that does not change the function yet.

    Pure and traceable: it works under `jit` with output shardings, under `eval_shape`, and with abstract `params`.

    Args:
      key: PRNG key; each site draws from a key of its own, by path, so that adding a site changes no other.
      spec: which sites get which method.
      sites: from `lorax.trace`, all or some: `[s for s in sites if s.kind == "linear"]`.
      params: the base, never changed; only `Full` and initialisers that read weights look at its values.

    Returns:
      The adapter; `adapted(params, adapter, x)` equals `fn(params, x)`.

    Raises:
      TypeError: `spec` is no `Spec`, or `sites` are no sites.
      ValueError: a pattern selects nothing; `params` has other paths or shapes than `sites`.
    """
    if not isinstance(spec, Spec):
        raise TypeError(f"init(key, spec, sites, params): the spec is a {type(spec).__name__}, expected a lorax.Spec")
    sites = sites if isinstance(sites, Sites) else Sites(sites)
    chosen = spec.resolve(sites)
    leaves, _ = base_leaves(params, [sites[path] for path in chosen])
    low_rank = {p: m.rank for p, m in chosen.items() if isinstance(m, LowRank)}
    wide = [p for p, rank in low_rank.items() if rank > min(sites[p].size("I"), sites[p].size("O"))]
    if wide:
        listed = ", ".join(f"{p} {sites[p].shape}" for p in wide)
        warnings.warn(
            f"the rank is above the smaller side of {listed}: a full-rank update would be cheaper", stacklevel=2
        )
    trained, fixed = {}, {}
    for path, method in chosen.items():
        site_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        trained[path], fixed[path] = method.init(site_key, sites[path], leaves[path])
        if (common := _shared(sites[path], method)) and common[0] not in fixed:
            fixed[common[0]] = common[1]()
    return Adapter(trained, fixed, Plan(tuple((sites[p], m) for p, m in chosen.items()), spec))


def _shared(site: Site, method: Method) -> tuple[str, Callable[[], Any]] | None:
    """Return the name and the maker of what a site has in common with others; no leaf's path begins with `*`."""
    shared = method.shared(site)
    return shared and (f"*/{shared[0]}", shared[1])


def _joined(names: list[str]) -> str:
    """Return a name for what members of a stack call so; another for each way in which they do."""
    different = list(dict.fromkeys(names))
    which = [] if len(different) == 1 else [",".join(str(different.index(name)) for name in names)]
    return " ".join([*filter(None, different), *which])


def base_leaves(params: Any, sites: Iterable[Site]) -> tuple[dict[str, Any], Any]:
    """Return the base's leaves by path and its structure, after checking the sites' presence and shapes.

    Raises:
      ValueError: a path is missing or a shape differs.
    """
    leaves, tree = paths.flatten(params)
    for site in sites:
        if site.path not in leaves:
            near = ", ".join(paths.nearest(site.path, leaves)) or "the tree is empty"
            raise ValueError(
                f"{site.path}: the params have no such leaf. Nearest: {near}. Were they made for another model?"
            )
        leaf = leaves[site.path]
        got = tuple(leaf.shape) if paths.is_quantized(leaf) else tuple(jnp.shape(leaf))
        if got != site.shape:
            raise ValueError(
                f"{site.path}: the params have shape {got}, the adapter was made for {site.shape}. "
                "Trace the function with these params and make a new adapter"
            )
    return leaves, tree


def split(params: Any, adapter: Adapter) -> tuple[Any, Any]:
    """Return the frozen and the trainable partition, two pytrees without a common leaf.

    The trainable one is `adapter.params`: what optax sees and gradients are taken of.
    """
    return (params, adapter.replace(params=None)), adapter.params


def join(frozen: Any, trainable: Any) -> tuple[Any, Adapter]:
    """Undo `split`: return the params and the adapter."""
    params, rest = frozen
    return params, rest.replace(params=trainable)


def mask(params: Any, adapter: Adapter) -> tuple[Any, Adapter]:
    """Return a pytree of bools shaped like `(params, adapter)`, True where trained.

    For a train state that keeps both in one tree, with `optax.masked` or `optax.freeze`.
    """
    fill = lambda tree, value: jax.tree.map(lambda _: value, tree)
    trained = adapter.replace(params=fill(adapter.params, True), state=fill(adapter.state, False))
    return fill(params, False), trained


def labels(adapter: Adapter) -> Any:
    """Return the name of every trained array, shaped like `adapter.params`: for `optax.multi_transform`.

    LoRA's are `a` and `b`, `Full`'s is `value`.
    """
    return {path: {name: name for name in arrays} for path, arrays in adapter.params.items()}
