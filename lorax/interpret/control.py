"""Rules for control flow: re-enter the public function with the body evaluated on adapted weights.

A weight passes through as the pytree of its arrays. What re-entry drops: the name, donation and input shardings of an
inner jit (its body is evaluated in place; output shardings are kept as constraints).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from lorax import compat
from lorax.interpret import residuals
from lorax.interpret.context import Context
from lorax.interpret.deferred import Deferred, force, witness
from lorax.interpret.evaluate import densify, derived, evaluate
from lorax.interpret.weight import Factor, Weight, rebuild, relabelled


def jit(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Inner jit: evaluated in place, so that eager calls do not compile anew; its output shardings are kept."""
    with jax.named_scope(eqn.params.get("name", "call")):
        outs = evaluate(
            eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")), operands, ctx, fixed=ctx.fixed, live=ctx.live
        )
    shardings = eqn.params.get("out_shardings", (None,) * len(outs))
    return [
        lax.with_sharding_constraint(x, s) if compat.is_specified(s) and isinstance(x, jax.Array) else x
        for x, s in zip(outs, shardings, strict=True)
    ]


def checkpoint(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Rematerialised body: the adapter's part is recomputed with it."""
    fixed, live = ctx.fixed, ctx.live
    body = lambda operands, key: evaluate(eqn.params["jaxpr"], operands, ctx.inside(key), fixed=fixed, live=live)
    remat = jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    return remat(list(operands), ctx.key_here())


def _unmoved(jaxpr: Any, operands: Sequence[Any], first: int, count: int) -> list[bool]:
    """Tell which carried weights the body hands on as they came."""
    inner, _ = compat.open_jaxpr(jaxpr)
    pairs = zip(operands, inner.invars[first : first + count], inner.outvars[:count], strict=True)
    return [isinstance(x, Weight) and into is out for x, into, out in pairs]


def _settled(operands: Sequence[Any]) -> list[Any]:
    """Derive before a loop what each of its steps would derive from the same weight."""
    return [x.settled() if isinstance(x, Weight) else x for x in operands]


def scan(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Scan: a stacked weight is scanned array by array, those without the stacked axis are constants."""
    jaxpr = eqn.params["jaxpr"]
    n_consts, n_carry = compat.scan_arity(eqn.params)
    operands = [*_settled(operands[: n_consts + n_carry]), *operands[n_consts + n_carry :]]
    consts, init, xs = operands[:n_consts], operands[n_consts : n_consts + n_carry], operands[n_consts + n_carry :]
    fixed = _unmoved(jaxpr, init, n_consts, n_carry)
    carried = [x if keep else densify(ctx, x, "scan's carry") for x, keep in zip(init, fixed, strict=True)]
    sliced = [_leading(x) if isinstance(x, Weight) else (x, None) for x in xs]
    length = eqn.params["length"]
    live = [True] * n_carry + list(ctx.live[n_carry:])
    known = [is_fixed and not n_consts <= i < n_consts + n_carry for i, is_fixed in enumerate(ctx.fixed)]
    key = ctx.key_here()
    keys = None if key is None else jax.random.split(key, length)
    is_ours = residuals.is_left_to_us(jaxpr) and any(_is_rescaled(x) for x in operands)

    def body(moving: list[Any], step: Any) -> Any:
        arrays, key = step
        it = iter(moving)
        carry = [x if keep else next(it) for x, keep in zip(carried, fixed, strict=True)]
        inner = ctx.inside(key)
        inputs = [*consts, *carry, *(_layer(a, spec) for a, (_, spec) in zip(arrays, sliced, strict=True))]
        inner.followed = residuals.Followed(inputs) if is_ours else None
        outs = evaluate(jaxpr, inputs, inner, fixed=known, live=live)
        moved = [densify(inner, x, "scan's carry") for x, keep in zip(outs[:n_carry], fixed, strict=True) if not keep]
        return moved, [densify(inner, x, "scan's output") for x in outs[n_carry:]]

    if is_ours:
        body = jax.checkpoint(body, prevent_cse=False, policy=residuals.keeps)
    moving = [x for x, keep in zip(carried, fixed, strict=True) if not keep]
    last, ys = lax.scan(
        body,
        moving,
        ([arrays for arrays, _ in sliced], keys),
        length=length,
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    it = iter(last)
    return [x if keep else next(it) for x, keep in zip(carried, fixed, strict=True)] + list(ys)


def _forced(weight: Weight) -> Weight:
    """Dequantise the base, where its quantised arrays cannot go."""
    return rebuild(weight, force(weight.base), weight.partial_factors())


def _is_rescaled(x: Any) -> bool:
    """Whether a weight has gains, or will have when its method says what it is."""
    return isinstance(x, Weight) and bool((jax.eval_shape(Weight.settled, x) if x.pending else x).gains)


def _leading(weight: Weight) -> tuple[list[Any], Weight]:
    """Split a weight into the arrays to scan, stacked axis first, and the weight to put a layer's arrays into."""
    if isinstance(weight.base, Deferred) and not weight.base.is_sliceable:
        weight = _forced(weight)
    arrays = []
    for f in weight.factors():
        if 0 in f.axes:
            i = f.axes.index(0)
            arrays.append(lax.transpose(f.array, [i, *(j for j in range(len(f.axes)) if j != i)]) if i else f.array)
    return arrays, weight


def _layer(arrays: Any, weight: Weight | None) -> Any:
    """Put one layer's arrays into the weight, whose first axis is gone."""
    if weight is None:
        return arrays
    it = iter(arrays)
    lower = lambda axes: relabelled([a for a in axes if a != 0], lambda a: a - 1)
    factors = [Factor(next(it) if 0 in f.axes else f.array, lower(f.axes)) for f in weight.factors()]
    return weight.with_factors(factors, shape=weight.shape[1:], origins=weight.origins[1:])


def while_loop(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """While: weights that the body hands on unchanged are constants, others are built."""
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    operands = _settled(operands)
    cond_consts, body_consts, init = operands[:n_cond], operands[n_cond : n_cond + n_body], operands[n_cond + n_body :]
    fixed = _unmoved(eqn.params["body_jaxpr"], init, n_body, len(init))
    carried = [x if keep else densify(ctx, x, "while's carry") for x, keep in zip(init, fixed, strict=True)]
    key = ctx.key_here()

    def whole(moving: Sequence[Any]) -> list[Any]:
        it = iter(moving)
        return [x if keep else next(it) for x, keep in zip(carried, fixed, strict=True)]

    def goes_on(moving: Sequence[Any]) -> Any:
        """Under vmap, one answer for each of its members: what runs is the loop of the last to end."""
        inner = ctx.inside(None)
        return densify(inner, evaluate(eqn.params["cond_jaxpr"], [*cond_consts, *whole(moving)], inner)[0], "while")

    is_batched = bool(compat.open_jaxpr(eqn.params["cond_jaxpr"])[0].outvars[0].aval.shape)

    def cond(state: Any) -> Any:
        return jnp.any(goes_on(state[0])) if is_batched else goes_on(state[0])

    def body(state: Any) -> Any:
        moving, key = state
        key, here = (None, None) if key is None else jax.random.split(key)
        inner = ctx.inside(here)
        outs = evaluate(eqn.params["body_jaxpr"], [*body_consts, *whole(moving)], inner)
        moved = [densify(inner, x, "while's carry") for x, keep in zip(outs, fixed, strict=True) if not keep]
        if is_batched:
            members = goes_on(moving)
            lead = lambda x: lax.broadcast_in_dim(members, x.shape, range(members.ndim))
            moved = [lax.select(lead(x), x, old) for x, old in zip(moved, moving, strict=True)]
        return moved, key

    moving = [x for x, keep in zip(carried, fixed, strict=True) if not keep]
    last, _ = lax.while_loop(cond, body, (moving, key))
    return whole(last)


def cond(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Cond and switch: every branch gets the weights; what a branch returns is a plain array."""
    index, *operands = operands
    index = densify(ctx, index, "cond's index")

    fixed, live = list(ctx.fixed[1:]), ctx.live
    weights: dict[int, list[Weight]] = {}

    def branch(jaxpr: Any) -> Any:
        def run(operands: list[Any], key: Any) -> list[Any]:
            inner = ctx.inside(key)
            outs = evaluate(jaxpr, operands, inner, fixed=fixed, live=live)
            for i, x in enumerate(outs):
                if isinstance(x, Weight):
                    weights.setdefault(i, []).append(x)
            return [densify(inner, x, "cond's output") for x in outs]

        return run

    outs = lax.switch(index, [branch(j) for j in eqn.params["branches"]], list(operands), ctx.key_here())
    return [derived(x, weights[i]) if ctx.tracing and i in weights else x for i, x in enumerate(outs)]


def custom_vjp(ctx: Context, eqn: Any, operands: Sequence[Any]) -> Any:
    """custom_vjp: gets the dense weight, so that its author's derivative is kept; when tracing, look inside."""
    return evaluate(eqn.params["call_jaxpr"], operands, ctx, fixed=ctx.fixed) if ctx.tracing else NotImplemented


def custom_jvp(ctx: Context, eqn: Any, operands: Sequence[Any]) -> Any:
    """custom_jvp: the body is factored, and derivatives are the author's, taken at the dense weight."""
    if any(isinstance(x, Weight) and x.outputs for x in operands):  # which a dense weight lacks
        return NotImplemented
    leaves, tree = jax.tree.flatten(list(operands))

    @jax.custom_jvp
    def call(leaves: list[Any]) -> list[Any]:
        outs = evaluate(eqn.params["call_jaxpr"], jax.tree.unflatten(tree, leaves), ctx.inside(None))
        return [densify(ctx, x, "custom_jvp's output") for x in outs]

    def as_written(leaves: list[Any]) -> list[Any]:
        return compat.bind(eqn, [densify(Context(None), x, "custom_jvp") for x in jax.tree.unflatten(tree, leaves)])

    @call.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        return jax.jvp(as_written, primals, tangents)

    return call(leaves)


def shard_map(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """shard_map: each of a weight's arrays is split as the axes that it spans are."""
    params = eqn.params
    axes = lambda spec, n: [*spec, *(None,) * (n - len(spec))]

    def specs(x: Any, spec: Any) -> Any:
        if not isinstance(x, Weight):
            return spec
        of = dict(enumerate(axes(spec, len(x.shape))))
        return jax.tree.map(
            lambda f: Factor(jax.P(*(of.get(a) for a in f.axes)), f.axes), x, is_leaf=lambda v: isinstance(v, Factor)
        )

    def placed(x: Any, spec: Any) -> Any:
        """Split a weight's arrays as its axes are, where types say how; the base came so, unless it is quantised."""
        if not isinstance(x, Weight):
            return x
        came, x = x.base, _forced(x)
        mesh = compat.explicit_mesh(witness(came))
        if mesh is None:
            return x
        split = lambda f, s: Factor(jax.sharding.reshard(f.array, NamedSharding(mesh, s.array)), f.axes)
        made = jax.tree.map(split, x, specs(x, spec), is_leaf=lambda v: isinstance(v, Factor))
        return made if isinstance(came, Deferred) else rebuild(made, came, made.partial_factors())

    operands = [placed(x, s) for x, s in zip(operands, params["in_specs"], strict=True)]

    def local(x: Any) -> Any:
        return dataclasses.replace(x, shape=x.base.shape) if isinstance(x, Weight) else x

    def body(operands: list[Any], key: Any) -> list[Any]:
        inner = ctx.inside(key)
        outs = evaluate(params["jaxpr"], [local(x) for x in operands], inner)
        return [densify(inner, x, "shard_map's output") for x in outs]

    return jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=([specs(x, s) for x, s in zip(operands, params["in_specs"], strict=True)], jax.P()),
        out_specs=list(params["out_specs"]),
        axis_names=params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )(list(operands), ctx.key_here())


RULES: dict[Any, Any] = {
    compat.jit_p: jit,
    compat.closed_call_p: jit,
    compat.remat_p: checkpoint,
    compat.scan_p: scan,
    compat.while_p: while_loop,
    compat.cond_p: cond,
    compat.custom_jvp_call_p: custom_jvp,
    compat.custom_vjp_call_p: custom_vjp,
    compat.shard_map_p: shard_map,
}

# What hands a weight on to a body as it is; the others take it apart, or may decline.
ENTERED = {compat.jit_p, compat.closed_call_p, compat.remat_p, compat.scan_p, compat.while_p, compat.cond_p}
CUT = {*ENTERED, compat.custom_jvp_call_p}  # and what hands on one of which axes are cut into parts
