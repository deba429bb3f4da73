"""A small dense model, and adapters of it, for tests of what an adapter promises."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorax
from tests.zoo.entry import normal

X_BxI = normal(1, 4, 5)
TOL = 1e-5  # float32, largest difference of numbers near 1


def model() -> tuple[Callable[..., Any], dict[str, Any], tuple[Any, ...]]:
    """Three dense layers, two of one shape, with biases and a norm scale."""
    params = {
        "norm": {"scale": 1 + normal(2, 5)},
        "first": {"kernel": normal(3, 5, 7), "bias": normal(4, 7)},
        "second": {"kernel": normal(5, 5, 7), "bias": normal(6, 7)},
        "head": {"kernel": normal(7, 7, 3), "bias": normal(8, 3)},
    }

    def fn(p, x):
        x = x * p["norm"]["scale"]
        h = jnp.tanh(x @ p["first"]["kernel"] + p["first"]["bias"]) + x @ p["second"]["kernel"] + p["second"]["bias"]
        return h @ p["head"]["kernel"] + p["head"]["bias"]

    return fn, params, (X_BxI,)


def make(method: Any = None, pattern: str = ".*kernel", random: bool = True) -> tuple[Any, Any, Any, Any]:
    """The model, and an adapter whose trained arrays are random."""
    fn, params, args = model()
    adapter = lorax.init(
        jax.random.key(0), lorax.Spec({pattern: method or lorax.LoRA(rank=2)}), lorax.trace(fn, params, *args), params
    )
    return fn, params, args, disturbed(adapter) if random else adapter


def disturbed(adapter: Any, scale: float = 0.1) -> Any:
    """The adapter with random numbers added to all that is trained."""
    rng = np.random.default_rng(0)
    return adapter.replace(
        params=jax.tree.map(lambda x: x + jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), adapter.params)
    )


def count_numbers(tree: Any) -> int:
    """The number of numbers in a tree."""
    return sum(x.size for x in jax.tree.leaves(tree))
