"""Reads a GGUF file of the Llama architecture: dequantises the weights, builds the tokenizer it describes."""

import functools
import importlib.util
import pathlib
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.models.decoder_config import LlamaConfig
from experiments.models.llama import param_shapes
from experiments.models.names import names_for
from experiments.models.placed import Places
from experiments.models.tokenizer import PRE_TOKENIZERS, Tokenizer, byte_level_bpe
from experiments.models.weights import Formats, fill_params

if TYPE_CHECKING:
    from gguf import GGUFReader

_CONTROL, _USER_DEFINED = 3, 4  # token types of the GGUF specification that are matched as a whole


def find_in_wheel(package: str, install: str) -> pathlib.Path:
    """Path of the one GGUF file inside an installed package, which is not imported.

    Args:
        package: import name.
        install: command that installs it, for the error.

    Raises:
        ValueError: if the package is not installed or does not hold exactly one GGUF file.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the package {package}, which holds the weights, is not installed; run: {install}")
    folders = [pathlib.Path(folder) for folder in spec.submodule_search_locations]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"{package} holds {len(files)} GGUF files, wanted one; reinstall it: {install}")
    return files[0]


def open_reader(path: pathlib.Path) -> "GGUFReader":
    """Opens a GGUF file; its tensors are memory-mapped."""
    from gguf import GGUFReader

    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    return GGUFReader(path)


def _field(reader: "GGUFReader", key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def read_config(reader: "GGUFReader") -> LlamaConfig:
    """Translates the metadata.

    Raises:
        ValueError: if the file holds another architecture, or a rotary scaling that the decoder lacks.
    """
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise ValueError(f"the GGUF file holds the architecture {architecture!r}, wanted 'llama'")
    scaling = _field(reader, "llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"the GGUF file has llama.rope.scaling.type={scaling!r}, the decoder reads 'none' only")
    tensors = {t.name: t for t in reader.tensors}
    heads, dim = _field(reader, "llama.attention.head_count"), _field(reader, "llama.embedding_length")
    head_dim = _field(reader, "llama.attention.key_length", dim // heads)
    turned = _field(reader, "llama.rope.dimension_count", head_dim)
    if turned != head_dim:
        raise ValueError(f"the GGUF file turns {turned} of {head_dim} dimensions, the decoder turns all")
    divisors = tensors.get("rope_freqs.weight")
    return LlamaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        layers=_field(reader, "llama.block_count"),
        dim=dim,
        heads=heads,
        kv_heads=_field(reader, "llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn_dim=_field(reader, "llama.feed_forward_length"),
        max_positions=_field(reader, "llama.context_length"),
        norm_eps=float(_field(reader, "llama.attention.layer_norm_rms_epsilon", 1e-5)),
        rope_theta=float(_field(reader, "llama.rope.freq_base", 10000.0)),
        rope_divisors=None if divisors is None else tuple(float(d) for d in divisors.data),
        tied="output.weight" not in tensors,
    )


def read_params(
    reader: "GGUFReader",
    config: LlamaConfig,
    dtype: Any,
    source: str,
    formats: Formats | None = None,
    places: Places | None = None,
) -> dict[str, Any]:
    """Dequantises the weights into the decoder's parameters, see `weights.fill_params`."""
    from gguf.quants import dequantize

    names = names_for(config)
    rows: dict[str, tuple[str, bool]] = {}
    for name in names.values():
        for i in range(config.layers if name.stacked else 1):
            rows[name.gguf_tensor.format(layer=i)] = (name.tensor.format(layer=i), name.rotary)

    def read(stored: Any, rotary: bool) -> np.ndarray:
        weight = dequantize(stored.data, stored.tensor_type)
        return half_split_rows(weight, config.head_dim) if rotary else weight

    tensors = {}
    for stored in reader.tensors:
        if stored.name != "rope_freqs.weight":
            name, rotary = rows.get(stored.name, (stored.name, False))
            tensors[name] = functools.partial(read, stored, rotary)
    return fill_params(param_shapes(config), names, tensors, dtype=dtype, source=source, formats=formats, places=places)


def half_split_rows(weight_OxI: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders each head's rows from rotary pairs `(2i, 2i+1)` to pairs `(i, i + H/2)`."""
    pairs = weight_OxI.reshape(-1, head_dim // 2, 2, weight_OxI.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight_OxI.shape)


def read_tokenizer(reader: "GGUFReader") -> Tokenizer | None:
    """Builds the tokenizer; None, with a warning, if it is not a known kind of byte-level BPE."""
    model, pre = _field(reader, "tokenizer.ggml.model"), _field(reader, "tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        warnings.warn(
            f"no tokenizer: the GGUF file has tokenizer model {model!r} with pre-tokenizer {pre!r}, "
            f"known are 'gpt2' with {sorted(PRE_TOKENIZERS)}",
            stacklevel=2,
        )
        return None
    tokens = _field(reader, "tokenizer.ggml.tokens")
    types = _field(reader, "tokenizer.ggml.token_type", [])
    merges = [tuple(m.split(" ")) for m in _field(reader, "tokenizer.ggml.merges")]
    special = [t for t, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    eos_id = _field(reader, "tokenizer.ggml.eos_token_id")
    ids = {name: _field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    return Tokenizer(
        byte_level_bpe(tokens, merges, special, pre=pre),
        eos_id=eos_id,
        pad_id=_field(reader, "tokenizer.ggml.padding_token_id", eos_id),
        chat_template=_field(reader, "tokenizer.chat_template"),
        template_names={f"{name}_token": tokens[i] for name, i in ids.items() if i is not None},
    )
