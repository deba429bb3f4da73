"""CLIP in Flax linen (Radford et al. 2021, arXiv:2103.00020): a causal text encoder and a vision encoder, one space.

It knows nothing of adapters.

Axes: B images, M texts, T tokens, S side of an image, K channels, D width, E width of the common space.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.pooling import unit_length
from experiments.models.prenorm import StackConfig, norm, stack
from experiments.models.vit import VisionConfig, VisionEncoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Shape of the text encoder.

    Args:
        vocab_size: rows of the token embedding.
        max_positions: rows of the position embedding: the longest text, in tokens.
        stack: shape and numerics of the blocks.
        eos_id: the token that ends a text, whose hidden state stands for it; the first one counts. None: the end is the
            token of the highest id, as in the first checkpoints.
    """

    vocab_size: int
    max_positions: int
    stack: StackConfig
    eos_id: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Shape of a pair of encoders.

    Args:
        text: the text encoder.
        vision: the vision encoder.
        projection_dim: width of the space that both project to.
    """

    text: TextConfig
    vision: VisionConfig
    projection_dim: int


class TextEncoder(nn.Module):
    """Tokens and positions, causal blocks, a norm."""

    config: TextConfig

    def setup(self) -> None:
        """Declares the parameters."""
        cfg, init = self.config, nn.initializers.normal(0.02)
        self.tokens = nn.Embed(cfg.vocab_size, cfg.stack.dim, dtype=cfg.stack.dtype, embedding_init=init)
        self.positions = nn.Embed(cfg.max_positions, cfg.stack.dim, dtype=cfg.stack.dtype, embedding_init=init)
        self.layers = stack(cfg.stack)
        self.final_norm = norm(cfg.stack)

    def __call__(self, tokens_MxT: jax.Array, mask_MxT: jax.Array | None = None) -> jax.Array:
        """Returns the hidden states after the last norm, M x T x D; those at padding mean nothing.

        Args:
            tokens_MxT: int32 token ids.
            mask_MxT: True, or 1, at tokens that are no padding; none: nothing is hidden. What is behind the end of a
                text needs no mask, as no token looks ahead.

        Raises:
            ValueError: if the texts are longer than the position embedding.
        """
        T = tokens_MxT.shape[1]
        if self.config.max_positions < T:
            raise ValueError(
                f"tokens are {T} long, the model was built for max_positions={self.config.max_positions}; "
                "shorten the texts"
            )
        mask_MxTxT = jnp.tril(jnp.ones((1, T, T), bool))
        if mask_MxT is not None:
            mask_MxTxT = mask_MxTxT & mask_MxT.astype(bool)[:, None]
        x_MxTxD = self.tokens(tokens_MxT) + self.positions(jnp.arange(T))
        return self.final_norm(self.layers(x_MxTxD, mask_MxTxT)[0])

    def features(self, tokens_MxT: jax.Array, mask_MxT: jax.Array | None = None) -> jax.Array:
        """Returns the hidden state at the end of each text, M x D; at its first token if the end is missing."""
        eos_id = self.config.eos_id
        hidden_MxTxD = self(tokens_MxT, mask_MxT)
        end_M = jnp.argmax(tokens_MxT if eos_id is None else tokens_MxT == eos_id, axis=1)
        return jnp.take_along_axis(hidden_MxTxD, end_M[:, None, None], axis=1)[:, 0]


class Clip(nn.Module):
    """Both encoders, their projections, and the scale of the logits."""

    config: ClipConfig

    def setup(self) -> None:
        """Declares the parameters."""
        cfg = self.config
        self.text = TextEncoder(cfg.text)
        self.vision = VisionEncoder(cfg.vision)
        self.text_projection = nn.Dense(cfg.projection_dim, use_bias=False, dtype=cfg.text.stack.dtype)
        self.vision_projection = nn.Dense(cfg.projection_dim, use_bias=False, dtype=cfg.vision.stack.dtype)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(math.log(1 / 0.07)), ())

    def __call__(
        self, images_BxSxSxK: jax.Array, tokens_MxT: jax.Array, mask_MxT: jax.Array | None = None
    ) -> jax.Array:
        """Returns how well each image and each text go together: float32 logits B x M."""
        images_BxE, texts_MxE = self.embed_images(images_BxSxSxK), self.embed_texts(tokens_MxT, mask_MxT)
        return jnp.exp(self.logit_scale.astype(jnp.float32)) * images_BxE @ texts_MxE.T

    def embed_images(self, images_BxSxSxK: jax.Array) -> jax.Array:
        """Returns embeddings of images, float32 B x E, of length 1; see `VisionEncoder.hidden`."""
        return unit_length(self.vision_projection(self.vision.features(images_BxSxSxK)))

    def embed_texts(self, tokens_MxT: jax.Array, mask_MxT: jax.Array | None = None) -> jax.Array:
        """Returns embeddings of texts, float32 M x E, of length 1; see `TextEncoder`."""
        return unit_length(self.text_projection(self.text.features(tokens_MxT, mask_MxT)))
