"""Decoders with unrolled layers: in plain JAX, unchanged or with LoRA written into its layers by hand; linen; nnx.

Axes: B batch, T tokens, D model, H query heads, G key/value heads, K head, F feed-forward, V vocabulary, R rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a decoder."""

    layers: int = 8
    d_model: int = 512
    heads: int = 8
    kv_heads: int = 4
    d_ff: int = 1408
    vocabulary: int = 8192

    @property
    def head(self) -> int:
        """Size of one head."""
        return self.d_model // self.heads


def init_params(key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Draw the parameters; every kernel is a matrix, so that the form by hand is what one would write."""
    d, k = shape.d_model, shape.head
    sizes = {
        "query": (d, shape.heads * k),
        "key": (d, shape.kv_heads * k),
        "value": (d, shape.kv_heads * k),
        "out": (shape.heads * k, d),
        "gate": (d, shape.d_ff),
        "up": (d, shape.d_ff),
        "down": (shape.d_ff, d),
    }

    def kernel(key: jax.Array, size: tuple[int, int]) -> jax.Array:
        return (jax.random.normal(key, size) / size[0] ** 0.5).astype(dtype)

    keys = jax.random.split(key, shape.layers + 2)
    layers = []
    for layer_key in keys[2:]:
        ks = jax.random.split(layer_key, len(sizes))
        layer: dict[str, Any] = {n: {"kernel": kernel(q, s)} for q, (n, s) in zip(ks, sizes.items(), strict=True)}
        layers.append(layer | {"norm_attn": jnp.ones(d, dtype), "norm_mlp": jnp.ones(d, dtype)})
    return {
        "embed": kernel(keys[0], (shape.vocabulary, d)),
        "layers": layers,
        "norm": jnp.ones(d, dtype),
        "head": {"kernel": kernel(keys[1], (d, shape.vocabulary))},
    }


Dense = Callable[[Any, jax.Array], jax.Array]


def plain_dense(layer: Any, x_xD: jax.Array) -> jax.Array:
    """`x·W`."""
    return x_xD @ layer["kernel"]


def biased_dense(layer: Any, x_xD: jax.Array) -> jax.Array:
    """`x·W + b`."""
    return x_xD @ layer["kernel"] + layer["bias"]


def with_biases(params: dict[str, Any]) -> dict[str, Any]:
    """Put a bias of zeros beside every kernel, for `biased_dense`."""

    def biased(node: Any) -> Any:
        kernel = node.get("kernel") if isinstance(node, dict) else None
        return node if kernel is None else {**node, "bias": jnp.zeros(kernel.shape[1], kernel.dtype)}

    layers = [{name: biased(node) for name, node in layer.items()} for layer in params["layers"]]
    return {**params, "layers": layers, "head": biased(params["head"])}


def hand_written_lora(scale: float) -> Dense:
    """`x·W + s·(x·A)·B`, as one would write it into a layer."""

    def dense(layer: Any, x_xD: jax.Array) -> jax.Array:
        y = x_xD @ layer["kernel"]
        if "a" in layer:
            y = y + (x_xD @ layer["a"] * scale) @ layer["b"]
        return y

    return dense


def _norm(scale_D: jax.Array, x_BxTxD: jax.Array) -> jax.Array:
    return x_BxTxD * jax.lax.rsqrt(jnp.mean(x_BxTxD**2, -1, keepdims=True) + 1e-5) * scale_D


def decoder(shape: Shape, dense: Dense = plain_dense) -> Callable[[Any, jax.Array], jax.Array]:
    """Return `fn(params, tokens_BxT) -> logits_BxTxV`."""

    def fn(params: Any, tokens_BxT: jax.Array) -> jax.Array:
        x_BxTxD = jnp.take(params["embed"], tokens_BxT, axis=0)
        b, t, _ = x_BxTxD.shape
        causal = jnp.tril(jnp.ones((t, t), bool))
        for layer in params["layers"]:
            h = _norm(layer["norm_attn"], x_BxTxD)
            q_BxTxHxK = dense(layer["query"], h).reshape(b, t, shape.heads, shape.head)
            k_BxTxGxK = dense(layer["key"], h).reshape(b, t, shape.kv_heads, shape.head)
            v_BxTxGxK = dense(layer["value"], h).reshape(b, t, shape.kv_heads, shape.head)
            repeat = shape.heads // shape.kv_heads
            k, v = (jnp.repeat(y, repeat, axis=2) for y in (k_BxTxGxK, v_BxTxGxK))
            scores = jnp.einsum("bthk,bshk->bhts", q_BxTxHxK, k) / shape.head**0.5
            weights = jax.nn.softmax(jnp.where(causal, scores, jnp.finfo(scores.dtype).min))
            mixed = jnp.einsum("bhts,bshk->bthk", weights, v).reshape(b, t, -1)
            x_BxTxD = x_BxTxD + dense(layer["out"], mixed)
            h = _norm(layer["norm_mlp"], x_BxTxD)
            x_BxTxD = x_BxTxD + dense(layer["down"], jax.nn.silu(dense(layer["gate"], h)) * dense(layer["up"], h))
        return dense(params["head"], _norm(params["norm"], x_BxTxD))

    return fn


def loss(logits_BxTxV: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next token, in nats."""
    logp = jax.nn.log_softmax(logits_BxTxV[:, :-1].astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(logp, tokens_BxT[:, 1:, None], axis=-1))


class _LinenDecoder(nn.Module):
    shape: Shape

    @nn.compact
    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        shape = self.shape
        x_BxTxD = nn.Embed(shape.vocabulary, shape.d_model)(tokens_BxT)
        causal = nn.make_causal_mask(tokens_BxT)
        for _ in range(shape.layers):
            x_BxTxD = x_BxTxD + nn.MultiHeadDotProductAttention(shape.heads)(nn.RMSNorm()(x_BxTxD), mask=causal)
            h = nn.RMSNorm()(x_BxTxD)
            h = nn.silu(nn.Dense(shape.d_ff)(h)) * nn.Dense(shape.d_ff)(h)
            x_BxTxD = x_BxTxD + nn.Dense(shape.d_model)(h)
        return nn.Dense(shape.vocabulary)(nn.RMSNorm()(x_BxTxD))


class _NnxLayer(nnx.Module):
    def __init__(self, shape: Shape, rngs: nnx.Rngs) -> None:
        d = shape.d_model
        self.norm_attn, self.norm_mlp = nnx.RMSNorm(d, rngs=rngs), nnx.RMSNorm(d, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(shape.heads, d, decode=False, rngs=rngs)
        self.gate, self.up = nnx.Linear(d, shape.d_ff, rngs=rngs), nnx.Linear(d, shape.d_ff, rngs=rngs)
        self.down = nnx.Linear(shape.d_ff, d, rngs=rngs)

    def __call__(self, x_BxTxD: jax.Array, causal: jax.Array) -> jax.Array:
        x_BxTxD = x_BxTxD + self.attention(self.norm_attn(x_BxTxD), mask=causal)
        h = self.norm_mlp(x_BxTxD)
        return x_BxTxD + self.down(nnx.silu(self.gate(h)) * self.up(h))


class _NnxDecoder(nnx.Module):
    def __init__(self, shape: Shape, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(shape.vocabulary, shape.d_model, rngs=rngs)
        self.layers = nnx.List([_NnxLayer(shape, rngs) for _ in range(shape.layers)])
        self.norm = nnx.RMSNorm(shape.d_model, rngs=rngs)
        self.head = nnx.Linear(shape.d_model, shape.vocabulary, rngs=rngs)

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        x_BxTxD, causal = self.embed(tokens_BxT), nnx.make_causal_mask(tokens_BxT)
        for layer in self.layers:
            x_BxTxD = layer(x_BxTxD, causal)
        return self.head(self.norm(x_BxTxD))


def unrolled(form: str, shape: Shape) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
    """Return `fn(params, tokens_BxT) -> logits_BxTxV` and its abstract params: `plain JAX`, `linen` or `nnx`."""
    if form == "linen":
        model = _LinenDecoder(shape)
        params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        return lambda p, tokens: model.apply({"params": p}, tokens), params
    if form == "nnx":
        graph, params = nnx.split(nnx.eval_shape(lambda: _NnxDecoder(shape, nnx.Rngs(0))))
        return lambda p, tokens: nnx.merge(graph, p)(tokens), params
    return decoder(shape), jax.eval_shape(lambda: init_params(jax.random.key(0), shape))
