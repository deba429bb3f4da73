"""AdaLoRA's training: an optimiser, a regulariser and the budget update as one transformation."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax.adapter import Adapter
from lorax.optim.budget import Budget
from lorax.optim.triplets import FACTORS, Triplets, best, budgets, budgets_of, penalty, triplets

Tree = Any


class AdaLoRAState(NamedTuple):
    """State of `adalora`: arrays only, shaped like the adapter's AdaLoRA sites.

    Attributes:
      step: int32, the updates done.
      inner: state of the inner optimiser.
      sensitivity: float32, moving averages `Ī` of `|w·∂L/∂w|`, of every entry of `a`, `e` and `b`.
      uncertainty: float32, moving averages `Ū` of `|I − Ī|`, likewise.
      is_kept: bools S×R a site, the triplets of the latest choice.
    """

    step: jax.Array
    inner: Any
    sensitivity: Tree
    uncertainty: Tree
    is_kept: Tree


def adalora(
    inner: optax.GradientTransformation,
    adapter: Adapter,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    final_steps: int = 0,
    interval: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orthogonal_weight: float = 0.5,
) -> optax.GradientTransformationExtraArgs:
    """Train AdaLoRA sites within a budget; all other sites are trained by `inner` alone.

    Each update adds `γ` times the gradient of `orthogonality` to that of the loss, lets `inner` move the parameters,
    and keeps score: with `I = |w·∂L/∂w|` (the parameter after its update, as in PEFT), `Ī ← β₁Ī + (1 − β₁)I`,
    `Ū ← β₂Ū + (1 − β₂)|I − Ī|` and `s = Ī·Ū`, a triplet is worth `s(e) + mean s(A) + mean s(B)`. When a choice is
    due, the `b(t)` best triplets of all sites stay and the `e` of all others becomes exactly 0. They go on being
    trained and may come back, until the last choice (arXiv:2303.10512, sections 3.2 and 3.3). Conventions are PEFT's
    but for a draw: there all triplets no better than the best pruned one are pruned, here the budget is met.

    The budget goes from the sum of `rank` to the sum of `target_rank` over all weights; a stack's layers count one by
    one, and those with a scale of zero not at all. Clipping belongs into `inner`, where it sees the regulariser too;
    `optax.MultiSteps` goes around the whole.

    Args:
      inner: the optimiser, such as `optax.adamw(1e-3)`; it sees all of `adapter.params`.
      adapter: the adapter to be trained, arrays or shapes; its sites, methods and scales of zero are what counts.
      total_steps: `T`, the steps of the whole training; budget and choices depend on it.
      warmup_steps: `t_i`, steps before the budget falls.
      final_steps: `t_f`, steps after the last choice.
      interval: `ΔT`, steps between choices.
      beta1: `β₁` in (0, 1), decay of the sensitivity.
      beta2: `β₂` in (0, 1), decay of the uncertainty.
      orthogonal_weight: `γ`, weight of the regulariser.

    Returns:
      A transformation of gradients shaped like `adapter.params`, whose `update` has to be given the params. It works
      under `jit`, `scan` and `vmap`, and its state is a pytree of arrays.

    Raises:
      ValueError: no site has AdaLoRA, the steps leave no time for the budget to fall, or a coefficient is out of range.

    >>> import lorax
    >>> from lorax.methods.adalora import AdaLoRA
    >>> fn = lambda params, x: x @ params["kernel"]
    >>> params, x = {"kernel": jnp.eye(4)}, jnp.ones((2, 4))
    >>> spec = lorax.Spec({"kernel": AdaLoRA(rank=3, target_rank=2)})
    >>> adapter = lorax.init(jax.random.key(0), spec, lorax.trace(fn, params, x), params)
    >>> tx = adalora(optax.adam(1e-2), adapter, total_steps=4)
    >>> opt_state = tx.init(adapter.params)
    >>> for _ in range(4):
    ...     loss = lambda p: jnp.mean(lorax.adapt(fn)(params, adapter.replace(params=p), x) ** 2)
    ...     updates, opt_state = tx.update(jax.grad(loss)(adapter.params), opt_state, adapter.params)
    ...     adapter = adapter.replace(params=optax.apply_updates(adapter.params, updates))
    >>> int((adapter.params["kernel"]["e"] != 0).sum()), float(adapter.params["kernel"]["updates"])
    (2, 4.0)
    """
    found = triplets(adapter)
    start, end = budgets(found)
    is_member = any(t.mask is not None for t in found)
    pairs = dict.fromkeys(budgets_of(m.plan) for m in adapter.plan.members) if is_member else [(start, end)]
    steps = {"warmup_steps": warmup_steps, "final_steps": final_steps, "interval": interval}
    schedules = [Budget(initial=b0, target=bt, total_steps=total_steps, **steps) for b0, bt in pairs]
    schedule = schedules[0]
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 < beta < 1:
            raise ValueError(f"adalora: {name} is {beta!r}; it has to lie in (0, 1)")
    if not orthogonal_weight >= 0:
        raise ValueError(f"adalora: orthogonal_weight is {orthogonal_weight!r}; it has to be at least 0")
    wanted = jax.tree.structure(adapter.params)
    optimiser = optax.with_extra_args_support(inner)

    def check(tree: Tree, what: str) -> None:
        if jax.tree.structure(tree) != wanted:
            raise ValueError(
                f"adalora: {what} shaped like adapter.params, and got {jax.tree.structure(tree)} where that is {wanted}"
            )

    def init(params: Any) -> AdaLoRAState:
        check(params, "init needs params")
        zeros = lambda: {t.path: {n: jnp.zeros_like(params[t.path][n], jnp.float32) for n in FACTORS} for t in found}
        is_kept = {t.path: jnp.ones_like(params[t.path]["e"], bool) for t in found}
        return AdaLoRAState(jnp.zeros((), jnp.int32), optimiser.init(params), zeros(), zeros(), is_kept)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, AdaLoRAState]:
        if params is None:
            raise ValueError("adalora: importance depends on the parameters' values: tx.update(grads, state, params)")
        check(params, "update needs params")
        check(updates, "update needs gradients")
        gradients = _with_penalty(found, updates, params, orthogonal_weight) if orthogonal_weight else updates
        updates, inner_state = optimiser.update(gradients, state.inner, params, **extra)
        moved: Any = optax.apply_updates(params, updates)

        step = state.step + 1
        importance = jax.tree.map(_product, _factors(found, moved), _factors(found, gradients))
        sensitivity = jax.tree.map(lambda m, i: beta1 * m + (1 - beta1) * i, state.sensitivity, importance)
        uncertainty = jax.tree.map(
            lambda u, i, m: beta2 * u + (1 - beta2) * jnp.abs(i - m), state.uncertainty, importance, sensitivity
        )
        # The last choice is made with the scores of the step before it, as in PEFT; from then on none is needed.
        newer = lambda new, old: jax.tree.map(lambda x, y: jnp.where(step < schedule.last, x, y), new, old)
        sensitivity, uncertainty = newer(sensitivity, state.sensitivity), newer(uncertainty, state.uncertainty)

        worth = jax.tree.map(jnp.multiply, sensitivity, uncertainty)
        # A member of a stack has one of several budgets, whose courses were worked out beforehand.
        which = [(start == b0) & (end == bt) for b0, bt in pairs]
        budget = jnp.select(which, [s.at(step) for s in schedules]) if is_member else schedule.at(step)
        chosen = best(found, [t.score(worth[t.path]) for t in found], budget)
        is_due = schedule.is_due(step)
        is_kept = jax.tree.map(lambda new, old: jnp.where(is_due, new, old), chosen, state.is_kept)
        is_pruned = is_due | (step > schedule.last)
        pruned = dict(updates)
        for t in found:
            old, new = params[t.path], updates[t.path]
            is_alive_SxR = is_kept[t.path] | ~is_pruned
            e_SxR = jnp.where(is_alive_SxR, new["e"].astype(old["e"].dtype), -old["e"])  # the sum is exactly 0
            pruned[t.path] = {**new, "e": e_SxR, "updates": jnp.ones_like(old["updates"])}
        return pruned, AdaLoRAState(step, inner_state, sensitivity, uncertainty, is_kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _factors(found: list[Triplets], tree: Tree) -> Tree:
    return {t.path: {name: tree[t.path][name] for name in FACTORS} for t in found}


def _product(value: jax.Array, gradient: jax.Array) -> jax.Array:
    return jnp.abs(value.astype(jnp.float32) * gradient.astype(jnp.float32))


def _with_penalty(found: list[Triplets], gradients: Tree, params: Tree, weight: float) -> Tree:
    added = jax.grad(lambda p: weight * penalty(found, p))(_factors(found, params))
    summed = {**gradients}
    for path, mine in added.items():
        theirs = gradients[path]
        summed[path] = {**theirs, **{n: theirs[n] + mine[n].astype(theirs[n].dtype) for n in ("a", "b")}}
    return summed
