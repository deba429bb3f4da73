"""The tensors of a directory, which are taken one after another until none is left, and what is wrong with them."""

from __future__ import annotations

import pathlib
import re

import jax
import numpy as np

from lorax.peft.files import PREFIX
from lorax.peft.names import Table

# What follows a module's path in the name of a tensor.
_SUFFIX = r"(\.base_layer)*\.(lora_|token_adapter\.|modules_to_save\.|original_module\.|weight$|bias$).*$"


class Ledger:
    """What was found, what is left of it, and every complaint.

    Attributes:
      found: the tensors by name, without the prefix that all have.
      left: the names of those that nothing asked for yet.
      wrong: complaints.
      copies: names of tensors that repeat the base or another tensor.
    """

    def __init__(self, path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
        self.path = path
        self.found = {k.removeprefix(PREFIX): x for k, x in tensors.items() if k.startswith(PREFIX)}
        self.foreign = [k for k in tensors if not k.startswith(PREFIX)]
        self.left = dict.fromkeys(self.found)
        self.missing: list[str] = []
        self.wrong: list[str] = []
        self.copies: list[str] = []

    def take(self, key: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """Return a tensor; None, and a complaint, where it is missing or of another shape."""
        tensor = self.found.get(key)
        self.left.pop(key, None)
        if tensor is None:
            self.missing.append(f"{PREFIX}{key} {list(shape)}")
        elif tensor.shape != shape:
            self.wrong.append(f"{PREFIX}{key} has shape {list(tensor.shape)}, expected {list(shape)}")
            return None
        elif tensor.dtype == np.float64 and not jax.config.read("jax_enable_x64"):
            self.wrong.append(f"{PREFIX}{key} is {tensor.dtype}: enable jax_enable_x64, or convert it")
            return None
        return tensor

    def same(self, key: str, twin: np.ndarray | None) -> None:
        """Take a tensor that has to repeat another one."""
        if twin is None or key not in self.left:
            return
        self.copy(key)
        tensor = self.found[key]
        if tensor.shape != twin.shape or not np.array_equal(tensor, twin):
            self.wrong.append(f"{PREFIX}{key} differs from the tensor that it has to repeat")

    def copy(self, key: str) -> None:
        """Take a tensor that means nothing of its own, if it is there."""
        if key in self.left:
            self.left.pop(key)
            self.copies.append(key)

    def refuse(self, table: Table, *, is_empty: bool) -> None:
        """Raise one error for all that is missing, wrong or left over.

        Args:
          table: knows the names, to suggest what a left tensor may belong to.
          is_empty: whether nothing was taken that an adapter can be made of.

        Raises:
          ValueError: if anything is.
        """
        lines: list[str] = []
        left = [PREFIX + k for k in self.left] + self.foreign
        for title, listed in (("missing tensors", self.missing), ("wrong", self.wrong), ("unmatched tensors", left)):
            if listed:
                lines.append(f"{title}: " + "; ".join(listed))
        owners = {re.sub(_SUFFIX, "", k) for k in self.left}
        unnamed = sorted(owners - set(table.modules) - set(table.parameters()))
        twins = [
            (m, k) for m in unnamed for k in table.modules if f".{k}".endswith(f".{m}") or f".{m}".endswith(f".{k}")
        ]
        if twins:
            lines.append("the prefix differs: " + ", ".join(f"{m} here and {k} in names" for m, k in twins[:3]))
        elif unnamed:
            suggestions = ", ".join(sorted({table.suggest_path(m) for m in unnamed}))
            lines.append(f"names has no leaf for {', '.join(unnamed)}; perhaps add {{{suggestions}}}")
        unread = sorted(owners & {s.module for s in table.slots.values() if table.layouts[s.path].kind == "unknown"})
        if unread:
            lines.append(f"the sites have no product of {', '.join(unread)}: give all sites that lorax.trace returns")
        if self.foreign:
            lines.append(f"every name has to begin with {PREFIX!r}")
        elif left and not (unnamed or unread or self.wrong or self.missing):
            lines.append("the config has no place for these, and PEFT would drop them without a word")
        if is_empty and not lines:
            lines.append("the config selects nothing that names knows")
        if lines:
            raise ValueError(f"{self.path} was not loaded.\n  " + "\n  ".join(lines))
