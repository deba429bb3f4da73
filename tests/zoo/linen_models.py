"""Linen layers and modules, with their own layouts of kernels."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from tests.zoo.entry import Built, entry, linen, normal, tokens

X_BxTxD = normal(1, 2, 3, 8)
IDS_BxT = tokens(1, 11, 2, 3)


@entry(
    factored=".*kernel",
    numbers=2 * 4 * (8 + 8),
    shapes={"out/kernel": ((2, 4, 2), (2, 8)), "query/kernel": ((8, 2), (2, 2, 4))},
)
def linen_attention() -> Built:
    return linen(nn.MultiHeadDotProductAttention(2), X_BxTxD)


@entry(factored=".*kernel")
def linen_dense_general() -> Built:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x_BxTxD):
            x = nn.DenseGeneral((2, 3), name="widen")(x_BxTxD)
            x = nn.DenseGeneral((4,), axis=(-3, -1), name="mix")(x)  # contracts time and one of the two new axes
            return nn.DenseGeneral(5, axis=-1, batch_dims=(0,), name="batched")(x)

    return linen(Model(), X_BxTxD)


@entry(factored=".*kernel", tol=3e-2)
def linen_bf16_compute() -> Built:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm(dtype=jnp.bfloat16)(nn.Dense(6, dtype=jnp.bfloat16)(x))
            return nn.Dense(5, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)(jnp.tanh(x))

    return linen(Model(), X_BxTxD)


@entry(factored="kernel", shapes={"kernel": ((8, 2), (2, 3, 2, 4))})
def linen_einsum() -> Built:
    return linen(nn.Einsum((3, 2, 8, 4), "btd,shdk->sbthk"), X_BxTxD)


class TiedLanguageModel(nn.Module):
    """Embedding, one dense layer, logits by `attend`, and `encode` as a second method."""

    def setup(self) -> None:
        """Create the layers."""
        self.embed = nn.Embed(11, 8)
        self.dense = nn.Dense(8)
        self.unused = nn.Dense(3)

    def encode(self, ids_BxT: jax.Array) -> jax.Array:
        """Hidden states."""
        return jnp.tanh(self.dense(self.embed(ids_BxT)))

    def __call__(self, ids_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits, and a second head."""
        h = self.encode(ids_BxT)
        return self.embed.attend(h), self.unused(h)


@entry(factored="embed/embedding|.*kernel", numbers=2 * (11 + 8 + 16 + 11))
def linen_tied_embedding() -> Built:
    return linen(TiedLanguageModel(), IDS_BxT)


@entry(factored="embed/embedding|dense/kernel", kinds={"embed/embedding": "embedding"}, numbers=2 * (11 + 8 + 16))
def linen_second_method() -> Built:
    """The parameters of the whole model, and a function that runs only `encode`."""
    _, params, args = linen(TiedLanguageModel(), IDS_BxT)
    return lambda p, ids: TiedLanguageModel().apply({"params": p}, ids, method="encode"), params, args


@entry(factored="shared/kernel|head/kernel", numbers=2 * (16 + 13))
def linen_shared_module() -> Built:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, a, b):
            shared = nn.Dense(8, name="shared")
            x = jnp.tanh(shared(a)) * shared(jnp.sin(b)) + shared(shared(a))
            return nn.Dense(5, name="head")(x)

    return linen(Model(), X_BxTxD, X_BxTxD + 1)


@entry(factored=".*kernel")
def linen_norms_and_dropout() -> Built:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, key):
            x = nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3,))(x))
            x = nn.PReLU()(nn.GroupNorm(2)(x)) + nn.InstanceNorm()(x)
            x = nn.Dropout(0.5, deterministic=False)(x, rng=key)
            return nn.Dense(5)(nn.RMSNorm()(nn.LayerNorm()(x)))

    return linen(Model(), X_BxTxD, jax.random.key(0), stats=True)


@entry(factored="kernel")
def linen_own_dot_general() -> Built:
    def dot_general(x, w, dims, precision=None, preferred_element_type=None):
        y = jax.lax.dot_general(w, x, ((dims[0][1], dims[0][0]), ((), ())), precision)
        return jnp.moveaxis(y, 0, -1) * 0.5

    return linen(nn.Dense(5, dot_general=dot_general), X_BxTxD)


@entry(factored="dense/kernel", numbers=2 * 16)
def linen_layer_mapped_over_the_batch() -> Built:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared = nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False})
            return shared(8, name="dense")(x)

    return linen(Model(), X_BxTxD)


@entry(factored="Dense_0/kernel", numbers=2 * 16)
def linen_while_loop_and_cond() -> Built:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, flag):
            dense = nn.Dense(8)
            return nn.cond(flag, lambda _, x: jnp.tanh(dense(x)), lambda _, x: x, self, dense(x))

    return linen(Model(), X_BxTxD, jnp.array(True))
