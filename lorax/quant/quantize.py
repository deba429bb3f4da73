"""Which parameters are stored in which quantised format, and the functions that store them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lorax import compat, paths
from lorax.paths import is_quantized
from lorax.quant.formats import Format
from lorax.quant.node import Quantized, encode
from lorax.sites import Site

Rules = Mapping[str, Format | None] | Sequence[tuple[str, Format | None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How a leaf is cut into matrices: the number of leading stacked axes, and the axes of rows and of columns."""

    stack: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]


def quantize(params: Any, rules: Rules, *, sites: Iterable[Site] | None = None) -> Any:
    r"""Store parameters in quantised formats, one leaf after another.

    Args:
      params: a pytree of arrays, of jax, numpy (also mapped from a file) or abstract; never changed. Traceable.
      rules: ordered patterns of leaf paths, matched as a whole, and their formats; the first that selects a leaf wins.
        `None` in place of a format leaves alone all that it matches.
      sites: from `lorax.trace`; they tell the axes of inputs, outputs and layers. Without them the last two axes of a
        leaf are taken for inputs and outputs, and all before for layers.

    Returns:
      The pytree with a `Quantized` node in place of every selected leaf.

    Raises:
      ValueError: a pattern is no regular expression or selects nothing, or a leaf holds NaN or infinity.

    >>> params = {"mlp": {"kernel": jnp.ones((64, 128)), "bias": jnp.zeros(128)}}
    >>> from lorax.quant import NF4
    >>> quantize(params, {".*kernel": NF4()})["mlp"]["kernel"]
    Quantized(shape=(64, 128), dtype=float32, format=NF4(block=64, double=True))
    """
    leaves, tree = paths.flatten(params)
    known = None if sites is None else {site.path: site for site in sites}
    layouts = {path: _layout(leaf, path, known) for path, leaf in leaves.items()}
    for path, format in _resolve(rules, leaves, layouts).items():
        layout = layouts[path]
        assert isinstance(layout, Layout)
        leaves[path] = _store(leaves[path], format, layout, path)
    return jax.tree.unflatten(tree, list(leaves.values()))


