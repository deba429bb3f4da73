"""A tiny sentence encoder with a tokenizer, written to a directory."""

import pathlib
import shutil

from tokenizers import Tokenizer, models, pre_tokenizers, processors

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "bert"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e", "f", "g", "h", "##z"]


def write(directory: pathlib.Path) -> pathlib.Path:
    """Writes the encoder of the reference data, and a tokenizer of `WORDS` that cuts and pads."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, directory / name)
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(word, WORDS.index(word)) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory
