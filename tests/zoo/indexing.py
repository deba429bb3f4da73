"""Weights that are indexed, padded, repeated or permuted before they are used, and less common lookups."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.zoo.entry import Built, entry, normal, tokens

X = normal(1, 4, 5)


@entry(factored="w")
def broadcast_to_the_batch() -> Built:
    def fn(p, x):
        w = jnp.broadcast_to(p["w"], (4, 5, 7))
        return jnp.einsum("bi,bio->bo", x, w) + (x[:, None] @ w)[:, 0]

    return fn, {"w": normal(3, 5, 7)}, (X,)


@entry(adaptable="w")
def repeated_heads() -> Built:
    """Grouped-query attention with the kernel repeated, and not its output."""

    def fn(p, x):
        return jnp.einsum("bi,ihk->bhk", x, jnp.repeat(p["w"], 2, axis=1))

    return fn, {"w": normal(3, 5, 2, 4)}, (X,)


@entry(factored="w|v|u")
def reversed_permuted_and_rolled() -> Built:
    def fn(p, x):
        order = jnp.array([3, 1, 0, 2, 4])
        x = jnp.tanh(x @ p["w"][:, ::-1])
        x = jnp.tanh(x @ p["v"][order])
        return x @ jnp.roll(p["u"], 2, axis=1)

    return fn, {k: normal(i, 5, 5) for i, k in enumerate("wvu")}, (X,)


@entry(adaptable="w|v")
def padded() -> Built:
    def fn(p, x):
        x = jnp.tanh(x @ jnp.pad(p["w"], ((0, 0), (1, 2))))
        return x @ lax.pad(p["v"], 0.0, ((1, 2, 0), (0, 0, 1)))

    return fn, {"w": normal(3, 5, 5), "v": normal(4, 5, 3)}, (X,)


@entry(adaptable="embedding", anything="w")
def padding_row_set_to_zero() -> Built:
    def fn(p, ids):
        return p["embedding"].at[0].set(0.0)[ids] @ p["w"].at[:, 1].multiply(2.0)

    return fn, {"embedding": normal(3, 11, 5), "w": normal(4, 5, 7)}, (tokens(1, 11, 2, 3),)


@entry(factored="embedding")
def embedding_along_the_last_axis() -> Built:
    return lambda p, ids: jnp.take(p["embedding"], ids, axis=1), {"embedding": normal(3, 8, 11)}, (tokens(1, 11, 2, 3),)


@entry(anything="table")
def embedding_by_two_indices() -> Built:
    """A bias per head and bucket, and one table per codebook."""

    def fn(p, ids):
        heads = jnp.arange(3)
        return p["bias"][heads[None], ids], p["table"][heads[None], ids]

    return fn, {"bias": normal(3, 3, 11), "table": normal(4, 3, 11, 8)}, (tokens(1, 11, 4, 3),)


@entry(factored="embedding", numbers=2 * (11 + 8))
def bag_of_embeddings() -> Built:
    def fn(p, ids):
        rows = p["embedding"][ids]
        return rows.sum(1), jax.ops.segment_sum(rows[0], jnp.array([0, 0, 1]), 2), p["embedding"][ids[0, 0]]

    return fn, {"embedding": normal(3, 11, 8)}, (tokens(1, 11, 2, 3),)


@entry(factored="relative", numbers=2 * (9 + 2))
def relative_position_table() -> Built:
    """A table of offsets, looked up by constant positions: `(T·T, heads)` rows."""

    def fn(p, scores_HxTxT):
        offset = jnp.arange(3)[:, None] - jnp.arange(3)[None] + 4
        bias = p["relative"][offset.reshape(-1)].reshape(3, 3, 2).transpose(2, 0, 1)
        return jax.nn.softmax(scores_HxTxT + bias)

    return fn, {"relative": normal(3, 9, 2)}, (normal(1, 2, 3, 3),)


@entry(anything="position", factored="w")
def position_table_sliced_at_a_traced_offset() -> Built:
    def fn(p, x_BxTxD, start):
        return (x_BxTxD + lax.dynamic_slice_in_dim(p["position"], start, 3)) @ p["w"]

    return fn, {"position": normal(3, 9, 5), "w": normal(4, 5, 7)}, (normal(1, 2, 3, 5), jnp.int32(4))


@entry(anything="w")
def modulated_convolution() -> Built:
    """A kernel for each sample, scaled by a style and normalised."""

    def fn(p, x_BxLxC, style_BxC):
        w = p["w"] * style_BxC[:, None, :, None]
        w = w * lax.rsqrt(jnp.sum(w**2, axis=(1, 2), keepdims=True) + 1e-3)
        one = lambda x, w: jnp.stack([jnp.convolve(x[:, 0], w[:, 0, o], "same") for o in range(2)], -1)
        return jax.vmap(one)(x_BxLxC, w)

    return fn, {"w": normal(3, 3, 4, 2)}, (normal(1, 2, 6, 4), normal(2, 2, 4))


@entry(adaptable="w")
def gram_matrix() -> Built:
    """An orthogonality penalty: the weight meets itself."""
    return lambda p, x: (x @ p["w"], p["w"].T @ p["w"]), {"w": normal(3, 5, 7)}, (X,)


@entry(adaptable="w", anything="v")
def linear_solve_and_diagonal() -> Built:
    def fn(p, x):
        return x @ p["w"] + jnp.linalg.solve(p["v"] + 4 * jnp.eye(5), x.T).T, jnp.einsum("bi,ii->bi", x, p["w"])

    return fn, {"w": normal(3, 5, 5), "v": normal(4, 5, 5)}, (X,)


@entry(adaptable="w", tol=2e-2)
def fake_quantisation() -> Built:
    """Rounded weights with a straight-through gradient, and a lower precision."""

    def fn(p, x):
        w = p["w"]
        rounded = w + lax.stop_gradient(jnp.round(w * 64) / 64 - w)
        return x @ rounded + x @ lax.reduce_precision(w, 8, 10)

    return fn, {"w": normal(3, 5, 5)}, (X,)


@entry(factored="w", tol=3e-2)
def bf16_weight_under_a_float32_input() -> Built:
    return lambda p, x: x @ p["w"], {"w": normal(3, 5, 7, dtype=jnp.bfloat16)}, (X,)


@entry(factored="w", tol=3e-2)
def float16_weight() -> Built:
    return lambda p, x: x.astype(jnp.float16) @ p["w"], {"w": normal(3, 5, 7, dtype=jnp.float16)}, (X,)


@entry(factored="w|v", numbers=2 * (1 + 7 + 7 + 1))
def sides_of_size_one() -> Built:
    return lambda p, x: jnp.tanh(x[:, :1] @ p["w"]) @ p["v"], {"w": normal(3, 1, 7), "v": normal(4, 7, 1)}, (X,)


@entry(factored="w", numbers=24)
def two_methods_of_one_batch_axis() -> Built:
    """`jnp.vectorize`, `vmap` with axis names, and a collective over the mapped axis."""

    def fn(p, x):
        rows = jnp.vectorize(lambda row: row @ p["w"], signature="(i)->(o)")(x)
        centred = jax.vmap(lambda row: row @ p["w"] - lax.pmean(row @ p["w"], "batch"), axis_name="batch")(x)
        return rows, centred

    return fn, {"w": normal(3, 5, 7)}, (X,)


@entry(adaptable="w", numbers=24)
def platform_dependent_branches() -> Built:
    def fn(p, x):
        return lax.platform_dependent(x, p["w"], cpu=lambda x, w: x @ w, default=lambda x, w: (w.T @ x.T).T)

    return fn, {"w": normal(3, 5, 7)}, (X,)


@jax.custom_batching.custom_vmap
def _dense(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w)


@_dense.def_vmap
def _(axis_size, in_batched, w, x):
    del axis_size, in_batched
    return jnp.tanh(x @ w), True


@entry(adaptable="w", numbers=24, grad=False)
def custom_vmap_with_the_weight() -> Built:
    params = {"w": normal(3, 5, 7)}
    return lambda p, x: jax.vmap(lambda row: _dense(p["w"], row))(x) + _dense(p["w"], x), params, (X,)


@entry(anything="flat|square")
def storage_that_mixes_both_sides() -> Built:
    """A matrix kept as a vector, and one reshaped across its sides."""

    def fn(p, x):
        return x @ p["flat"].reshape(5, 7) @ p["square"].reshape(7, 6)

    return fn, {"flat": normal(3, 35), "square": normal(4, 6, 7)}, (X,)


@entry(factored="down", adaptable="up")
def absorbed_projection() -> Built:
    """Latent attention: one leaf expands the latents, and also is absorbed into the queries, head by head."""

    def fn(p, x_BxTxD, q_BxTxHxK):
        latent_BxTxR = x_BxTxD @ p["down"]
        keys = (latent_BxTxR @ p["up"]).reshape(2, 3, 2, 4)
        absorbed = jnp.einsum("bthk,rhk->bthr", q_BxTxHxK, p["up"].reshape(3, 2, 4))
        return jnp.einsum("bthk,bshk->bhts", q_BxTxHxK, keys), jnp.einsum("bthr,bsr->bhts", absorbed, latent_BxTxR)

    return fn, {"down": normal(3, 5, 3), "up": normal(4, 3, 8)}, (normal(1, 2, 3, 5), normal(2, 2, 3, 2, 4))


@entry(factored="w|lora_a|lora_b", numbers=2 * (5 + 7 + 5 + 3 + 3 + 7))
def model_that_has_adapters_of_its_own() -> Built:
    params = {"w": normal(3, 5, 7), "lora_a": normal(4, 5, 3), "lora_b": normal(5, 3, 7)}
    return lambda p, x: x @ p["w"] + x @ p["lora_a"] @ p["lora_b"], params, (X,)


@entry(anything="experts", factored="router")
def experts_averaged_in_weight_space() -> Built:
    def fn(p, x):
        gate_E = jax.nn.softmax(x.mean(0) @ p["router"])
        return x @ jnp.einsum("e,edf->df", gate_E, p["experts"])

    return fn, {"router": normal(3, 5, 3), "experts": normal(4, 3, 5, 7)}, (X,)


@entry(factored="w", tol=3e-2)
def operands_of_two_dtypes() -> Built:
    def fn(p, x):
        return lax.dot_general(x, p["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    return fn, {"w": normal(3, 5, 7)}, (X.astype(jnp.bfloat16),)
