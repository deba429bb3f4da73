"""One variant of `experiments.bench.train` in JAX: `python -m experiments.bench.train_worker SETTINGS`.

Prints a line of JSON when it is ready and after each line that it reads: `step` runs one, `end` ends it.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import lorax
from experiments.bench.sizes import by_size
from experiments.bench.worker_settings import LEARNING_RATE, Settings
from experiments.models.llama import Llama, LlamaConfig

QUERY_VALUE = r"layers/attn/(query|value)/kernel"
EVERY_LINEAR = r"layers/(attn|mlp)/\w+/kernel"


def config_of(settings: Settings) -> LlamaConfig:
    """Return the decoder's configuration."""
    return dataclasses.replace(by_size(settings.shape), dtype=jnp.dtype(settings.dtype))


def next_token_loss(config: LlamaConfig) -> Callable[..., jax.Array]:
    """Return `(params, tokens) -> mean cross-entropy of the next token`, in nats."""
    module: Any = Llama(config)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = module.apply({"params": params}, tokens)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]))

    return loss


def with_shift(loss: Callable[..., jax.Array], shift: jax.Array) -> Callable[..., jax.Array]:
    """Return the loss with something added to the embedded tokens, to differentiate it by."""

    def shifted(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = call(*args, **kwargs)
        is_lookup = isinstance(context.module, nn.Embed) and context.method_name == "__call__"
        return y + shift if is_lookup else y

    def run(*args: Any) -> jax.Array:
        with nn.intercept_methods(shifted):
            return loss(*args)

    return run


def spec_of(settings: Settings) -> lorax.Spec:
    """Return what is adapted, and how."""
    if settings.variant == "full":
        return lorax.Spec({".*": lorax.Full()})
    method = lorax.DoRA if settings.variant.startswith("dora") else lorax.LoRA
    target = EVERY_LINEAR if settings.is_all else QUERY_VALUE
    return lorax.Spec({target: method(rank=settings.rank, alpha=2 * settings.rank)})


def build(settings: Settings) -> tuple[Callable[[], jax.Array], Any]:
    """Return a function that runs a step and returns its loss, and the compiled program."""
    config = config_of(settings)
    loss = next_token_loss(config)
    tokens = jax.random.randint(jax.random.key(1), (settings.batch, settings.length), 0, config.vocab_size)
    draw = lambda key: Llama(config).init(key, tokens[:, :8])["params"]
    cast = lambda tree: jax.tree.map(lambda x: x.astype(config.dtype), tree)
    params: Any = jax.jit(lambda key: cast(draw(key)))(jax.random.key(0))
    if settings.variant == "forward":
        run = jax.jit(loss).lower(params, tokens).compile()
        return lambda: run(params, tokens), run
    if settings.variant == "floor":
        shape = (settings.batch, settings.length, config.dim)
        shift = jnp.zeros(shape, config.dtype)
        floor = jax.value_and_grad(lambda shift, *args: with_shift(loss, shift)(*args))
        run = jax.jit(floor).lower(shift, params, tokens).compile()
        return lambda: run(shift, params, tokens)[0], run
    sites = lorax.trace(loss, params, tokens)
    if settings.variant.startswith("qlora"):
        params = lorax.quantize(params, {EVERY_LINEAR: lorax.NF4()}, sites=sites)
    adapter = jax.jit(lambda key, p: lorax.init(key, spec_of(settings), sites, p))(jax.random.key(2), params)
    tx = optax.adamw(LEARNING_RATE)
    adapted = lorax.adapt(loss, strict=True)

    def step(params: Any, adapter: lorax.Adapter, opt_state: Any, tokens: jax.Array) -> Any:
        value, grads = jax.value_and_grad(lambda p: adapted(params, adapter.replace(params=p), tokens))(adapter.params)
        updates, opt_state = tx.update(grads, opt_state, adapter.params)
        return adapter.replace(params=optax.apply_updates(adapter.params, updates)), opt_state, value

    held = adapter, tx.init(adapter.params)
    run = jax.jit(step, donate_argnums=(1, 2)).lower(params, *held, tokens).compile()

    def once() -> jax.Array:
        nonlocal held
        *held, value = run(params, *held, tokens)
        return value

    return once, run


def peak_flops() -> float:
    """Return the FLOP/s of a product of two large matrices here: what a step could come to."""
    size = 2048
    x = jnp.full((size, size), 0.5, jnp.float32)
    product = jax.jit(lambda x: x @ x)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def main() -> None:
    """Serve steps."""
    settings = Settings(**json.loads(sys.argv[1]))
    device = jax.devices()[0]
    peak = peak_flops()
    once, run = build(settings)
    memory = run.memory_analysis()
    facts = {
        "device": device.device_kind,
        "versions": {"jax": jax.__version__},
        "peak_flops": peak,
        "program_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    }
    print(json.dumps(facts), flush=True)
    value = None
    for line in sys.stdin:
        if line.strip() == "end":
            break
        start = time.perf_counter()
        value = once().block_until_ready()
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
    stats = device.memory_stats() or {}
    peak_bytes = stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"loss": None if value is None else float(value), "peak_bytes": peak_bytes}), flush=True)


if __name__ == "__main__":
    main()
