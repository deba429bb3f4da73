"""What an adapter takes: numbers that are trained, by site, and the rank that a budget of them pays for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import jax

from lorax.adapter import Adapter, init
from lorax.sites import Site
from lorax.spec import Spec


def parameters(adapter: Adapter) -> dict[str, int]:
    """Return how many numbers are trained, by path.

    Args:
      adapter: the adapter; shapes are enough.
    """
    return {path: sum(x.size for x in arrays.values()) for path, arrays in adapter.params.items()}


def rank_for_budget(make: Callable[[int], Spec], sites: Iterable[Site], budget: int) -> int:
    """Return the largest rank at which no more numbers are trained than a budget allows.

    So that methods and targets can be compared at equal cost: `make` says what is adapted how at a rank. Nothing is
    computed.

    Args:
      make: makes the spec of a rank; what it trains grows with the rank.
      sites: from `lorax.trace`, of which the spec chooses.
      budget: numbers to train.

    Raises:
      ValueError: rank 1 is above the budget already, or the rank makes no difference.

    >>> import lorax, jax.numpy as jnp
    >>> fn, params = lambda p, x: x @ p["up"] @ p["down"], {"up": jnp.zeros((8, 32)), "down": jnp.zeros((32, 8))}
    >>> sites = lorax.trace(fn, params, jnp.ones((1, 8)))
    >>> lora = lambda pattern: lambda rank: Spec({pattern: lorax.LoRA(rank=rank)})
    >>> rank_for_budget(lora("up"), sites, 250), rank_for_budget(lora(".*"), sites, 250)
    (6, 3)
    """
    sites = list(sites)
    params = {site.path: jax.ShapeDtypeStruct(site.shape, site.dtype) for site in sites if site.is_floating}
    floating = [site for site in sites if site.is_floating]

    def trained(rank: int) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a rank above a weight's smaller side, which is only tried
            made = jax.eval_shape(lambda: init(jax.random.key(0), make(rank), floating, params))
        return sum(parameters(made).values())

    if (least := trained(1)) > budget:
        raise ValueError(f"rank 1 trains {least:,} numbers, and the budget is {budget:,}: adapt fewer weights")
    low, high = 1, 2
    while (needed := trained(high)) <= budget:
        if needed == least:
            raise ValueError(
                f"the spec trains {least:,} numbers at rank 1 and at rank {high}: it does not use the rank"
            )
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if trained(middle) <= budget else (low, middle)
    return low
