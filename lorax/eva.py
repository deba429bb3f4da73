"""EVA: factors along the directions in which a site's inputs vary, and more rank where they explain more of it.

Axes: S stacked layers or experts, I fan-in (flattened), K components, R rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax.adapter import Adapter, Plan
from lorax.capture import input_moments
from lorax.methods.dora import DoRA
from lorax.methods.initializers import find
from lorax.methods.lora import LoRA
from lorax.methods.lorafa import LoRAFA
from lorax.methods.lowrank import LowRank
from lorax.sites import Site

FITTED = (LoRA, LoRAFA, DoRA)


def centred(second: Any, total: Any, count: Any) -> jax.Array:
    """Return the scatter about the mean, `XᵀX − (Σx)(Σx)ᵀ/n`, from sums that add up over batches.

    Args:
      second: `XᵀX`, shape (*S, I, I).
      total: the sum of the rows of `X`, shape (*S, I).
      count: the number of rows, a scalar or of shape S.

    >>> x = jnp.array([[1.0, 5.0], [3.0, 5.0]])
    >>> centred(x.T @ x, x.sum(0), 2).tolist()
    [[2.0, 0.0], [0.0, 0.0]]
    """
    count = jnp.asarray(count)[..., None, None]
    return second - total[..., :, None] * total[..., None, :] / jnp.maximum(count, 1)


def components(scatter: Any, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the leading principal components of inputs.

    Args:
      scatter: their scatter, as `centred` returns it, shape (*S, I, I).
      count: how many components `K`; never more than `I`.

    Returns:
      The directions as columns, shape (*S, I, K); the share of the variance that each explains, (*S, K), descending,
      zero where there is none; and the variances themselves (times the number of rows), (*S, K).

    >>> directions, shares, _ = components(jnp.diag(jnp.array([1.0, 3.0])), 1)
    >>> jnp.abs(directions).tolist(), shares.tolist()
    ([[0.0], [1.0]], [0.75])
    """
    values, vectors = jnp.linalg.eigh(jnp.asarray(scatter, jnp.promote_types(jnp.result_type(scatter), jnp.float32)))
    values = jnp.maximum(values, 0)
    total = jnp.sum(values, axis=-1, keepdims=True)
    leading = values[..., ::-1][..., :count]
    return vectors[..., ::-1][..., :count], leading / jnp.where(total > 0, total, 1), leading


def redistribute(shares: Mapping[str, Any], budget: int) -> dict[str, np.ndarray]:
    """Return how many components of each layer are among the best of all: the ranks.

    Args:
      shares: by path the explained shares, shape (*S, K), descending: `K` bounds a layer's rank.
      budget: the sum of all ranks; of equal shares the one that comes first is taken.

    Returns:
      The ranks by path, whole numbers of shape S.

    >>> ranks = redistribute({"first": np.array([0.5, 0.1]), "layers": np.array([[0.9, 0.05], [0.4, 0.3]])}, 4)
    >>> {path: ranks[path].tolist() for path in ranks}
    {'first': 1, 'layers': [1, 2]}
    """
    flat = {path: np.asarray(x, np.float64) for path, x in shares.items()}
    pool = np.concatenate([x.reshape(-1) for x in flat.values()])
    is_kept = np.zeros(len(pool), bool)
    is_kept[np.argsort(-pool, kind="stable")[:budget]] = True
    parts = np.split(is_kept, np.cumsum([x.size for x in flat.values()])[:-1])
    return {path: part.reshape(x.shape).sum(-1) for (path, x), part in zip(flat.items(), parts, strict=True)}


