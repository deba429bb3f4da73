"""What the transform costs: a training step against the same decoder with LoRA written into its layers by hand.

    python -m experiments.bench.step_cost [--tokens 4x128] [--rank 8] [--repeats 5] [--depths 8,32,128]

FLOPs and bytes are XLA's own analysis of the compiled step; times are ratios of interleaved runs. "merged" is the step
through `lorax.merge`, which is what the factored evaluation saves. Before it, what tracing the adapted function takes
over tracing the plain one.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lorax
from experiments.bench.decoder import Shape, decoder, hand_written_lora, init_params, loss, unrolled

KERNELS = r"(layers/\d+/\w+|head)/kernel"


def adapted_step(fn: Callable[..., Any], tx: optax.GradientTransformation, how: str = "factored") -> Callable[..., Any]:
    """Return a training step through `lorax.adapt`, or through the merged weights."""
    adapted = lorax.adapt(fn, strict=True) if how == "factored" else lambda p, a, x: fn(lorax.merge(p, a), x)

    def step(params: Any, adapter: lorax.Adapter, opt_state: Any, tokens: jax.Array) -> Any:
        value, grads = jax.value_and_grad(lambda p: loss(adapted(params, adapter.replace(params=p), tokens), tokens))(
            adapter.params
        )
        updates, opt_state = tx.update(grads, opt_state, adapter.params)
        return adapter.replace(params=optax.apply_updates(adapter.params, updates)), opt_state, value

    return step


def hand_step(shape: Shape, scale: float, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """Return a training step of the decoder with LoRA in its layers, factors apart from the frozen weights."""
    fn = decoder(shape, hand_written_lora(scale))

    def step(params: Any, factors: Any, opt_state: Any, tokens: jax.Array) -> Any:
        value, grads = jax.value_and_grad(lambda f: loss(fn(with_factors(params, f), tokens), tokens))(factors)
        updates, opt_state = tx.update(grads, opt_state, factors)
        return optax.apply_updates(factors, updates), opt_state, value

    return step


def with_factors(params: Any, factors: Any) -> Any:
    """Put factors, `{leaf path: {"a", "b"}}`, beside the kernels that they adapt."""
    layers = [
        {n: {**v, **factors.get(f"layers/{i}/{n}/kernel", {})} if isinstance(v, dict) else v for n, v in layer.items()}
        for i, layer in enumerate(params["layers"])
    ]
    return {**params, "layers": layers, "head": {**params["head"], **factors.get("head/kernel", {})}}


def cost(compiled: Any) -> dict[str, float]:
    """Return GFLOPs a step and MiB of temporary memory, and the MiB of constants in the program."""
    memory = compiled.memory_analysis()
    return {
        "GFLOP": compiled.cost_analysis()["flops"] / 1e9,
        "temp MiB": memory.temp_size_in_bytes / 2**20,
        "constants MiB": _constant_bytes(compiled.as_text()) / 2**20,
    }


def _constant_bytes(hlo: str) -> int:
    sizes = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1}
    total = 0
    for dtype, dims in re.findall(r"= (\w+)\[([\d,]+)\]\S* constant\(", hlo):
        n = 1
        for d in dims.split(","):
            n *= int(d)
        total += n * sizes.get(dtype, 8)
    return total


def seconds(steps: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Time each step, one after another, `repeats` times."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        jax.block_until_ready(step())
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step())
            times[name].append(time.perf_counter() - start)
    return times


def compare_steps(shape: Shape, rank: int, batch: int, length: int, repeats: int) -> None:
    """Print the cost of a step: by hand, through lorax, through the merged weights."""
    fn, tx = decoder(shape), optax.adamw(1e-3)
    params = init_params(jax.random.key(0), shape)
    tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, shape.vocabulary)
    spec = lorax.Spec({KERNELS: lorax.LoRA(rank=rank, alpha=2 * rank)})
    adapter = lorax.init(jax.random.key(2), spec, lorax.trace(fn, params, tokens), params)
    state = tx.init(adapter.params)
    steps = {
        "by hand": (hand_step(shape, 2.0, tx), adapter.params),
        "lorax": (adapted_step(fn, tx), adapter),
        "merged": (adapted_step(fn, tx, "merged"), adapter),
    }
    compiled = {n: jax.jit(s).lower(params, f, state, tokens).compile() for n, (s, f) in steps.items()}
    times = seconds({n: lambda c=c, f=steps[n][1]: c(params, f, state, tokens) for n, c in compiled.items()}, repeats)
    hand = cost(compiled["by hand"])
    print(
        f"\n{shape.layers} layers, d {shape.d_model}, rank {rank}, {batch}×{length} tokens, {len(adapter.sites)} sites"
    )
    print(f"{'step':10}{'GFLOP':>10}{'ratio':>8}{'temp MiB':>10}{'ratio':>8}{'constants MiB':>15}{'time ratio':>12}")
    for name, c in compiled.items():
        row = cost(c)
        ratios = [t / h for t, h in zip(times[name], times["by hand"], strict=True)]
        print(
            f"{name:10}{row['GFLOP']:10.1f}{row['GFLOP'] / hand['GFLOP']:8.4f}{row['temp MiB']:10.1f}"
            f"{row['temp MiB'] / hand['temp MiB']:8.4f}{row['constants MiB']:15.3f}{statistics.median(ratios):12.3f}"
        )


def compare_tracing(depths: list[int], rank: int, repeats: int = 5) -> None:
    """Print the time to trace the plain and the adapted function over depth, without compiling."""
    print(f"\n{'model':12}{'layers':>8}{'sites':>8}{'plain ms':>10}{'adapted ms':>12}{'added/plain':>13}")
    for form in ("plain JAX", "linen", "nnx"):
        for layers in depths:
            sites, plain, adapted = _tracing_seconds(form, layers, rank, repeats)
            row = (plain * 1e3, adapted * 1e3, (adapted - plain) / plain)
            print(f"{form:12}{layers:8}{sites:8}{row[0]:10.0f}{row[1]:12.0f}{row[2]:13.2f}")


def _tracing_seconds(form: str, layers: int, rank: int, repeats: int, least: float = 3.0) -> tuple[int, float, float]:
    """Return the number of sites and the least time of each, over some repeats and at least so many seconds of them."""
    shape = Shape(layers=layers, d_model=64, heads=4, kv_heads=2, d_ff=128, vocabulary=256)
    fn, params = unrolled(form, shape)
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    sites = lorax.trace(fn, params, tokens)
    spec = lorax.Spec({r".*kernel": lorax.LoRA(rank=rank)})
    adapter = jax.eval_shape(lambda: lorax.init(jax.random.key(0), spec, sites, params))
    times: list[tuple[float, float]] = []
    while len(times) < repeats or sum(map(sum, times)) < least:
        # New functions each time, so that nothing is cached; processor time, as the wall clock is shared.
        plain = _processor_seconds(lambda: jax.make_jaxpr(lambda p, x: fn(p, x))(params, tokens))
        call = lambda: jax.make_jaxpr(lambda p, a, x: lorax.adapt(fn)(p, a, x))(params, adapter, tokens)
        times.append((plain, _processor_seconds(call)))
    return len(adapter.sites), min(p for p, _ in times), min(a for _, a in times)


def _processor_seconds(call: Callable[[], Any]) -> float:
    gc.collect()
    gc.disable()  # as timeit does: what a collection costs depends on all that the process holds
    start = time.process_time()
    call()
    elapsed = time.process_time() - start
    gc.enable()
    return elapsed


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", default="4x128", help="batch x length")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--depths", default="8,32,128")
    args = parser.parse_args()
    batch, length = map(int, args.tokens.split("x"))
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")
    compare_tracing([int(d) for d in args.depths.split(",")], args.rank)
    compare_steps(Shape(layers=args.layers), args.rank, batch, length, args.repeats)


if __name__ == "__main__":
    main()
