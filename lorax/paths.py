"""Leaf paths: one rule for linen dicts, boxed parameters, `nnx.State`, dataclasses, lists and tuples."""

from __future__ import annotations

import collections
import difflib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np


def flatten(params: Any) -> tuple[dict[str, Any], Any]:
    """Flatten a parameter pytree to `{leaf path: leaf}`, in the tree's own order, and its structure.

    Key path entries are joined by `/`. The box around a leaf (`nn.Partitioned`, an nnx variable: a node whose only
    child is its attribute `value`) is no part of the path, so that boxed, nnx and plain trees agree. A quantised node
    is one leaf.

    Raises:
      ValueError: two leaves have the same path, such as those under the keys `0` and `"0"` of one dict.

    >>> list(flatten({"attn": {"query": 1.0}, "blocks": [2.0, 3.0]})[0])
    ['attn/query', 'blocks/0', 'blocks/1']
    """
    keyed, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    children = collections.Counter(keys[:-1] for keys, _ in keyed)
    paths: dict[str, Any] = {}
    for keys, leaf in keyed:
        boxed = len(keys) > 1 and children[keys[:-1]] == 1 and getattr(keys[-1], "name", None) == "value"
        path = "/".join(_entry(k) for k in (keys[:-1] if boxed else keys))
        if path in paths:
            raise ValueError(f"two parameters have the path {path!r}: rename one of them")
        paths[path] = leaf
    return paths, tree


def _entry(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def is_quantized(x: Any) -> bool:
    """Tell whether a node of a tree stands for an array whose values it holds in fewer bits."""
    return getattr(x, "is_parameter_leaf", False)


def is_array(x: Any) -> bool:
    """Tell whether a leaf is an array, concrete, traced or abstract, or a quantised node."""
    return isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)) or is_quantized(x)


def nearest(path: str, known: Iterable[str], count: int = 5) -> list[str]:
    """Return the known paths that look most like a path or pattern, for error messages."""
    known = list(known)
    return difflib.get_close_matches(path, known, n=count, cutoff=0.0)[:count]
