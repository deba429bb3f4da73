"""Evaluate a jaxpr in which some values are adapted weights.

An equation that no adapted weight reaches is bound as it is. For the others a table of rules, keyed by primitive, says
what happens; a rule that declines, or a primitive with no rule, gets the dense weight, which is always right and
always recorded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lorax import compat
from lorax.interpret.activation import apply_outputs
from lorax.interpret.context import Context, Use
from lorax.interpret.contraction import dense
from lorax.interpret.deferred import witness
from lorax.interpret.residuals import Followed
from lorax.interpret.weight import Factor, Term, Weight

RULES: dict[Any, Any] = {}
ENTERED: set[Any] = set()  # control flow, whose bodies get a weight as it is
CUT: set[Any] = set()  # what can do with arrays that span a part of an axis


def evaluate(
    jaxpr: Any, args: Sequence[Any], ctx: Context, *, fixed: Sequence[bool] = (), live: Sequence[bool] | None = None
) -> list[Any]:
    """Run an open or closed jaxpr on arrays and `Weight`s; outputs may be either.

    Args:
      jaxpr: the jaxpr.
      args: its inputs.
      ctx: the context.
      fixed: when tracing: which plain inputs follow from the parameters alone, so that a weight that is normalised or
        masked on its way to a product still is seen to reach it.
      live: which outputs are read; the others come out as None, and nothing is built for them.
    """
    jaxpr, consts = compat.open_jaxpr(jaxpr)
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    built: dict[Any, Any] = {}  # dense forms, at most one a variable
    place = ctx.place
    live = [True] * len(jaxpr.outvars) if live is None else live
    steps, needed = _liveness(jaxpr, live)
    known = set(jaxpr.constvars) | {v for v, is_fixed in zip(jaxpr.invars, fixed, strict=False) if is_fixed}

    def read(v: Any) -> Any:
        return v.val if isinstance(v, compat.Literal) else env[v]

    def run(eqn: Any) -> Sequence[Any]:
        values = [read(v) for v in eqn.invars]
        if ctx.tracing:
            ctx.fixed = [isinstance(v, compat.Literal) or v in known or _is_whole(env[v]) for v in eqn.invars]
            if all(ctx.fixed):
                known.update(eqn.outvars)
        if Weight not in map(type, values):
            return compat.bind(eqn, values)
        ctx.live = [v in needed for v in eqn.outvars]
        rule = RULES.get(eqn.primitive)
        if eqn.primitive not in ENTERED:
            for v, x in zip(eqn.invars, values, strict=True):
                if isinstance(x, Weight) and x.pending:
                    with compat.mesh_of(witness(x.base)):
                        env[v] = x.settled()
            values = [read(v) for v in eqn.invars]
        if eqn.primitive not in CUT and any(isinstance(x, Weight) and x.cuts() for x in values):
            rule = None
        outs = NotImplemented if rule is None else rule(ctx, eqn, values)
        if outs is not NotImplemented:
            return outs
        adapted = [v for v, x in zip(eqn.invars, values, strict=True) if isinstance(x, Weight)]
        for v in adapted:
            if v not in built:
                built[v] = densify(ctx, env[v], str(eqn.primitive))
        plain = [built[v] if isinstance(x, Weight) else x for v, x in zip(eqn.invars, values, strict=True)]
        outs = compat.bind(eqn, plain)
        if ctx.tracing and all(v in known for v in eqn.outvars):
            return [derived(out, [env[v] for v in adapted]) for out in outs]
        return outs

    for context, group in itertools.groupby(steps, lambda step: step[0].ctx):
        with context.manager:
            for eqn, number, dying in group:
                ctx.place = (*place, number)
                with compat.source_context(eqn):
                    outs = run(eqn)
                    if ctx.followed is not None:
                        outs = _marked(ctx.followed, eqn, [read(v) for v in eqn.invars], outs)
                    env.update((v, x) for v, x in zip(eqn.outvars, outs, strict=True) if v in needed)
                for v in dying:  # an eager call keeps no activation longer than the plain function does
                    ctx.forget(env.pop(v))
                    built.pop(v, None)
    ctx.place = place
    return [read(v) if is_live else None for v, is_live in zip(jaxpr.outvars, live, strict=True)]


def _marked(followed: Followed, eqn: Any, values: Sequence[Any], outs: Sequence[Any]) -> Sequence[Any]:
    """Mark what is kept of an equation's outputs, unless that happened inside of it."""
    is_entered = eqn.primitive in ENTERED and any(isinstance(x, Weight) for x in values)
    return outs if is_entered else followed.mark(eqn, values, outs)


def _is_whole(value: Any) -> bool:
    """Tell whether a value is a weight and not the rows that an argument looked up in one."""
    return isinstance(value, Weight) and not any(batched for *_, batched in value.lookups)


def derived(out: Any, weights: Sequence[Weight]) -> Any:
    """When tracing, follow a weight through an operation that only its dense form can go through."""
    weights = [w for w in weights if len(w.shape) == jnp.ndim(out)]
    if not weights or not jnp.issubdtype(out.dtype, jnp.floating):
        return out
    return Weight(
        (Term((Factor(out, tuple(range(out.ndim))),)),),
        tuple(out.shape),
        out.dtype,
        tuple(  # an axis that a weight is repeated along is none of its own
            frozenset().union(*(w.origins[i] for w in weights if w.shape[i] > 1 or n == 1))
            for i, n in enumerate(out.shape)
        ),
        tuple(dict.fromkeys(path for w in weights for path in w.paths)),
        frozenset().union(*(w.lookups for w in weights)),
    )


def densify(ctx: Context, value: Any, reason: str) -> Any:
    """Return a plain array for a value, building an adapted weight and recording for what."""
    if not isinstance(value, Weight):
        return value
    if ctx.record is not None:
        use = Use(
            paths=value.paths,
            kind="embedding" if value.lookups else "other",
            primitive=reason,
            contracted=frozenset((path, axis) for path, axis, batched in value.lookups if batched),
            free=frozenset().union(*value.origins),
            lookups=value.lookups,
            factored=False,
            reason=f"read by {reason}",
        )
        ctx.record(use)
    with compat.mesh_of(witness(value.base)):
        return _through_outputs(value, reason) if value.outputs else dense(value)


def _through_outputs(value: Weight, reason: str) -> Any:
    """Build a weight that has outputs: rows that were looked up go through them, a weight itself has none."""
    free = frozenset().union(*value.origins)
    acting = [o for o in value.outputs if value.lookups and o.over == free]
    for o in value.outputs:
        if o not in acting and not o.method.acts_on_lookups:
            raise ValueError(
                f"{', '.join(value.paths)}: {type(o.method).__name__} acts on the output of a product, and here "
                f"{reason} reads the weight itself. Leave it out of the spec, or adapt it with a method that has a "
                "merged weight"
            )
    axes = [("row", i) if not origin else i for i, origin in enumerate(value.origins)]
    return apply_outputs(acting, dense(value), axes)


def _liveness(jaxpr: Any, live: Sequence[bool]) -> tuple[list[tuple[Any, int, list[Any]]], set[Any]]:
    """Return the equations that are needed, with their numbers and what each reads last, and all variables needed."""
    outs = zip(jaxpr.outvars, live, strict=True)
    needed = {v for v, is_live in outs if is_live and isinstance(v, compat.Var)}
    steps = []
    for number, eqn in reversed(list(enumerate(jaxpr.eqns))):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            dying = dict.fromkeys(v for v in eqn.invars if isinstance(v, compat.Var) and v not in needed)
            needed.update(dying)
            steps.append((eqn, number, list(dying)))
    return steps[::-1], needed
