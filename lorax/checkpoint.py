"""Checkpoints that hold the adapter only: `save`, `restore`, and `TrainCheckpoints` for a run that may be killed.

A checkpoint is an orbax directory with two items: `arrays`, a flat dict of named tensors, and `lorax`, a JSON document
with everything else: the spec, the sites and methods, digests of the base and of every tensor, versions, metadata.
Orbax writes into a temporary directory and renames it when complete, so a crash leaves what was there before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lorax.adapter import Adapter, Member, Plan
from lorax.fingerprint import digests
from lorax.methods.base import METHODS, Method
from lorax.sites import Site, SiteUse
from lorax.spec import Spec
from lorax.version import __version__

FORMAT = 1


def save(
    path: str | os.PathLike[str], adapter: Adapter, *, base: Any, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write an adapter to a new directory.

    Args:
      path: the directory; it must not exist, or be empty.
      adapter: the adapter.
      base: the params it was trained on; their paths, shapes, dtypes and a digest of their contents are recorded.
      metadata: anything that JSON can hold.

    Raises:
      ValueError: the directory is in use, or the metadata is no JSON.
    """
    path = os.path.abspath(path)
    if os.path.isdir(path) and os.listdir(path):
        raise ValueError(f"{path} is in use: nothing was written. Choose another directory, or remove it first")
    arrays = _adapter_arrays(adapter)
    document = _document(adapter, arrays, digests(base), metadata)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, _items(arrays, document), force=os.path.isdir(path))


def restore(path: str | os.PathLike[str], *, base: Any, shardings: Any = None) -> Adapter:
    """Read an adapter; the directory and the base are all it takes.

    Args:
      path: a directory that `save` wrote.
      base: the params the adapter was trained on, arrays on any mesh.
      shardings: where to put the adapter's arrays: an adapter-shaped pytree of shardings, or one sharding for all;
        None is the default device.

    Returns:
      The adapter that was saved.

    Raises:
      ValueError: the directory holds no adapter or a damaged one, a tensor is missing, extra or edited, the base is
        not the one it was trained on, or a method is not registered. The message names what differs.
    """
    path = os.path.abspath(path)
    document = _read_document(path)
    _same_base(path, document["base"], digests(base))
    plan = _plan(path, document)
    arrays = _read_arrays(path, document, _placed(plan, document, shardings))
    return _adapter(plan, arrays)


def metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the metadata that was saved with an adapter, and the versions that saved it, without reading arrays."""
    path = os.path.abspath(path)
    document = _read_document(path)
    return {"metadata": document["metadata"], "versions": document["versions"]}


@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a training checkpoint holds."""

    step: int
    adapter: Adapter
    opt_state: Any
    rng: Any
    data_state: Any
    metadata: dict[str, Any]


class TrainCheckpoints:
    """The checkpoints of one run: adapter, optimiser state, step, RNG and data position, saved in the background.

    A step is there whole or not at all, whenever the process is killed. The base's digest is computed once.

    Args:
      directory: the run's checkpoint directory.
      keep: how many steps to keep, the newest ones.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 3) -> None:
        self.directory = os.path.abspath(directory)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=("arrays", "lorax"))
        self._base: tuple[Any, dict[str, Any]] | None = None

    def save(
        self,
        step: int,
        adapter: Adapter,
        *,
        opt_state: Any,
        base: Any,
        rng: Any = None,
        data_state: Any = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Start saving a step and return; what is passed may be donated or changed at once.

        Args:
          step: number of completed steps; a step that is there already is left alone.
          adapter: the adapter.
          opt_state: the optimiser's state, any pytree of arrays.
          base: the params.
          rng: a PRNG key (typed or raw), or any pytree of arrays.
          data_state: the data iterator's position, JSON.
          metadata: anything that JSON can hold.
        """
        if step in self._manager.all_steps():
            return
        arrays = {**_adapter_arrays(adapter), **_named("opt_state", opt_state), **_named("rng", rng)}
        keys = {name: str(jax.random.key_impl(x)) for name, x in arrays.items() if _is_key(x)}
        arrays = {name: jax.random.key_data(x) if name in keys else jnp.copy(x) for name, x in arrays.items()}
        more = {"step": step, "data_state": data_state, "keys": keys}
        document = _document(adapter, arrays, self._digests(base), metadata, **more)
        self._manager.save(step, args=_items(arrays, document))

    def latest_step(self) -> int | None:
        """Return the newest complete step, or None."""
        return self._manager.latest_step()

    def restore(
        self, *, base: Any, opt_state_like: Any, rng_like: Any = None, step: int | None = None, shardings: Any = None
    ) -> TrainState:
        """Read a step.

        Args:
          base: the params, which have to be those the run was started on.
          opt_state_like: an optimiser state of the same structure, such as `tx.init(adapter.params)` or its
            `jax.eval_shape`; its arrays' shardings, where they have any, are used.
          rng_like: likewise for `rng`; None is a typed key of JAX's default implementation, if one was saved.
          step: which one; None is the newest.
          shardings: of the adapter, as in `restore`.

        Raises:
          ValueError: there is no such step, or what `restore` raises.
        """
        step = self.latest_step() if step is None else step
        if step is None or step not in self._manager.all_steps():
            there = self._manager.all_steps()
            wanted = "" if step is None else f" {step}"
            raise ValueError(f"{self.directory}: no complete step{wanted}; there are {there}")
        path = os.path.join(self.directory, str(step))
        document = _read_document(path)
        _same_base(path, document["base"], self._digests(base))
        plan = _plan(path, document)
        if rng_like is None and "rng" in document["arrays"]:
            rng_like = jax.eval_shape(lambda: jax.random.key(0))
        likes = {**_named("opt_state", opt_state_like, abstract=True), **_named("rng", rng_like, abstract=True)}
        where = _placed(plan, document, shardings) | {name: _chosen_sharding(x) for name, x in likes.items()}
        _same_names(path, {n for n in document["arrays"] if not n.startswith(("params/", "state/"))}, set(likes))
        arrays = _read_arrays(path, document, where)
        return TrainState(
            step,
            _adapter(plan, arrays),
            _filled("opt_state", opt_state_like, arrays),
            _filled("rng", rng_like, arrays),
            document["data_state"],
            document["metadata"],
        )

    def wait(self) -> None:
        """Wait until everything that was started is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait and release the background threads."""
        self._manager.close()

    def _digests(self, base: Any) -> dict[str, Any]:
        leaves = jax.tree.leaves(base)
        if self._base is None or any(a is not b for a, b in zip(self._base[0], leaves, strict=True)):
            self._base = leaves, digests(base)
        return self._base[1]


