"""Plain-JAX products: every way that a weight reaches a `dot_general`, and leaves that only look like weights."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.zoo.entry import Built, entry, normal, tokens

X = normal(1, 4, 5)  # BxI
X_BxTxD = normal(2, 2, 3, 8)


@entry(factored="w", shapes={"w": ((5, 2), (2, 7))}, kinds={"w": "linear"}, numbers=24)
def matmul() -> Built:
    return lambda p, x: x @ p["w"] + p["b"], {"w": normal(3, 5, 7), "b": normal(4, 7)}, (X,)


@entry(factored="w", shapes={"w": ((5, 2), (2, 7))}, numbers=24)
def dot_with_transposed_weight() -> Built:
    return lambda p, x: jnp.dot(x, p["w"].T), {"w": normal(3, 7, 5)}, (X,)


@entry(factored="w", tol=3e-2, numbers=24)
def weight_cast_to_bf16() -> Built:
    return lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16), {"w": normal(3, 5, 7)}, (X,)


@entry(factored="w", tol=3e-2, numbers=24)
def bf16_base() -> Built:
    params = {"w": normal(3, 5, 7, dtype=jnp.bfloat16), "b": normal(4, 7, dtype=jnp.bfloat16)}
    return lambda p, x: x @ p["w"] + p["b"], params, (X.astype(jnp.bfloat16),)


@entry(factored="w", tol=3e-2, numbers=24)
def bf16_base_float32_product() -> Built:
    def fn(p, x):
        return lax.dot_general(x, p["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    return fn, {"w": normal(3, 5, 7, dtype=jnp.bfloat16)}, (X.astype(jnp.bfloat16),)


@entry(factored="w", tol=1e-3, numbers=24)
def highest_precision() -> Built:
    return lambda p, x: jnp.dot(x, p["w"], precision="highest"), {"w": normal(3, 5, 7)}, (X,)


@entry(factored="w", shapes={"w": ((5, 2), (2, 7))}, numbers=24)
def weight_on_the_left() -> Built:
    return lambda p, x: p["w"] @ x, {"w": normal(3, 7, 5)}, (X.T,)


@entry(factored="w|v", numbers=24 + 2 * (7 + 6))
def vectors() -> Built:
    return lambda p, x: p["v"] @ (x @ p["w"]), {"w": normal(3, 5, 7), "v": normal(4, 6, 7)}, (X[0],)


@entry(factored="w", shapes={"w": ((5, 2), (2, 1))})
def single_output() -> Built:
    return lambda p, x: (x @ p["w"])[:, 0], {"w": normal(3, 5, 1)}, (X,)


@entry(factored="q/kernel|o/kernel", numbers=2 * (8 + 8) * 2, shapes={"o/kernel": ((2, 4, 2), (2, 8))})
def einsum_heads() -> Built:
    def fn(p, x):
        q = jnp.einsum("btd,dhk->bthk", x, p["q"]["kernel"]) + p["q"]["bias"]
        return jnp.einsum("bthk,hkd->btd", jnp.tanh(q), p["o"]["kernel"])

    q = {"kernel": normal(3, 8, 2, 4), "bias": normal(5, 2, 4)}
    return fn, {"q": q, "o": {"kernel": normal(4, 2, 4, 8)}}, (X_BxTxD,)


@entry(factored="w", shapes={"w": ((8, 2), (2, 2, 4))})
def einsum_weight_first() -> Built:
    return lambda p, x: jnp.einsum("dhk,btd->bthk", p["w"], x), {"w": normal(3, 8, 2, 4)}, (X_BxTxD,)


@entry(factored="w", shapes={"w": ((8, 2), (2, 3, 2, 4))}, numbers=2 * (8 + 24))
def einsum_fused_qkv() -> Built:
    def fn(p, x):
        q, k, v = jnp.einsum("btd,shdk->sbthk", x, p["w"])
        return jnp.einsum("bthk,bshk,bshl->bthl", q, k, v)

    return fn, {"w": normal(3, 3, 2, 8, 4)}, (X_BxTxD,)


@entry(factored="w", shapes={"w": ((8, 2), (2, 2, 4))})
def einsum_contracted_axis_in_the_middle() -> Built:
    return lambda p, x: jnp.einsum("btd,hdk->bthk", x, p["w"]), {"w": normal(3, 2, 8, 4)}, (X_BxTxD,)


@entry(factored="w", shapes={"w": ((2, 4, 2), (2, 8))})
def einsum_two_contracted_axes_apart() -> Built:
    args = (normal(2, 2, 3, 2, 4),)
    return lambda p, x: jnp.einsum("bthk,hdk->btd", x, p["w"]), {"w": normal(3, 2, 8, 4)}, args


@entry(factored="w", shapes={"w": ((3, 8, 2), (3, 2, 5))})
def einsum_batched_weight() -> Built:
    return lambda p, x: jnp.einsum("bnd,ndf->bnf", x, p["w"]), {"w": normal(3, 3, 8, 5)}, (X_BxTxD,)


@entry(factored="w", shapes={"w": ((3, 8, 2), (3, 2, 5))})
def einsum_batch_axis_in_the_middle() -> Built:
    return lambda p, x: jnp.einsum("bnd,dnf->bnf", x, p["w"]), {"w": normal(3, 8, 3, 5)}, (X_BxTxD,)


@entry(factored="w")
def bilinear_form() -> Built:
    return lambda p, x: jnp.einsum("bi,ij,bj->b", x, p["w"], x), {"w": normal(3, 5, 5)}, (X,)


@entry(factored="w")
def bilinear_map() -> Built:
    return lambda p, x: jnp.einsum("bi,ijk,bj->bk", x, p["w"], x), {"w": normal(3, 5, 5, 6)}, (X,)


@entry(factored="w", numbers=2 * (8 + 24))
def fused_qkv_cut_after() -> Built:
    def fn(p, x):
        q, k, v = jnp.split(x @ p["w"] + p["b"], 3, axis=-1)
        return jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k)) @ v

    return fn, {"w": normal(3, 8, 24), "b": normal(4, 24)}, (X_BxTxD,)


def attend(x_BxTxD: jax.Array, q_w: jax.Array, k_w: jax.Array, v_w: jax.Array) -> jax.Array:
    """One head of attention from three matrices."""
    q, k, v = x_BxTxD @ q_w, x_BxTxD @ k_w, x_BxTxD @ v_w
    return jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k)) @ v


@entry(factored="w", numbers=2 * (8 + 24))
def fused_qkv_cut_before_by_slices() -> Built:
    def fn(p, x):
        w = p["w"]
        return attend(x, w[:, :8], w[:, 8:16], w[:, 16:])

    return fn, {"w": normal(3, 8, 24)}, (X_BxTxD,)


@entry(factored="w", numbers=2 * (8 + 24))
def fused_qkv_cut_before_by_split() -> Built:
    return lambda p, x: attend(x, *jnp.split(p["w"], 3, axis=1)), {"w": normal(3, 8, 24)}, (X_BxTxD,)


@entry(factored="w", numbers=2 * (8 + 24))
def fused_qkv_cut_before_by_reshape_and_index() -> Built:
    def fn(p, x):
        w = p["w"].reshape(8, 3, 8)
        return attend(x, w[:, 0], w[:, 1], w[:, 2])

    return fn, {"w": normal(3, 8, 24)}, (X_BxTxD,)


@entry(factored="w", numbers=2 * (8 + 24))
def fused_qkv_cut_before_by_dynamic_slice() -> Built:
    def fn(p, x, start):
        cut = [lax.dynamic_slice_in_dim(p["w"], start + i * 8, 8, axis=1) for i in range(3)]
        return attend(x, *cut)

    return fn, {"w": normal(3, 8, 24)}, (X_BxTxD, jnp.int32(0))


@entry(factored="w", numbers=2 * (8 + 24))
def fused_qkv_torch_layout() -> Built:
    def fn(p, x):
        w = p["w"]
        return attend(x, w[:8].T, w[8:16].T, w[16:].T)

    return fn, {"w": normal(3, 24, 8)}, (X_BxTxD,)


@entry(factored="w")
def fused_qkv_indexed_stack() -> Built:
    return lambda p, x: attend(x, p["w"][0], p["w"][1], p["w"][2]), {"w": normal(3, 3, 8, 8)}, (X_BxTxD,)


@entry(factored="w", shapes={"w": ((8, 2), (2, 6))})
def sliced_along_fan_in() -> Built:
    def fn(p, x):
        return jnp.tanh(x[..., :3] @ p["w"][:3]) + x[..., 3:] @ p["w"][3:]

    return fn, {"w": normal(3, 8, 6)}, (X_BxTxD,)


@entry(factored="w")
def flattened_storage() -> Built:
    return lambda p, x: x @ p["w"].reshape(8, 6), {"w": normal(3, 4, 2, 6)}, (X_BxTxD,)


@entry(factored="embedding", shapes={"embedding": ((11, 2), (2, 8))}, kinds={"embedding": "embedding"}, numbers=38)
def embedding_rows() -> Built:
    return lambda p, ids: jnp.take(p["embedding"], ids, axis=0), {"embedding": normal(3, 11, 8)}, (tokens(1, 11, 2, 3),)


@entry(factored="embedding", kinds={"embedding": "embedding"}, numbers=38)
def embedding_rows_by_indexing() -> Built:
    def fn(p, ids):
        return p["embedding"][ids] + p["embedding"].at[ids].get(mode="fill", fill_value=0.0)

    return fn, {"embedding": normal(3, 11, 8)}, (tokens(1, 11, 2, 3),)


@entry(factored="embedding", tol=3e-2, numbers=38)
def embedding_cast_and_scaled() -> Built:
    def fn(p, ids):
        return p["embedding"].astype(jnp.bfloat16)[ids] * jnp.bfloat16(8**0.5)

    return fn, {"embedding": normal(3, 11, 8)}, (tokens(1, 11, 2, 3),)


@entry(factored="embedding", kinds={"embedding": "linear"}, shapes={"embedding": ((11, 2), (2, 8))})
def embedding_by_one_hot() -> Built:
    return lambda p, ids: jax.nn.one_hot(ids, 11) @ p["embedding"], {"embedding": normal(3, 11, 8)}, (tokens(1, 11, 4),)


@entry(factored="embedding|w", numbers=38 + 32, kinds={"embedding": "linear"})
def tied_embedding() -> Built:
    def fn(p, ids):
        x = jnp.take(p["embedding"], ids, axis=0)
        return jnp.tanh(x @ p["w"]) @ p["embedding"].T

    return fn, {"embedding": normal(3, 11, 8), "w": normal(4, 8, 8)}, (tokens(1, 11, 2, 3),)


@entry(factored="w", numbers=2 * (5 + 7))
def tied_autoencoder() -> Built:
    return lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T + p["b"], {"w": normal(3, 5, 7), "b": normal(4, 5)}, (X,)


@entry(factored="w", numbers=2 * (5 + 5))
def weight_used_three_times() -> Built:
    def fn(p, x):
        for _ in range(3):
            x = jnp.tanh(x @ p["w"] + p["b"])
        return x

    return fn, {"w": normal(3, 5, 5), "b": normal(4, 5)}, (X,)


@entry(factored="word", anything="position_rows")
def position_tables() -> Built:
    def fn(p, ids):
        x = p["word"][ids] + p["position"][: ids.shape[1]] + p["type"]
        return jnp.tanh(x + jnp.take(p["position_rows"], jnp.arange(ids.shape[1]), axis=0))

    params = {
        "word": normal(3, 11, 8),
        "position": normal(4, 6, 8),
        "type": normal(5, 1, 8),
        "position_rows": normal(6, 6, 8),
    }
    return fn, params, (tokens(1, 11, 2, 3),)


@entry(factored="word|rows|w", kinds={"word": "embedding", "rows": "embedding"})
def embeddings_summed_before_a_product() -> Built:
    """What was looked up is an activation, and a table added to it no part of a weight."""

    def fn(p, ids):
        return (p["word"][ids] * p["gain"] + p["position"] + p["rows"][ids % 3] + p["type"][0]) @ p["w"]

    params = {
        "word": normal(3, 11, 8),
        "gain": normal(4, 8),
        "position": normal(5, 3, 8),
        "rows": normal(6, 3, 8),
        "type": normal(7, 2, 8),
        "w": normal(8, 8, 5),
    }
    return fn, params, (tokens(1, 11, 2, 3),)


@entry(factored="w")
def position_table_added_before_a_product() -> Built:
    return lambda p, x: (x + p["position"]) @ p["w"], {"position": normal(4, 3, 8), "w": normal(3, 8, 5)}, (X_BxTxD,)


@entry(factored="w[12]")
def activation_shaped_like_an_unrelated_weight() -> Built:
    def fn(p, x):
        h = jnp.tanh(x @ p["w1"])
        return jnp.tanh(h @ x) @ p["w2"] + h * p["gate"]

    return fn, {k: normal(i, 4, 4) for i, k in enumerate(["w1", "w2", "gate"], 3)}, (X[:, :4],)


@entry(factored="w")
def scales_that_reach_a_product_as_batch_axes() -> Built:
    """Graph attention: vectors of heads are contracted, and no axis of their own stays free."""

    def fn(p, x):
        h = jnp.einsum("btd,dhk->bthk", x, p["w"])
        h = jnp.einsum("bthk,k->bthk", h, p["diagonal"]) + jnp.einsum("bthk,hk->bthk", h, p["per_head"])
        source = jnp.einsum("bthk,hk->bth", h, p["source"])
        source = source + jnp.einsum("bt,h->bth", x.mean(-1), p["outer"])
        return h * jax.nn.softmax(source, axis=1)[..., None] + (h @ p["vector"])[..., None]

    names = {"diagonal": (4,), "per_head": (2, 4), "source": (2, 4), "vector": (4,), "outer": (2,)}
    params = {"w": normal(3, 8, 2, 4)} | {k: normal(i, *s) for i, (k, s) in enumerate(names.items(), 4)}
    return fn, params, (X_BxTxD,)


@entry(factored="w")
def norm_scale_of_two_axes() -> Built:
    """A scale per head and channel, as nnx and linen MHA have for their biases: two-dimensional and no weight."""

    def fn(p, x):
        h = jnp.einsum("btd,dhk->bthk", x, p["w"])
        h = h * lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6)
        return h * (1 + p["head_scale"]) + p["head_bias"]

    return fn, {"w": normal(3, 8, 2, 4), "head_scale": normal(4, 2, 4), "head_bias": normal(5, 2, 4)}, (X_BxTxD,)


@entry(adaptable="latents|w")
def two_leaves_in_one_product() -> Built:
    """Learned latents are the activation of a projection: both operands are parameters."""
    return lambda p, x: x @ (p["latents"] @ p["w"]).T, {"latents": normal(3, 6, 5), "w": normal(4, 5, 8)}, (X_BxTxD,)


@entry(factored="w", kinds={"w": "linear"})
def integer_weights_beside() -> Built:
    """An int8 leaf that is contracted after a cast: an integer leaf cannot take a low-rank update."""

    def fn(p, x):
        return (x @ p["w"]) @ (p["codes"].astype(jnp.float32) * p["scale"])

    params = {"w": normal(3, 5, 7), "codes": jnp.arange(42, dtype=jnp.int8).reshape(7, 6), "scale": jnp.float32(0.01)}
    return fn, params, (X,)


@entry(factored="w[123]")
def products_with_rank_one_and_three_inputs() -> Built:
    def fn(p, x):
        return jnp.tensordot(x, p["w1"], axes=1), jnp.inner(x, p["w2"]), jnp.matvec(p["w3"], x)

    return fn, {"w1": normal(3, 8, 2, 3), "w2": normal(4, 6, 8), "w3": normal(5, 7, 8)}, (X_BxTxD,)


@entry(factored="w")
def debug_callback_and_randomness_inside() -> Built:
    def fn(p, x, key):
        y = x @ p["w"]
        jax.debug.callback(lambda _: None, y[0, 0])
        return jnp.where(jax.random.bernoulli(key, 0.5, y.shape), y, 0)

    return fn, {"w": normal(3, 5, 7)}, (X, jax.random.key(0))


@entry(materialised="w", numbers=24)
def penalty_on_the_weight_itself() -> Built:
    return lambda p, x: (x @ p["w"], jnp.sum(p["w"] ** 2)), {"w": normal(3, 5, 7)}, (X,)


@entry(materialised="w", numbers=24)
def weight_returned() -> Built:
    return lambda p, x: {"y": x @ p["w"], "params": p}, {"w": normal(3, 5, 7), "b": normal(4, 7)}, (X,)
