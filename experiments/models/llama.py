"""A decoder of the Llama family in Flax linen: scanned stack, rotary positions, grouped-query attention.

It knows nothing of adapters: `lorax` finds the weights from a trace of `Llama.__call__`.

Axes: B batch, T query tokens, S key slots, D width, N query heads, K key/value heads, G query heads per key
head, GT the two joined, H head width, F feed-forward width, V vocabulary, L layers.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.partition import by_rows

# Written into masked scores. Finite, so that a row with nothing to attend to (padding) gives no NaN.
_MASKED = -1e30

REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Shape and numerics of a decoder.

    Args:
        vocab_size: rows of the embedding.
        layers: blocks in the stack.
        dim: width of the residual stream.
        heads: query heads.
        kv_heads: key and value heads; each serves `heads / kv_heads` query heads.
        head_dim: width of one head, even.
        ffn_dim: width inside the SwiGLU feed-forward.
        max_positions: the longest sequence the weights were trained for, in tokens.
        norm_eps: added to the mean square in RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_divisors: `head_dim / 2` numbers dividing the frequencies (context extension); none: all ones.
        tied: whether the embedding is also the output head.
        dtype: dtype of the computation; norms, softmax and logits are float32 in any case.
        remat: activations to recompute in the backward pass. None keeps all, "full" keeps only each block's
            input, "dots" keeps the products, "dots_no_batch" the products with weights but not the scores.
    """

    vocab_size: int
    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    max_positions: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_divisors: tuple[float, ...] | None = None
    tied: bool = False
    dtype: Any = jnp.float32
    remat: str | None = None

    def __post_init__(self) -> None:
        """Checks what the shapes of the model depend on."""
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary positions need an even width")
        if self.rope_divisors is not None and len(self.rope_divisors) != self.head_dim // 2:
            raise ValueError(f"rope_divisors has {len(self.rope_divisors)} numbers, wanted {self.head_dim // 2}")
        if self.remat is not None and self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat={self.remat!r} is unknown; choose None or {sorted(REMAT_POLICIES)}")


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps) · scale`, in float32."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Returns the normalised activations in the dtype of `x_BxTxD`."""
        scale_D = self.param("scale", nn.initializers.ones, (x_BxTxD.shape[-1],))
        x32 = x_BxTxD.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.config.norm_eps)
        return (x32 * inverse * scale_D.astype(jnp.float32)).astype(x_BxTxD.dtype)


def rotary_table(config: LlamaConfig, positions_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary angles.

    Args:
        config: gives the head width and the frequencies.
        positions_BxT: integer positions in tokens.

    Returns:
        Two float32 arrays B x T x 1 x H/2.
    """
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_divisors is not None:
        frequencies = frequencies / jnp.asarray(config.rope_divisors, jnp.float32)
    angles = positions_BxT[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BxTxNxH: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair `(x[i], x[i + H/2])` by its angle (the rotate-half convention of Hugging Face)."""
    cos, sin = table
    first, second = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BxTxNxH.dtype)


def attend(q_BxTxNxH: jax.Array, k_BxSxKxH: jax.Array, v_BxSxKxH: jax.Array, mask_BxTxS: jax.Array) -> jax.Array:
    """Grouped-query attention, softmax in float32.

    Args:
        q_BxTxNxH: queries; head n reads key head `n // G`.
        k_BxSxKxH: keys.
        v_BxSxKxH: values.
        mask_BxTxS: True where a query may look; the batch axis may have size 1.

    Returns:
        Attended values B x T x N x H.
    """
    B, T, N, H = q_BxTxNxH.shape
    S, K = k_BxSxKxH.shape[1:3]
    G = N // K
    # Heads before tokens, and the G query heads of a key head as rows of one product: half the time, in XLA's
    # CPU back end, of the same products written as one einsum over all axes.
    q_BxKxTxGxH = (q_BxTxNxH * H**-0.5).reshape(B, T, K, G, H).swapaxes(1, 2)
    q_BxKxGTxH = q_BxKxTxGxH.swapaxes(2, 3).reshape(B, K, G * T, H)
    scores_BxKxGTxS = jnp.einsum("bkmh,bksh->bkms", q_BxKxGTxH, k_BxSxKxH.swapaxes(1, 2))
    scores_BxKxGxTxS = scores_BxKxGTxS.reshape(B, K, G, T, S).astype(jnp.float32)
    scores_BxKxGxTxS = jnp.where(mask_BxTxS[:, None, None], scores_BxKxGxTxS, _MASKED)
    weights_BxKxGxTxS = jax.nn.softmax(scores_BxKxGxTxS, axis=-1).astype(v_BxSxKxH.dtype)
    weights_BxKxGTxS = weights_BxKxGxTxS.reshape(B, K, G * T, S)
    y_BxKxGTxH = jnp.einsum("bkms,bksh->bkmh", weights_BxKxGTxS, v_BxSxKxH.swapaxes(1, 2))
    return y_BxKxGTxH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


class Attention(nn.Module):
    """Causal self-attention, with or without a cache of keys and values."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        table: tuple[jax.Array, jax.Array],
        mask_BxTxS: jax.Array,
        cache: dict[str, jax.Array] | None,
        slot: jax.Array | int,
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """Returns the output B x T x D, and the new keys and values if a cache was given."""
        cfg = self.config

        def project(name: str, heads: int) -> jax.Array:
            return _dense((heads, cfg.head_dim), -1, cfg, name)(x_BxTxD)

        query = rotate(project("query", cfg.heads), table)
        new = {"key": rotate(project("key", cfg.kv_heads), table), "value": project("value", cfg.kv_heads)}
        if cache is None:
            y = attend(query, new["key"], new["value"], mask_BxTxS)
        else:
            seen = {k: jax.lax.dynamic_update_slice_in_dim(cache[k], new[k], slot, axis=1) for k in new}
            y = attend(query, seen["key"], seen["value"], mask_BxTxS)
        return _dense(cfg.dim, (-2, -1), cfg, "out")(y), None if cache is None else new


