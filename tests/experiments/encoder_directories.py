"""The tiny encoders that transformers wrote, as directories to read and to change."""

import json
import pathlib
import shutil

import numpy as np
from safetensors.numpy import load_file, save_file

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "encoders"


def outputs(name: str) -> dict[str, np.ndarray]:
    """Inputs and outputs of the reference implementation, images with their channels last."""
    with np.load(GOLDEN / name / "outputs.npz") as archive:
        arrays = dict(archive)
    if "images" in arrays:
        arrays["images"] = arrays["images"].transpose(0, 2, 3, 1)
    return arrays


def copy(name: str, directory: pathlib.Path) -> pathlib.Path:
    """A copy to write in."""
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name / file, directory / file)
    return directory


def edit_config(directory: pathlib.Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(directory: pathlib.Path, edit) -> None:
    """Rewrites the weights as `edit` returns them."""
    save_file(edit(load_file(directory / "model.safetensors")), directory / "model.safetensors")
