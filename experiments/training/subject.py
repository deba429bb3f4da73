"""What is evaluated: a base with an adapter, merged into plain parameters where that can be, else adapted at each use.

A quantised base is not merged: that would build its weights in full precision. Methods without a merged weight cannot
be.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

import lorax
from lorax.adapter import Plan

POSITIONAL = (lorax.Prompt, lorax.Prefix)

_merge = jax.jit(lorax.merge)


def why_not_merged(params: Any, adapter: lorax.Adapter) -> str | None:
    """Return why an adapter is evaluated beside its base, or None if it is merged into it."""
    if kinds := sorted({type(m).__name__ for m in adapter.methods.values() if not m.is_mergeable}):
        return f"{', '.join(kinds)} has no merged weight"
    if any(lorax.quant.is_quantized(x) for x in jax.tree.leaves(params, is_leaf=lorax.quant.is_quantized)):
        return "the base is quantised"
    return None


def of(params: Any, adapter: lorax.Adapter) -> Any:
    """Return what an evaluator takes: merged parameters, or the pair `(params, adapter)`."""
    return (params, adapter) if why_not_merged(params, adapter) else _merge(params, adapter)


def adapted(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function `(params, …)` as one of the pair: `((params, adapter), …)`."""
    return lambda pair, *args: lorax.adapt(fn)(*pair, *args)


def adapted_later(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same for positions after the first ones, which prompts and prefixes leave as they are."""
    return lambda pair, *args: lorax.adapt(fn)(pair[0], _without_positions(pair[1]), *args)


def _without_positions(adapter: lorax.Adapter) -> lorax.Adapter:
    kept = tuple((site, method) for site, method in adapter.plan.entries if not isinstance(method, POSITIONAL))
    paths = {site.path for site, _ in adapter.plan.entries} - {site.path for site, _ in kept}
    rest = lambda arrays: {path: x for path, x in arrays.items() if path not in paths}
    plan = Plan(kept, adapter.spec)
    return dataclasses.replace(adapter, params=rest(adapter.params), state=rest(adapter.state), plan=plan)
