"""The files of a directory: where they are, and how they are replaced."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Mapping

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every tensor's name


def find(path: pathlib.Path) -> pathlib.Path:
    """Return the directory that holds an adapter: the one given, or its only subfolder that does.

    Raises:
      ValueError: none does, several do, or the tensors are in files of another format.
    """
    if not (path / CONFIG).is_file():
        folders = sorted(p.parent for p in path.glob(f"*/{CONFIG}")) if path.is_dir() else []
        if len(folders) != 1:
            listed = ", ".join(str(p) for p in folders) or "none"
            raise ValueError(f"{path} holds no {CONFIG}; subfolders that do: {listed}. Name the adapter's directory")
        path = folders[0]
    if not (path / WEIGHTS).is_file():
        others = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".safetensors", ".pt"))
        hint = "shards have to be joined and .bin files converted: load and save_pretrained them with PEFT"
        raise ValueError(f"{path} holds no {WEIGHTS}, but {', '.join(others) or 'no tensors'}; {hint}")
    return path


def replace(directory: pathlib.Path, files: Mapping[str, bytes]) -> None:
    """Write the files beside their places, complete, and then move them there; undo that if it fails half-way."""
    directory.mkdir(parents=True, exist_ok=True)
    fresh = {name: directory / f".{name}.{os.getpid()}.new" for name in files}
    old = {name: directory / f".{name}.{os.getpid()}.old" for name in files if (directory / name).exists()}
    moved: list[str] = []
    try:
        for name, data in files.items():
            with open(fresh[name], "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for name, kept in old.items():
            shutil.copyfile(directory / name, kept)
        for name in files:
            os.replace(fresh[name], directory / name)
            moved.append(name)
    except BaseException:
        for name in moved:
            if name in old:
                os.replace(old[name], directory / name)
            else:
                (directory / name).unlink()
        raise
    finally:
        for path in (*fresh.values(), *old.values()):
            path.unlink(missing_ok=True)
