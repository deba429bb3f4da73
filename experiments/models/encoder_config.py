"""Translates the config.json of encoders in Hugging Face directories: BERT, RoBERTa, XLM-R, ViT, CLIP."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from experiments.models.bert import BertConfig
from experiments.models.clip import ClipConfig, TextConfig
from experiments.models.prenorm import ACTIVATIONS, StackConfig
from experiments.models.vit import VisionConfig

EncoderConfig = BertConfig | VisionConfig | ClipConfig

# What a config.json that leaves a field out means.
_TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_VIT_DEFAULTS = _VISION_DEFAULTS | {"patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": True}
_BERT_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
_LEGACY_EOS = 2  # what the first CLIP checkpoints name as their end token, wrongly

FAMILIES = ("bert", "roberta", "xlm-roberta", "vit", "clip")


def translate(raw: Mapping[str, Any], path: str, *, dtype: Any) -> EncoderConfig:
    """Translates the fields of a config.json.

    Args:
        raw: the fields.
        path: of the file, for errors.
        dtype: dtype of the computation.

    Raises:
        ValueError: if the model type, or a feature of it, is not one that the encoders compute.
    """
    kind, dtype = raw.get("model_type"), jnp.dtype(dtype)
    if kind == "clip":
        return _clip(raw, path, dtype)
    if kind == "vit":
        return _vit(raw, path, dtype)
    if kind not in FAMILIES:
        raise ValueError(f"{path}: model_type={kind!r}, wanted one of {list(FAMILIES)}")
    return _bert(raw, path, dtype)


def _bert(raw: Mapping[str, Any], path: str, dtype: Any) -> BertConfig:
    only = {
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
    }
    for key, value in only.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{path}: {key}={raw[key]!r}, the encoder computes {key}={value!r} only")
    fields = {**_BERT_DEFAULTS, **raw}
    return BertConfig(
        vocab_size=_required(fields, "vocab_size", path),
        layers=fields["num_hidden_layers"],
        dim=fields["hidden_size"],
        heads=fields["num_attention_heads"],
        ffn_dim=fields["intermediate_size"],
        max_positions=fields["max_position_embeddings"],
        types=fields["type_vocab_size"],
        norm_eps=fields["layer_norm_eps"],
        padding_id=None if raw["model_type"] == "bert" else raw.get("pad_token_id", 1),
        dtype=dtype,
    )


def _vit(raw: Mapping[str, Any], path: str, dtype: Any) -> VisionConfig:
    fields = {**_VIT_DEFAULTS, **raw}
    labels = len(raw["id2label"]) if raw.get("id2label") else raw.get("num_labels", 2)
    is_classifier = any(name.endswith("ForImageClassification") for name in raw.get("architectures") or ())
    return VisionConfig(
        image=_side(fields, "image_size", path),
        patch=_side(fields, "patch_size", path),
        channels=fields["num_channels"],
        stack=_stack(fields, path, dtype, qkv_bias=fields["qkv_bias"]),
        classes=labels if is_classifier else None,
    )


def _clip(raw: Mapping[str, Any], path: str, dtype: Any) -> ClipConfig:
    # Old files hold each part twice, and the copy ending in _dict counts.
    text = {**_TEXT_DEFAULTS, **(raw.get("text_config_dict") or raw.get("text_config") or {})}
    vision = {**_VISION_DEFAULTS, **(raw.get("vision_config_dict") or raw.get("vision_config") or {})}
    eos = text["eos_token_id"]
    return ClipConfig(
        text=TextConfig(
            vocab_size=text["vocab_size"],
            max_positions=text["max_position_embeddings"],
            stack=_stack(text, f"{path}: text_config", dtype),
            eos_id=None if eos == _LEGACY_EOS else eos,
        ),
        vision=VisionConfig(
            image=_side(vision, "image_size", path),
            patch=_side(vision, "patch_size", path),
            channels=vision["num_channels"],
            stack=_stack(vision, f"{path}: vision_config", dtype),
            patch_bias=False,
            pre_norm=True,
        ),
        projection_dim=raw.get("projection_dim", 512),
    )


def _stack(fields: Mapping[str, Any], path: str, dtype: Any, *, qkv_bias: bool = True) -> StackConfig:
    if fields["hidden_act"] not in ACTIVATIONS:
        raise ValueError(
            f"{path}: hidden_act={fields['hidden_act']!r}, the encoder computes one of {sorted(ACTIVATIONS)}"
        )
    return StackConfig(
        layers=fields["num_hidden_layers"],
        dim=fields["hidden_size"],
        heads=fields["num_attention_heads"],
        ffn_dim=fields["intermediate_size"],
        norm_eps=fields["layer_norm_eps"],
        activation=fields["hidden_act"],
        qkv_bias=qkv_bias,
        dtype=dtype,
    )


def _side(fields: Mapping[str, Any], key: str, path: str) -> int:
    value = fields[key]
    sides = set(value) if isinstance(value, list) else {value}
    if len(sides) != 1:
        raise ValueError(f"{path}: {key}={value!r}, the encoder reads square images in square patches only")
    return sides.pop()


def _required(fields: Mapping[str, Any], key: str, path: str) -> Any:
    if key not in fields:
        raise ValueError(f"{path} has no {key}; copy the model's whole config.json")
    return fields[key]
