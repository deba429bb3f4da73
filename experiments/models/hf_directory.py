"""Reads a Hugging Face directory: config.json, safetensors (sharded or not), tokenizer.json."""

import contextlib
import json
import math
import pathlib
from typing import Any

import numpy as np

from experiments.models.decoder_config import LlamaConfig
from experiments.models.names import names_for, redundant
from experiments.models.tokenizer import Tokenizer, special_text
from experiments.models.weights import Formats, fill_params, leaf_shapes

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


def read_config(directory: pathlib.Path) -> LlamaConfig:
    """Translates config.json.

    Raises:
        ValueError: if the architecture, or a feature of it, is not one that the decoder computes.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a Hugging Face model directory holds a config.json")
    raw = json.loads(path.read_text())
    architectures = raw.get("architectures") or ["LlamaForCausalLM"]
    if not set(architectures) & set(_ARCHITECTURES):
        raise ValueError(f"{path}: architectures={architectures}, wanted one of {list(_ARCHITECTURES)}")
    unsupported = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None}
    for key, only in unsupported.items():
        if raw.get(key, only) != only:
            raise ValueError(f"{path}: {key}={raw[key]!r}, the decoder computes {key}={only!r} only")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", raw.get("rope_theta", 10000.0)))
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    return LlamaConfig(
        vocab_size=raw["vocab_size"],
        layers=raw["num_hidden_layers"],
        dim=raw["hidden_size"],
        heads=raw["num_attention_heads"],
        kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=head_dim,
        ffn_dim=raw["intermediate_size"],
        max_positions=raw["max_position_embeddings"],
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_divisors=_rope_divisors(rope, theta, head_dim, path),
        tied=raw.get("tie_word_embeddings", False),
    )


def _rope_divisors(rope: dict[str, Any], theta: float, head_dim: int, path: pathlib.Path) -> tuple[float, ...] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    half = head_dim // 2
    if kind == "default":
        return None
    if kind == "linear":
        return (float(rope["factor"]),) * half
    if kind != "llama3":
        raise ValueError(f"{path}: rope type {kind!r}, the decoder computes default, linear and llama3")
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    trained = rope["original_max_position_embeddings"]
    divisors = []
    for i in range(half):
        turns = trained * theta ** (-i / half) / (2 * math.pi)  # full turns within the trained context
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1.0 / ((1.0 - kept) / factor + kept))
    return tuple(divisors)


def read_params(
    directory: pathlib.Path, config: LlamaConfig, dtype: Any, formats: Formats | None = None
) -> dict[str, Any]:
    """Reads the weights: the shards that model.safetensors.index.json lists, or model.safetensors.

    `formats` are those of `weights.fill_params`.
    """
    from safetensors import safe_open

    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
    elif single.is_file():
        with safe_open(single, framework="np") as handle:
            files = dict.fromkeys(handle.keys(), single.name)
    else:
        raise ValueError(f"{directory} holds neither {single.name} nor {index.name}; convert the weights")
    for file in sorted(set(files.values())):
        if not (directory / file).is_file():
            raise ValueError(f"{index} names {file}, which is not in {directory}; fetch the shard")
    with contextlib.ExitStack() as stack:
        shards = {
            file: stack.enter_context(safe_open(directory / file, framework="np")) for file in set(files.values())
        }

        def read(tensor: str) -> np.ndarray:
            return shards[files[tensor]].get_tensor(tensor)

        return fill_params(
            leaf_shapes(config),
            names_for(config),
            files,
            read,
            dtype=dtype,
            source=str(directory),
            formats=formats,
            redundant=redundant(config),
        )


def read_tokenizer(directory: pathlib.Path) -> Tokenizer | None:
    """Reads tokenizer.json and the chat template beside it; None without a tokenizer.json."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(path))
    settings = _read_json(directory / "tokenizer_config.json")
    model = _read_json(directory / "config.json")
    specials = {key: special_text(settings.get(key)) for key in ("bos_token", "eos_token", "pad_token")}

    def token_id(name: str) -> int | None:
        text = specials[f"{name}_token"]
        if text is not None:
            return backend.token_to_id(text)
        listed = model.get(f"{name}_token_id")
        return listed[0] if isinstance(listed, list) else listed

    eos_id = token_id("eos")
    if eos_id is None:
        raise ValueError(f"{directory}: neither tokenizer_config.json nor config.json names an eos token")
    pad_id = token_id("pad")
    template = settings.get("chat_template")
    if (directory / "chat_template.jinja").is_file():
        template = (directory / "chat_template.jinja").read_text()
    return Tokenizer(
        backend,
        eos_id=eos_id,
        pad_id=eos_id if pad_id is None else pad_id,
        chat_template=template,
        template_names={key: text for key, text in specials.items() if text is not None},
    )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
