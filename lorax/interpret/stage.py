"""Trace a function of (params, *args, **kwargs) to a jaxpr, with everything that is no array held fixed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lorax import compat, paths


@dataclasses.dataclass(frozen=True)
class Staged:
    """A traced function: its jaxpr takes the array leaves of `params`, then those of the arguments."""

    jaxpr: Any
    params: Mapping[str, Any]  # array leaves by path
    args: Sequence[Any]  # array leaves of the arguments
    finish: Callable[[Sequence[Any]], Any]  # flat array outputs -> what the function returns

    def aval(self, path: str) -> Any:
        """Return a parameter, of a quantised one only the shape and dtype that it stands for."""
        return _aval(self.params[path])


def _aval(x: Any) -> Any:
    if not paths.is_quantized(x):
        return x
    if compat.explicit_mesh(x.codes) is not None:  # types then say how the weight is split too
        return jax.eval_shape(x.dequantize)
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def stage(
    fn: Callable[..., Any], flat_params: tuple[dict[str, Any], Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Staged:
    """Trace `fn(params, *args, **kwargs)` abstractly; Python values among the arguments stay what they are.

    `flat_params` is what `paths.flatten` makes of the params.
    """
    named, tree = flat_params
    arg_leaves, arg_tree = jax.tree.flatten((tuple(args), dict(kwargs)))
    leaves = [*named.values(), *arg_leaves]
    dynamic = [paths.is_array(x) for x in leaves]
    returned: list[Any] = []

    def flat(*arrays: Any) -> list[Any]:
        it = iter(arrays)
        whole = [next(it) if d else x for x, d in zip(leaves, dynamic, strict=True)]
        args, kwargs = jax.tree.unflatten(arg_tree, whole[len(named) :])
        out = fn(jax.tree.unflatten(tree, whole[: len(named)]), *args, **kwargs)
        out_leaves, out_tree = jax.tree.flatten(out)
        is_out = [paths.is_array(x) for x in out_leaves]
        returned[:] = [out_tree, is_out, [None if d else x for x, d in zip(out_leaves, is_out, strict=True)]]
        return [x for x, d in zip(out_leaves, is_out, strict=True) if d]

    jaxpr = jax.make_jaxpr(flat)(*(_aval(x) for x, d in zip(leaves, dynamic, strict=True) if d))
    out_tree, is_out, fixed = returned

    def finish(outs: Sequence[Any]) -> Any:
        it = iter(outs)
        return jax.tree.unflatten(out_tree, [next(it) if d else x for x, d in zip(fixed, is_out, strict=True)])

    return Staged(
        jaxpr,
        {path: x for path, x in named.items() if paths.is_array(x)},
        [x for x in arg_leaves if paths.is_array(x)],
        finish,
    )