def _items(arrays: Mapping[str, Any], document: Mapping[str, Any]) -> Any:
    # What each of several processes has for itself, such as a key or a step count, is the same in all: one writes it.
    is_own = lambda x: jax.process_count() > 1 and isinstance(x, jax.Array) and x.is_fully_addressable
    arrays = {name: np.asarray(x) if is_own(x) else x for name, x in arrays.items()}
    return ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), lorax=ocp.args.JsonSave(dict(document)))


def _adapter_arrays(adapter: Adapter) -> dict[str, Any]:
    return {
        f"{partition}/{path}/{name}": x
        for partition in ("params", "state")
        for path, arrays in getattr(adapter, partition).items()
        for name, x in arrays.items()
    }


def _adapter(plan: Plan, arrays: Mapping[str, Any]) -> Adapter:
    take = lambda part, path: {
        n.rpartition("/")[2]: x for n, x in arrays.items() if n.rpartition("/")[0] == f"{part}/{path}"
    }
    paths = [s.path for s, _ in plan.entries]
    found = {part: {path: take(part, path) for path in paths} for part in ("params", "state")}
    found["state"] |= {name: take("state", name) for name in plan.shared.values()}
    return Adapter(found["params"], found["state"], plan)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _chosen_sharding(like: Any) -> Any:
    """Return the sharding of an array that was put somewhere on purpose, or None."""
    return getattr(like, "sharding", None) if getattr(like, "committed", True) else None


def _named(prefix: str, tree: Any, abstract: bool = False) -> dict[str, Any]:
    keyed, _ = jax.tree_util.tree_flatten_with_path(tree)
    leaf = (lambda x: x) if abstract else jnp.asarray
    return {prefix + jax.tree_util.keystr(keys): leaf(x) for keys, x in keyed}


def _filled(prefix: str, like: Any, arrays: Mapping[str, Any]) -> Any:
    keyed, tree = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree.unflatten(tree, [arrays[prefix + jax.tree_util.keystr(keys)] for keys, _ in keyed])


def _document(
    adapter: Adapter,
    arrays: Mapping[str, Any],
    base: Mapping[str, Any],
    metadata: Mapping[str, Any] | None,
    **more: Any,
) -> dict[str, Any]:
    document = {
        "format": FORMAT,
        "versions": {"lorax": __version__, "jax": jax.__version__, "orbax": ocp.__version__},
        **_described_plan(adapter.plan),
        "base": dict(base),
        "arrays": digests(dict(arrays)),
        "metadata": dict(metadata or {}),
        **more,
    }
    try:
        document = json.loads(json.dumps(document))
    except TypeError as error:
        raise ValueError(f"the metadata cannot be written as JSON: {error}") from error
    return {**document, "digest": _json_digest(document)}


