"""Small versions of published architectures, written the way that public code writes them."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import lax

from tests.zoo.entry import Built, entry, linen, nnx_split, normal, tokens

IDS_BxT = tokens(1, 13, 2, 4)
IMAGE_BxHxWxC = normal(1, 2, 8, 8, 3)


@entry(factored=".*kernel")
def vit() -> Built:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (4, 4), strides=(4, 4), name="patches")(x).reshape(2, 4, 8)
            cls = self.param("cls", nn.initializers.normal(), (1, 1, 8))
            x = jnp.concatenate([jnp.tile(cls, (2, 1, 1)), x], axis=1)
            x = x + self.param("position", nn.initializers.normal(), (1, 5, 8))
            for _ in range(2):
                x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
                x = x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x))))
            return nn.Dense(3, name="head")(nn.LayerNorm()(x)[:, 0])

    return linen(Model(), IMAGE_BxHxWxC)


@entry(factored=".*kernel|.*embedding")
def bert() -> Built:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids, mask):
            word = nn.Embed(13, 8, name="word")
            x = word(ids) + nn.Embed(6, 8, name="position")(jnp.arange(4)[None]) + nn.Embed(2, 8, name="type")(ids * 0)
            x = nn.LayerNorm()(x)
            for _ in range(2):
                attention = nn.MultiHeadDotProductAttention(2)(x, mask=mask[:, None, None, :])
                x = nn.LayerNorm()(x + attention)
                x = nn.LayerNorm()(x + nn.Dense(8)(nn.gelu(nn.Dense(12)(x))))
            x = nn.LayerNorm()(nn.gelu(nn.Dense(8, name="transform")(x)))
            pooled = jnp.tanh(nn.Dense(8, name="pooler")(x[:, 0]))
            bias = self.param("bias", nn.initializers.zeros, (13,))
            return word.attend(x) + bias, nn.Dense(2, name="relation")(pooled)

    return linen(Model(), IDS_BxT, jnp.ones((2, 4), bool))


@entry(factored=r".*/c_\w+/w|wte", anything="wpe")
def gpt2() -> Built:
    """Fused `c_attn` in a list of layers, tied logits."""

    def norm(p, x):
        x = x - x.mean(-1, keepdims=True)
        return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * p["g"] + p["b"]

    def linear(p, x):
        return x @ p["w"] + p["b"]

    def attention(p, x):
        q, k, v = (h.reshape(2, 4, 2, 4) for h in jnp.split(linear(p["c_attn"], x), 3, axis=-1))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2
        scores = jnp.where(jnp.tril(jnp.ones((4, 4), bool)), scores, -1e9)
        return linear(p["c_proj"], jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(x.shape))

    def fn(p, ids):
        x = p["wte"][ids] + p["wpe"][jnp.arange(ids.shape[1])]
        for block in p["blocks"]:
            x = x + attention(block["attn"], norm(block["ln_1"], x))
            x = x + linear(block["mlp"]["c_proj"], jax.nn.gelu(linear(block["mlp"]["c_fc"], norm(block["ln_2"], x))))
        return norm(p["ln_f"], x) @ p["wte"].T

    def dense(seed, i, o):
        return {"w": normal(seed, i, o), "b": normal(seed + 1, o)}

    def ln(seed):
        return {"g": 1 + normal(seed, 8), "b": normal(seed + 1, 8)}

    def block(seed):
        attn = {"c_attn": dense(seed, 8, 24), "c_proj": dense(seed + 2, 8, 8)}
        mlp = {"c_fc": dense(seed + 4, 8, 12), "c_proj": dense(seed + 6, 12, 8)}
        return {"attn": attn, "mlp": mlp, "ln_1": ln(seed + 8), "ln_2": ln(seed + 10)}

    params = {"wte": normal(1, 13, 8), "wpe": normal(2, 6, 8), "ln_f": ln(3), "blocks": [block(20), block(40)]}
    return fn, params, (IDS_BxT,)


def rope(x_BxTxHxK: jax.Array) -> jax.Array:
    """Rotary positions."""
    t, k = x_BxTxHxK.shape[1], x_BxTxHxK.shape[-1]
    angle = jnp.arange(t)[:, None, None] / 100 ** (jnp.arange(k // 2) / (k // 2))
    a, b = jnp.split(x_BxTxHxK, 2, axis=-1)
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1)


class LlamaBlock(nn.Module):
    """Grouped-query attention with rotary positions, and a gated MLP."""

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, _: None) -> tuple[jax.Array, None]:
        h = nn.RMSNorm(name="attn_norm")(x_BxTxD)
        q = rope(nn.DenseGeneral((4, 2), use_bias=False, name="query")(h))
        k = rope(nn.DenseGeneral((2, 2), use_bias=False, name="key")(h))
        v = nn.DenseGeneral((2, 2), use_bias=False, name="value")(h)
        k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k)), v)
        x_BxTxD = x_BxTxD + nn.DenseGeneral(8, axis=(-2, -1), use_bias=False, name="out")(y)
        h = nn.RMSNorm(name="mlp_norm")(x_BxTxD)
        h = nn.silu(nn.Dense(12, use_bias=False, name="gate")(h)) * nn.Dense(12, use_bias=False, name="up")(h)
        return x_BxTxD + nn.Dense(8, use_bias=False, name="down")(h), None


@entry(factored=".*kernel|embed/embedding", numbers=2 * (21 + 3 * (16 + 12 + 12 + 16 + 20 * 3)))
def llama() -> Built:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(13, 8, name="embed")
            block = nn.remat(LlamaBlock, prevent_cse=False, policy=jax.checkpoint_policies.dots_saveable)
            layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = layers(name="layers")(embed(ids), None)
            return embed.attend(nn.RMSNorm(name="final_norm")(x))

    return linen(Model(), IDS_BxT)


@entry(factored=".*kernel|embed/embedding|.*relative/embedding")
def t5() -> Built:
    """Encoder and decoder that share one embedding and one table of relative position biases."""

    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x, memory, bias):
            q, k, v = (
                nn.DenseGeneral((2, 4), use_bias=False, name=n)(y)
                for n, y in zip("qkv", (x, memory, memory), strict=True)
            )
            weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) + bias)
            y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
            return nn.DenseGeneral(8, axis=(-2, -1), use_bias=False, name="o")(y)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids, targets):
            embed = nn.Embed(13, 8, name="embed")
            buckets = jnp.abs(jnp.arange(4)[:, None] - jnp.arange(4)[None])
            bias = nn.Embed(4, 2, name="relative")(buckets).transpose(2, 0, 1)[None]
            x = embed(ids)
            x = x + Attention(name="encoder")(nn.RMSNorm()(x), nn.RMSNorm()(x), bias)
            y = embed(targets)
            y = y + Attention(name="self")(y, y, bias)
            y = y + Attention(name="cross")(nn.RMSNorm()(y), x, 0.0)
            h = nn.relu(nn.Dense(12, use_bias=False, name="wi")(y))
            y = y + nn.Dense(8, use_bias=False, name="wo")(h)
            return embed.attend(nn.RMSNorm()(y) * 8**-0.5)

    return linen(Model(), IDS_BxT, IDS_BxT[:, ::-1])


@entry(factored=".*kernel")
def mlp_mixer() -> Built:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (4, 4), strides=(4, 4))(x).reshape(2, 4, 8)
            for _ in range(2):
                y = nn.LayerNorm()(x).swapaxes(1, 2)
                x = x + nn.Dense(4)(nn.gelu(nn.Dense(6)(y))).swapaxes(1, 2)
                x = x + nn.Dense(8)(nn.gelu(nn.Dense(6)(nn.LayerNorm()(x))))
            return nn.Dense(3)(x.mean(1))

    return linen(Model(), IMAGE_BxHxWxC)


@entry(factored=".*kernel")
def resnet() -> Built:
    class Block(nn.Module):
        features: int
        strides: int

        @nn.compact
        def __call__(self, x):
            y = nn.Conv(self.features, (3, 3), self.strides, use_bias=False)(x)
            y = nn.relu(nn.BatchNorm(use_running_average=True)(y))
            y = nn.BatchNorm(use_running_average=True)(nn.Conv(self.features, (3, 3), use_bias=False)(y))
            if y.shape != x.shape:
                x = nn.Conv(self.features, (1, 1), self.strides, use_bias=False, name="shortcut")(x)
            return nn.relu(x + y)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.max_pool(nn.Conv(4, (7, 7), 2)(x), (3, 3), (2, 2), "SAME")
            x = Block(6, 2)(Block(4, 1)(x))
            return nn.Dense(3)(x.mean((1, 2)))

    return linen(Model(), IMAGE_BxHxWxC, stats=True)


@entry(factored=".*kernel")
def unet() -> Built:
    """A diffusion model: time embedding, down, attention, up with a skip connection."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.time = nnx.Linear(4, 6, rngs=rngs)
            self.enter = nnx.Conv(3, 6, (3, 3), rngs=rngs)
            self.down = nnx.Conv(6, 6, (3, 3), strides=2, rngs=rngs)
            self.norm = nnx.GroupNorm(6, num_groups=2, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
            self.up = nnx.ConvTranspose(6, 6, (2, 2), strides=(2, 2), rngs=rngs)
            self.leave = nnx.Conv(12, 3, (3, 3), rngs=rngs)

        def __call__(self, x, t):
            angle = t[:, None] * 2.0 ** jnp.arange(2)
            time = self.time(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1))
            skip = nnx.silu(self.enter(x) + time[:, None, None])
            h = self.norm(self.down(skip))
            h = h + self.attention(h.reshape(2, 16, 6)).reshape(h.shape)
            return self.leave(jnp.concatenate([self.up(h), skip], -1))

    return nnx_split(lambda: Model(nnx.Rngs(0)), IMAGE_BxHxWxC, jnp.array([0.1, 0.7]))


