"""Reads the weights (safetensors, sharded or not) and the tokenizer of a Hugging Face directory."""

import contextlib
import pathlib
from typing import Any

from experiments.models.decoder_config import LlamaConfig
from experiments.models.hf_files import open_tensors, read_json
from experiments.models.llama import param_shapes
from experiments.models.names import names_for, of_text, redundant
from experiments.models.placed import Places
from experiments.models.tokenizer import Tokenizer, special_text
from experiments.models.weights import Formats, fill_params


def read_params(
    directory: pathlib.Path,
    config: LlamaConfig,
    dtype: Any,
    formats: Formats | None = None,
    places: Places | None = None,
) -> dict[str, Any]:
    """Reads the weights: the shards that model.safetensors.index.json lists, or model.safetensors.

    `formats` and `places` are those of `weights.fill_params`.
    """
    with contextlib.ExitStack() as opened:
        tensors = {of_text(name): read for name, read in open_tensors(directory, opened).items()}
        return fill_params(
            param_shapes(config),
            names_for(config),
            tensors,
            dtype=dtype,
            source=str(directory),
            formats=formats,
            redundant=redundant(config),
            places=places,
        )


def read_tokenizer(directory: pathlib.Path) -> Tokenizer | None:
    """Reads tokenizer.json and the chat template beside it; None without a tokenizer.json."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(path))
    settings = read_json(directory / "tokenizer_config.json")
    model = read_json(directory / "config.json")
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
