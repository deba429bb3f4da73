"""Where what was downloaded or trained is kept, and files that appear there whole or not at all."""

import os
import pathlib
import tempfile


def directory(given: str) -> pathlib.Path:
    """Return the directory that a setting gives; empty: the user's cache directory of lorax."""
    if given:
        return pathlib.Path(given).expanduser()
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "lorax"


def write(path: pathlib.Path, content: bytes) -> None:
    """Write a file, whole or not at all, also where several processes write it or one is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
