"""Vision transformers in Flax linen (Dosovitskiy et al. 2021, arXiv:2010.11929): two front ends of one stack.

`Vit` is small, for grey images, and pools by the mean of the patches; `VisionEncoder` is for pretrained weights of ViT
and CLIP, with a class token. They know nothing of adapters.

Axes: B batch, S side of an image, K channels, T patches, P pixels of a patch, D width, C classes.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.prenorm import StackConfig, norm, stack


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

    @property
    def stack(self) -> StackConfig:
        """Shape and numerics of the blocks."""
        return StackConfig(
            layers=self.layers,
            dim=self.dim,
            heads=self.heads,
            ffn_dim=self.ffn_dim,
            norm_eps=self.norm_eps,
            activation="gelu_pytorch_tanh",
            fast_variance=True,
        )


def to_patches(images_BxSxS: jax.Array, patch: int) -> jax.Array:
    """Cuts images into patches B x T x P, both row by row.

    >>> to_patches(jnp.arange(16).reshape(1, 4, 4), patch=2)[0].tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    """
    B, S, _ = images_BxSxS.shape
    grid = images_BxSxS.reshape(B, S // patch, patch, S // patch, patch)
    return grid.swapaxes(2, 3).reshape(B, (S // patch) ** 2, patch**2)


class Vit(nn.Module):
    """The small encoder and its head."""

    config: VitConfig

    def setup(self) -> None:
        """Declares the parameters."""
        cfg = self.config
        self.embed = nn.Dense(cfg.dim)
        self.positions = nn.Embed(cfg.patches, cfg.dim, embedding_init=nn.initializers.normal(0.02))
        self.layers = stack(cfg.stack)
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
        x_BxTxD, _ = self.layers(x_BxTxD + self.positions(rows_T), None)
        return self.final_norm(x_BxTxD[:, placeholders:]).mean(axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Shape of a vision transformer with a class token, for square images.

    Args:
        image: side of an image, in pixels.
        patch: side of a patch, in pixels; divides `image`.
        channels: of an image.
        stack: shape and numerics of the blocks.
        patch_bias: whether the patches' projection has a bias.
        pre_norm: whether a norm precedes the stack.
        classes: outputs of the head; none: there is no head.
    """

    image: int
    patch: int
    channels: int
    stack: StackConfig
    patch_bias: bool = True
    pre_norm: bool = False
    classes: int | None = None

    def __post_init__(self) -> None:
        """Checks what the shapes of the model depend on."""
        if self.image % self.patch:
            raise ValueError(f"image={self.image} is not a multiple of patch={self.patch}")

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return self.stack.dim

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image // self.patch) ** 2


class VisionEncoder(nn.Module):
    """The encoder of ViT and CLIP: the class token and the patches, scanned blocks, a norm, maybe a head."""

    config: VisionConfig

    def setup(self) -> None:
        """Declares the parameters."""
        cfg, side = self.config, (self.config.patch,) * 2
        dtype = cfg.stack.dtype
        self.patches = nn.Conv(cfg.dim, side, side, "VALID", use_bias=cfg.patch_bias, dtype=dtype)
        self.class_token = self.param("class_token", nn.initializers.normal(0.02), (cfg.dim,))
        self.positions = nn.Embed(1 + cfg.patches, cfg.dim, dtype=dtype, embedding_init=nn.initializers.normal(0.02))
        self.pre_norm = norm(cfg.stack) if cfg.pre_norm else None
        self.layers = stack(cfg.stack)
        self.final_norm = norm(cfg.stack)
        self.head = nn.Dense(cfg.classes, dtype=dtype) if cfg.classes else None

    def __call__(self, images_BxSxSxK: jax.Array) -> jax.Array:
        """Returns the head's logits B x C, or without a head the hidden states."""
        return self.hidden(images_BxSxSxK) if self.head is None else self.logits(images_BxSxSxK)

    def hidden(self, images_BxSxSxK: jax.Array) -> jax.Array:
        """Returns the hidden states after the last norm, B x (1 + T) x D, those of the class token first.

        Args:
            images_BxSxSxK: pixels, normalised as the weights were trained; channels last.

        Raises:
            ValueError: for images of another side, or of other channels, than the model was built for.
        """
        cfg = self.config
        if images_BxSxSxK.shape[1:] != (cfg.image, cfg.image, cfg.channels):
            raise ValueError(
                f"images have shape {images_BxSxSxK.shape}, wanted (batch, {cfg.image}, {cfg.image}, {cfg.channels}); "
                "resize them, with the channels on the last axis"
            )
        patches_BxTxD = self.patches(images_BxSxSxK).reshape(len(images_BxSxSxK), cfg.patches, cfg.dim)
        token_Bx1xD = jnp.broadcast_to(self.class_token.astype(patches_BxTxD.dtype), (len(patches_BxTxD), 1, cfg.dim))
        x_BxTxD = jnp.concatenate([token_Bx1xD, patches_BxTxD], axis=1) + self.positions(jnp.arange(1 + cfg.patches))
        x_BxTxD = x_BxTxD if self.pre_norm is None else self.pre_norm(x_BxTxD)
        return self.final_norm(self.layers(x_BxTxD, None)[0])

    def features(self, images_BxSxSxK: jax.Array) -> jax.Array:
        """Returns what a head reads: the class token after the last norm, B x D."""
        return self.hidden(images_BxSxSxK)[:, 0]

    def logits(self, images_BxSxSxK: jax.Array) -> jax.Array:
        """Returns the head's logits B x C.

        Raises:
            ValueError: if there is no head.
        """
        if self.head is None:
            raise ValueError("this model has no head (classes=None); ask for `features`, and put a layer on them")
        return self.head(self.features(images_BxSxSxK))