@entry(factored=".*kernel")
def mamba() -> Built:
    """Selective state space: a depthwise causal convolution, input-dependent steps, `A_log` never contracted."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x_BxTxD):
            x, gate = jnp.split(nn.Dense(16, use_bias=False, name="in_proj")(x_BxTxD), 2, axis=-1)
            x = nn.silu(nn.Conv(8, (3,), padding="CAUSAL", feature_group_count=8, name="conv")(x))
            dt, b, c = jnp.split(nn.Dense(2 + 3 + 3, use_bias=False, name="x_proj")(x), (2, 5), axis=-1)
            dt = nn.softplus(nn.Dense(8, name="dt_proj")(dt))
            a_DxN = -jnp.exp(self.param("A_log", nn.initializers.zeros, (8, 3)))
            decay = jnp.exp(jnp.einsum("btd,dn->btdn", dt, a_DxN))
            drive = jnp.einsum("btd,btn,btd->btdn", dt, b, x)

            def step(h, inputs):
                decay, drive, c = inputs
                h = decay * h + drive
                return h, jnp.einsum("bdn,bn->bd", h, c)

            over_time = jax.tree.map(lambda y: y.swapaxes(0, 1), (decay, drive, c))
            _, y = lax.scan(step, jnp.zeros((2, 8, 3)), over_time)
            y = y.swapaxes(0, 1) + x * self.param("D", nn.initializers.ones, (8,))
            return nn.Dense(8, use_bias=False, name="out_proj")(y * nn.silu(gate))

    return linen(Model(), normal(1, 2, 5, 8))


@entry(factored="embed/embedding|.*kernel|.*/up|.*/down")
def mixture_of_experts_decoder() -> Built:
    """Two of three experts a token, by `ragged_dot` over sorted tokens, in a stack of two unrolled layers."""

    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x_BxTxD):
            x_TxD = x_BxTxD.reshape(-1, 8)
            gate, index = lax.top_k(jax.nn.softmax(nn.Dense(3, use_bias=False, name="router")(x_TxD)), 2)
            up = self.param("up", nn.initializers.lecun_normal(), (3, 8, 6))
            down = self.param("down", nn.initializers.lecun_normal(), (3, 6, 8))
            order = jnp.argsort(index.reshape(-1))
            sizes = jnp.bincount(index.reshape(-1), length=3).astype(jnp.int32)
            h = nn.silu(lax.ragged_dot(jnp.repeat(x_TxD, 2, axis=0)[order], up, sizes))
            y = lax.ragged_dot(h, down, sizes)
            y = jnp.zeros_like(y).at[order].set(y).reshape(-1, 2, 8)
            return jnp.einsum("tkd,tk->td", y, gate).reshape(x_BxTxD.shape)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(13, 8, name="embed")(ids)
            for i in range(2):
                x = x + nn.MultiHeadDotProductAttention(2, name=f"attention_{i}")(nn.RMSNorm()(x))
                x = x + Experts(name=f"experts_{i}")(nn.RMSNorm()(x))
            return nn.Dense(13, name="head")(x)

    return linen(Model(), IDS_BxT)


@entry(factored=".*kernel|.*embedding")
def contrastive_towers() -> Built:
    """Two towers, a learned temperature, normalised features."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, image, ids):
            image = nn.Dense(6, name="image", use_bias=False)(nn.Conv(4, (4, 4), 4)(image).mean((1, 2)))
            text = nn.Dense(6, name="text", use_bias=False)(nn.Embed(13, 8, name="words")(ids).mean(1))
            image, text = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (image, text))
            scale = jnp.exp(self.param("temperature", nn.initializers.zeros, ()))
            return scale * image @ text.T

    return linen(Model(), IMAGE_BxHxWxC, IDS_BxT)