def _json_digest(document: Mapping[str, Any]) -> str:
    rest = {k: v for k, v in document.items() if k != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _described_plan(plan: Plan) -> dict[str, Any]:
    described: dict[str, Any] = {
        "spec": [[pattern, _described(method)] for pattern, method in plan.spec.rules],
        "sites": [[dataclasses.asdict(site), _described(method)] for site, method in plan.entries],
    }
    if plan.members:
        described["members"] = [{**_described_plan(m.plan), "shapes": m.shapes} for m in plan.members]
    if plan.is_selection:
        described["is_selection"] = True
    return described


def _described(method: Method | None) -> dict[str, Any] | None:
    return None if method is None else {"method": type(method).__name__, **dataclasses.asdict(method)}  # type: ignore[call-overload]


def _method(path: str, described: Mapping[str, Any] | None) -> Any:
    if described is None:
        return None
    settings = dict(described)
    name = settings.pop("method")
    if name not in METHODS:
        raise ValueError(
            f"{path}: its method {name} is not registered (known: {', '.join(METHODS)}). Import what defines it"
        )
    known = {f.name for f in dataclasses.fields(METHODS[name])}  # type: ignore[arg-type]
    if unknown := sorted(set(settings) - known):
        raise ValueError(
            f"{path}: {name} has no setting {', '.join(unknown)} in this version of lorax; it has {sorted(known)}"
        )
    return METHODS[name](**settings)


def _plan(path: str, document: Mapping[str, Any]) -> Plan:
    def fields(d: dict[str, Any]) -> dict[str, Any]:
        return {k: tuple(v) if isinstance(v, list) else v for k, v in d.items()}

    def site(d: dict[str, Any]) -> Site:
        return Site(**fields({**d, "uses": [SiteUse(**fields(u)) for u in d["uses"]]}))

    entries = tuple((site(s), _method(path, m)) for s, m in document["sites"])
    spec = Spec([(pattern, _method(path, m)) for pattern, m in document["spec"]])
    shapes = lambda listed: tuple((tuple(key), tuple(shape)) for key, shape in listed)
    members = (Member(_plan(path, m), shapes(m["shapes"])) for m in document.get("members", ()))
    return Plan(entries, spec, tuple(members), document.get("is_selection", False))


def _read_document(path: str) -> dict[str, Any]:
    file = os.path.join(path, "lorax", "metadata")
    if not os.path.isfile(file):
        raise ValueError(f"{path}: no lorax checkpoint is here ({file} is missing)")
    try:
        with open(file, encoding="utf-8") as f:
            document = json.load(f)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if document.get("format", 0) > FORMAT:
        raise ValueError(
            f"{path}: format {document['format']} is newer than this lorax reads ({FORMAT}): upgrade lorax"
        )
    if document.get("digest") != _json_digest(document):
        raise ValueError(f"{file} was changed after it was written: its digest does not fit its contents")
    return document


def _same_base(path: str, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    if saved == given:
        return
    rows = [f"{p}: only in the {'saved' if p in saved else 'given'} base" for p in sorted(saved.keys() ^ given.keys())]
    for p in sorted(saved.keys() & given.keys()):
        for what in ("shape", "dtype", "digest"):
            if saved[p][what] != given[p][what]:
                name = "contents" if what == "digest" else what
                rows.append(f"{p}: {name} {saved[p][what]} when saved, {given[p][what]} now")
                break
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    raise ValueError(
        f"{path}: the base is not the one the adapter was trained on ({'; '.join(rows[:5])}{more}). Load that one"
    )


def _same_names(path: str, saved: set[str], wanted: set[str]) -> None:
    if saved != wanted:
        missing, extra = sorted(wanted - saved), sorted(saved - wanted)
        raise ValueError(f"{path}: missing tensors {missing[:8]}, extra tensors {extra[:8]}")


def _placed(plan: Plan, document: Mapping[str, Any], shardings: Any) -> dict[str, Any]:
    """Return the sharding of each of the adapter's arrays."""
    names = [n for n in document["arrays"] if n.startswith(("params/", "state/"))]
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        return dict.fromkeys(names, shardings)
    where = _adapter_arrays(shardings)
    _same_names("shardings", set(where), set(names))
    return where


def _read_arrays(path: str, document: Mapping[str, Any], where: Mapping[str, Any]) -> dict[str, Any]:
    described = document["arrays"]
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    targets = {
        name: jax.ShapeDtypeStruct(tuple(d["shape"]), jnp.dtype(d["dtype"]), sharding=where.get(name) or default)
        for name, d in described.items()
    }
    handler = ocp.CompositeCheckpointHandler(arrays=ocp.StandardCheckpointHandler(), lorax=ocp.JsonCheckpointHandler())
    with ocp.Checkpointer(handler) as checkpointer:
        try:
            items: Any = checkpointer.metadata(path).item_metadata
            on_disk = set(items["arrays"].tree)
        except Exception as error:  # orbax and tensorstore raise many kinds for damaged files
            raise ValueError(f"{path} is damaged: {error}") from error
        _same_names(path, on_disk, set(described))
        try:
            args = ocp.args.Composite(arrays=ocp.args.StandardRestore(targets))
            arrays = checkpointer.restore(path, args=args)["arrays"]
        except Exception as error:  # as above
            raise ValueError(f"{path} is damaged: a tensor cannot be read: {error}") from error
    # Without a sharding, an array is as `init` leaves it: on the default device, free to follow others elsewhere.
    arrays = {name: x if where.get(name) else jnp.asarray(np.asarray(x)) for name, x in arrays.items()}
    now = digests(arrays)
    if edited := [name for name in described if now[name] != described[name]]:
        raise ValueError(f"{path}: tensors were changed after they were saved: {', '.join(edited[:8])}")
    keys = document.get("keys", {})
    return {name: jax.random.wrap_key_data(x, impl=keys[name]) if name in keys else x for name, x in arrays.items()}
