"""How the models' parameters and activations are split over a mesh with the axes data, fsdp and tensor.

Parameters: fully sharded (fsdp) along the width of the residual stream, tensor parallel (tensor) along heads, the inner
width of feed-forwards, and the vocabulary. Activations: rows over data and fsdp, so that a device that holds a part of
the weights also works on a part of the batch. The models know nothing of adapters, nor of processes.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

import lorax

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")

# Leaf paths, matched as a whole, and the mesh axes of a leaf's last axes; an axis in front (layers) is not split.
_RULES = (
    (r"(.*/)?embed(/tokens)?/embedding", ("tensor", "fsdp")),
    (r"(.*/)?attn/(query|key|value)/kernel", ("fsdp", "tensor", None)),
    (r"(.*/)?attn/(query|key|value)/bias", ("tensor", None)),
    (r"(.*/)?attn/out/kernel", ("tensor", None, "fsdp")),
    (r"(.*/)?mlp/(gate|up)/kernel", ("fsdp", "tensor")),
    (r"(.*/)?mlp/(gate|up)/bias", ("tensor",)),
    (r"(.*/)?mlp/down/kernel", ("tensor", "fsdp")),
    (r"(.*/)?head/kernel", ("fsdp", "tensor")),
)


def spec(path: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> jax.P:
    """Return how a parameter is split.

    Args:
        path: the leaf's path.
        shape: its shape.
        sizes: devices along each axis of the mesh. An axis that does not divide a dimension evenly does not split it.

    >>> tuple(spec("layers/attn/key/kernel", (2, 64, 2, 16), {"fsdp": 4, "tensor": 4}))
    (None, 'fsdp', None, None)
    """
    names = next((names for pattern, names in _RULES if re.fullmatch(pattern, path)), ())
    names = (*[None] * (len(shape) - len(names)), *names)
    return jax.P(*(name if name and size % sizes[name] == 0 else None for name, size in zip(names, shape, strict=True)))


def places(mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Return the function of a parameter's path and shape that says where it lies."""
    return lambda path, shape: NamedSharding(mesh, spec(path, shape, mesh.shape))


def shardings(params: Any, mesh: Mesh) -> Any:
    """Return a sharding for every leaf of nested dicts of arrays, and for every child of a quantised leaf."""
    leaves: dict[str, Any] = flax.traverse_util.flatten_dict(params, sep="/")
    where = {path: places(mesh)(path, x.shape) for path, x in leaves.items()}
    return lorax.quant.shardings(params, flax.traverse_util.unflatten_dict(where, sep="/"))


def whole(x: jax.Array) -> jax.Array:
    """Give every device all of an array, where a mesh was set: for what a host reads."""
    is_set = bool(jax.sharding.get_abstract_mesh().axis_names)
    return jax.lax.with_sharding_constraint(x, jax.P()) if is_set else x


def over_rows_and_heads(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Let every device compute its own rows and heads, where a mesh was set: for kernels that XLA cannot split.

    Args:
        fn: of arrays B x T x heads x width, of which the last argument has no heads (B x T x S), to one of the former.
            Rows and heads are computed by themselves.
    """

    def split(*arrays: jax.Array) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        rows = ROWS if _divides(mesh, ROWS, [len(x) for x in arrays]) else None
        heads = "tensor" if _divides(mesh, ("tensor",), [x.shape[2] for x in arrays[:-1]]) else None
        if rows is None and heads is None:
            return fn(*arrays)
        specs = (*[jax.P(rows, None, heads)] * (len(arrays) - 1), jax.P(rows))
        return jax.shard_map(fn, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)

    return split


def _divides(mesh: AbstractMesh, names: tuple[str, ...], sizes: Sequence[int]) -> bool:
    """Whether the mesh has these axes, and their devices divide all sizes."""
    if not set(names) <= set(mesh.axis_names):
        return False
    devices = math.prod(mesh.shape[name] for name in names)
    return all(size % devices == 0 for size in sizes)


def by_rows(x: jax.Array) -> jax.Array:
    """Keep an activation split by rows, its first axis, where a mesh was set with `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if not _divides(mesh, ROWS, [len(x)]):
        return x
    return jax.lax.with_sharding_constraint(x, jax.P(ROWS))
