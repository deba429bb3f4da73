"""One optimiser for a stack of adapters: settings a member, and members that diverge stopped."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax.adapter import Adapter
from lorax.methods.base import OF_A_MEMBER
from lorax.stack import count_members

LOOKED_AT_TOGETHER = 8


class StackedState(NamedTuple):
    """State of `stacked`. Every array has the members' axis in front.

    Attributes:
      settings: what each member's optimiser is made with. They may be replaced by other arrays of these shapes at any
        time, without recompiling: `state._replace(settings={**state.settings, "learning_rate": rates})`.
      diverged: bools; a member is stopped from the first update on whose loss, gradient or settings are not finite.
      inner: the members' own states.
      marks: what the adapters' states say of the members: masks, budgets, scales.
    """

    settings: dict[str, jax.Array]
    diverged: jax.Array
    inner: Any
    marks: Any


def stacked(
    make: Callable[..., optax.GradientTransformation], stack: Adapter, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    """Train each member of a stack by an optimiser of its own, all in one program.

    What an optimiser does to a gradient as a whole, such as clipping its norm, it does to each member's. A member whose
    loss or gradient is not finite is stopped there for good: its parameters stay what they were before that update, and
    the others do not notice. (Its optimiser's state says no more, and may be NaN: to keep it too would cost all members
    a copy of theirs at every step.)

    Args:
      make: `make(adapter, **settings) -> optimiser` of one member, with its settings as scalars. It is called under
        `jax.vmap`: the settings are traced, and of the adapter it may ask for the plan, and for the masks and scales in
        its state (`lorax.optim.adalora` and `lorax.optim.lora_plus` do).
      stack: from `lorax.stack`.
      **settings: for each keyword of `make` one number for all members, or one for each.

    Returns:
      A transformation of gradients shaped like `stack.params`. `update` takes the members' losses as `value`, an array
      with one number a member; without it only the gradients tell who diverged. `state.diverged` says it.

    Raises:
      TypeError, ValueError: `stack` is none, or a setting has neither one value nor one a member.

    >>> import lorax
    >>> fn = lambda params, x: x @ params["kernel"]
    >>> params, x = {"kernel": jnp.eye(4)}, jnp.ones((2, 4))
    >>> sites = lorax.trace(fn, params, x)
    >>> specs = [lorax.Spec({"kernel": lorax.LoRA(rank=r)}) for r in (1, 2, 4)]
    >>> both = lorax.stack([lorax.init(jax.random.key(0), spec, sites, params) for spec in specs])
    >>> tx = stacked(lambda adapter, learning_rate: optax.adam(learning_rate), both, learning_rate=[0.1, 0.1, jnp.inf])
    >>> loss = lambda p, a: jnp.mean(lorax.adapt(fn)(params, a.replace(params=p), x) ** 2)
    >>> state = tx.init(both.params)
    >>> for _ in range(3):
    ...     losses, grads = jax.vmap(jax.value_and_grad(loss))(both.params, both)
    ...     updates, state = tx.update(grads, state, both.params, value=losses)
    ...     both = both.replace(params=optax.apply_updates(both.params, updates))
    >>> state.diverged.tolist(), (losses[:2] < 1).tolist()
    ([False, False, True], [True, True])
    """
    count = count_members(stack)
    per_member: dict[str, jax.Array] = {}
    for name, value in settings.items():
        values = jnp.asarray(value)
        values = values.astype(values.dtype)  # a Python number's type would give way to that of what replaces it
        if values.ndim > 1 or (values.ndim == 1 and values.shape[0] != count):
            raise ValueError(
                f"stacked: {name} has shape {values.shape}, expected one number or one for each of {count}"
            )
        per_member[name] = jnp.broadcast_to(values, (count,))
    marks = _marks(stack)

    def of_member(settings: Any, marks: Any, params: Any) -> Any:
        return optax.with_extra_args_support(make(Adapter(params, marks, stack.plan), **settings))

    def init(params: Any) -> StackedState:
        inner = jax.vmap(lambda s, m, p: of_member(s, m, p).init(p))(per_member, marks, params)
        own = jax.tree.map(jnp.copy, (per_member, marks))  # a step may donate both the stack and this state
        return StackedState(own[0], jnp.zeros(count, bool), inner, own[1])

    def update(
        updates: Any, state: Any, params: Any = None, *, value: Any = None, **extra: Any
    ) -> tuple[Any, StackedState]:
        def one(settings: Any, has_diverged: Any, inner: Any, marks: Any, grads: Any, params: Any, value: Any) -> Any:
            more = extra if value is None else {**extra, "value": value}
            moved, new = of_member(settings, marks, params).update(grads, inner, params, **more)
            has_diverged |= ~_is_finite((settings, grads, value))
            return jax.tree.map(lambda x: jnp.where(has_diverged, jnp.zeros_like(x), x), moved), has_diverged, new

        moved, diverged, inner = jax.vmap(one)(
            state.settings, state.diverged, state.inner, state.marks, updates, params, value
        )
        return moved, StackedState(state.settings, diverged, inner, state.marks)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_finite(tree: Any) -> jax.Array:
    """Tell whether all numbers are finite.

    Arrays of one type are looked at a few at a time: to reduce each by itself would be a good part of what the step of
    a deep model takes to compile, and all at once would need memory for their maximum.
    """
    alike: dict[Any, list[jax.Array]] = collections.defaultdict(list)
    for x in jax.tree.leaves(tree):
        alike[jax.typeof(x)].append(jnp.abs(x))
    together = [xs[i : i + LOOKED_AT_TOGETHER] for xs in alike.values() for i in range(0, len(xs), LOOKED_AT_TOGETHER)]
    largest = [jnp.max(functools.reduce(jnp.maximum, xs), initial=0) for xs in together]  # NaN if a number is
    return functools.reduce(jnp.logical_and, map(jnp.isfinite, largest))


def _marks(stack: Adapter) -> Any:
    """Return the part of the adapter's state that a maker may ask for: what is about the members, and scales.

    Frozen projections and the like are left out: a training step's state would hold them twice.
    """
    kept: dict[str, Any] = {}
    for site, method in stack.plan.entries:
        names = {"scale", *OF_A_MEMBER, *method.carried(site, method)}
        kept[site.path] = {name: x for name, x in stack.state[site.path].items() if name in names}
    return kept
