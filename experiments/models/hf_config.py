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
# transformers' defaults that all families share; files of its version 4 leave out what equals the default.
_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
    "query_pre_attn_scalar": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
# Fields with the one value that the decoder computes, whatever the family.
_ONLY = {"attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What the architecture says that config.json does not.

    Args:
        features: settings of `LlamaConfig` that all its models have.
        scaled_embedding: whether embeddings are multiplied by the root of their width.
        defaults: values of fields that config.json may leave out.
        turned: whether a layer turns its queries and keys, of the fields and the layer's index; none: all do.
        windowed: whether a layer has a window, of the fields and the layer's index, for a file without `layer_types`;
            none: no layer has one.
        only: fields with the one value that the decoder computes.
        activation: the field that names the activation.
    """

    features: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scaled_embedding: bool = False
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    windowed: Callable[[Raw, int], bool] | None = None
    turned: Callable[[Raw, int], bool] | None = None
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    activation: str = "hidden_act"


def _last_layers(raw: Raw, i: int) -> bool:
    return bool(raw.get("use_sliding_window")) and i >= raw["max_window_layers"]


def _all_but_each_nth(raw: Raw, i: int) -> bool:
    return (i + 1) % raw.get("sliding_window_pattern", raw["_sliding_window_pattern"]) != 0


def _without_rotation(raw: Raw, i: int) -> bool:
    return bool(raw.get("use_sliding_window")) and not _turned(raw, i)


def _turned(raw: Raw, i: int) -> bool:
    """Whether SmolLM3's layer i turns its queries and keys."""
    listed = raw.get("no_rope_layers")
    return bool(listed[i]) if listed else (i + 1) % raw["no_rope_layer_interval"] != 0


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
    "Qwen3ForCausalLM": Family(features={"qk_norm": True}, windowed=_last_layers, defaults={**_QWEN, "head_dim": 128}),
    "SmolLM3ForCausalLM": Family(
        windowed=_without_rotation,
        turned=_turned,
        defaults={"rope_theta": 2e6, "tie_word_embeddings": True, "no_rope_layer_interval": 4},
    ),
    "Gemma2ForCausalLM": Family(
        features=_GEMMA,
        scaled_embedding=True,
        windowed=_all_but_each_nth,
        defaults={**_GEMMA_DEFAULTS, **_GEMMA2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        activation="hidden_activation",
    ),
    "Gemma3ForCausalLM": Family(
        features={**_GEMMA, "qk_norm": True},
        scaled_embedding=True,
        windowed=_all_but_each_nth,
        defaults={**_GEMMA_DEFAULTS, **_GEMMA3},
        only={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
        activation="hidden_activation",
    ),
}
# Models of text and images whose language model, described by `text_config`, is one of these.
NESTED = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}


def read_config(directory: pathlib.Path) -> LlamaConfig:
    """Translates config.json.

    Raises:
        ValueError: if the architecture, or a feature of it, is not one that the decoder computes.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a Hugging Face model directory holds a config.json")
    return decoder_config(json.loads(path.read_text()), str(path))


def decoder_config(file: Raw, source: str) -> LlamaConfig:
    """Translates what a config.json holds; `source` is what errors call it."""
    architecture = next(iter(file.get("architectures") or ["LlamaForCausalLM"]))
    if architecture in NESTED:
        architecture, file = NESTED[architecture], file["text_config"]
    if architecture not in FAMILIES:
        known = sorted({*FAMILIES, *NESTED})
        raise ValueError(f"{source}: architecture {architecture!r} is not one that the decoder computes: {known}")
    family = FAMILIES[architecture]
    raw = {**_DEFAULTS, **family.defaults, **file}
    for key, only in {**_ONLY, **family.only}.items():
        if raw.get(key, only) != only:
            raise ValueError(f"{source}: {key}={raw[key]!r}, the decoder computes {key}={only!r} only")
    activation = raw.get(family.activation) or raw.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{source}: {family.activation}={activation!r}, wanted one of {sorted(_ACTIVATIONS)}")
    layers, scalar = raw["num_hidden_layers"], raw["query_pre_attn_scalar"]
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    scaled, local = _ropes(raw, source)
    return LlamaConfig(
        vocab_size=raw["vocab_size"],
        layers=layers,
        dim=raw["hidden_size"],
        heads=raw["num_attention_heads"],
        kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=head_dim,
        ffn_dim=raw["intermediate_size"],
        max_positions=raw["max_position_embeddings"],
        norm_eps=raw["rms_norm_eps"],
        activation=_ACTIVATIONS[activation],
        embed_scale=raw["hidden_size"] ** 0.5 if family.scaled_embedding else 1.0,
        query_scale=None if scalar is None else scalar**-0.5,
        attn_softcap=raw["attn_logit_softcapping"],
        final_softcap=raw["final_logit_softcapping"],
        rope_theta=float(scaled["rope_theta"]),
        rope_divisors=_rope_divisors(scaled, head_dim, source),
        local_rope_theta=None if local is None else float(local["rope_theta"]),
        rope_layers=family.turned and tuple(family.turned(raw, i) for i in range(layers)),
        windows=_windows(raw, family, source),
        tied=raw["tie_word_embeddings"],
        **family.features,
    )


def _windows(raw: Raw, family: Family, source: str) -> tuple[int, ...] | None:
    layers, window, listed = raw["num_hidden_layers"], raw["sliding_window"], raw.get("layer_types")
    if listed is not None:
        if unknown := sorted(set(listed) - set(_WINDOWED)):
            raise ValueError(f"{source}: layer_types holds {unknown}, the decoder computes {sorted(_WINDOWED)}")
        windowed = [_WINDOWED[kind] for kind in listed]
    else:
        windowed = [family.windowed is not None and family.windowed(raw, i) for i in range(layers)]
    if window is None or not any(windowed):
        return None
    return tuple(window if has else 0 for has in windowed)


def _ropes(raw: Raw, source: str) -> tuple[Raw, Raw | None]:
    """Rotary settings of layers without a window, and of those with one if they differ: "rope_theta" and the scaling.

    transformers 5 writes `rope_parameters`, for each type of layer if they differ; version 4 `rope_theta`,
    `rope_scaling`, and Gemma 3's `rope_local_base_freq`.
    """
    written = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    by_type = {kind: written[kind] for kind in _WINDOWED if kind in written}
    full = {"rope_theta": raw["rope_theta"], **by_type.get("full_attention", {} if by_type else written)}
    base = raw.get("rope_local_base_freq")
    local = by_type.get("sliding_attention", None if base is None else {"rope_theta": base})
    if local is not None and local.get("rope_type", "default") != "default":
        raise ValueError(f"{source}: rope type {local['rope_type']!r} of layers with a window, wanted 'default'")
    return full, local


def _rope_divisors(rope: Raw, head_dim: int, source: str) -> tuple[float, ...] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    half = head_dim // 2
    if kind == "default":
        return None
    if kind == "linear":
        return (float(rope["factor"]),) * half
    if kind != "llama3":
        raise ValueError(f"{source}: rope type {kind!r}, the decoder computes default, linear and llama3")
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    trained, theta = rope["original_max_position_embeddings"], rope["rope_theta"]
    divisors = []
    for i in range(half):
        turns = trained * theta ** (-i / half) / (2 * math.pi)  # full turns within the trained context
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1.0 / ((1.0 - kept) / factor + kept))
    return tuple(divisors)
