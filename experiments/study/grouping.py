"""Which runs of a study are trained together: those that one program can hold without much work for zeros."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence

import jax

import lorax
from experiments.study.adaptation import Adaptations
from experiments.study.axes import Cell
from lorax import analysis

Counts = dict[str, int]  # trained numbers of each leaf
CPU_MEMBERS = 8  # more gain nothing there: an update of MiniLM takes a run 1.15 times as long among 32
FREE_PART = 0.6  # of the memory that is free, for a program: evaluation, data and the host need some, too


@dataclasses.dataclass
class Family:
    """Runs that can be members of one stack: those of several configurations, each with its rates and seeds.

    Attributes:
        key: what their programs have in common.
        frozen: numbers of the base that products read.
        members: of each configuration its runs, its abstract adapter, and the numbers it trains.
    """

    key: tuple[object, ...]
    frozen: int
    members: list[tuple[list[Cell], lorax.Adapter, Counts]]

    @property
    def configurations(self) -> list[list[Cell]]:
        """The runs of each configuration."""
        return [cells for cells, _, _ in self.members]

    def takes(self, cells: list[Cell], adapter: lorax.Adapter, counts: Counts, *, padding: float) -> bool:
        """Return whether runs of one more configuration can join without more padded work than allowed."""
        wider = [*self.members, (cells, adapter, counts)]
        return _padded_part(wider, self.frozen) <= padding and _can_stack([self.members[0][1], adapter])


def families(cells: Iterable[Cell], adaptations: Adaptations, *, padding: float) -> list[Family]:
    """Return the runs as families: each joins the first that it fits, the largest adapters first.

    Args:
        cells: all runs.
        adaptations: of the study.
        padding: how much of a family's work may go into zeros, as a part of the work that its runs need.

    Raises:
        ValueError: a pattern selects no leaf that its method can adapt.
    """
    by_configuration: dict[object, list[Cell]] = {}
    for cell in cells:
        key = adaptations.program(cell.settings), adaptations.spec(cell.settings)
        by_configuration.setdefault(key, []).append(cell)
    described = []
    for (key, _), members in by_configuration.items():
        adapter = adaptations.abstract(members[0].settings)
        described.append((key, members, adapter, analysis.parameters(adapter)))
    found: list[Family] = []
    for key, members, adapter, counts in sorted(described, key=lambda entry: -sum(entry[3].values())):
        for family in found:
            if family.key == key and family.takes(members, adapter, counts, padding=padding):
                family.members.append((members, adapter, counts))
                break
        else:
            sites = adaptations.base(members[0].settings).sites
            frozen = sum(site.size("W") for site in sites if site.kind in ("linear", "conv", "grouped"))
            found.append(Family(key, frozen, [(members, adapter, counts)]))
    return found


def _padded_part(members: Sequence[tuple[list[Cell], lorax.Adapter, Counts]], frozen: int) -> float:
    """Return the work of a stack's zeros as a part of what its members need.

    A position costs two operations a weight forwards, two backwards to the inputs, and two more for the gradient of a
    weight that is trained.
    """
    largest: Counts = {}
    for _, _, counts in members:
        largest |= {path: max(count, largest.get(path, 0)) for path, count in counts.items()}
    padded, runs = sum(largest.values()), sum(len(cells) for cells, _, _ in members)
    own = sum(len(cells) * sum(counts.values()) for cells, _, counts in members)
    return 6 * (runs * padded - own) / (4 * runs * frozen + 6 * own)


def _can_stack(adapters: list[lorax.Adapter]) -> bool:
    try:
        jax.eval_shape(lorax.stack, adapters)
    except ValueError:  # says in which way the two differ
        return False
    return True


def groups(family: Family, fits: Callable[[Sequence[Cell]], bool], *, most: int) -> list[list[Cell]]:
    """Return the runs of a family in groups of nearly equal size that fit to memory.

    A group has all configurations with some of the rates and seeds if it can: then the groups have one program.

    Args:
        family: the runs.
        fits: whether a group can be trained, by compiling it.
        most: runs in a group, whatever fits; 0: no limit.
    """
    total = sum(map(len, family.configurations))
    wanted = min(most or total, total)
    while True:
        parts = _parts(family.configurations, wanted)
        largest = max(parts, key=len)
        if len(largest) == 1 or fits(largest):
            return parts
        wanted = max(1, len(largest) // 2)


def _parts(configurations: Sequence[Sequence[Cell]], most: int) -> list[list[Cell]]:
    """Return the runs in parts of at most `most`: by rates and seeds, and by configurations if these are too many.

    >>> _parts(["ab", "cd", "ef"], 3)
    [['a', 'c', 'e'], ['b', 'd', 'f']]
    >>> _parts(["ab", "cd", "ef"], 2)
    [['a', 'c'], ['b', 'd'], ['e', 'f']]
    """
    per_part = math.ceil(len(configurations) / math.ceil(len(configurations) / most))
    parts = []
    for first in range(0, len(configurations), per_part):
        together = configurations[first : first + per_part]
        runs = max(map(len, together))
        at_once = math.ceil(runs / math.ceil(runs / max(1, most // len(together))))
        for place in range(0, runs, at_once):
            parts.append([cell for cells in together for cell in cells[place : place + at_once]])
    return parts


def most_members(members: int, platform: str) -> int:
    """Return the most runs in a group: as the settings say, or of a CPU, which gains nothing from many; 0: no limit.

    >>> most_members(0, "cpu"), most_members(0, "gpu"), most_members(32, "cpu")
    (8, 0, 32)
    """
    return members or (CPU_MEMBERS if platform == "cpu" else 0)


def memory_limit(gib: float) -> int:
    """Return the bytes that a program may take: as the settings say, or a part of what is free on the device."""
    return int(gib * 2**30) if gib else int(FREE_PART * _free_bytes())


def _free_bytes() -> int:
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    table = pathlib.Path("/proc/meminfo")  # what programs can have, which counts caches that would give way
    if table.exists():
        lines = dict(line.split(":", 1) for line in table.read_text(encoding="ascii").splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
