"""`adapt`: the function with its weights adapted where it uses them; `explain`: how that was done."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lorax.adapter import Adapter, base_leaves
from lorax.interpret.context import Context, Use
from lorax.interpret.evaluate import densify, evaluate
from lorax.interpret.stage import Staged, stage


@dataclasses.dataclass(frozen=True)
class Row:
    """How one site is evaluated: `factored` (the dense weight is never built) or `materialised`, and why."""

    path: str
    how: str
    reason: str


def adapt(fn: Callable[..., Any], *, strict: bool = False) -> Callable[..., Any]:
    """Return `fn` with adapted weights: `adapted(params, adapter, *args, rng=None, **kwargs)`.

    The function is traced and evaluated with every adapted weight `W` standing for `W + s·A·B` (or what its method
    says) at each of its uses; the model needs no change, and no `ΔW` is built. The result is that of
    `fn(lorax.merge(params, adapter), *args, **kwargs)` up to round-off, in values and gradients. It composes with
    `jit`, `grad`, `vmap`, `scan`, `checkpoint`, `shard_map` and itself.

    Args:
      fn: any JAX function of a parameter pytree. It is traced: what it does with arrays in Python control flow has to
        work under `jit`; arguments that are no arrays stay Python values.
      strict: refuse to build a dense weight where no rule applies; see `explain`.

    Returns:
      The adapted function. Its keyword `rng` (a PRNG key) turns on the adapter's own dropout and is not handed on.

    Raises:
      ValueError: when called: the adapter belongs to params of other paths or shapes; under `strict`, a weight would
        have to be built.

    >>> import lorax, jax.numpy as jnp
    >>> fn = lambda params, x: x @ params["kernel"]
    >>> params, x = {"kernel": jnp.eye(4)}, jnp.ones((2, 4))
    >>> spec = lorax.Spec({"kernel": lorax.LoRA(rank=2)})
    >>> adapter = lorax.init(jax.random.key(0), spec, lorax.trace(fn, params, x), params)
    >>> bool((lorax.adapt(fn)(params, adapter, x) == fn(params, x)).all())
    True
    """

    @functools.wraps(fn)
    def adapted(params: Any, adapter: Adapter, *args: Any, rng: Any = None, **kwargs: Any) -> Any:
        staged = stage(fn, base_leaves(params, adapter.sites), args, kwargs)
        if strict:
            built = [row for row in _rows(staged, adapter) if row.how == "materialised"]
            if built:
                listed = "; ".join(f"{row.path}: {row.reason}" for row in built)
                raise ValueError(
                    f"strict: these weights would have to be built ({listed}). Adapt others, or drop strict"
                )
        return staged.finish(_run(staged, list(staged.params.values()), adapter, staged.args, Context(None, rng)))

    return adapted


def explain(fn: Callable[..., Any], params: Any, adapter: Adapter, *args: Any, **kwargs: Any) -> list[Row]:
    """Say for every adapted site how `adapt(fn)` evaluates it, without running anything.

    Args:
      fn: the function.
      params: the base, arrays or `jax.ShapeDtypeStruct`s.
      adapter: likewise.
      *args: likewise.
      **kwargs: likewise.

    Returns:
      A row a site with `.path`, `.how` (`factored` or `materialised`) and `.reason`.
    """
    return _rows(stage(fn, base_leaves(params, adapter.sites), args, kwargs), adapter)


def _run(staged: Staged, leaves: Sequence[Any], adapter: Adapter, args: Sequence[Any], ctx: Context) -> list[Any]:
    values: dict[str, Any] = dict(zip(staged.params, leaves, strict=True))
    for site, method in adapter.plan.entries:
        weight = method.leaf(site, values[site.path], adapter.arrays(site.path))
        values[site.path] = weight.base if weight.is_plain else weight
    outs = evaluate(staged.jaxpr, [*values.values(), *args], ctx)
    return [densify(ctx, x, "the function's output") for x in outs]


def _rows(staged: Staged, adapter: Adapter) -> list[Row]:
    uses: dict[Use, None] = {}
    ctx = Context(lambda use: uses.setdefault(use))
    jax.eval_shape(
        lambda leaves, adapter, args: _run(staged, leaves, adapter, args, ctx),
        list(staged.params.values()),
        adapter,
        list(staged.args),
    )
    return [
        _row(site.path, set(site.stack), [u for u in uses if site.path in u.paths]) for site, _ in adapter.plan.entries
    ]


def _row(path: str, stack: set[int], uses: Sequence[Use]) -> Row:
    # A row that was looked up is a lookup's result, not a weight that had to be built; a layer picked by its number is.
    looked_up = lambda u: any(p == path and axis not in stack for p, axis, _ in u.lookups)
    built = [u for u in uses if not u.factored and not looked_up(u)]
    if built:
        return Row(path, "materialised", "; ".join(dict.fromkeys(u.reason for u in built)))
    kinds = dict.fromkeys(u.kind for u in uses)
    return Row(path, "factored", ", ".join(kinds) or "not read as a weight by this call")
