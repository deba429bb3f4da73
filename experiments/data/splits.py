"""Which split a text belongs to, decided by the text alone.

A text's split is a hash of its letters and digits. It therefore needs no index file, does not move when other
texts are added or dropped, and copies of a text that differ in case, spacing or punctuation never stand on
both sides of the line between training and held-out data.
"""

import hashlib
import unicodedata
from typing import Literal

Split = Literal["train", "validation", "test"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
VALIDATION_PERCENT = 5
TEST_PERCENT = 10


def normalised(text: str) -> str:
    """Returns the letters and digits of a text, case folded: what two copies of a text have in common.

    A text that has neither ("...", ":-)") keeps its other characters, without the spaces.

    >>> normalised("Well worth the money!") == normalised("well  worth the money.")
    True
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(filter(str.isalnum, folded)) or "".join(folded.split())


def split_of(text: str) -> Split:
    """Returns the split of a text: 10 % of all texts are `test`, 5 % `validation`, the others `train`.

    >>> split_of("Horrible.") == split_of("horrible!!!")
    True
    """
    digest = hashlib.sha256(normalised(text).encode()).digest()
    percent = int.from_bytes(digest[:8], "big") % 10_000 / 100
    if percent < TEST_PERCENT:
        return "test"
    return "validation" if percent < TEST_PERCENT + VALIDATION_PERCENT else "train"
