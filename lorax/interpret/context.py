"""What an evaluation carries along: who is told of each use, and the key that dropout draws from."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lorax.interpret.residuals import Followed

LeafAxes = frozenset[tuple[str, int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Use:
    """One place where the traced function reads a weight.

    `contracted`, `free` and `batch` are axes of the leaves, as (path, axis). `factored` is False where the dense
    weight had to be built, and `reason` then says what for.
    """

    paths: tuple[str, ...]
    kind: str
    primitive: str
    contracted: LeafAxes = frozenset()
    free: LeafAxes = frozenset()
    batch: LeafAxes = frozenset()
    lookups: frozenset[tuple[str, int, bool]] = frozenset()
    factored: bool = True
    reason: str = ""
    equation: int = 0  # tells two like uses apart


class Context:
    """The state of one evaluation of one jaxpr level.

    `tracing` is the evaluation that finds the sites: all parameters are weights without an adapter, and a weight is
    followed through whatever makes another weight of it. `fixed` then says which operands of the present equation
    follow from the parameters alone. `live` says which of its outputs are read. `followed` is there in the body of a
    scan of which lorax says what it keeps.
    """

    def __init__(self, record: Callable[[Use], None] | None, key: Any = None, tracing: bool = False) -> None:
        self.record = record
        self.key = key
        self.tracing = tracing
        self.fixed: Sequence[bool] = ()
        self.live: Sequence[bool] = ()
        self.followed: Followed | None = None
        self.place: tuple[int, ...] = ()  # of the present equation, and of those that it is inside of
        self._made: dict[int, tuple[Any, dict[Any, Any]]] = {}

    def once(self, name: Any, of: Any, make: Callable[[], Any]) -> Any:
        """Return what was made of a value under this name before, or make it: for sites that read one activation."""
        _, made = self._made.setdefault(id(of), (of, {}))  # holds on to the value, so that its id stays its own
        if name not in made:
            made[name] = make()
        return made[name]

    def forget(self, of: Any) -> None:
        """Let go of a value that is read no more, and of what was made of it."""
        self._made.pop(id(of), None)

    def inside(self, key: Any) -> Context:
        """Return the context for the body of a control-flow construct."""
        return Context(self.record, key, self.tracing)

    def key_here(self, what: str = "") -> Any:
        """Return the key of the present equation, or None when no `rng` was given.

        It depends on the equation alone, and on what is asked for, so that an adapter draws the same at a site
        whatever else is adapted.
        """
        if self.key is None:
            return None
        # The function may draw from the same key, by small numbers.
        return jax.random.fold_in(self.key, zlib.crc32(f"lorax {self.place} {what}".encode()))
