"""One process or many: how they start, the mesh over all their devices, and who does what only one should do.

Every process runs the same script. What is computed on the mesh they compute together; files are written by the main
process alone, and what it reads or decides is told to the others, so that all go the same way.
"""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from ml_collections import config_dict

from experiments import data
from experiments.models import partition
from experiments.training import step

# A process that says nothing for so long counts as dead, and the others end; well inside a minute.
HEARTBEAT_S = 30

T = TypeVar("T")


def start(coordinator: str, processes: int, process: int) -> None:
    """Join the other processes of a run; to be called before anything else of JAX.

    Args:
        coordinator: address of the first process, `host:port`; "auto" where the cluster tells (TPU pods, Slurm, Open
            MPI, Kubernetes: see `jax.distributed.initialize`).
        processes: how many there are.
        process: the number of this one, from 0.

    Raises:
        ValueError: for an incomplete or impossible description.
    """
    if coordinator == "auto":
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_S)
        return
    if ":" not in coordinator or processes < 1 or not 0 <= process < processes:
        raise ValueError(
            f"--coordinator={coordinator} --processes={processes} --process={process}: wanted the address host:port of "
            "process 0, the number of processes, and which of them this is, from 0"
        )
    jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT_S)


def is_main() -> bool:
    """Whether this process writes the files."""
    return jax.process_index() == 0


def from_main(make: Callable[[], T]) -> T:
    """Return what `make` returns in the main process, which alone calls it, in all processes.

    Args:
        make: returns what JSON can hold.

    Raises:
        ValueError: in all processes, if `make` raises one in the main process.
    """
    if jax.process_count() == 1:
        return make()
    told: dict[str, Any] = {}
    if is_main():
        try:
            told = {"value": make()}
        except ValueError as error:
            told = {"error": str(error)}
    text = np.frombuffer(json.dumps(told).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = multihost_utils.broadcast_one_to_all(text if is_main() else np.zeros(size, np.uint8))
    told = json.loads(bytes(np.asarray(text)))
    if "error" in told:
        raise ValueError(told["error"])
    return told["value"]


def mesh(settings: config_dict.ConfigDict, over: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of `config.mesh` over the devices of all processes, or over others.

    Raises:
        ValueError: if the axes do not multiply to the number of devices.
    """
    sizes = [settings[name] for name in partition.AXES]
    over = jax.devices() if over is None else over
    count = len(over)
    others = math.prod(size for size in sizes if size)
    if sizes.count(0) > 1 or min(sizes) < 0 or count % others or (0 not in sizes and others != count):
        raise ValueError(
            f"config.mesh = {dict(zip(partition.AXES, sizes, strict=True))}: wanted sizes that multiply to the "
            f"{count} devices there are; 0, once at most, is what is left of them"
        )
    shape = tuple(size or count // others for size in sizes)
    return jax.make_mesh(shape, partition.AXES, axis_types=(AxisType.Auto,) * len(shape), devices=over)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device has whole."""
    return NamedSharding(mesh, jax.P())


def whole(tree: Any) -> Any:
    """Return arrays on a mesh as numpy arrays in every process; small ones, such as an adapter's."""
    together = lambda x: multihost_utils.process_allgather(x, tiled=True) if not x.is_fully_addressable else x
    return jax.tree.map(lambda x: np.asarray(together(x)), tree)


def parts_sharding(mesh: Mesh) -> NamedSharding:
    """Return where the arrays of a batch lie, with the axes part, row of the part, and others."""
    return NamedSharding(mesh, jax.P(None, partition.ROWS))


class Shares:
    """Which rows of a batch are a process's own: those that its devices work on.

    Args:
        mesh: rows are split over its axes data and fsdp.
        parts: into how many parts, one after the other, a batch is cut first.
    """

    def __init__(self, mesh: Mesh, parts: int):
        """Keep the sharding of arrays with the axes part, row of the part, and others."""
        self._sharding, self._parts = parts_sharding(mesh), parts
        self._ways = math.prod(mesh.shape[name] for name in partition.ROWS)

    def rows(self, count: int) -> list[int]:
        """Return the numbers of this process's rows of a batch of `count`, in order.

        Raises:
            ValueError: if the rows do not divide into the parts and then over the devices.
        """
        if count % (self._parts * self._ways):
            raise ValueError(
                f"a batch of {count} rows does not divide into config.train.accumulate = {self._parts} parts, and "
                f"these over {self._ways} devices along {' and '.join(partition.ROWS)}; change config.train.rows, "
                "the row lengths, or config.mesh"
            )
        own = self._own(count)
        return [part * (count // self._parts) + row for part in range(self._parts) for row in own]

    def batch(self, own: data.Batch, count: int) -> dict[str, jax.Array]:
        """Return global arrays (A, B / A, …) of a batch of which every process gives its own rows."""
        place = {row: i for i, row in enumerate(self._own(count))}

        def whole(x: np.ndarray) -> jax.Array:
            def cut(index: Sequence[slice]) -> np.ndarray:
                rows = range(*index[1].indices(count // self._parts))
                return x[:, [place[row] for row in rows]]

            shape = (self._parts, count // self._parts, *x.shape[2:])
            return jax.make_array_from_callback(shape, self._sharding, cut)

        return {name: whole(x) for name, x in step.split_batch(own, self._parts).items()}

    def told(self, is_told: bool) -> jax.Array | None:
        """Return for every device whether its process was told to stop; None where there is one process."""
        if jax.process_count() == 1:
            return None
        mesh = self._sharding.mesh
        each = NamedSharding(mesh, jax.P(mesh.axis_names))
        return jax.make_array_from_callback((mesh.size,), each, lambda index: np.full(1, is_told))

    def _own(self, count: int) -> list[int]:
        shape = (self._parts, count // self._parts)
        parts = self._sharding.addressable_devices_indices_map(shape).values()
        return sorted({row for index in parts if index for row in range(*index[1].indices(shape[1]))})
