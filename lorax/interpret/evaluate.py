"""Evaluate a jaxpr in which some values are adapted weights.

Equations that no adapted weight reaches go to JAX's own evaluator in runs. For the others a table of rules, keyed by
primitive, says what happens; a rule that declines, or a primitive with no rule, gets the dense weight, which is
always right and always recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorax import compat
from lorax.interpret.context import Context, Use
from lorax.interpret.weight import Weight, dense

RULES: dict[Any, Any] = {}


def evaluate(jaxpr: Any, args: Sequence[Any], ctx: Context) -> list[Any]:
    """Run an open or closed jaxpr on arrays and `Weight`s; outputs may be either."""
    jaxpr, consts = compat.open_jaxpr(jaxpr)
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    built: dict[Any, Any] = {}  # dense forms, at most one a variable
    last_use = _last_uses(jaxpr)
    pending: list[Any] = []

    def read(v: Any) -> Any:
        return v.val if isinstance(v, compat.Literal) else env[v]

    for at, eqn in enumerate(jaxpr.eqns):
        adapted = [v for v in eqn.invars if isinstance(v, compat.Var) and isinstance(env.get(v), Weight)]
        if not adapted:
            pending.append(eqn)
            continue
        _run(pending, env, last_use, at)
        pending.clear()
        values = [read(v) for v in eqn.invars]
        with compat.equation_context(eqn):
            rule = RULES.get(eqn.primitive)
            outs = NotImplemented if rule is None else rule(ctx, eqn, values)
            if outs is NotImplemented:
                for v in adapted:
                    if v not in built:
                        built[v] = densify(ctx, env[v], str(eqn.primitive))
                plain = [built[v] if isinstance(x, Weight) else x for v, x in zip(eqn.invars, values, strict=True)]
                outs = ctx.bind(eqn, plain)
        env.update(zip(eqn.outvars, outs, strict=True))
    _run(pending, env, last_use, len(jaxpr.eqns))
    return [read(v) for v in jaxpr.outvars]


def densify(ctx: Context, value: Any, reason: str) -> Any:
    """Return a plain array for a value, building an adapted weight and recording for what."""
    if not isinstance(value, Weight):
        return value
    rows = {(path, axis) for path, axis, batched in value.lookups if batched}
    ctx.record(
        Use(
            paths=value.paths,
            kind="embedding" if value.lookups else "other",
            primitive=reason,
            contracted=frozenset(rows),
            free=frozenset().union(*value.origins),
            lookups=value.lookups,
            factored=False,
            reason=f"read by {reason}",
        )
    )
    return dense(value)


def _last_uses(jaxpr: Any) -> dict[Any, int]:
    last = {v: at for at, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if isinstance(v, compat.Var)}
    last.update((v, len(jaxpr.eqns)) for v in jaxpr.outvars if isinstance(v, compat.Var))
    return last


def _run(eqns: Sequence[Any], env: dict[Any, Any], last_use: dict[Any, int], until: int) -> None:
    """Run equations that no adapted weight reaches; keep what is read at or after equation `until`."""
    if not eqns:
        return
    defined = {v for eqn in eqns for v in eqn.outvars}
    read = dict.fromkeys(v for eqn in eqns for v in eqn.invars if isinstance(v, compat.Var) and v not in defined)
    kept = [v for eqn in eqns for v in eqn.outvars if last_use.get(v, -1) >= until]
    env.update(zip(kept, compat.evaluate_equations(eqns, list(read), kept, [env[v] for v in read]), strict=True))
