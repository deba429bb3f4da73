"""FLOPs of a function, counted from its jaxpr: loops as often as they run, which XLA's own count does not.

`Compiled.cost_analysis()` counts the body of a loop once, and what the compiler makes of small products is its affair.
Here a product counts as its definition says: two FLOPs, a multiplication and an addition, for every element of the
output and every element that is summed over. Nothing else is counted: elementwise work, decompositions and lookups are
little of a model's, and kernels written by hand are opaque.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lorax import compat


def flops(fn: Callable[..., Any], *args: Any, while_trips: int | None = None) -> int:
    """Return the FLOPs of the products in `fn(*args)`, without running or compiling it.

    Counted are dense, batched, ragged and convolution products, in all that the function calls: a scan's body times its
    length, of a `cond` the dearest branch, under `shard_map` all devices. The loss's gradient counts what it takes when
    `fn` is that gradient. A convolution's padding counts as if it were data (XLA leaves it out).

    Args:
      fn: any JAX function; close over Python values.
      *args: arrays or `jax.ShapeDtypeStruct`s.
      while_trips: how often to count the body of a `while_loop`, whose trips depend on values.

    Raises:
      ValueError: products are in a `while_loop`, and `while_trips` is not given.

    >>> x, w = jax.ShapeDtypeStruct((2, 8), "float32"), jax.ShapeDtypeStruct((3, 8, 8), "float32")
    >>> layers = lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
    >>> flops(layers, x, w) == 3 * 2 * (2 * 8) * 8
    True
    """
    jaxpr = jax.make_jaxpr(fn)(*args)
    return _count(jaxpr, [True] * len(compat.open_jaxpr(jaxpr)[0].outvars), while_trips)


def _count(jaxpr: Any, live: list[bool], while_trips: int | None) -> int:
    """Count the products that the live outputs need: differentiation leaves some behind that nothing reads."""
    jaxpr, _ = compat.open_jaxpr(jaxpr)
    needed = {v for v, is_live in zip(jaxpr.outvars, live, strict=True) if is_live and isinstance(v, compat.Var)}
    total = 0
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            total += _of_equation(eqn, [v in needed for v in eqn.outvars], while_trips)
            needed.update(v for v in eqn.invars if isinstance(v, compat.Var))
    return total


def _of_equation(eqn: Any, live: list[bool], while_trips: int | None) -> int:
    primitive, params = eqn.primitive, eqn.params
    if primitive is compat.dot_general_p:
        return _of_product(eqn, params["dimension_numbers"])
    if primitive is compat.ragged_dot_p:  # a row of the one meets the matrix of its group, and no other
        numbers = params["ragged_dot_dimension_numbers"]
        return _of_product(eqn, numbers.dot_dimension_numbers, numbers.rhs_group_dimensions)
    if primitive is compat.conv_general_dilated_p:
        kernel, features = eqn.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
        return 2 * eqn.outvars[0].aval.size * math.prod(kernel) // kernel[features]
    bodies = [x for x in jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr) if _is_jaxpr(x)]
    if primitive in (compat.jit_p, compat.closed_call_p, compat.remat_p):
        return sum(_count(body, live, while_trips) for body in bodies)
    counts = [_count(body, [True] * len(compat.open_jaxpr(body)[0].outvars), while_trips) for body in bodies]
    if primitive is compat.cond_p:
        return max(counts)
    if primitive is compat.while_p and any(counts) and while_trips is None:
        raise ValueError("there are products in a while_loop, whose trips are in no jaxpr: give flops(while_trips=…)")
    return sum(counts) * _times(primitive, params, while_trips)


def _of_product(eqn: Any, numbers: Any, groups: Sequence[int] = ()) -> int:
    """Every element of the left operand meets every element of the right one along the axes that only that one has."""
    left, right = (v.aval.shape for v in eqn.invars[:2])
    (_, contracted), (_, batch) = numbers
    taken = {*contracted, *batch, *groups}
    return 2 * math.prod(left) * math.prod(n for axis, n in enumerate(right) if axis not in taken)


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def _times(primitive: Any, params: Any, while_trips: int | None) -> int:
    """Return how often an equation runs its bodies."""
    if primitive is compat.scan_p:
        return params["length"]
    if primitive is compat.while_p:
        return while_trips or 0
    if primitive is compat.shard_map_p:
        (axes,) = (value for name, value in params.items() if name.endswith("manual_axes"))
        return math.prod(params["mesh"].shape[axis] for axis in axes)
    return 1
