"""Fills a model's parameters, one tensor at a time, from whatever holds the tensors, by a table of names."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from experiments.models.names import ModuleName
from experiments.models.placed import PlacedArray, Places
from lorax.quant import Format, Quantized, quantize_leaf, shardings

Formats = Mapping[str, Format]


def leaf_shapes(module: Any, *inputs: jax.ShapeDtypeStruct) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a linen module, by leaf path; `inputs` are those of its `__call__`."""
    tree: Any = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    leaves: dict[str, Any] = flax.traverse_util.flatten_dict(tree, sep="/")
    return {path: leaf.shape for path, leaf in leaves.items()}


def fill_params(
    shapes: Mapping[str, tuple[int, ...]],
    names: Mapping[str, ModuleName],
    tensors: Mapping[str, Callable[[], np.ndarray]],
    *,
    dtype: Any,
    source: str,
    formats: Formats | None = None,
    redundant: Sequence[str] = (),
    places: Places | None = None,
) -> dict[str, Any]:
    """Builds the parameter tree leaf by leaf; the host holds one tensor and this process's part of one leaf at a time.

    A leaf that is to be quantised is so layer by layer, as its tensors are read: what the parameters take in full
    precision is never held. The nodes are those of `lorax.quantize` on the whole parameters. With `places`, no mesh may
    be set (`jax.set_mesh`): each process quantises on a device of its own.

    Args:
        shapes: shape of every leaf, by path.
        names: the row of every leaf, by path. A row with `{layer}` runs along the leaf's leading axis.
        tensors: the tensors that the source holds, by name, each as a function that reads it.
        dtype: dtype of the parameters.
        source: what to call the source in errors.
        formats: patterns of leaf paths, matched as a whole, and the formats to store those leaves in; the first that
            matches counts.
        redundant: patterns of tensors, matched as a whole, that the source may hold and the model does without.
        places: where each leaf lies, by its path and shape; the children of a quantised one lie as follows from it.
            None: on the default device.

    Returns:
        Nested dict of arrays and quantised nodes, without the outer "params".

    Raises:
        ValueError: if a tensor is missing, left over, or of another shape than `shapes` asks for, a pattern matches no
            linear layer, or `shapes` and `names` are not about the same leaves.
    """
    if unlike := sorted(shapes.keys() ^ names.keys()):
        raise ValueError(f"the shapes and the table of names differ in {', '.join(unlike)}; correct the table")
    stored_as = _resolve(formats or {}, names)
    wanted = {path: name.tensors(shapes[path]) for path, name in names.items()}
    _check_complete({t for group in wanted.values() for t in group}, set(tensors), redundant, source)
    leaves = {}
    for path, name in names.items():
        shape = shapes[path][1:] if name.stacked else shapes[path]

        def layer(tensor: str, path: str = path, name: ModuleName = name, shape: Any = shape) -> np.ndarray:
            try:
                return name.to_leaf(tensors[tensor](), shape)
            except ValueError as error:
                raise ValueError(f"{source}: {tensor} does not fill {path}: {error}") from error

        leaf = _abstract(path, shapes[path], dtype, stored_as.get(path), name, places)
        leaf = jax.tree.map(lambda x: PlacedArray(x.shape, x.dtype, x.sharding), leaf)
        for i, tensor in enumerate(wanted[path]):
            weight = layer(tensor)
            if path in stored_as:
                weight = _quantize(weight.astype(dtype), stored_as[path], name, path)
            row = i if name.stacked else None
            jax.tree.map(lambda whole, piece, row=row: whole.fill(np.asarray(piece), row), leaf, weight)
        leaves[path] = jax.tree.map(PlacedArray.done, leaf)
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def abstract_params(
    shapes: Mapping[str, tuple[int, ...]],
    names: Mapping[str, ModuleName],
    *,
    dtype: Any,
    formats: Formats | None = None,
    places: Places | None = None,
) -> dict[str, Any]:
    """Returns what `fill_params` does, as `jax.ShapeDtypeStruct`s that know where they lie; it reads nothing."""
    stored_as = _resolve(formats or {}, names)
    leaves = {
        path: _abstract(path, shape, dtype, stored_as.get(path), names[path], places) for path, shape in shapes.items()
    }
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def _abstract(
    path: str, shape: tuple[int, ...], dtype: Any, format: Format | None, name: ModuleName, places: Places | None
) -> Any:
    where = None if places is None else places(path, shape)
    if format is None:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    layer = _quantize(jax.ShapeDtypeStruct(shape[1:] if name.stacked else shape, dtype), format, name, path)
    stack = lambda x: jax.ShapeDtypeStruct((*shape[:1], *x.shape) if name.stacked else x.shape, x.dtype)
    node = jax.tree.map(stack, layer)
    if where is None:
        return node
    children = shardings({path: node}, {path: where})[path]
    return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), node, children)


def _quantize(layer: Any, format: Format, name: ModuleName, path: str) -> Quantized:
    axes = range(layer.ndim)
    return quantize_leaf(layer, format, fan_in=axes[: name.fan_in], fan_out=axes[name.fan_in :], path=path)


def _resolve(formats: Formats, names: Mapping[str, ModuleName]) -> dict[str, Format]:
    linear = [path for path, name in names.items() if name.kind == "linear"]
    chosen: dict[str, Format] = {}
    for pattern, format in formats.items():
        matched = [path for path in names if re.fullmatch(pattern, path)]
        if not matched or set(matched) - set(linear):
            raise ValueError(_not_linear(pattern, matched, linear))
        chosen |= {path: format for path in matched if path not in chosen}
    return chosen


def _not_linear(pattern: str, matched: Sequence[str], linear: Sequence[str]) -> str:
    if others := sorted(set(matched) - set(linear)):
        return f"pattern {pattern!r} would quantise {', '.join(others)}, which are no linear layers; narrow it"
    nearest = difflib.get_close_matches(pattern, linear, n=3, cutoff=0)
    return f"pattern {pattern!r} matches no parameter to quantise; the nearest linear layers are {', '.join(nearest)}"


def _check_complete(wanted: set[str], given: set[str], redundant: Sequence[str], source: str) -> None:
    missing = sorted(wanted - given)
    extra = sorted(t for t in given - wanted if not any(re.fullmatch(pattern, t) for pattern in redundant))
    if missing:
        raise ValueError(f"{source}: {len(missing)} tensors are missing, among them {missing[:3]}")
    if extra:
        raise ValueError(
            f"{source}: {len(extra)} tensors have no place in this model, among them {extra[:3]}; "
            "the config describes another one"
        )
