"""Reads the weights (safetensors, sharded or not) and the tokenizer of a Hugging Face directory."""

import contextlib
import json
import pathlib
from typing import Any

import numpy as np

from experiments.models.decoder_config import LlamaConfig
from experiments.models.names import names_for, of_text, redundant
from experiments.models.tokenizer import Tokenizer, special_text
from experiments.models.weights import Formats, fill_params, leaf_shapes


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

        stored = {of_text(tensor): tensor for tensor in files}

        def read(tensor: str) -> np.ndarray:
            return shards[files[stored[tensor]]].get_tensor(stored[tensor])

        return fill_params(
            leaf_shapes(config),
            names_for(config),
            stored,
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
