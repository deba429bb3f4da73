"""Translates config.json of Hugging Face decoders, as transformers 4 and 5 write it, by a table of families."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from experiments.models.decoder_config import LlamaConfig

Raw = Mapping[str, Any]
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_WINDOWED = {"sliding_attention": True, "full_attention": False}
# transformers' defaults that all families share; a nested config leaves out what equals the default.
_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What the architecture says that config.json does not.

    Args:
        features: settings of `LlamaConfig` that all its models have.
        defaults: values of fields that config.json may leave out.
        windowed: whether a layer has a window, of the fields and the layer's index, for a file without `layer_types`;
            none: no layer has one.
        only: fields with the one value that the decoder computes.
        activation: the field that names the activation.
    """

    features: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    windowed: Callable[[Raw, int], bool] | None = None
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    activation: str = "hidden_act"


def _last_layers(raw: Raw, i: int) -> bool:
    return bool(raw.get("use_sliding_window")) and i >= raw["max_window_layers"]


def _all_but_each_nth(raw: Raw, i: int) -> bool:
    return (i + 1) % raw.get("sliding_window_pattern", raw["_sliding_window_pattern"]) != 0


_QWEN = {"max_window_layers": 28, "sliding_window": 4096}
_GEMMA = {"norm_offset": 1.0, "post_norms": True}
_GEMMA_DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GEMMA2 = {"vocab_size": 256000, "max_position_embeddings": 8192, "_sliding_window_pattern": 2}
_GEMMA3 = {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "_sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
FAMILIES = {
    "LlamaForCausalLM": Family(only={"sliding_window": None}),
    "MistralForCausalLM": Family(windowed=lambda raw, i: True, defaults={"sliding_window": 4096}),
    "Qwen2ForCausalLM": Family(features={"qkv_bias": True}, windowed=_last_layers, defaults=_QWEN),
    "Qwen3ForCausalLM": Family(
        features={"qk_norm": True}, windowed=_last_layers, defaults={**_QWEN, "head_dim": 128}
    ),
    "SmolLM3ForCausalLM": Family(
        windowed=lambda raw, i: bool(raw.get("use_sliding_window")) and not _turned(raw)[i],
        defaults={"rope_theta": 2e6, "tie_word_embeddings": True, "no_rope_layer_interval": 4},
    ),
    "Gemma2ForCausalLM": Family(
        features=_GEMMA,
        windowed=_all_but_each_nth,
        defaults={**_GEMMA_DEFAULTS, **_GEMMA2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        only={"use_bidirectional_attention": None},
        activation="hidden_activation",
    ),
    "Gemma3ForCausalLM": Family(
        features={**_GEMMA, "qk_norm": True},
        windowed=_all_but_each_nth,
        defaults={**_GEMMA_DEFAULTS, **_GEMMA3},
        only={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
        activation="hidden_activation",
    ),
}
# Models of text and images whose language model, described by `text_config`, is one of these.
NESTED = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