@entry(factored=r"(encode|decode)_\d/w")
def variational_autoencoder() -> Built:
    def fn(p, x, key):
        def dense(name, x):
            return x @ p[name]["w"] + p[name]["b"]

        mean, log_variance = jnp.split(dense("encode_1", jax.nn.relu(dense("encode_0", x))), 2, axis=-1)
        z = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
        return dense("decode_1", jax.nn.relu(dense("decode_0", z))), mean, log_variance

    sizes = {"encode_0": (5, 8), "encode_1": (8, 6), "decode_0": (3, 8), "decode_1": (8, 5)}
    params = {k: {"w": normal(i, *s), "b": normal(i + 9, s[1])} for i, (k, s) in enumerate(sizes.items())}
    return fn, params, (normal(1, 4, 5), jax.random.key(1))


@entry(factored="message_w|update_w|readout_w")
def graph_network() -> Built:
    def fn(p, nodes_NxD, senders_E, receivers_E):
        for _ in range(2):
            message = jax.nn.relu(nodes_NxD[senders_E] @ p["message_w"])
            pooled = jax.ops.segment_sum(message, receivers_E, nodes_NxD.shape[0])
            nodes_NxD = jnp.tanh(jnp.concatenate([nodes_NxD, pooled], -1) @ p["update_w"])
        return nodes_NxD.mean(0) @ p["readout_w"]

    params = {"message_w": normal(3, 5, 6), "update_w": normal(4, 11, 5), "readout_w": normal(5, 5, 2)}
    return fn, params, (normal(1, 4, 5), jnp.array([0, 1, 2, 3, 0]), jnp.array([1, 2, 3, 0, 2]))


@entry(factored=".*kernel", anything="latents")
def perceiver() -> Built:
    """Learned latents read an input by cross-attention; the same block is run twice."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            latents = self.param("latents", nn.initializers.normal(), (3, 8))
            z = nn.LayerNorm()(jnp.broadcast_to(latents, (x.shape[0], 3, 8)))
            read = nn.MultiHeadDotProductAttention(2, name="read")
            for _ in range(2):
                z = z + read(z, x)
            return nn.Dense(3, name="head")(z.mean(1))

    return linen(Model(), normal(1, 2, 5, 8))