class MLP(nn.Module):
    """SwiGLU: `(silu(x·gate) ∘ x·up)·down`."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Returns B x T x D."""
        cfg = self.config
        gate_BxTxF = _dense(cfg.ffn_dim, -1, cfg, "gate")(x_BxTxD)
        up_BxTxF = _dense(cfg.ffn_dim, -1, cfg, "up")(x_BxTxD)
        return _dense(cfg.dim, -1, cfg, "down")(nn.silu(gate_BxTxF) * up_BxTxF)


def _dense(
    features: int | tuple[int, ...], axis: int | tuple[int, ...], cfg: LlamaConfig, name: str | None = None
) -> nn.DenseGeneral:
    init = nn.initializers.normal(0.02)
    return nn.DenseGeneral(features, axis=axis, use_bias=False, dtype=cfg.dtype, kernel_init=init, name=name)


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and inside a residual connection."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        table: tuple[jax.Array, jax.Array],
        mask_BxTxS: jax.Array,
        slot: jax.Array | int,
        cache: dict[str, jax.Array] | None,
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """Returns the residual stream and the layer's new keys and values (None without a cache)."""
        normed = RMSNorm(self.config, name="attn_norm")(x_BxTxD)
        y_BxTxD, new = Attention(self.config, name="attn")(normed, table, mask_BxTxS, cache, slot)
        x_BxTxD = by_rows(x_BxTxD + y_BxTxD)
        normed = RMSNorm(self.config, name="mlp_norm")(x_BxTxD)
        return by_rows(x_BxTxD + MLP(self.config, name="mlp")(normed)), new


