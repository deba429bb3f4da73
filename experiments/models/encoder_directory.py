"""Reads the weights and the tokenizer of an encoder from a Hugging Face directory, or from a zip file with the same."""

import contextlib
from collections.abc import Mapping
from typing import Any

from experiments.models.encoder_names import ARCHITECTURES
from experiments.models.hf_files import Folder, open_tensors
from experiments.models.names import ModuleName
from experiments.models.placed import Places
from experiments.models.weights import fill_params

_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # in BERT's first checkpoints


def read_params(
    folder: Folder,
    model_type: str,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: Any,
    places: Places | None = None,
) -> tuple[dict[str, Any], dict[str, ModuleName]]:
    """Reads the weights.

    Args:
        folder: the directory.
        model_type: a key of `ARCHITECTURES`.
        shapes: of the parameters, by leaf path.
        dtype: dtype of the parameters.
        places: of `weights.fill_params`.

    Returns:
        The parameters as a nested dict, and the names that they have in the directory, by leaf path.

    Raises:
        ValueError: if a tensor is missing, left over, or of another shape than the config asks for.
    """
    architecture = ARCHITECTURES[model_type]
    with contextlib.ExitStack() as opened:
        tensors = {_modern(name): read for name, read in open_tensors(folder, opened).items()}
        base = architecture.base(tensors)
        names = architecture.names(shapes, base)
        aside = architecture.redundant(base)
        params = fill_params(shapes, names, tensors, dtype=dtype, source=str(folder), redundant=aside, places=places)
    return params, names


def _modern(tensor: str) -> str:
    for old, new in _OLD_NAMES.items():
        tensor = tensor.removesuffix(old) + new if tensor.endswith(old) else tensor
    return tensor


def read_tokenizer(folder: Folder) -> Any:
    """Reads tokenizer.json, of the `tokenizers` package; None if there is none.

    Special tokens are added as the file says; nothing is cut or padded.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    tokenizer.no_truncation()  # a text that is too long is the caller's to see
    tokenizer.no_padding()
    return tokenizer