def start(
    adapter: Adapter,
    scatters: Mapping[str, Any],
    *,
    rho: float = 2.0,
    whiten: bool = False,
    adjusts_scale: bool = True,
) -> Adapter:
    """Start factors from the inputs of their sites: Paischer et al. 2024 (arXiv:2410.07170, section 3).

    `A` holds the leading principal components of a layer's inputs, as columns. The ranks that the methods have, summed
    over all layers, are the budget: it goes to the components that explain the largest share of their layer's
    variance, at most `rho` times its rank to a layer. Layers of one stack may differ in rank: the columns above a
    layer's own are zero, and training leaves them zero. A site that gets no rank at all is left out of the adapter.

    As in PEFT the inputs are centred; `whiten` divides a component by the root of its singular value.

    Args:
      adapter: of methods that start with `B = 0`, as `lorax.init` made it; concrete, since ranks are shapes.
      scatters: by path the scatter of the inputs, shape (*S, I, I); `centred` makes it of running sums. Sites that are
        not among them keep what they have and take no part.
      rho: at least 1, which gives every layer its rank.
      whiten: see above.
      adjusts_scale: as in PEFT, `alpha` grows and falls with a layer's rank, so that `alpha/rank` stays.

    Returns:
      The adapter with other ranks.

    Raises:
      ValueError: a setting is out of range; a path is not adapted, its scatter has another shape, or its method is
        none that starts with `B = 0`.
    """
    if not rho >= 1:
        raise ValueError(f"eva: rho is {rho!r}; it has to be at least 1")
    methods = {path: _method(adapter, path, scatter) for path, scatter in scatters.items()}
    if not methods:
        raise ValueError(f"eva: got no inputs for any of {', '.join(list(adapter.methods)[:8])}")
    sites = adapter.sites
    leading = {path: components(x, round(methods[path].rank * rho)) for path, x in scatters.items()}
    budget = sum(method.rank * sites[path].size("S") for path, method in methods.items())
    ranks = redistribute({path: shares for path, (_, shares, _) in leading.items()}, budget)
    trained, fixed, entries = {}, {}, []
    for site, method in adapter.plan.entries:
        path = site.path
        mine, state = dict(adapter.params[path]), dict(adapter.state[path])
        if path in ranks:
            rank = int(ranks[path].max())
            if not rank:
                continue
            directions, _, variances = leading[path]
            fitted = _factors(site, directions, variances, ranks[path], rank, whiten)
            mine = {name: fitted[name].astype(x.dtype) if name in fitted else x for name, x in mine.items()}
            state = {name: fitted[name].astype(x.dtype) if name in fitted else x for name, x in state.items()}
            state["scale"] = _scale(methods[path], ranks[path], adjusts_scale)
            method = dataclasses.replace(methods[path], rank=rank, alpha=_alpha(methods[path], rank, adjusts_scale))
        trained[path], fixed[path] = mine, state
        entries.append((site, method))
    kept = {adapter.plan.shared[site.path] for site, _ in entries if site.path in adapter.plan.shared}
    fixed |= {name: adapter.state[name] for name in kept}
    return Adapter(trained, fixed, Plan(tuple(entries), adapter.spec))


def _method(adapter: Adapter, path: str, scatter: Any) -> LowRank:
    """Return a site's method, once it is known to fit."""
    if path not in adapter.methods:
        raise ValueError(
            f"{path}: there are inputs, and no adapter of this leaf. Adapted: {', '.join(adapter.methods)}"
        )
    site, method = adapter.sites[path], adapter.methods[path]
    if not isinstance(method, FITTED) or find(method.initializer).is_subtracted or site.kind == "embedding":
        raise ValueError(
            f"{path}: EVA starts from B = 0 under {', '.join(cls.__name__ for cls in FITTED)} and not at an embedding; "
            f"this is {method} at a site of kind {site.kind}. Leave the path out"
        )
    wanted = (*site.dims("S"), site.size("I"), site.size("I"))
    if tuple(np.shape(scatter)) != wanted:
        raise ValueError(f"{path}: the scatter of the inputs has shape {tuple(np.shape(scatter))}, expected {wanted}")
    return method


def _factors(
    site: Site, directions: jax.Array, variances: jax.Array, ranks: np.ndarray, rank: int, whiten: bool
) -> dict[str, jax.Array]:
    """Return `A` and `B`; a layer's columns above its own rank are zero."""
    is_own = np.arange(rank) < np.asarray(ranks)[..., None]
    weight = jnp.asarray(is_own, directions.dtype)
    if whiten:
        values = variances[..., :rank]
        weight = jnp.where(is_own & (values > 0), jnp.where(values > 0, values, 1) ** -0.25, 0)
    a = directions[..., :rank] * weight[..., None, :]
    return {"a": a.reshape(site.dims("SIR", R=rank)), "b": jnp.zeros(site.dims("SRO", R=rank))}


