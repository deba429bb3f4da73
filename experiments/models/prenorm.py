"""The transformer stack of vision models and CLIP in Flax linen: norms in front of attention and feed-forward.

It knows nothing of adapters. BERT, whose norms follow the residual connections, is in `experiments.models.bert`.

Axes: B batch, T tokens or patches, D width, N heads, H head width, F feed-forward width, L layers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax


def quick_gelu(x: jax.Array) -> jax.Array:
    """`x·sigmoid(1.702 x)`, the approximation of gelu that CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


# By the names that Hugging Face gives them.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "quick_gelu": quick_gelu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Shape and numerics of a stack.

    Args:
        layers: blocks in the stack.
        dim: width of the residual stream, a multiple of `heads`.
        heads: attention heads.
        ffn_dim: width inside the feed-forward.
        norm_eps: added to the variance in the norms.
        activation: a name in `ACTIVATIONS`.
        qkv_bias: whether query, key and value have biases.
        fast_variance: whether norms take the variance as `mean(x²) - mean(x)²`, which loses digits.
        dtype: dtype of the computation, norms and softmax are float32 in any case; none: that of the parameters.
    """

    layers: int
    dim: int
    heads: int
    ffn_dim: int
    norm_eps: float
    activation: str = "gelu"
    qkv_bias: bool = True
    fast_variance: bool = False
    dtype: Any = None

    def __post_init__(self) -> None:
        """Checks what the shapes and the feed-forward depend on."""
        if self.dim % self.heads:
            raise ValueError(f"dim={self.dim} is not a multiple of heads={self.heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is unknown, choose one of {sorted(ACTIVATIONS)}")


class Attention(nn.Module):
    """Multi-head self-attention."""

    config: StackConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, mask_BxTxT: jax.Array | None) -> jax.Array:
        """Returns B x T x D."""
        cfg = self.config

        def project(name: str) -> jax.Array:
            heads = (cfg.heads, cfg.dim // cfg.heads)
            return nn.DenseGeneral(heads, use_bias=cfg.qkv_bias, dtype=cfg.dtype, name=name)(x_BxTxD)

        mask_Bx1xTxT = None if mask_BxTxT is None else mask_BxTxT[:, None]
        y_BxTxNxH = jax.nn.dot_product_attention(project("query"), project("key"), project("value"), mask=mask_Bx1xTxT)
        return nn.DenseGeneral(cfg.dim, axis=(-2, -1), dtype=cfg.dtype, name="out")(y_BxTxNxH)


class MLP(nn.Module):
    """`activation(x·up)·down`."""

    config: StackConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Returns B x T x D."""
        cfg = self.config
        up_BxTxF = nn.Dense(cfg.ffn_dim, dtype=cfg.dtype, name="up")(x_BxTxD)
        return nn.Dense(cfg.dim, dtype=cfg.dtype, name="down")(ACTIVATIONS[cfg.activation](up_BxTxF))


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and inside a residual connection."""

    config: StackConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, mask_BxTxT: jax.Array | None) -> tuple[jax.Array, None]:
        """Returns the residual stream, and nothing for the scan to stack."""
        cfg = self.config
        normed = norm(cfg, "attn_norm")(x_BxTxD)
        x_BxTxD = x_BxTxD + Attention(cfg, name="attn")(normed, mask_BxTxT)
        normed = norm(cfg, "mlp_norm")(x_BxTxD)
        return x_BxTxD + MLP(cfg, name="mlp")(normed), None


def norm(config: StackConfig, name: str | None = None) -> nn.LayerNorm:
    """A layer norm with the numerics of the stack."""
    return nn.LayerNorm(config.norm_eps, dtype=config.dtype, use_fast_variance=config.fast_variance, name=name)


def stack(config: StackConfig, name: str | None = None) -> Callable[..., tuple[jax.Array, None]]:
    """The scanned blocks: `stack(config)(x_BxTxD, mask_BxTxT)`.

    Args:
        config: shape and numerics.
        name: of the module, where it is made in a compact method.

    Returns:
        A module that takes the residual stream B x T x D and a mask, True where a row may look (the batch axis may have
        size 1) or none, and returns the stream and None.
    """
    scanned = nn.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
        length=config.layers,
    )
    return scanned(config, name=name)
