"""Models by their names on the Hugging Face Hub."""

import pathlib
import re

_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w.-]+))?")
_WANTED = ("*.json", "*.jinja", "model*.safetensors")


def directory(source: str | pathlib.Path) -> pathlib.Path:
    """Returns the directory, or file, that a source means: a path, or a model on the Hub, which is fetched once.

    Args:
        source: a path, or if there is none of that name, `owner/model` or `owner/model@revision`. Where downloads are
            kept, which mirror and which token are used, the library's own variables say (`HF_HOME`, `HF_ENDPOINT`,
            `HF_TOKEN`).

    Raises:
        ValueError: if the model cannot be fetched: no network, no such model, no right to read it.
    """
    path = pathlib.Path(source)
    found = _NAME.fullmatch(str(source))
    if path.exists() or found is None or path.suffix == ".gguf":
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return pathlib.Path(
            snapshot_download(
                found["name"],
                revision=found["revision"],
                allow_patterns=list(_WANTED),
                ignore_patterns=["*/*.safetensors"],
            )
        )
    except (OSError, HfHubHTTPError, ValueError) as error:
        raise ValueError(
            f"source={str(source)!r} is no directory here, and was not fetched from the Hugging Face Hub: {error} "
            "Without a network, give the path of a directory that was fetched before"
        ) from error
