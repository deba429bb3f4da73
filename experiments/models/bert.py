"""A BERT or RoBERTa encoder in Flax linen: learned positions, bidirectional attention, norms after the residuals.

It knows nothing of adapters: `lorax` finds the weights from a trace of `Bert.__call__`.

Axes: B batch, T tokens, D width, N heads, H head width, F feed-forward width, L layers.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.llama import attend


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Shape and numerics of an encoder.

    Args:
        vocab_size: rows of the token embedding.
        layers: blocks in the stack.
        dim: width of the residual stream, a multiple of `heads`.
        heads: attention heads.
        ffn_dim: width inside the feed-forward.
        max_positions: rows of the position embedding.
        types: rows of the segment embedding.
        norm_eps: added to the variance in the norms.
        padding_id: RoBERTa's padding token, which is skipped when positions are counted; the first one counted has the
            row `padding_id + 1`. None: every token counts, from row 0 on, as in BERT.
        dtype: dtype of the computation; norms and softmax are float32 in any case.
    """

    vocab_size: int
    layers: int
    dim: int
    heads: int
    ffn_dim: int
    max_positions: int
    types: int = 2
    norm_eps: float = 1e-12
    padding_id: int | None = None
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        """Checks what the shapes of the model depend on."""
        if self.dim % self.heads:
            raise ValueError(f"dim={self.dim} is not a multiple of heads={self.heads}")
        if self.max_tokens < 1:
            raise ValueError(f"max_positions={self.max_positions} leaves no row behind padding_id={self.padding_id}")

    @property
    def first_position(self) -> int:
        """Row of the position embedding for the first token."""
        return 0 if self.padding_id is None else self.padding_id + 1

    @property
    def max_tokens(self) -> int:
        """The longest sequence, in tokens."""
        return self.max_positions - self.first_position


class Embed(nn.Module):
    """The sum of a token's, its position's and its segment's vector, normalised."""

    config: BertConfig

    @nn.compact
    def __call__(self, tokens_BxT: jax.Array, types_BxT: jax.Array, rows_BxT: jax.Array) -> jax.Array:
        """Returns B x T x D."""
        cfg = self.config

        def table(rows: int, name: str) -> nn.Embed:
            return nn.Embed(rows, cfg.dim, dtype=cfg.dtype, embedding_init=nn.initializers.normal(0.02), name=name)

        x_BxTxD = table(cfg.vocab_size, "tokens")(tokens_BxT) + table(cfg.types, "types")(types_BxT)
        return _norm(cfg, "norm")(x_BxTxD + table(cfg.max_positions, "positions")(rows_BxT))


class Attention(nn.Module):
    """Multi-head attention in which every token sees all tokens that are no padding."""

    config: BertConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, mask_BxT: jax.Array) -> jax.Array:
        """Returns B x T x D."""
        cfg = self.config
        heads = (cfg.heads, cfg.dim // cfg.heads)
        query, key, value = (_dense(heads, -1, cfg, name)(x_BxTxD) for name in ("query", "key", "value"))
        return _dense(cfg.dim, (-2, -1), cfg, "out")(attend(query, key, value, mask_BxT[:, None, :]))


class MLP(nn.Module):
    """`gelu(x·up)·down`, with biases and the exact gelu."""

    config: BertConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Returns B x T x D."""
        up_BxTxF = _dense(self.config.ffn_dim, -1, self.config, "up")(x_BxTxD)
        return _dense(self.config.dim, -1, self.config, "down")(nn.gelu(up_BxTxF, approximate=False))


class Block(nn.Module):
    """Attention and feed-forward, each inside a residual connection and followed by a norm."""

    config: BertConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, mask_BxT: jax.Array) -> tuple[jax.Array, None]:
        """Returns the residual stream, in the form that a scan wants."""
        cfg = self.config
        x_BxTxD = _norm(cfg, "attn_norm")(x_BxTxD + Attention(cfg, name="attn")(x_BxTxD, mask_BxT))
        return _norm(cfg, "mlp_norm")(x_BxTxD + MLP(cfg, name="mlp")(x_BxTxD)), None


class Bert(nn.Module):
    """The encoder: embedding and scanned blocks. BERT's pooler, which reads the first token alone, is left out."""

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        tokens_BxT: jax.Array,
        mask_BxT: jax.Array,
        positions_T: jax.Array | None = None,
        types_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """Reads whole sequences.

        Args:
            tokens_BxT: int32 token ids.
            mask_BxT: True, or 1, at tokens that are no padding.
            positions_T: int32 positions in tokens, from 0 on, the same for all rows; none: 0 … T-1, or with a
                `padding_id` the number of other tokens before.
            types_BxT: int32 segment of each token; none: 0.

        Returns:
            Hidden states B x T x D; those at padding mean nothing.

        Raises:
            ValueError: if the sequences are longer than the position embedding.
        """
        cfg = self.config
        if tokens_BxT.shape[1] > cfg.max_tokens:
            raise ValueError(
                f"tokens are {tokens_BxT.shape[1]} long, the model was built for max_positions={cfg.max_positions}"
                f"{f', {cfg.first_position} of which are unused' if cfg.first_position else ''}; shorten the sequences"
            )
        types_BxT = jnp.zeros_like(tokens_BxT) if types_BxT is None else types_BxT
        x_BxTxD = Embed(cfg, name="embed")(tokens_BxT, types_BxT, self._position_rows(tokens_BxT, positions_T))
        stack = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=cfg.layers,
        )
        return stack(cfg, name="layers")(x_BxTxD, mask_BxT.astype(bool))[0]

    def _position_rows(self, tokens_BxT: jax.Array, positions_T: jax.Array | None) -> jax.Array:
        """Rows of the position embedding, B x T or 1 x T."""
        cfg = self.config
        if positions_T is None and cfg.padding_id is not None:
            counted_BxT = (tokens_BxT != cfg.padding_id).astype(jnp.int32)
            return cfg.padding_id + jnp.cumsum(counted_BxT, axis=1) * counted_BxT  # padding has its own row
        positions_T = jnp.arange(tokens_BxT.shape[1]) if positions_T is None else positions_T
        return cfg.first_position + positions_T[None]


def _dense(features: int | tuple[int, ...], axis: int | tuple[int, ...], cfg: BertConfig, name: str) -> nn.DenseGeneral:
    init = nn.initializers.normal(0.02)
    return nn.DenseGeneral(features, axis=axis, dtype=cfg.dtype, kernel_init=init, name=name)


def _norm(cfg: BertConfig, name: str) -> nn.LayerNorm:
    # mean(x²) - mean(x)² would lose digits that the reference keeps.
    return nn.LayerNorm(cfg.norm_eps, dtype=cfg.dtype, use_fast_variance=False, name=name)
