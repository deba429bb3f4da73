"""A plan as text."""

from collections.abc import Iterator

from ml_collections import config_dict

from experiments.plan import search
from experiments.plan.program import Plan


def text(plan: Plan, config: config_dict.ConfigDict) -> str:
    """Return what a plan says, for people."""
    return "\n".join(_lines(plan, config))


def _lines(plan: Plan, config: config_dict.ConfigDict) -> Iterator[str]:
    yield f"{plan.devices} x {plan.kind}; for each:"
    parts = ("base", "adapter", "moments", "batch", "temporaries")
    yield from (f"  {name:<22}{_bytes(getattr(plan, name)):>12}" for name in parts)
    yield f"    of these, activations at most {_bytes(plan.activations)}"
    yield f"  {'peak':<22}{_bytes(plan.peak):>12}{'' if plan.limit is None else f' of {_bytes(plan.limit)}'}"
    if plan.costs is not None:
        yield f"  {'products':<22}{plan.costs.flops / 1e12:>9.3g} TFLOP"
        yield f"  {'main memory moved':<22}{_bytes(plan.costs.bytes):>12}"
        for c in plan.costs.collectives:
            name, sent = f"{c.kind} of {c.group}", _bytes(c.wire_bytes)
            yield f"  {name:<22}{_bytes(c.bytes):>12}  {c.count:.0f} times, {sent} sent"
        if plan.costs.unknown_loops:
            yield f"  counted once, because nothing says how often they run: {', '.join(plan.costs.unknown_loops)}"
    if plan.seconds is not None:
        times = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in plan.seconds.items())
        longest, summed = max(plan.seconds.values()), sum(plan.seconds.values())
        yield f"  a step takes {longest * 1e3:.3g} ms or more, {summed * 1e3:.3g} ms without overlap ({times})"
    if plan.fits is False:
        yield "it does not fit; what can help:"
        yield from (f"  {line}" for line in advice(plan, config))
    elif plan.fits:
        yield "it fits"


def found(tried: list[search.Tried]) -> str:
    """Return what a search found, for people: its frontier, with what differs from what was asked for."""
    first, best = tried[0], search.frontier(tried)
    lines = [
        f"{len(tried)} compiled, {sum(t.plan.fits is False for t in tried)} of them too large; no other of them is"
    ]
    lines += ["smaller and faster than these:", f"  {'peak':>12}  {'a step':>12}  settings"]
    for one in best:
        changed = [f"--config.{name}={value}" for name, value in one.choice.items() if first.choice[name] != value]
        speed = f"{one.cost * 1e3:.3g} ms" if one.plan.seconds is not None else f"{one.cost / 1e12:.3g} TFLOP"
        lines.append(f"  {_bytes(one.plan.peak):>12}  {speed:>12}  {' '.join(changed) or 'as asked for'}")
    smallest = min(tried, key=lambda t: t.plan.peak)
    return "\n".join(lines) if best else f"none of {len(tried)} fits; the smallest takes {_bytes(smallest.plan.peak)}"


def advice(plan: Plan, config: config_dict.ConfigDict) -> list[str]:
    """Return the settings to change where a step does not fit, those first that change most of what is too much."""
    rows = config.train.rows // config.train.accumulate
    found: list[tuple[float, str]] = []
    if config.model.remat != "full":
        found.append((plan.activations, "config.model.remat=full keeps each layer's input alone"))
    if rows > 1:
        more = min(config.train.rows, 2 * config.train.accumulate)
        found.append((plan.temporaries / 2, f"config.train.accumulate={more} goes through the rows in more parts"))
    if not config.train.loss_chunk:
        found.append((plan.temporaries / 4, "config.train.loss_chunk=512 never holds all logits"))
    if config.model.attention == "plain":
        found.append((plan.temporaries / 8, "config.model.attention=flash never holds all scores of a row"))
    if config.model.quantize == "none":
        found.append((plan.base * 0.7, "config.model.quantize=nf4 takes about a quarter of a bfloat16 base"))
    if config.mesh.fsdp != plan.devices and plan.devices > 1:
        found.append((plan.base, f"config.mesh.fsdp={plan.devices} splits the base over all devices"))
    found.append((0.0, "more devices"))
    return [line for _, line in sorted(found, key=lambda pair: -pair[0])]


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3f} {unit}"
    return f"{count:.0f} B"
