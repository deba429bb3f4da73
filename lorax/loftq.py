"""LoftQ and QPiSSA: quantise a base so that its adapter makes up for the error from the start.

Axes: S stacked layers or experts, I fan-in, O fan-out (each flattened), R rank.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lorax import compat
from lorax.adapter import Adapter, base_leaves
from lorax.methods.dora import DoRA
from lorax.methods.initializers import Factors, by_layer, leaf_of, matrices, principal
from lorax.methods.lora import LoRA
from lorax.methods.lorafa import LoRAFA
from lorax.paths import is_quantized
from lorax.quant import Quantized, quantize
from lorax.quant.quantize import Rules
from lorax.sites import Site

FITTED = (LoRA, LoRAFA, DoRA)


def loftq(
    params: Any, adapter: Adapter, rules: Rules, *, sites: Iterable[Site] | None = None, iterations: int = 5
) -> tuple[Any, Adapter]:
    """Quantise the params, and start the adapter's factors so that `Q + s·A·B` is near the weight `W`.

    LoftQ, Li et al. 2023 (arXiv:2310.08659, section 3, algorithm 1): from `A·B = 0`, repeat `Q = quant(W − s·A·B)` and
    `s·A·B = SVD_r(W − Q)`, with the quantiser itself. An adapter whose start is subtracted (`pissa`, `olora`) starts
    from `s·A·B = SVD_r(W)` instead and ends with a quantisation: QPiSSA, Meng et al. 2024 (arXiv:2404.02948, section
    4). Nothing is subtracted from it then, since `Q` is the residual.

    The scaling is respected, whatever it is; in PEFT the result is exact for `alpha = r` only. Each layer of a stack
    is a matrix of its own. Under DoRA the magnitude stays that of `W`.

    Args:
      params: the base in full precision; never changed. Of numpy, or on a mesh, if you like.
      adapter: as `lorax.init` made it on these params; what its factors were is lost.
      rules: as for `lorax.quantize`: ordered patterns of leaf paths and their formats. Selected leaves without an
        adapter are quantised as they are.
      sites: as for `lorax.quantize`; those of the adapter are known anyway.
      iterations: how often to repeat, at least once.

    Returns:
      The quantised params, and the adapter that belongs to them.

    Raises:
      ValueError: `iterations` is below 1, the rules select no leaf that the adapter adapts, or one under a method that
        has no pair of factors to fit, or a scaling is not above zero; or what `lorax.quantize` and `base_leaves` raise.

    >>> import lorax
    >>> from lorax.quant import NF4
    >>> fn = lambda params, x: x @ params["kernel"]
    >>> params, x = {"kernel": jax.random.normal(jax.random.key(0), (64, 128))}, jnp.ones((1, 64))
    >>> spec = lorax.Spec({"kernel": lorax.LoRA(rank=16, alpha=32)})
    >>> adapter = lorax.init(jax.random.key(1), spec, lorax.trace(fn, params, x), params)
    >>> qparams, adapter = loftq(params, adapter, {"kernel": NF4()})
    >>> plain = qparams["kernel"].with_values(params["kernel"]).dequantize()
    >>> near = lorax.merge({"kernel": qparams["kernel"].dequantize()}, adapter)["kernel"]
    >>> error = lambda w: float(jnp.linalg.norm(w - params["kernel"]))
    >>> error(near) < 0.8 * error(plain)
    True
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"loftq: iterations is {iterations!r}; it has to be a whole number of at least 1")
    leaves, _ = base_leaves(params, adapter.sites)
    quantized, tree = base_leaves(quantize(params, rules, sites=sites), adapter.sites)
    chosen = [
        (site, method)
        for site, method in adapter.plan.entries
        if is_quantized(quantized[site.path]) and not is_quantized(leaves[site.path])
    ]
    if not chosen:
        adapted = ", ".join(site.path for site, _ in adapter.plan.entries[:8])
        raise ValueError(f"loftq: the rules select no leaf that the adapter adapts ({adapted}): use lorax.quantize")
    if unfit := [f"{s.path} ({type(m).__name__})" for s, m in chosen if not isinstance(m, FITTED)]:
        kinds = ", ".join(cls.__name__ for cls in FITTED)
        raise ValueError(
            f"loftq: no pair of factors to fit at {', '.join(unfit)}; it needs {kinds}. Leave these out of the rules "
            "by a pattern with None further up, and quantise them with lorax.quantize"
        )
    trained, fixed = dict(adapter.params), dict(adapter.state)
    scales = {site.path: _scales(site, fixed[site.path]["scale"]) for site, _ in chosen}
    for site, method in chosen:
        path, leaf = site.path, leaves[site.path]
        arrays = adapter.arrays(path)
        plain = quantize({path: leaf}, {re.escape(path): quantized[path].format}, sites=[site])[path]
        node, fitted = _fit(leaf, plain, scales[path], arrays["a"], arrays["b"], iterations, site, "b0" in arrays)
        quantized[path] = _placed_like(node, plain)
        trained[path] = {name: fitted.get(name, x) for name, x in trained[path].items()}
        state = {name: fitted.get(name, x) for name, x in fixed[path].items() if name not in ("a0", "b0")}
        if isinstance(method, DoRA):  # the squared norm is that of the base, which is `Q` now
            state["squared_norm"] = _started(method, site, node)["squared_norm"]
        fixed[path] = state
    return jax.tree.unflatten(tree, list(quantized.values())), adapter.replace(params=trained, state=fixed)


