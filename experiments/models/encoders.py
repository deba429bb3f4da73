"""Pretrained encoders: `load_encoder(directory)` gives the weights, pure functions of them, and the tokenizer.

Every function takes the parameters first, so that it goes through `lorax.trace` and `lorax.adapt` as it is.

Axes: B batch, M texts, T tokens, S side of an image, K channels, D width, C classes, E width of CLIP's common space.
"""

import dataclasses
import json
import pathlib
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.models import encoder_config, encoder_directory, hub, partition
from experiments.models.bert import Bert, BertConfig
from experiments.models.clip import Clip, ClipConfig
from experiments.models.encoder_config import EncoderConfig
from experiments.models.hf_files import Folder
from experiments.models.names import ModuleName
from experiments.models.vit import VisionConfig, VisionEncoder
from experiments.models.weights import leaf_shapes


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Encoder:
    """A pretrained encoder.

    Args:
        config: shape and numerics.
        params: nested dict of arrays, such as `params["layers"]["attn"]["query"]["kernel"]`.
        tokenizer: of the `tokenizers` package, without truncation and padding; none if the directory has none.
        peft_names: leaf path -> its name and layout in the directory, for exchange of adapters.
    """

    config: EncoderConfig
    params: dict[str, Any] = dataclasses.field(repr=False)
    tokenizer: Any = dataclasses.field(default=None, repr=False)
    peft_names: dict[str, ModuleName] = dataclasses.field(default_factory=dict, repr=False)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TextEncoder(Encoder):
    """BERT, RoBERTa or XLM-R."""

    config: BertConfig

    def apply(
        self,
        params: Any,
        tokens: jax.Array,
        mask: jax.Array,
        *,
        positions: jax.Array | None = None,
        types: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states B x T x D of tokens B x T; see `Bert.__call__`."""
        module: Any = Bert(self.config)
        return module.apply({"params": params}, tokens, mask, positions, types)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageEncoder(Encoder):
    """ViT, with or without a classifier."""

    config: VisionConfig

    def apply(self, params: Any, images: jax.Array) -> jax.Array:
        """Hidden states B x (1 + T) x D of images B x S x S x K, the class token first; see `VisionEncoder.hidden`."""
        return self._call(params, images, "hidden")

    def features(self, params: Any, images: jax.Array) -> jax.Array:
        """What a head reads, B x D."""
        return self._call(params, images, "features")

    def logits(self, params: Any, images: jax.Array) -> jax.Array:
        """The classifier's logits B x C.

        Raises:
            ValueError: if the weights have no classifier.
        """
        return self._call(params, images, "logits")

    def _call(self, params: Any, images: jax.Array, method: str) -> jax.Array:
        module: Any = VisionEncoder(self.config)
        return module.apply({"params": params}, images, method=method)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageTextEncoder(Encoder):
    """CLIP."""

    config: ClipConfig

    def apply(self, params: Any, images: jax.Array, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """How well images B x S x S x K and texts M x T go together: float32 logits B x M; see `Clip.__call__`."""
        module: Any = Clip(self.config)
        return module.apply({"params": params}, images, tokens, mask)

    def embed_images(self, params: Any, images: jax.Array) -> jax.Array:
        """Embeddings of images, float32 B x E, of length 1."""
        module: Any = Clip(self.config)
        return module.apply({"params": params}, images, method="embed_images")

    def embed_texts(self, params: Any, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Embeddings of texts, float32 M x E, of length 1."""
        module: Any = Clip(self.config)
        return module.apply({"params": params}, tokens, mask, method="embed_texts")


def load_encoder(source: str | pathlib.Path | Folder, *, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> Encoder:
    """Loads BERT, RoBERTa, XLM-R, ViT or CLIP, as config.json says.

    What the encoders do not compute is left out: poolers, and the heads of models that keep the encoder under a prefix
    such as `roberta.`. The classifier of ViT is kept.

    Args:
        source: a Hugging Face directory with config.json and safetensors, the same in a `zipfile.Path`, or the name of
            a model on the Hub, see `hub.directory`.
        dtype: dtype of the parameters and of the computation.
        mesh: with the axes of `partition.AXES`, over which each leaf is split as it is read. None: all goes to the
            default device.

    Returns:
        A `TextEncoder`, an `ImageEncoder` or an `ImageTextEncoder`.

    Raises:
        ValueError: if the source is incomplete or holds another architecture, or a tensor is missing, left over, or of
            another shape than the config asks for.
    """
    folder = source if isinstance(source, zipfile.Path) else hub.directory(source)
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a Hugging Face model directory holds a config.json")
    raw = json.loads(path.read_text(encoding="utf-8"))
    config = encoder_config.translate(raw, str(path), dtype=dtype)
    kind, places = raw["model_type"], mesh and partition.places(mesh)
    params, names = encoder_directory.read_params(folder, kind, param_shapes(config), dtype, places)
    wrap = {BertConfig: TextEncoder, VisionConfig: ImageEncoder, ClipConfig: ImageTextEncoder}[type(config)]
    return wrap(config=config, params=params, tokenizer=encoder_directory.read_tokenizer(folder), peft_names=names)


def param_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, by leaf path."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    if isinstance(config, BertConfig):
        return leaf_shapes(Bert(config), tokens, tokens)
    if isinstance(config, VisionConfig):
        return leaf_shapes(VisionEncoder(config), _image(config))
    return leaf_shapes(Clip(config), _image(config.vision), tokens)


def _image(config: VisionConfig) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, config.image, config.image, config.channels), jnp.float32)
