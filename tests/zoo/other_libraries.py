"""One Haiku and one Equinox function; skipped where the library is not installed."""

import importlib.util

import jax
import jax.numpy as jnp

from tests.zoo.entry import Built, entry, fill, normal

X_BxD = normal(1, 4, 5)

if importlib.util.find_spec("haiku"):

    @entry(factored=r"mlp/~/linear_\d/w|conv1_d/w", kinds={"conv1_d/w": "conv"})
    def haiku() -> Built:
        import haiku as hk

        @hk.transform
        def model(x):
            h = hk.nets.MLP([7, 6])(x)
            return hk.LayerNorm(-1, True, True)(h) + hk.Conv1D(6, 3)(h[None])[0]

        params = fill(jax.eval_shape(model.init, jax.random.key(0), X_BxD))
        return lambda p, x: model.apply(p, None, x), params, (X_BxD,)


if importlib.util.find_spec("equinox"):

    @entry(factored=r"layers/\d/weight|attention/.*weight")
    def equinox() -> Built:
        import equinox as eqx

        class Model(eqx.Module):
            attention: eqx.nn.MultiheadAttention
            layers: list[eqx.nn.Linear]

            def __init__(self, key: jax.Array) -> None:
                keys = jax.random.split(key, 3)
                self.attention = eqx.nn.MultiheadAttention(1, 5, key=keys[0])
                self.layers = [eqx.nn.Linear(5, 7, key=keys[1]), eqx.nn.Linear(7, 3, use_bias=False, key=keys[2])]

            def __call__(self, x_TxD: jax.Array) -> jax.Array:
                x_TxD = self.attention(x_TxD, x_TxD, x_TxD)
                for layer in self.layers:
                    x_TxD = jnp.tanh(jax.vmap(layer)(x_TxD))
                return x_TxD

        params, static = eqx.partition(Model(jax.random.key(0)), eqx.is_inexact_array)
        return lambda p, x: eqx.combine(p, static)(x), fill(params), (X_BxD,)
