"""Which form of a low-rank product to differentiate: the same decoder step with each, against plain autodiff.

    python -m experiments.bench.backward_forms [--tokens 4x128] [--rank 8] [--repeats 10]

- autodiff: `x·W + s·(x·A)·B`, differentiated by JAX;
- custom_vjp: the same forward with a written backward, `dA = xᵀ(dy Bᵀ)`, `dB = (xA)ᵀdy`;
- merged: `x·(W + s·A·B)` in the forward, the written backward for the factors;
- rows: as autodiff, with the activation's free axes joined into rows first: what lorax does;
- shared: one `x·[A₁|A₂|…]` for the sites that read one activation, differentiated by JAX.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.bench.decoder import Shape, decoder, hand_written_lora, init_params, loss
from experiments.bench.step_cost import cost, seconds, with_factors

SCALE = 2.0


def rows_dense(layer: Any, x: jax.Array) -> jax.Array:
    """`x·W + s·(x·A)·B` with the thin products over rows."""
    y = x @ layer["kernel"]
    if "a" not in layer:
        return y
    return y + ((x.reshape(-1, x.shape[-1]) @ layer["a"] * SCALE) @ layer["b"]).reshape(y.shape)


@jax.custom_vjp
def _thin(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return (x @ a * SCALE) @ b


def _thin_forward(x: jax.Array, a: jax.Array, b: jax.Array) -> Any:
    h = x @ a * SCALE
    return h @ b, (x, h, a, b)


def _thin_backward(saved: Any, dy: jax.Array) -> Any:
    x, h, a, b = saved
    rows = lambda y: y.reshape(-1, y.shape[-1])
    dh = dy @ b.T * SCALE
    return dh @ a.T, rows(x).T @ rows(dh), rows(h).T @ rows(dy)


_thin.defvjp(_thin_forward, _thin_backward)


def custom_vjp_dense(layer: Any, x: jax.Array) -> jax.Array:
    """`x·W` and a thin product with a written backward."""
    y = x @ layer["kernel"]
    return y + _thin(x, layer["a"], layer["b"]) if "a" in layer else y


@jax.custom_vjp
def _merged(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return x @ (w + SCALE * a @ b)


def _merged_forward(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> Any:
    return _merged(x, w, a, b), (x, w, a, b)


def _merged_backward(saved: Any, dy: jax.Array) -> Any:
    x, w, a, b = saved
    rows = lambda y: y.reshape(-1, y.shape[-1])
    dh = dy @ b.T * SCALE
    return dy @ (w + SCALE * a @ b).T, None, rows(x).T @ rows(dh), rows(x @ a * SCALE).T @ rows(dy)


_merged.defvjp(_merged_forward, _merged_backward)


def merged_dense(layer: Any, x: jax.Array) -> jax.Array:
    """One product with the merged weight and the written backward."""
    return _merged(x, layer["kernel"], layer["a"], layer["b"]) if "a" in layer else x @ layer["kernel"]


class Shared:
    """`x·[A₁|A₂|…]` once for all sites that read one activation."""

    def __init__(self) -> None:
        self._layers: list[Any] = []

    def watch(self, params: Any) -> None:
        """Remember the layers of a call, to know which sites read one activation."""
        self._layers = [
            *(
                [layer[n] for n in group]
                for layer in params["layers"]
                for group in (("query", "key", "value"), ("gate", "up"))
            ),
            *([layer[n]] for layer in params["layers"] for n in ("out", "down")),
            [params["head"]],
        ]
        self._thin: dict[int, jax.Array] = {}

    def __call__(self, layer: Any, x: jax.Array) -> jax.Array:
        """`x·W` and this site's part of the shared product."""
        group = next(g for g in self._layers if any(m is layer for m in g))
        if id(group) not in self._thin:
            self._thin[id(group)] = x @ jnp.concatenate([m["a"] for m in group], axis=1) * SCALE
        rank, at = layer["a"].shape[1], next(i for i, m in enumerate(group) if m is layer)
        return x @ layer["kernel"] + self._thin[id(group)][..., at * rank : (at + 1) * rank] @ layer["b"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", default="4x128", help="batch x length")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    batch, length = map(int, args.tokens.split("x"))
    shape, tx = Shape(layers=args.layers), optax.adamw(1e-3)
    params = init_params(jax.random.key(0), shape)
    tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, shape.vocabulary)
    kernels = {
        f"layers/{i}/{n}/kernel": layer[n]["kernel"]
        for i, layer in enumerate(params["layers"])
        for n in layer
        if "norm" not in n
    }
    factors = {
        path: {
            "a": jax.random.normal(jax.random.key(i), (w.shape[0], args.rank)) / w.shape[0] ** 0.5,
            "b": jax.random.normal(jax.random.key(i), (args.rank, w.shape[1])) * 0.01,
        }
        for i, (path, w) in enumerate({**kernels, "head/kernel": params["head"]["kernel"]}.items())
    }
    shared = Shared()

    def shared_fn(params: Any, tokens: jax.Array) -> jax.Array:
        shared.watch(params)
        return decoder(shape, shared)(params, tokens)

    forms: dict[str, Callable[..., Any]] = {
        "autodiff": decoder(shape, hand_written_lora(SCALE)),
        "rows": decoder(shape, rows_dense),
        "custom_vjp": decoder(shape, custom_vjp_dense),
        "merged": decoder(shape, merged_dense),
        "shared": shared_fn,
    }

    def step(fn: Callable[..., Any]) -> Callable[..., Any]:
        def run(params: Any, factors: Any, state: Any, tokens: jax.Array) -> Any:
            value, grads = jax.value_and_grad(lambda f: loss(fn(with_factors(params, f), tokens), tokens))(factors)
            updates, state = tx.update(grads, state, factors)
            return optax.apply_updates(factors, updates), state, value, grads

        return run

    state = tx.init(factors)
    compiled = {n: jax.jit(step(f)).lower(params, factors, state, tokens).compile() for n, f in forms.items()}
    times = seconds({n: lambda c=c: c(params, factors, state, tokens) for n, c in compiled.items()}, args.repeats)
    grads = {n: c(params, factors, state, tokens)[3] for n, c in compiled.items()}
    device = jax.devices()[0].device_kind
    print(f"{shape.layers} layers, d {shape.d_model}, rank {args.rank}, {batch}×{length} tokens, {device}")
    print(f"{'form':12}{'GFLOP':>8}{'temp MiB':>10}{'time ratio':>12}{'fastest':>9}{'gradient off by':>17}")
    for name, c in compiled.items():
        row = cost(c)
        ratio = statistics.median(t / r for t, r in zip(times[name], times["autodiff"], strict=True))
        best = min(times[name]) / min(times["autodiff"])
        off = jax.tree.map(lambda g, r: jnp.linalg.norm(g - r) / jnp.linalg.norm(r), grads[name], grads["autodiff"])
        worst = float(max(jax.tree.leaves(off)))
        print(f"{name:12}{row['GFLOP']:8.1f}{row['temp MiB']:10.1f}{ratio:12.3f}{best:9.3f}{worst:17.1e}")


if __name__ == "__main__":
    main()
