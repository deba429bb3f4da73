"""nnx layers and modules, as functions of the state that `nnx.split` gives."""

import jax
import jax.numpy as jnp
from flax import nnx

from tests.zoo.entry import Built, entry, nnx_split, normal, tokens

X_BxTxD = normal(1, 2, 3, 8)


@entry(
    factored=".*kernel",
    numbers=2 * 4 * (8 + 8),
    shapes={"out/kernel": ((2, 4, 2), (2, 8)), "value/kernel": ((8, 2), (2, 2, 4))},
)
def nnx_attention() -> Built:
    return nnx_split(lambda: nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0)), X_BxTxD)


@entry(factored=".*kernel")
def nnx_linear_and_norms() -> Built:
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(8, 6, rngs=rngs)
            self.general = nnx.LinearGeneral((3, 6), (2, 5), axis=(-2, -1), rngs=rngs)
            self.norm = nnx.LayerNorm(5, rngs=rngs)
            self.batch_norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x_BxTxD):
            x = self.dropout(self.batch_norm(self.linear(x_BxTxD)))
            return self.norm(self.general(jnp.tanh(x)))

    return nnx_split(lambda: Model(nnx.Rngs(0)), X_BxTxD)


@entry(factored="kernel", shapes={"kernel": ((8, 2), (2, 3, 2, 4))})
def nnx_einsum() -> Built:
    return nnx_split(lambda: nnx.Einsum("btd,shdk->sbthk", (3, 2, 8, 4), rngs=nnx.Rngs(0)), X_BxTxD)


class NnxLanguageModel(nnx.Module):
    """Embedding, one linear layer, logits by `attend`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.dense = nnx.Linear(8, 8, rngs=rngs)

    def encode(self, ids_BxT: jax.Array) -> jax.Array:
        """Hidden states."""
        return jnp.tanh(self.dense(self.embed(ids_BxT)))

    def __call__(self, ids_BxT: jax.Array) -> jax.Array:
        return self.embed.attend(self.encode(ids_BxT))


@entry(factored="embed/embedding|dense/kernel", numbers=2 * (19 + 16))
def nnx_tied_embedding() -> Built:
    return nnx_split(lambda: NnxLanguageModel(nnx.Rngs(0)), tokens(1, 11, 2, 3))


@entry(factored="embed/embedding|dense/kernel", numbers=2 * (19 + 16))
def nnx_second_method() -> Built:
    return nnx_split(lambda: NnxLanguageModel(nnx.Rngs(0)), tokens(1, 11, 2, 3), call=lambda m, ids: m.encode(ids))


@entry(factored="first/kernel", numbers=2 * 16)
def nnx_shared_module() -> Built:
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(8, 8, rngs=rngs)
            self.second = self.first

        def __call__(self, x):
            return self.second(jnp.tanh(self.first(x)))

    return nnx_split(lambda: Model(nnx.Rngs(0)), X_BxTxD)


@entry(factored=".*kernel")
def nnx_sequential_and_remat() -> Built:
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.body = nnx.Sequential(nnx.Linear(8, 6, rngs=rngs), jax.nn.gelu, nnx.Linear(6, 8, rngs=rngs))

        def __call__(self, x):
            return x + nnx.remat(lambda body, x: body(x))(self.body, x)

    return nnx_split(lambda: Model(nnx.Rngs(0)), X_BxTxD)


@entry(factored="kernel", tol=3e-2)
def nnx_bf16() -> Built:
    def make():
        return nnx.Linear(8, 6, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    return nnx_split(make, X_BxTxD)


@entry(factored="kernel", numbers=2 * 16)
def nnx_jit_and_cond() -> Built:
    def call(model, x):
        return nnx.cond(
            jnp.sum(x) > 0, lambda m, x: m(x), lambda m, x: jnp.tanh(m(x)), model, nnx.jit(lambda m, x: m(x))(model, x)
        )

    return nnx_split(lambda: nnx.Linear(8, 8, rngs=nnx.Rngs(0)), X_BxTxD, call=call)