class Llama(nn.Module):
    """The decoder: embedding, scanned blocks, final norm, head."""

    config: LlamaConfig

    def setup(self) -> None:
        """Declares the parameters."""
        cfg = self.config
        init = nn.initializers.normal(0.02)
        self.embed = nn.Embed(cfg.vocab_size, cfg.dim, dtype=cfg.dtype, embedding_init=init)
        block = Block
        if cfg.remat is not None:
            block = nn.remat(Block, policy=REMAT_POLICIES[cfg.remat], prevent_cse=False)
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
            length=cfg.layers,
        )
        self.layers = stack(cfg)
        self.final_norm = RMSNorm(cfg)
        if not cfg.tied:
            self.head = _dense(cfg.vocab_size, -1, cfg)

    def __call__(
        self,
        tokens_BxT: jax.Array,
        positions_BxT: jax.Array | None = None,
        segment_ids_BxT: jax.Array | None = None,
        logits: bool = True,
    ) -> jax.Array:
        """Reads whole sequences.

        Args:
            tokens_BxT: int32 token ids.
            positions_BxT: int32 positions in tokens; none: 0 … T-1.
            segment_ids_BxT: int32; a token sees earlier tokens of its own segment only. None: a row is one.
            logits: whether to apply the head.

        Returns:
            Logits B x T x V in float32, or with `logits=False` the normed hidden states B x T x D.
        """
        B, T = tokens_BxT.shape
        if self.config.max_positions < T:
            raise ValueError(
                f"tokens are {T} long, the model was built for max_positions={self.config.max_positions}; "
                "shorten the sequences"
            )
        steps_T = jnp.arange(T)
        if positions_BxT is None:
            positions_BxT = jnp.broadcast_to(steps_T, (B, T))
        mask_BxTxS = (steps_T[:, None] >= steps_T[None, :])[None]
        if segment_ids_BxT is not None:
            mask_BxTxS = mask_BxTxS & (segment_ids_BxT[:, :, None] == segment_ids_BxT[:, None, :])
        table = rotary_table(self.config, positions_BxT)
        x_BxTxD, _ = self.layers(by_rows(self.embed(tokens_BxT)), table, mask_BxTxS, 0, None)
        x_BxTxD = self.final_norm(x_BxTxD)
        return self.unembed(x_BxTxD) if logits else x_BxTxD

    def unembed(self, hidden_xD: jax.Array) -> jax.Array:
        """Maps hidden states `... x D` (after the final norm) to float32 logits `... x V`."""
        logits = self.embed.attend(hidden_xD) if self.config.tied else self.head(hidden_xD)
        return logits.astype(jnp.float32)

    def step(
        self,
        cache: dict[str, jax.Array],
        tokens_BxT: jax.Array,
        positions_BxT: jax.Array,
        visible_BxS: jax.Array,
        slot: jax.Array | int,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Reads the next `T` tokens of each row after what the cache holds.

        Args:
            cache: "key" and "value", each L x B x S x K x H.
            tokens_BxT: int32 token ids, written to slots `slot … slot+T-1` of every row.
            positions_BxT: int32 positions in tokens.
            visible_BxS: False at slots that hold padding; slots not yet written are hidden in any case.
            slot: the first slot to write, the same for all rows.

        Returns:
            Float32 logits B x V after the last of the `T` tokens, and the cache with the new slots filled.
        """
        T, S = tokens_BxT.shape[1], visible_BxS.shape[1]
        causal_TxS = slot + jnp.arange(T)[:, None] >= jnp.arange(S)[None, :]
        mask_BxTxS = causal_TxS & visible_BxS[:, None, :]
        table = rotary_table(self.config, positions_BxT)
        x_BxTxD, new = self.layers(by_rows(self.embed(tokens_BxT)), table, mask_BxTxS, slot, cache)
        assert new is not None  # the blocks were given a cache
        cache = {k: jax.lax.dynamic_update_slice_in_dim(cache[k], new[k], slot, axis=2) for k in cache}
        return self.unembed(self.final_norm(x_BxTxD[:, -1])), cache


def empty_cache(config: LlamaConfig, batch_size: int, slots: int) -> dict[str, jax.Array]:
    """A cache of `slots` tokens a row: "key" and "value", zeros, each L x B x S x K x H."""
    shape = (config.layers, batch_size, slots, config.kv_heads, config.head_dim)
    return {"key": jnp.zeros(shape, config.dtype), "value": jnp.zeros(shape, config.dtype)}