def dequantize(params: Any) -> Any:
    """Return the params with every quantised node replaced by its weight.

    >>> from lorax.quant import Int8
    >>> dequantize(quantize({"kernel": jnp.ones((2, 2))}, {"kernel": Int8()}))["kernel"].tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    return jax.tree.map(lambda x: x.dequantize() if is_quantized(x) else x, params, is_leaf=is_quantized)


def quantize_leaf(
    array: Any,
    format: Format,
    *,
    fan_in: Sequence[int],
    fan_out: Sequence[int],
    stack: int = 0,
    embedding: bool = False,
    path: str = "the array",
) -> Quantized:
    """Quantise one weight, such as while loading a model.

    A numpy array with stacked axes goes to the device one slice at a time. `stack_nodes` joins the nodes of layers that
    are loaded one after another.

    Args:
      array: floating point, with two axes or more; jax, numpy or abstract.
      format: such as `NF4()`.
      fan_in: the axes that a product contracts; of an embedding table the axis that is looked up.
      fan_out: the axes that it leaves free.
      stack: the number of leading axes that are stacked (layers, experts); all others are in `fan_in` or `fan_out`.
      embedding: whether the weight is a table of rows that are looked up: a row of the matrix is then a row of the
        table, and not the weights of one output.
      path: the weight's name in errors.

    Returns:
      The node.

    Raises:
      ValueError: the axes do not fit, or the array is not floating point, is empty or holds NaN or infinity.

    >>> from lorax.quant import NF4
    >>> layers = [quantize_leaf(np.ones((128, 64), np.float32), NF4(), fan_in=(0,), fan_out=(1,)) for _ in range(3)]
    >>> stack_nodes(layers)
    Quantized(shape=(3, 128, 64), dtype=float32, format=NF4(block=64, double=True))
    """
    if not isinstance(format, Format):
        raise ValueError(f"{path}: got {format!r}, expected a format such as lorax.NF4()")
    refused = _refusal(array)
    if refused:
        raise ValueError(f"{path}: {refused}")
    ndim = len(array.shape)
    inputs, outputs = (tuple(a + ndim if a < 0 else a for a in axes) for axes in (fan_in, fan_out))
    if not inputs or not outputs or sorted((*range(stack), *inputs, *outputs)) != list(range(ndim)):
        raise ValueError(
            f"{path} of shape {tuple(array.shape)}: got fan_in={tuple(fan_in)}, fan_out={tuple(fan_out)} and {stack} "
            "stacked axes; every axis has to be in exactly one of them, and fan_in and fan_out must not be empty"
        )
    rows, columns = (inputs, outputs) if embedding else (outputs, inputs)
    within = lambda axes: tuple(a - stack for a in axes)
    return _store(array, format, Layout(stack=stack, rows=within(rows), columns=within(columns)), path)


def stack_nodes(nodes: Iterable[Quantized]) -> Quantized:
    """Join nodes of one shape, format and layout along a new leading axis, as `jnp.stack` does arrays.

    Raises:
      ValueError: there are none, or they differ in shape, dtype, format or layout.
    """
    nodes = list(nodes)
    if not nodes:
        raise ValueError("stack_nodes: got no nodes, expected at least one")
    first = nodes[0]
    for i, node in enumerate(nodes):
        if not isinstance(node, Quantized):
            raise ValueError(f"stack_nodes: entry {i} is a {type(node).__name__}, expected a Quantized")
        if node.shape != first.shape or jax.tree.structure(node) != jax.tree.structure(first):
            raise ValueError(
                f"stack_nodes: entry {i} is {node} with rows {node.rows}, entry 0 is {first} with rows {first.rows}; "
                "they have to agree"
            )
    return jax.tree.map(lambda *xs: (np if isinstance(xs[0], np.ndarray) else jnp).stack(xs), *nodes)


def shardings(params: Any, where: Any) -> Any:
    """Derive where the children of quantised nodes lie from where the weights would; other leaves lie there themselves.

    Args:
      params: a pytree with quantised nodes, concrete or abstract (`jax.eval_shape` of `quantize`).
      where: for every leaf, a node being one, a `NamedSharding`: of the params before they were quantised, say.

    Returns:
      `params` with a sharding in place of every array: for `out_shardings` of a jitted `quantize`, or `jax.device_put`.

    Raises:
      ValueError: `where` has other paths.

    >>> from lorax.quant import NF4
    >>> mesh = jax.sharding.AbstractMesh((2,), ("data",))
    >>> params = jax.eval_shape(lambda: quantize({"kernel": jnp.ones((256, 8))}, {"kernel": NF4()}))
    >>> split = shardings(params, {"kernel": NamedSharding(mesh, jax.P("data"))})
    >>> tuple(split["kernel"].codes.spec)
    (None, 'data')
    """
    leaves, tree = paths.flatten(params)
    placed, _ = paths.flatten(where)
    if differing := sorted(leaves.keys() ^ placed.keys()):
        raise ValueError(f"shardings: params and where differ at {', '.join(differing[:8])}; give a sharding a leaf")
    of = lambda leaf, sharding: _of_children(leaf, sharding) if is_quantized(leaf) else sharding
    return jax.tree.unflatten(tree, [of(leaf, placed[path]) for path, leaf in leaves.items()])


def _of_children(node: Quantized, sharding: NamedSharding) -> Quantized:
    return jax.tree.map(lambda spec: NamedSharding(sharding.mesh, spec), node.partition_specs(sharding))


def _refusal(leaf: Any) -> str | None:
    """Why a leaf cannot be quantised, whatever it is for."""
    if is_quantized(leaf):
        return f"it is quantised already, as {leaf.format}"
    if not paths.is_array(leaf):
        return f"it is a {type(leaf).__name__}, not an array"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"{leaf.dtype} is not floating point"
    if len(leaf.shape) < 2:
        return f"it has {len(leaf.shape)} axes, and a weight has two or more"
    return None if min(leaf.shape) else "it is empty"


def _layout(leaf: Any, path: str, sites: Mapping[str, Site] | None) -> Layout | str:
    """A leaf's layout, or why it cannot be quantised."""
    refused = _refusal(leaf)
    if refused:
        return refused
    ndim = len(leaf.shape)
    if sites is None:
        return Layout(stack=ndim - 2, rows=(1,), columns=(0,))
    site = sites.get(path)
    if site is None:
        return "it is not among the sites"
    if site.shape != tuple(leaf.shape):
        return f"the site was traced with shape {site.shape}"
    if not site.is_adaptable:
        return "no use contracts one of its axes and leaves another free"
    stack = next((a for a in range(ndim) if a not in site.stack), ndim)
    looked_up = next((use.contracted for use in site.uses if use.kind == "embedding"), ())
    others = tuple(a for a in site.stack if a >= stack)
    rows = (*others, *(looked_up or site.fan_out))
    columns = tuple(a for a in range(stack, ndim) if a not in rows)
    return Layout(stack=stack, rows=tuple(a - stack for a in rows), columns=tuple(a - stack for a in columns))


