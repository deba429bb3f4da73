"""The files of a Hugging Face directory, or of a zip file with the same: tensors by name, JSON.

Both are read through what `pathlib.Path` and `zipfile.Path` have in common.
"""

import contextlib
import functools
import json
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

Folder = pathlib.Path | zipfile.Path


def open_tensors(folder: Folder, opened: contextlib.ExitStack) -> dict[str, Callable[[], np.ndarray]]:
    """The tensors by name, each as a function that reads it while `opened` is.

    They are those of the shards that model.safetensors.index.json lists, or of model.safetensors.

    Raises:
        ValueError: if the directory holds neither, or lacks a shard.
    """
    from safetensors import safe_open
    from safetensors.numpy import load

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    elif single.is_file():
        files = [single.name]
    else:
        raise ValueError(f"{folder} holds neither {single.name} nor {index.name}; convert the weights")
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(f"{index} names {file}, which is not in {folder}; fetch the shard")
    tensors: dict[str, Callable[[], np.ndarray]] = {}
    for file in files:
        path = folder / file
        if isinstance(path, pathlib.Path):
            handle = opened.enter_context(safe_open(path, framework="np"))
            tensors |= {name: functools.partial(handle.get_tensor, name) for name in handle.keys()}  # noqa: SIM118
        else:
            held = load(path.read_bytes())
            tensors |= {name: functools.partial(held.__getitem__, name) for name in held}
    return tensors


def read_json(path: Folder) -> dict[str, Any]:
    """What a JSON file holds; nothing if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
