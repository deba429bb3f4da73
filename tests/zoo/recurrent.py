"""Recurrent cells, linen and nnx, and scans over time."""

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import lax

from tests.zoo.entry import Built, entry, linen, nnx_split, normal

X_BxTxD = normal(1, 2, 4, 5)


@entry(factored=".*kernel", numbers=2 * 4 * ((5 + 6) + (6 + 6)))
def linen_lstm() -> Built:
    return linen(nn.RNN(nn.LSTMCell(6)), X_BxTxD)


@entry(factored=".*kernel", numbers=2 * 4 * ((5 + 6) + (6 + 6)))
def linen_optimized_lstm() -> Built:
    return linen(nn.RNN(nn.OptimizedLSTMCell(6)), X_BxTxD)


@entry(factored=".*kernel")
def linen_gru_reversed() -> Built:
    return linen(nn.RNN(nn.GRUCell(6), reverse=True, keep_order=True), X_BxTxD)


@entry(factored=".*kernel")
def linen_bidirectional() -> Built:
    return linen(nn.Bidirectional(nn.RNN(nn.SimpleCell(6)), nn.RNN(nn.MGUCell(6))), X_BxTxD)


@entry(factored=".*kernel")
def linen_conv_lstm() -> Built:
    return linen(nn.RNN(nn.ConvLSTMCell(3, (3, 3))), normal(1, 2, 2, 5, 5, 2))


@entry(factored=".*kernel")
def linen_one_lstm_step() -> Built:
    return linen(nn.LSTMCell(6), (normal(2, 2, 6), normal(3, 2, 6)), X_BxTxD[:, 0])


@entry(factored=".*kernel")
def nnx_lstm() -> Built:
    return nnx_split(lambda: nnx.RNN(nnx.LSTMCell(5, 6, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)), X_BxTxD)


@entry(factored=".*kernel")
def nnx_optimized_lstm() -> Built:
    return nnx_split(lambda: nnx.RNN(nnx.OptimizedLSTMCell(5, 6, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)), X_BxTxD)


@entry(factored=".*kernel")
def nnx_gru() -> Built:
    return nnx_split(lambda: nnx.RNN(nnx.GRUCell(5, 6, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)), X_BxTxD)


@entry(factored="input|state", numbers=2 * ((5 + 24) + (6 + 24)))
def plain_lstm_with_fused_gates() -> Built:
    def fn(p, x_BxTxD):
        def step(carry, x):
            h, c = carry
            i, f, g, o = jnp.split(x @ p["input"] + h @ p["state"] + p["bias"], 4, axis=-1)
            c = jnp.tanh(f) * c + jnp.tanh(i) * jnp.tanh(g)
            h = jnp.tanh(o) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros((x_BxTxD.shape[0], 6))
        return lax.scan(step, (zero, zero), x_BxTxD.swapaxes(0, 1))[1]

    return fn, {"input": normal(3, 5, 24), "state": normal(4, 6, 24), "bias": normal(5, 24)}, (X_BxTxD,)
