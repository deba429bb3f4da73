"""`adapt`: the function with its weights adapted where it uses them; `explain`: how that was done."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lorax import paths
from lorax.adapter import Adapter, Plan, base_leaves
from lorax.interpret.context import Context, Use
from lorax.interpret.evaluate import densify, evaluate
from lorax.interpret.stage import Staged, stage
from lorax.interpret.weight import Weight, quantized_weight
from lorax.sites import Site
from lorax.spec import Spec


@dataclasses.dataclass(frozen=True)
class Row:
    """How one site is evaluated.

    Attributes:
      path: the leaf's path.
      how: `factored` (the merged weight is never built) or `materialised`.
      reason: the kinds of its uses; what the merged weight was built for.
    """

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
      The adapted function. In place of the adapter `None` stands for none: quantised params are used as they are. The
      keyword `rng` (a PRNG key) turns on the adapter's own dropout, and is handed on where `fn` itself has a parameter
      of that name; the adapter draws from a stream of its own.

    Raises:
      TypeError: when called: the second argument is no adapter.
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
    own_rng = _parameter(fn, "rng")
    is_required = own_rng is not None and own_rng.kind is own_rng.KEYWORD_ONLY and own_rng.default is own_rng.empty

    @functools.wraps(fn)
    def adapted(params: Any, adapter: Adapter | None, *args: Any, rng: Any = None, **kwargs: Any) -> Any:
        if adapter is None:
            adapter = Adapter({}, {}, Plan((), Spec([])))
        _check_is_adapter(adapter, "adapted(params, adapter, ...)")
        if is_required or (own_rng is not None and rng is not None):
            kwargs["rng"] = rng
        staged = stage(fn, base_leaves(params, adapter.sites), args, kwargs)
        if strict:
            built = [row for row in _rows(staged, adapter) if row.how == "materialised"]
            if built:
                listed = "; ".join(f"{row.path}: {row.reason}" for row in built)
                raise ValueError(
                    f"strict: these weights would have to be built ({listed}). Adapt others, or drop strict"
                )
        return staged.finish(_run(staged, _weights(staged, adapter), Context(None, rng)))

    del adapted.__wrapped__  # its signature is not that of `fn`, and `jit` looks there for static arguments
    return adapted


def _parameter(fn: Callable[..., Any], name: str) -> inspect.Parameter | None:
    try:
        return inspect.signature(fn).parameters.get(name)
    except (TypeError, ValueError):  # a builtin shows none
        return None


def _check_is_adapter(adapter: Any, call: str) -> None:
    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"{call}: the adapter is a {type(adapter).__name__}. It comes from lorax.init or lorax.restore; with new "
            "trained values it is adapter.replace(params=values)"
        )


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
    _check_is_adapter(adapter, "explain(fn, params, adapter, ...)")
    return _rows(stage(fn, base_leaves(params, adapter.sites), args, kwargs), adapter)


def _weights(staged: Staged, adapter: Adapter) -> dict[str, Any]:
    """Return the adapted weights; a leaf that is trained as a whole is a plain array."""
    weights = {
        site.path: method.leaf(site, staged.params[site.path], adapter.arrays(site.path))
        for site, method in adapter.plan.entries
    }
    for path, leaf in staged.params.items():
        if path not in weights and paths.is_quantized(leaf):
            weights[path] = quantized_weight(path, leaf)
    return {path: w.base if w.is_plain else w for path, w in weights.items()}


def _run(staged: Staged, weights: Mapping[str, Any], ctx: Context) -> list[Any]:
    adapted = [w for w in weights.values() if isinstance(w, Weight)]
    if not any(w.pending or any(term.dropout for term in w.terms) for w in adapted):
        ctx.key = None
    leaves = {**staged.params, **weights}
    outs = evaluate(staged.jaxpr, [*leaves.values(), *staged.args], ctx)
    return [densify(ctx, x, "the function's output") for x in outs]


def _rows(staged: Staged, adapter: Adapter) -> list[Row]:
    uses: dict[Use, None] = {}
    whole: set[str] = set()

    def run(leaves: Sequence[Any], args: Sequence[Any], adapter: Adapter) -> list[Any]:
        abstract = dataclasses.replace(staged, params=dict(zip(staged.params, leaves, strict=True)), args=args)
        weights = _weights(abstract, adapter)
        whole.update(path for path, w in weights.items() if not isinstance(w, Weight))
        return _run(abstract, weights, Context(lambda use: uses.setdefault(use)))

    jax.eval_shape(run, list(staged.params.values()), list(staged.args), adapter)  # a dict would come back sorted
    sites = [site for site, _ in adapter.plan.entries]
    trained = lambda site: Row(site.path, "factored", "trained as it is")
    return [trained(s) if s.path in whole else _row(s, [u for u in uses if s.path in u.paths]) for s in sites]


def _row(site: Site, uses: Sequence[Use]) -> Row:
    # A row that was looked up is a lookup's result, not a weight that had to be built; a layer picked by its number is.
    looked_up = lambda u: any(path == site.path and axis not in site.stack for path, axis, _ in u.lookups)
    built = [u for u in uses if not u.factored and not looked_up(u)]
    if built:
        return Row(site.path, "materialised", "; ".join(dict.fromkeys(u.reason for u in built)))
    kinds = dict.fromkeys(u.kind for u in uses)
    return Row(site.path, "factored", ", ".join(kinds) or "not read by this call")
