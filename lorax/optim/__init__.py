"""Optax transformations of `adapter.params`: AdaLoRA's budget, LoRA+'s rates, state in host memory, stacks.

All else is optax as it is. Rates by factor, say, follow from `lorax.labels`:

>>> import jax, jax.numpy as jnp, lorax, optax
>>> fn = lambda params, x: x @ params["kernel"]
>>> params, x = {"kernel": jnp.eye(4)}, jnp.ones((2, 4))
>>> spec = lorax.Spec({"kernel": lorax.LoRA(rank=2)})
>>> adapter = lorax.init(jax.random.key(0), spec, lorax.trace(fn, params, x), params)
>>> tx = optax.partition({"a": optax.adam(1e-4), "b": optax.sgd(1e-2)}, lorax.labels(adapter))
>>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, adapter.params), tx.init(adapter.params))
>>> {name: f"{-x.mean():.0e}" for name, x in updates["kernel"].items()}
{'a': '1e-04', 'b': '1e-02'}
"""

from lorax.optim.adalora import AdaLoRAState, adalora
from lorax.optim.lora_plus import lora_plus, lora_plus_groups
from lorax.optim.members import StackedState, stacked
from lorax.optim.offload import offload
from lorax.optim.shardings import shardings
from lorax.optim.triplets import live_ranks, orthogonality

__all__ = [
    "AdaLoRAState",
    "StackedState",
    "adalora",
    "live_ranks",
    "lora_plus",
    "lora_plus_groups",
    "offload",
    "orthogonality",
    "shardings",
    "stacked",
]