def _alpha(method: LowRank, rank: int, adjusts: bool) -> float:
    alpha = method.rank if method.alpha is None else method.alpha
    return alpha * rank / method.rank if adjusts else alpha


def _scale(method: LowRank, ranks: np.ndarray, adjusts: bool) -> jax.Array:
    """Return the scaling: one number, or one a layer where layers differ."""
    one = lambda rank: dataclasses.replace(method, rank=rank, alpha=_alpha(method, rank, adjusts)).scaling
    own = [max(int(rank), 1) for rank in ranks.reshape(-1)]  # of a layer without a rank it does not matter
    scales = np.array([one(rank) for rank in own], np.float32).reshape(ranks.shape)
    return jnp.asarray(scales.flat[0] if np.all(scales == scales.flat[0]) else scales)


def eva(
    fn: Callable[..., Any],
    params: Any,
    adapter: Adapter,
    batches: Sequence[Sequence[Any]],
    *,
    rho: float = 2.0,
    whiten: bool = False,
    adjusts_scale: bool = True,
    memory: int = 2**30,
) -> Adapter:
    """Start the factors of an adapter from the inputs that its sites see on a few batches; redistribute the ranks.

    See `start` for what is done with them. Every product site with a method that starts with `B = 0` takes part.

    Args:
      fn: the function.
      params: the base.
      adapter: as `lorax.init` made it.
      batches: a few batches, each the arguments that `fn` has after the params.
      rho: the most that a layer's rank may grow by, a factor.
      whiten: divide a component by the root of its singular value.
      adjusts_scale: `alpha` grows and falls with a layer's rank.
      memory: bytes of moments that are held at a time; more sites than fit take further passes over the batches.

    Returns:
      The adapter with other ranks and factors; it changes nothing yet.

    Raises:
      ValueError: no site takes part, a batch is no tuple, or what `start` raises.

    >>> import lorax
    >>> fn = lambda params, x: x @ params["first"] @ params["second"]
    >>> params = {"first": jnp.eye(6), "second": jnp.eye(6)}
    >>> x = jax.random.normal(jax.random.key(0), (32, 6)) * jnp.array([9.0, 3.0, 1.0, 1.0, 1.0, 1.0])
    >>> spec = lorax.Spec({".*": lorax.LoRA(rank=2)})
    >>> adapter = lorax.init(jax.random.key(0), spec, lorax.trace(fn, params, x), params)
    >>> adapter = eva(fn, params, adapter, [(x,)])
    >>> adapter.params["first"]["a"].shape, int(jnp.argmax(jnp.abs(adapter.params["first"]["a"][:, 0])))
    ((6, 2), 0)
    """
    fits = lambda method: isinstance(method, FITTED) and not find(method.initializer).is_subtracted
    sites = [site for site, method in adapter.plan.entries if site.kind == "linear" and fits(method)]
    if any(not isinstance(batch, (tuple, list)) for batch in batches):
        raise ValueError("eva: a batch is the tuple of the function's arguments after the params, such as (x,)")
    if not sites or not len(batches):
        wanted = ", ".join(cls.__name__ for cls in FITTED)
        raise ValueError(f"eva: needs batches ({len(batches)} given) and products with {wanted} ({len(sites)} here)")
    scatters: dict[str, Any] = {}
    for group in _groups(sites, memory):
        measure = jax.jit(lambda params, args, group=group: input_moments(fn, params, group, *args))
        sums = None
        for batch in batches:
            moments = measure(params, tuple(batch))
            sums = moments if sums is None else jax.tree.map(jnp.add, sums, moments)
        scatters |= {path: centred(*moments) for path, moments in (sums or {}).items()}
    return start(adapter, scatters, rho=rho, whiten=whiten, adjusts_scale=adjusts_scale)


def _groups(sites: Sequence[Site], memory: int) -> list[list[Site]]:
    """Cut the sites into groups whose moments fit."""
    groups: list[list[Site]] = []
    held = memory + 1
    for site in sites:
        size = 4 * site.size("S") * site.size("I") ** 2
        if held + size > memory:
            groups.append([])
            held = 0
        groups[-1].append(site)
        held += size
    return groups
