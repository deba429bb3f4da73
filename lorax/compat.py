"""Everything that differs between JAX releases, and every name that is not at the top level of JAX.

lorax supports JAX 0.10 to 0.12. Primitives are keyed by object, never by name (`pjit` became `jit` in 0.7).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax import core, lax
from jax.extend import core as jex_core
from jax.extend import source_info_util
from jax.extend.core import primitives as prims

Literal = jex_core.Literal
Var = jex_core.Var

# Primitives that jax.lax or jax.extend.core export in every supported release.
dot_general_p = lax.dot_general_p
conv_general_dilated_p = lax.conv_general_dilated_p
gather_p = lax.gather_p
transpose_p = lax.transpose_p
reshape_p = lax.reshape_p
squeeze_p = lax.squeeze_p
broadcast_in_dim_p = lax.broadcast_in_dim_p
slice_p = lax.slice_p
dynamic_slice_p = lax.dynamic_slice_p
split_p = lax.split_p
rev_p = lax.rev_p
concatenate_p = lax.concatenate_p
convert_element_type_p = lax.convert_element_type_p
copy_p = lax.copy_p
optimization_barrier_p = lax.optimization_barrier_p
sharding_constraint_p = lax.sharding_constraint_p
stop_gradient_p = lax.stop_gradient_p
device_put_p = lax.device_put_p
mul_p = lax.mul_p
div_p = lax.div_p
neg_p = lax.neg_p
name_p = prims.name_p
jit_p = prims.jit_p
closed_call_p = prims.closed_call_p
remat_p = prims.remat_p
scan_p = prims.scan_p
while_p = prims.while_p
cond_p = prims.cond_p
custom_jvp_call_p = prims.custom_jvp_call_p
custom_vjp_call_p = prims.custom_vjp_call_p

# stack and unstack are primitives of their own in recent releases and compositions before.
stack_p = getattr(lax, "stack_p", None)
unstack_p = getattr(lax, "unstack_p", None)


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """Return the equations and the constants of an open or closed jaxpr (one class since JAX 0.12)."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return inner, getattr(jaxpr, "consts", ())


def _primitive_bound_by(fn: Any, *args: Any) -> Any:
    """Return the primitive that a public function binds, by tracing it: for those no module exports."""
    return jax.make_jaxpr(fn)(*args).eqns[-1].primitive


def _find_ragged_dot_p() -> Any:
    f32, i32 = jax.ShapeDtypeStruct((2, 2), "float32"), jax.ShapeDtypeStruct((1,), "int32")
    return _primitive_bound_by(lax.ragged_dot, f32, jax.ShapeDtypeStruct((1, 2, 2), "float32"), i32)


def _find_shard_map_p() -> Any:
    mesh = jax.sharding.AbstractMesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(lambda x: x, mesh=mesh, in_specs=jax.P("i"), out_specs=jax.P("i"))
    return _primitive_bound_by(mapped, jax.ShapeDtypeStruct((1,), "float32"))


def _find_pvary_p() -> Any:
    mesh = jax.sharding.AbstractMesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(lambda x: lax.pcast(x, "i", to="varying"), mesh=mesh, in_specs=jax.P(), out_specs=jax.P("i"))
    (eqn,) = jax.make_jaxpr(mapped)(jax.ShapeDtypeStruct((1,), "float32")).eqns
    return open_jaxpr(eqn.params["jaxpr"])[0].eqns[0].primitive


def _find_reshard_p() -> Any:
    mesh = jax.sharding.AbstractMesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Explicit,))
    split, whole = (jax.sharding.NamedSharding(mesh, jax.P(name)) for name in ("i", None))
    x = jax.ShapeDtypeStruct((2,), "float32", sharding=split)
    return _primitive_bound_by(lambda x: jax.sharding.reshard(x, whole), x)


ragged_dot_p = _find_ragged_dot_p()
shard_map_p = _find_shard_map_p()
reshard_p = _find_reshard_p()
pvary_p = _find_pvary_p()


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Run one equation on other values."""
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return out if eqn.primitive.multiple_results else [out]


def source_context(eqn: Any) -> AbstractContextManager[Any]:
    """Return a context in which profiles and errors name the modules and lines that an equation comes from."""
    info = eqn.source_info
    names = source_info_util.current_name_stack() + info.name_stack
    return source_info_util.user_context(info.traceback, name_stack=names)


def scan_arity(params: dict[str, Any]) -> tuple[int, int]:
    """Return the number of constants and of carried values of a scan equation."""
    if "ft_in" in params:  # JAX 0.11 replaced num_consts and num_carry by trees
        consts, carry, _ = params["ft_in"].unpack()
        return len(list(consts)), len(list(carry))
    return params["num_consts"], params["num_carry"]


def is_specified(sharding: Any) -> bool:
    """Tell whether a sharding parameter of an inner jit was given by the user."""
    return isinstance(sharding, jax.sharding.Sharding)


def _mesh(x: Any) -> Any:
    return getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)


def explicit_mesh(x: Any) -> Any:
    """Return the mesh if the array's type carries a sharding over explicit axes, else None."""
    mesh = _mesh(x)
    return mesh if mesh is not None and jax.sharding.AxisType.Explicit in mesh.axis_types else None


def mesh_of(x: Any) -> AbstractContextManager[Any]:
    """Return a context of the mesh that an array's type names: where axes change their kind, it is not the program's.

    That is so at the border of `jax.sharding.auto_axes`, inside of which a value from outside arrives.
    """
    mesh = explicit_mesh(x)
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh)


def is_partitioned(x: Any) -> bool:
    """Tell whether an array's type names a mesh that the compiler may split it over, in whatever way."""
    mesh, kinds = _mesh(x), jax.sharding.AxisType
    return mesh is not None and any(
        kind == kinds.Explicit or (kind != kinds.Manual and n > 1)
        for n, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    )


def is_traced(x: Any) -> bool:
    """Tell whether an array has no value yet."""
    return isinstance(x, core.Tracer)
