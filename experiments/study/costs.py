"""What a run costs by itself: numbers and bytes of its compiled update, and the time of a forward pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorax
from experiments.study.adaptation import Adaptations, Settings
from experiments.study.problem import Arrays
from experiments.study.program import memory
from lorax import analysis

OF = ("method", "targets", "rank", "dropout", "quantize")  # the axes that costs depend on


def name(settings: Settings) -> str:
    """Return a name for the costs that a run shares with those of other rates, seeds and scalings.

    >>> name({"method": "lora", "targets": "qv", "rank": 4, "dropout": None, "quantize": "none", "lr": 0.1})
    'method=lora,targets=qv,rank=4,quantize=none'
    """
    return ",".join(f"{axis}={settings[axis]}" for axis in OF if settings[axis] is not None)


def measure(adaptations: Adaptations, settings: Settings) -> dict[str, Any]:
    """Return what one run takes, trained by itself.

    Args:
        adaptations: of the study.
        settings: the run's.

    Returns:
        `trainable_parameters`; `flops` of an update, its products counted with what loops repeat (XLA counts a loop's
        body once); `peak_bytes` of the compiled update, as XLA plans them: arguments, temporaries and results that
        are no arguments; `unmerged_latency_seconds` and `merged_latency_seconds` of a forward pass, medians of
        interleaved calls, the latter None where the method has no merged weight.
    """
    adapter = adaptations.adapter(settings)
    flops, peak = _update(adaptations, settings, adapter)
    return {
        "trainable_parameters": sum(analysis.parameters(adapter).values()),
        "flops": flops,
        "peak_bytes": peak,
        **_latency(adaptations, settings, adapter),
    }


def _update(adaptations: Adaptations, settings: Settings, adapter: lorax.Adapter) -> tuple[float, int]:
    base = adaptations.base(settings)
    problem, adapted = base.problem, lorax.adapt(base.problem.fn)
    optimiser = optax.with_extra_args_support(
        adaptations.optimiser(settings)(adapter, settings["lr"], settings["weight_decay"])
    )

    def loss(trainable: Any, params: Any, adapter: lorax.Adapter, batch: Any, key: jax.Array) -> jax.Array:
        dropout = {"rng": key} if settings["dropout"] else {}
        outputs = adapted(params, adapter.replace(params=trainable), batch, **dropout)
        return jnp.mean(problem.loss(outputs, batch).astype(jnp.float32))

    def update(params: Any, adapter: lorax.Adapter, opt_state: Any, batch: Any, key: jax.Array) -> Any:
        value, gradient = jax.value_and_grad(loss)(adapter.params, params, adapter, batch, key)
        moved, opt_state = optimiser.update(gradient, opt_state, adapter.params, value=value)
        return adapter.replace(params=optax.apply_updates(adapter.params, moved)), opt_state, value

    batch = _first(problem.data["train"], adaptations.config.train.batch)
    arguments = base.params, adapter, optimiser.init(adapter.params), batch, jax.random.key(0)
    compiled = jax.jit(update, donate_argnums=(1, 2)).lower(*arguments).compile()
    return float(analysis.flops(update, *arguments)), memory(compiled)[0]


def _latency(adaptations: Adaptations, settings: Settings, adapter: lorax.Adapter) -> dict[str, float | None]:
    base, latency = adaptations.base(settings), adaptations.config.latency
    batch = jax.device_put(_first(base.problem.data["test"], latency.examples))
    subjects: dict[str, Callable[[], Any]] = {"unmerged": lambda: base.forward(base.params, adapter, batch)}
    if all(method.is_mergeable for method in adapter.methods.values()):
        merged = jax.jit(lorax.merge)(base.params, adapter)
        subjects["merged"] = lambda: base.forward(merged, None, batch)
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for call in subjects.values():
        jax.block_until_ready(call())
    for _ in range(latency.repeats):
        for subject, call in subjects.items():  # one after the other, so that a busy moment hits both
            started = time.perf_counter()
            jax.block_until_ready(call())
            seconds[subject].append(time.perf_counter() - started)
    medians = {subject: statistics.median(taken) for subject, taken in seconds.items()}
    return {f"{subject}_latency_seconds": medians.get(subject) for subject in ("merged", "unmerged")}


def _first(data: Arrays, count: int) -> Arrays:
    """Return the first examples, from the beginning again where there are too few."""
    return {name: array[np.arange(count) % len(array)] for name, array in data.items()}