def _started(method: DoRA, site: Site, base: Any) -> Mapping[str, Any]:
    """Return what DoRA keeps of a base, of which only the norm is of interest."""
    return dataclasses.replace(method, initializer="uniform").init(jax.random.key(0), site, base)[1]


def _scales(site: Site, scale: Any) -> jax.Array:
    """Return one scaling a layer."""
    if not compat.is_traced(scale) and not np.all(np.asarray(scale) > 0):
        raise ValueError(
            f"{site.path}: loftq divides by the scaling, which is {np.asarray(scale)}: choose an alpha above 0"
        )
    return jnp.broadcast_to(jnp.asarray(scale), site.dims("S")).reshape(-1)


@functools.partial(jax.jit, static_argnames=("site", "starts_at_weight"))
def _fit(
    leaf: Any, node: Quantized, scales_S: Any, a: Any, b: Any, iterations: Any, site: Site, starts_at_weight: bool
) -> tuple[Quantized, Mapping[str, jax.Array]]:
    """Return the quantised leaf and its factors; `node` gives the layout and the format, `a` and `b` the dtypes."""
    weight_SxIxO = matrices(site, leaf)
    rank = b.shape[site.axes("SRO").index("R")]

    def factors(target_SxIxO: jax.Array) -> Factors:
        fitted = by_layer(lambda m, s: principal(m, rank, s), target_SxIxO, scales_S)
        return fitted[0].astype(a.dtype), fitted[1].astype(b.dtype)

    def residual(node: Quantized) -> jax.Array:
        return weight_SxIxO - matrices(site, node)

    def stored(update_SxIxO: Any) -> Quantized:
        return node.with_values(leaf_of(site, weight_SxIxO - update_SxIxO))

    def update(pair: Factors) -> jax.Array:
        a_SxIxR, b_SxRxO = (x.astype(weight_SxIxO.dtype) for x in pair)
        return jnp.matmul(a_SxIxR * scales_S[:, None, None], b_SxRxO, precision=lax.Precision.HIGHEST)

    def refit(_: Any, last: tuple[Quantized, Factors]) -> tuple[Quantized, Factors]:
        node = stored(update(last[1]))
        return node, factors(residual(node))

    def restore(_: Any, last: tuple[Quantized, Factors]) -> tuple[Quantized, Factors]:
        pair = factors(residual(last[0]))
        return stored(update(pair)), pair

    if starts_at_weight:
        start = factors(weight_SxIxO)
        node, pair = lax.fori_loop(1, iterations, restore, (stored(update(start)), start))
    else:
        first = stored(0)
        node, pair = lax.fori_loop(1, iterations, refit, (first, factors(residual(first))))
    return node, {"a": pair[0].reshape(a.shape), "b": pair[1].reshape(b.shape)}


def _placed_like(node: Quantized, other: Quantized) -> Quantized:
    """Lay a node out over the devices like another of its layout."""
    if any(compat.is_traced(x) for x in jax.tree.leaves((node, other))) or node.codes.sharding == other.codes.sharding:
        return node
    return jax.device_put(node, jax.tree.map(lambda x: x.sharding, other))
