"""Other settings of a run, compiled like those that were asked for: which of them fit, and which are faster."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from ml_collections import config_dict

from experiments.models import partition
from experiments.plan.program import Plan
from experiments.training import devices, settings

# What is tried, by the names of the settings; a change of quantisation alone also changes what is learned.
_SETTINGS = ("model.remat", "train.accumulate", "train.loss_chunk", "model.quantize")
_MESH = tuple(f"mesh.{axis}" for axis in partition.AXES)

Choice = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tried:
    """A plan, and what was chosen for it: {dotted name of a setting: value}."""

    choice: Choice
    plan: Plan

    @property
    def cost(self) -> float:
        """Seconds of a step without overlap, or its FLOPs where the chip's peaks are not known."""
        if self.plan.costs is None:
            return float("inf")
        return sum(self.plan.seconds.values()) if self.plan.seconds is not None else self.plan.costs.flops

    @property
    def order(self) -> tuple[bool, float]:
        """Better ones first: of those that fit the fastest, of others the smallest."""
        return (True, self.plan.peak) if self.plan.fits is False else (False, self.cost)


def search(
    config: config_dict.ConfigDict,
    on: Sequence[jax.Device],
    plan_of: Callable[[config_dict.ConfigDict], Plan],
    *,
    most: int,
) -> list[Tried]:
    """Compiles the settings that were asked for, and then again and again a neighbour of the best ones so far.

    A neighbour differs in one of: what the backward pass recomputes, the parts that an update's rows are gone through
    in, how many logits are there at a time, four bits for the base, a factor of two of the mesh on another axis.

    Args:
        config: the settings that were asked for; not changed.
        on: the devices.
        plan_of: plans a configuration; a ValueError says that it cannot be.
        most: how many programs to compile.

    Returns:
        What was tried, the settings that were asked for first.

    Raises:
        ValueError: if the settings that were asked for cannot be.
    """
    asked, sizes = settings.dotted(config), devices.mesh(config.mesh, on).shape
    start = {name: asked[name] for name in _SETTINGS} | {f"mesh.{axis}": sizes[axis] for axis in partition.AXES}
    tried = [Tried(choice=start, plan=plan_of(config))]
    known = [start]
    waiting = [(tried[0], neighbour) for neighbour in _neighbours(start)]
    while waiting and len(tried) < most:
        parent, choice = min(waiting, key=lambda pair: pair[0].order)
        waiting.remove((parent, choice))
        if choice in known:
            continue
        known.append(choice)
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict(choice)
        try:
            plan = plan_of(other)
        except ValueError:  # such as rows that do not divide over this mesh
            continue
        tried.append(Tried(choice=choice, plan=plan))
        print(f"{len(tried)} of at most {most} compiled", file=sys.stderr)
        waiting += [(tried[-1], neighbour) for neighbour in _neighbours(choice)]
    return tried


def frontier(tried: Sequence[Tried]) -> list[Tried]:
    """Returns those that fit, or may, and of which no other is both smaller and faster; the fastest first."""
    found: list[Tried] = []
    for one in sorted((t for t in tried if t.plan.fits is not False), key=lambda t: (t.cost, t.plan.peak)):
        if not found or one.plan.peak < found[-1].plan.peak:
            found.append(one)
    return found


def _neighbours(choice: Choice) -> Iterator[Choice]:
    yield choice | {"model.remat": "none" if choice["model.remat"] == "full" else "full"}
    yield choice | {"train.accumulate": 2 * choice["train.accumulate"]}
    if choice["train.accumulate"] % 2 == 0:
        yield choice | {"train.accumulate": choice["train.accumulate"] // 2}
    if not choice["train.loss_chunk"]:
        yield choice | {"train.loss_chunk": 512}
    for source in _MESH:
        for target in _MESH:
            if source != target and choice[source] % 2 == 0:
                yield choice | {source: choice[source] // 2, target: choice[target] * 2}
    if choice["model.quantize"] == "none":
        yield choice | {"model.quantize": "nf4"}