def _store(leaf: Any, format: Format, layout: Layout, path: str) -> Quantized:
    settings = (format, layout.stack, layout.rows, layout.columns)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return _abstract(leaf, *settings)
    if isinstance(leaf, np.ndarray) and layout.stack:
        one = dataclasses.replace(layout, stack=0)
        nodes = [_store(leaf[i], format, one, path) for i in np.ndindex(leaf.shape[: layout.stack])]
        return jax.tree.map(lambda x: x.reshape(*leaf.shape[: layout.stack], *x.shape[1:]), stack_nodes(nodes))
    if compat.is_traced(leaf):
        return encode(leaf, *settings)
    held = getattr(leaf, "sharding", None)
    node, is_finite = _checked(leaf, *settings, sharding=held if isinstance(held, NamedSharding) else None)
    if not is_finite:  # waits, so that one leaf's temporaries are gone before the next one's
        raise ValueError(
            f"{path}: it holds NaN or infinity, which no quantised format can store. Repair the weight first"
        )
    return node


@functools.partial(jax.jit, static_argnames=("format", "stack", "rows", "columns", "sharding"))
def _checked(
    array: jax.Array,
    format: Format,
    stack: int,
    rows: tuple[int, ...],
    columns: tuple[int, ...],
    sharding: NamedSharding | None,
) -> tuple[Quantized, jax.Array]:
    """The node, laid out over the devices like the array, and whether all its weights are finite."""
    node = encode(array, format, stack, rows, columns)
    if sharding is not None and compat.explicit_mesh(array) is None:
        node = jax.tree.map(jax.lax.with_sharding_constraint, node, _of_children(node, sharding))
    return node, jnp.isfinite(array).all()


def _abstract(leaf: Any, format: Format, stack: int, rows: tuple[int, ...], columns: tuple[int, ...]) -> Quantized:
    """The node of an abstract array, with the shardings that follow from its own."""
    bare = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    node = jax.eval_shape(lambda x: encode(x, format, stack, rows, columns), bare)
    if not isinstance(leaf.sharding, NamedSharding):
        return node
    place = lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to)
    return jax.tree.map(place, node, _of_children(node, leaf.sharding))


def _resolve(rules: Rules, leaves: Mapping[str, Any], layouts: Mapping[str, Layout | str]) -> dict[str, Format]:
    """The format of every selected leaf, in the leaves' order."""
    claimed: dict[str, tuple[str, Format | None]] = {}
    for pattern, format in rules.items() if isinstance(rules, Mapping) else rules:
        if format is not None and not isinstance(format, Format):
            raise ValueError(f"pattern {pattern!r}: got {format!r}, expected a format such as lorax.NF4()")
        try:
            matched = [path for path in leaves if re.fullmatch(pattern, path)]
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error
        able = [path for path in matched if format is None or isinstance(layouts[path], Layout)]
        free = [path for path in able if path not in claimed]
        if not free:
            raise ValueError(_selects_nothing(pattern, leaves, layouts, matched, able, claimed))
        claimed.update((path, (pattern, format)) for path in free)
    return {path: format for path in leaves if (format := claimed.get(path, ("", None))[1]) is not None}


def _selects_nothing(
    pattern: str,
    leaves: Mapping[str, Any],
    layouts: Mapping[str, Layout | str],
    matched: Sequence[str],
    able: Sequence[str],
    claimed: Mapping[str, tuple[str, Format | None]],
) -> str:
    head = f"pattern {pattern!r} selects no parameter to quantise"
    if able:
        owners = "; ".join(f"{path} has {claimed[path][0]!r}" for path in able[:8])
        return f"{head}: an earlier pattern selects all that it matches ({owners}). Put it further up, or remove it"
    if matched:
        reasons = "; ".join(f"{path}: {layouts[path]}" for path in matched[:8])
        return f"{head}: it matches {len(matched)} that cannot be ({reasons}). Choose others"
    near = ", ".join(paths.nearest(pattern, leaves)) or "there are none"
    return f"{head}: it matches none of {len(leaves)} paths (as a whole, by re.fullmatch). Nearest paths: {near}"
