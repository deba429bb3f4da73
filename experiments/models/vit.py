"""A small vision transformer in Flax linen: patches, learned positions, a scanned stack, the mean of the patches.

Dosovitskiy et al. 2021 (arXiv:2010.11929), with mean pooling in place of the class token. It knows nothing of adapters.

Axes: B batch, S side of an image, T patches, P pixels of a patch, D width, N heads, H head width, F feed-forward width,
C classes.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitConfig:
    """Shape of a vision transformer for square grey images.

    Args:
        image: side of an image, in pixels.
        patch: side of a patch, in pixels; divides `image`.
        layers: blocks in the stack.
        dim: width of the residual stream.
        heads: attention heads; divide `dim`.
        ffn_dim: width inside the feed-forward.
        classes: outputs of the head.
        norm_eps: added to the variance in the layer norms.
    """

    image: int = 8
    patch: int = 2
    layers: int = 4
    dim: int = 64
    heads: int = 4
    ffn_dim: int = 256
    classes: int = 10
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        """Checks what the shapes of the model depend on."""
        if self.image % self.patch:
            raise ValueError(f"image={self.image} is not a multiple of patch={self.patch}")
        if self.dim % self.heads:
            raise ValueError(f"dim={self.dim} is not a multiple of heads={self.heads}")

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image // self.patch) ** 2


def to_patches(images_BxSxS: jax.Array, patch: int) -> jax.Array:
    """Cuts images into patches B x T x P, both row by row.

    >>> to_patches(jnp.arange(16).reshape(1, 4, 4), patch=2)[0].tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    """
    B, S, _ = images_BxSxS.shape
    grid = images_BxSxS.reshape(B, S // patch, patch, S // patch, patch)
    return grid.swapaxes(2, 3).reshape(B, (S // patch) ** 2, patch**2)


class Attention(nn.Module):
    """Self-attention in which every position sees every other."""

    config: VitConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Returns B x T x D."""
        cfg = self.config

        def project(name: str) -> jax.Array:
            return nn.DenseGeneral((cfg.heads, cfg.dim // cfg.heads), name=name)(x_BxTxD)

        y_BxTxNxH = jax.nn.dot_product_attention(project("query"), project("key"), project("value"))
        return nn.DenseGeneral(cfg.dim, axis=(-2, -1), name="out")(y_BxTxNxH)


class MLP(nn.Module):
    """`gelu(x·up)·down`."""

    config: VitConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Returns B x T x D."""
        hidden_BxTxF = nn.gelu(nn.Dense(self.config.ffn_dim, name="up")(x_BxTxD))
        return nn.Dense(self.config.dim, name="down")(hidden_BxTxF)


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and inside a residual connection."""

    config: VitConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> tuple[jax.Array, None]:
        """Returns the residual stream, and nothing for the scan to stack."""
        normed = nn.LayerNorm(self.config.norm_eps, name="attn_norm")(x_BxTxD)
        x_BxTxD = x_BxTxD + Attention(self.config, name="attn")(normed)
        normed = nn.LayerNorm(self.config.norm_eps, name="mlp_norm")(x_BxTxD)
        return x_BxTxD + MLP(self.config, name="mlp")(normed), None


class Vit(nn.Module):
    """The encoder and its head."""

    config: VitConfig

    def setup(self) -> None:
        """Declares the parameters."""
        cfg = self.config
        self.embed = nn.Dense(cfg.dim)
        self.positions = nn.Embed(cfg.patches, cfg.dim, embedding_init=nn.initializers.normal(0.02))
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=cfg.layers)
        self.layers = stack(cfg)
        self.final_norm = nn.LayerNorm(cfg.norm_eps)
        self.head = nn.Dense(cfg.classes)

    def __call__(self, images_BxSxS: jax.Array) -> jax.Array:
        """Returns the head's logits B x C for images with values in [0, 1]."""
        return self.head(self.features(images_BxSxS))

    def features(self, images_BxSxS: jax.Array, placeholders: int = 0) -> jax.Array:
        """Returns what a head reads: the mean of the patches after the final norm, B x D.

        Args:
            images_BxSxS: values in [0, 1].
            placeholders: positions in front of the patches that show nothing and have no part in the mean; the patches
                attend to them. A learned prompt or prefix takes their place.

        Raises:
            ValueError: for images of another side than the model was built for.
        """
        cfg = self.config
        if images_BxSxS.shape[1:] != (cfg.image, cfg.image):
            raise ValueError(f"images have shape {images_BxSxS.shape}, wanted (batch, {cfg.image}, {cfg.image})")
        patches_BxTxD = self.embed(to_patches(images_BxSxS, cfg.patch))
        x_BxTxD = jnp.pad(patches_BxTxD, ((0, 0), (placeholders, 0), (0, 0)))
        rows_T = jnp.maximum(jnp.arange(-placeholders, cfg.patches), 0)  # placeholders stand at the first patch's place
        x_BxTxD, _ = self.layers(x_BxTxD + self.positions(rows_T))
        return self.final_norm(x_BxTxD[:, placeholders:]).mean(axis=1)
