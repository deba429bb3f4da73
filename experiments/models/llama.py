"""A decoder in Flax linen: scanned stack, rotary positions, grouped-query attention, gated feed-forward.

One module for the families that descend from Llama: what they differ in is data, in `LlamaConfig`, and what their
layers differ in is data that the stack is scanned over. It knows nothing of adapters: `lorax` finds the weights from a
trace of `Llama.__call__`.

Axes: B batch, T query tokens, S key slots, D width, N query heads, K key/value heads, G query heads per key
head, GT the two joined, H head width, F feed-forward width, V vocabulary, L layers.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.attention import Tokens, attend, attend_flash, rotary_tables, rotate, soft_cap, visible, within
from experiments.models.decoder_config import REMAT_POLICIES, LlamaConfig
from experiments.models.partition import by_rows
from experiments.models.weights import leaf_shapes

__all__ = ["Llama", "LlamaConfig", "attend", "empty_cache", "param_shapes"]


class View(NamedTuple):
    """What all layers share of the positions: rotary tables F x B x T x 1 x H/2, tokens, and the mask B x T x S."""

    tables: tuple[jax.Array, jax.Array]
    queries: Tokens
    keys: Tokens
    mask: jax.Array


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps) · (offset + scale)`, in float32."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Returns the activations, normalised over their last axis, in the dtype of `x_BxTxD`."""
        offset = self.config.norm_offset
        scale_D = self.param("scale", nn.initializers.constant(1 - offset), (x_BxTxD.shape[-1],))
        scale_D = scale_D.astype(jnp.float32) + offset if offset else scale_D.astype(jnp.float32)
        x32 = x_BxTxD.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.config.norm_eps)
        return (x32 * inverse * scale_D).astype(x_BxTxD.dtype)


class Attention(nn.Module):
    """Causal self-attention, with or without a cache of keys and values."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        view: View,
        slot: jax.Array | int,
        cache: dict[str, jax.Array] | None,
        layer: dict[str, jax.Array],
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """Returns the output B x T x D, and the new keys and values if a cache was given."""
        cfg = self.config
        row = layer.get("frequencies", 0)
        table = (view.tables[0][row], view.tables[1][row])

        def project(name: str, heads: int) -> jax.Array:
            return _dense((heads, cfg.head_dim), -1, cfg, name, bias=cfg.qkv_bias)(x_BxTxD)

        def place(name: str, heads: int) -> jax.Array:
            projected = project(name, heads)
            return rotate(RMSNorm(cfg, name=f"{name}_norm")(projected) if cfg.qk_norm else projected, table)

        query = place("query", cfg.heads)
        new = {"key": place("key", cfg.kv_heads), "value": project("value", cfg.kv_heads)}
        seen = new
        if cache is not None:
            seen = {k: jax.lax.dynamic_update_slice_in_dim(cache[k], new[k], slot, axis=1) for k in new}
        mask = view.mask
        if "window" in layer:
            mask = mask & within(layer["window"], view.queries, view.keys)
        # Of a cache few queries look at once.
        kind = attend_flash if cfg.attention == "flash" and cache is None else attend
        y = kind(query, seen["key"], seen["value"], mask, scale=cfg.query_scale, cap=cfg.attn_softcap)
        return _dense(cfg.dim, (-2, -1), cfg, "out")(y), None if cache is None else new


class MLP(nn.Module):
    """Gated feed-forward: `(activation(x·gate) ∘ x·up)·down`."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Returns B x T x D."""
        cfg = self.config
        gate_BxTxF = _dense(cfg.ffn_dim, -1, cfg, "gate")(x_BxTxD)
        up_BxTxF = _dense(cfg.ffn_dim, -1, cfg, "up")(x_BxTxD)
        return _dense(cfg.dim, -1, cfg, "down")(_gated(cfg.activation, gate_BxTxF, up_BxTxF))


_ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": functools.partial(nn.gelu, approximate=True)}


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gated(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """`activation(gate) · up`, of which a backward pass reads two arrays: what each of the two is multiplied with."""
    return _ACTIVATIONS[activation](gate) * up


@_gated.defjvp
def _gated_jvp(activation: str, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (gate, up), (dgate, dup) = primals, tangents
    active, slope = jax.jvp(_ACTIVATIONS[activation], (gate,), (jnp.ones_like(gate),))
    return active * up, active * dup + (slope * up) * dgate


def _dense(
    features: int | tuple[int, ...],
    axis: int | tuple[int, ...],
    cfg: LlamaConfig,
    name: str | None = None,
    bias: bool = False,
) -> nn.DenseGeneral:
    init = nn.initializers.normal(0.02)
    return nn.DenseGeneral(features, axis=axis, use_bias=bias, dtype=cfg.dtype, kernel_init=init, name=name)


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm, maybe in front of another, and inside a residual connection."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        view: View,
        slot: jax.Array | int,
        cache: dict[str, jax.Array] | None,
        layer: dict[str, jax.Array],
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """Returns the residual stream and the layer's new keys and values (None without a cache)."""

        def norm(name: str, x_BxTxD: jax.Array) -> jax.Array:
            return RMSNorm(self.config, name=name)(x_BxTxD)

        y_BxTxD, new = Attention(self.config, name="attn")(norm("attn_norm", x_BxTxD), view, slot, cache, layer)
        if self.config.post_norms:
            y_BxTxD = norm("attn_post_norm", y_BxTxD)
        x_BxTxD = by_rows(x_BxTxD + y_BxTxD)
        y_BxTxD = MLP(self.config, name="mlp")(norm("mlp_norm", x_BxTxD))
        if self.config.post_norms:
            y_BxTxD = norm("mlp_post_norm", y_BxTxD)
        return by_rows(x_BxTxD + y_BxTxD), new


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
            in_axes=(nn.broadcast, nn.broadcast, 0, 0),  # pyright: ignore[reportArgumentType]
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
        tokens = Tokens(steps_T[None], steps_T[None], segment_ids_BxT)
        x_BxTxD, _ = self._read(tokens_BxT, positions_BxT, tokens, tokens)
        x_BxTxD = self.final_norm(x_BxTxD)
        return self.unembed(x_BxTxD) if logits else x_BxTxD

    def _read(
        self,
        tokens_BxT: jax.Array,
        positions_BxT: jax.Array,
        queries: Tokens,
        keys: Tokens,
        slot: jax.Array | int = 0,
        cache: dict[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """Embeds tokens and takes them through the layers; returns what `Block` does."""
        cfg = self.config
        frequencies_FxH, row_of_layer_L = cfg.rotary_frequencies()
        layers = {"frequencies": row_of_layer_L, "window": cfg.windows and jnp.array(cfg.windows, jnp.int32)}
        layers = {name: jnp.asarray(values_L) for name, values_L in layers.items() if values_L is not None}
        tables = rotary_tables(jnp.asarray(frequencies_FxH), positions_BxT)
        view = View(tables, queries, keys, visible(queries, keys))
        x_BxTxD = self.embed(tokens_BxT)
        if cfg.embed_scale != 1:
            x_BxTxD = x_BxTxD * jnp.asarray(cfg.embed_scale, cfg.dtype)
        return self.layers(by_rows(x_BxTxD), view, slot, cache, layers)

    def unembed(self, hidden_xD: jax.Array) -> jax.Array:
        """Maps hidden states `... x D` (after the final norm) to float32 logits `... x V`."""
        logits = self.embed.attend(hidden_xD) if self.config.tied else self.head(hidden_xD)
        return soft_cap(logits.astype(jnp.float32), self.config.final_softcap)

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
            visible_BxS: False at slots that hold padding; slots not yet written are hidden in any case. Windows count
                the slots that are not.
            slot: the first slot to write, the same for all rows.

        Returns:
            Float32 logits B x V after the last of the `T` tokens, and the cache with the new slots filled.
        """
        B, T = tokens_BxT.shape
        slots_S = jnp.arange(visible_BxS.shape[1])
        places_BxS = jnp.cumsum(visible_BxS, axis=1, dtype=jnp.int32)
        places_BxT = jax.lax.dynamic_slice_in_dim(places_BxS, slot, T, axis=1)
        # All queries are of segment 1; padding is of segment 0, which none sees.
        queries = Tokens(slot + jnp.arange(T)[None], places_BxT, jnp.ones((B, T), jnp.int32))
        keys = Tokens(slots_S[None], places_BxS, visible_BxS.astype(jnp.int32))
        x_BxTxD, new = self._read(tokens_BxT, positions_BxT, queries, keys, slot, cache)
        assert new is not None  # the blocks were given a cache
        cache = {k: jax.lax.dynamic_update_slice_in_dim(cache[k], new[k], slot, axis=2) for k in cache}
        return self.unembed(self.final_norm(x_BxTxD[:, -1])), cache


def param_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, by leaf path."""
    return leaf_shapes(Llama(config), jax.ShapeDtypeStruct((1, 1), jnp.int32))


def empty_cache(config: LlamaConfig, batch_size: int, slots: int) -> dict[str, jax.Array]:
    """A cache of `slots` tokens a row: "key" and "value", zeros, each L x B x S x K x H."""
    shape = (config.layers, batch_size, slots, config.kv_heads, config.head_dim)
    return {"key": jnp.zeros(shape, config.dtype), "value": jnp.zeros(shape, config.dtype)}
