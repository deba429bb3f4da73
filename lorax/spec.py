"""Which sites get which method."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from lorax import paths
from lorax.methods import Method
from lorax.sites import Site

Rules = Mapping[str, Method | None] | Sequence[tuple[str, Method | None]]


@dataclasses.dataclass(frozen=True, init=False)
class Spec:
    r"""Ordered patterns of leaf paths and their methods; the first that selects a leaf wins.

    A pattern is a regular expression matched against the whole path. It selects, among the leaves it matches, those
    that its method can adapt; `None` in place of a method freezes all that it matches. Leaves that nothing selects are
    frozen.

    >>> from lorax import LoRA, Full
    >>> spec = Spec({r"layers/\d+/attn/(query|value)/kernel": LoRA(rank=8), r"head/.*": Full()})
    >>> [type(method).__name__ for method in spec.methods]
    ['LoRA', 'Full']
    """

    rules: tuple[tuple[str, Method | None], ...]

    def __init__(self, rules: Rules) -> None:
        pairs = tuple(rules.items()) if isinstance(rules, Mapping) else tuple(rules)
        for pattern, method in pairs:
            if method is not None and not isinstance(method, Method):
                raise ValueError(f"pattern {pattern!r}: got {method!r}, expected a method such as lorax.LoRA(rank=8)")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error
        object.__setattr__(self, "rules", pairs)

    @property
    def methods(self) -> tuple[Method | None, ...]:
        """The methods, in the patterns' order."""
        return tuple(m for _, m in self.rules)

    def resolve(self, sites: Iterable[Site]) -> dict[str, Method]:
        """Return the method of every selected leaf, in the sites' order.

        Raises:
          ValueError: a pattern selects nothing, or the spec has no pattern with a method.
        """
        sites = list(sites)
        if not any(self.methods):
            raise ValueError("the spec has no method: nothing would be trained")
        claimed: dict[str, tuple[str, Method | None]] = {}
        for pattern, method in self.rules:
            matched = [s for s in sites if re.fullmatch(pattern, s.path)]
            able = [s for s in matched if method is None or not method.refuses(s)]
            free = [s for s in able if s.path not in claimed]
            if not free:
                raise ValueError(_selects_nothing(pattern, method, sites, matched, able, claimed))
            claimed.update((s.path, (pattern, method)) for s in free)
        return {s.path: m for s in sites if (m := claimed.get(s.path, ("", None))[1]) is not None}


def _selects_nothing(
    pattern: str,
    method: Method | None,
    sites: list[Site],
    matched: list[Site],
    able: list[Site],
    claimed: Mapping[str, tuple[str, Method | None]],
) -> str:
    name = "no method" if method is None else type(method).__name__
    head = f"pattern {pattern!r} with {name} selects no parameter"
    if able:
        owners = "; ".join(f"{s.path} has {claimed[s.path][0]!r}" for s in able[:8])
        return f"{head}: an earlier pattern selects all that it matches ({owners}). Put it further up, or remove it"
    if matched and method is not None:
        reasons = "; ".join(f"{s.path} {s.shape}: {method.refuses(s)}" for s in matched[:8])
        return f"{head}: it matches {len(matched)} that {name} cannot adapt ({reasons}). Choose others, or lorax.Full()"
    near = ", ".join(paths.nearest(pattern, [s.path for s in sites])) or "there are none"
    return f"{head}: it matches none of {len(sites)} paths (as a whole, by re.fullmatch). Nearest paths: {near}"
