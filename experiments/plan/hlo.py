"""What a compiled program does, read from its text (`compiled.as_text()`): products, bytes moved, collectives.

XLA's own analysis counts the body of a loop once; here it counts as often as the loop runs: as XLA notes it
(`known_trip_count`), else from the constants that the loop's counter starts at, ends at and is stepped by.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<sizes>[\d,<=]*)\](?P<layout>\{[^}]*\})?")
_NAME = re.compile(r"%([\w.-]+)")
# Instructions that move nothing themselves: what they call, or what reads their results, does.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *(
        "while",
        "conditional",
        "call",
        "async-start",
        "async-update",
        "async-done",
        "copy-done",
        "opt-barrier",
        "domain",
    ),
    *("send", "send-done", "recv", "recv-done", "add-dependency", "get-dimension-size", "iota"),
}
# Instructions of which a slice takes the slice alone, where both are in one kernel.
_ELEMENT_BY_ELEMENT = {"bitcast", "get-tuple-element", "copy", "convert", "transpose", "reshape"}
COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of an instruction's result, on one device."""

    dtype: str
    sizes: tuple[int, ...]
    is_in_main_memory: bool

    @property
    def bytes(self) -> float:
        """Bytes it takes."""
        return math.prod(self.sizes) * _bits(self.dtype) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern in the attributes."""
        found = re.search(pattern, self.rest)
        return found and found[1]

    @property
    def called(self) -> list[str]:
        """Computations that it names, but for the reductions' own."""
        names = "calls|body|condition|true_computation|false_computation" + (
            "|to_apply" if self.opcode == "call" else ""
        )
        single = re.findall(rf"(?:{names})=%?([\w.-]+)", self.rest)
        several = re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", self.rest)
        return [*single, *(name for group in several for name in _NAME.findall(group))]


@dataclasses.dataclass(frozen=True)
class Collective:
    """Communication of one kind, summed over the times that the program does it.

    Args:
        kind: such as "all-gather".
        group: devices that take part together.
        count: how often.
        bytes: of what a device has afterwards, or before where that is more.
        wire_bytes: what a device sends, around a ring.
    """

    kind: str
    group: int
    count: float
    bytes: float
    wire_bytes: float


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one device does in one run of the program.

    Args:
        flops: of products (2 a multiplication and addition), which is where nearly all are.
        bytes: read from and written to main memory by its kernels.
        collectives: by kind and size of the group, those that send most first.
        unknown_loops: loops that were counted once, because nothing says how often they run.
    """

    flops: float
    bytes: float
    collectives: tuple[Collective, ...]
    unknown_loops: tuple[str, ...] = ()

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends."""
        return sum(c.wire_bytes for c in self.collectives)


def costs(text: str) -> Costs:
    """Counts what a device does in one run of a compiled program.

    Args:
        text: `jax.stages.Compiled.as_text()`, of the CPU, GPU or TPU back end.

    Raises:
        ValueError: if there is no entry computation in it.
    """
    return _Program(text).costs()


class _Program:
    def __init__(self, text: str):
        self.computations, self.entry = _parse(text)
        self.unknown_loops: list[str] = []

    def costs(self) -> Costs:
        flops = moved = 0.0
        gathered: dict[tuple[str, int], list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0])
        seen: set[str] = set()
        for instruction, defined, times, is_fused in self._runs(self.entry, 1.0, False):
            flops += times * _flops(instruction, defined)
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                # A TPU's asynchronous collective is written into each of the fusions that overlap with it.
                channel = instruction.attribute(r"channel_id=(\d+)")
                if channel is not None and channel in seen and is_fused:
                    continue
                seen.add(channel or instruction.name)
                count, size, wire = gathered[kind, _group_size(instruction)]
                before, after = _in_and_out(instruction, defined)
                n, most = _group_size(instruction), max(before, after)
                sent = _sent(kind, before, after, n)
                gathered[kind, n] = [count + times, size + times * most, wire + times * sent]
                moved += times * (before + after)
            elif not is_fused:
                moved += times * self._moved(instruction, defined)
        found = [Collective(kind, group, *numbers) for (kind, group), numbers in gathered.items() if group > 1]
        found.sort(key=lambda c: -c.wire_bytes)
        return Costs(flops, moved, tuple(found), tuple(dict.fromkeys(self.unknown_loops)))

    def _runs(
        self, computation: str, times: float, is_fused: bool
    ) -> Iterator[tuple[Instruction, Mapping[str, Instruction], float, bool]]:
        """Every instruction that is run, and how often; `is_fused` says that it is a part of a kernel."""
        defined = self.computations[computation]
        for instruction in defined.values():
            yield instruction, defined, times, is_fused
            inner = is_fused or instruction.opcode == "fusion"
            called = [name for name in instruction.called if name in self.computations]
            if instruction.opcode == "while":
                times_inside = times * self._trips(instruction, defined)
                called = [name for name in called if name != _condition_and_body(instruction)[0]]
            else:
                times_inside = times
            if instruction.opcode == "conditional":  # the branch that does most
                called = [max(called, key=self._flops_of)] if called else []
            for name in called:
                yield from self._runs(name, times_inside, inner)

    def _flops_of(self, computation: str) -> float:
        runs = self._runs(computation, 1.0, True)
        return sum(times * _flops(instruction, defined) for instruction, defined, times, _ in runs)

    def _trips(self, loop: Instruction, defined: Mapping[str, Instruction]) -> float:
        noted = loop.attribute(r'known_trip_count"?:\{"?n"?:"?(\d+)')
        trips = float(noted) if noted is not None else self._counted(loop, defined)
        if trips is None:
            self.unknown_loops.append(loop.name)
        return 1.0 if trips is None else trips

    def _counted(self, loop: Instruction, defined: Mapping[str, Instruction]) -> float | None:
        """How often a loop runs that counts from a constant in steps of one up to another; None: it is not of these."""
        condition, body = (self.computations.get(name, {}) for name in _condition_and_body(loop))
        compared = next((i for i in condition.values() if i.is_root and "direction=LT" in i.rest), None)
        if compared is None or compared.opcode != "compare":
            return None
        limit = _constant(condition, compared.operands[1])
        counter = condition.get(compared.operands[0])
        place = counter and counter.attribute(r"index=(\d+)")
        last = next((i for i in body.values() if i.is_root and i.opcode == "tuple"), None)
        first = defined.get(loop.operands[0])
        if limit is None or place is None or last is None or first is None or first.opcode != "tuple":
            return None
        start = _constant(defined, first.operands[int(place)])
        added = body.get(last.operands[int(place)])
        steps = [_constant(body, name) for name in added.operands] if added and added.opcode == "add" else []
        step = next((step for step in steps if step), None)
        return None if start is None or step is None else math.ceil((limit - start) / step)

    def _moved(self, instruction: Instruction, defined: Mapping[str, Instruction]) -> float:
        """Bytes of main memory that a kernel reads and writes."""
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return 0.0
        if opcode == "copy-start":  # its result names both ends
            return sum(a.bytes for a in instruction.result[:2] if a.is_in_main_memory)
        if opcode.endswith("slice-start"):  # its result names what it slices, and the slice
            source, part = instruction.result[:2]
            return part.bytes * (source.is_in_main_memory + part.is_in_main_memory)
        if opcode == "fusion" and instruction.called and instruction.called[0] in self.computations:
            inside = self.computations[instruction.called[0]]
            reads = 0.0
            for i, name in enumerate(instruction.operands):
                held = _main_bytes(defined[name]) if name in defined else 0.0
                used = self._read(inside, i) if held else 0.0
                reads += held if used is None else min(held, used)
            return reads + self._written(inside, instruction)
        written = _main_bytes(instruction)
        if opcode in ("dynamic-slice", "gather", "slice"):
            return 2 * written
        if opcode in ("dynamic-update-slice", "scatter"):
            return 2 * _main_bytes(defined[instruction.operands[1 if opcode == "dynamic-update-slice" else -1]])
        return written + sum(_main_bytes(defined[name]) for name in instruction.operands if name in defined)

    def _read(self, inside: Mapping[str, Instruction], number: int) -> float | None:
        """Bytes that a fused kernel reads of an operand: of a stack that it slices, the slices.

        None: it hands the operand on, so that what reads the result decides.
        """
        parameter = next(
            (i for i in inside.values() if i.opcode == "parameter" and i.rest.startswith(f"{number})")), None
        )
        return 0.0 if parameter is None else self._used(inside, parameter)

    def _used(self, inside: Mapping[str, Instruction], source: Instruction) -> float | None:
        if source.is_root:
            return None
        total, whole = 0.0, sum(a.bytes for a in source.result)
        for user in inside.values():
            for place, name in enumerate(user.operands):
                if name != source.name:
                    continue
                if user.opcode in ("dynamic-slice", "gather", "slice") and place == 0:
                    total += sum(a.bytes for a in user.result)
                elif user.opcode == "dynamic-update-slice" and place == 0:
                    continue
                elif user.opcode in _ELEMENT_BY_ELEMENT or user.opcode == "fusion":
                    inner = self.computations.get(user.called[0]) if user.opcode == "fusion" else None
                    used = None if inner is None else self._read(inner, place)
                    used = self._used(inside, user) if used is None else used
                    if used is None:
                        return None
                    total += used
                else:
                    return whole
        return min(total, whole)

    def _written(self, inside: Mapping[str, Instruction], fusion: Instruction) -> float:
        """Bytes that a fused kernel writes: of a stack that it updates in place, the update."""
        root = next((i for i in inside.values() if i.is_root), None)
        parts = [root] if root is None or root.opcode != "tuple" else [inside.get(name) for name in root.operands]
        if root is None or len(parts) != len(fusion.result):
            return _main_bytes(fusion)
        total = 0.0
        for part, array in zip(parts, fusion.result, strict=True):
            while part is not None and part.opcode == "bitcast":
                part = inside.get(part.operands[0])
            if part is not None and part.opcode == "dynamic-update-slice":
                update = inside[part.operands[1]]
                total += sum(a.bytes for a in update.result) if array.is_in_main_memory else 0.0
            else:
                total += array.bytes if array.is_in_main_memory else 0.0
        return total


def _condition_and_body(loop: Instruction) -> tuple[str, str]:
    return loop.attribute(r"condition=%?([\w.-]+)") or "", loop.attribute(r"body=%?([\w.-]+)") or ""


def _constant(defined: Mapping[str, Instruction], name: str) -> int | None:
    """The integer that an instruction is, or a copy of one."""
    found = defined.get(name)
    while found is not None and found.opcode in ("copy", "bitcast", "convert", "copy-start", "copy-done"):
        found = defined.get(found.operands[0])
    number = re.match(r"(-?\d+)\)", found.rest) if found is not None and found.opcode == "constant" else None
    return int(number[1]) if number else None


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if not line.startswith(" "):
            header = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
            current = None
            if header and "->" in line:
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif current is not None and " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("no entry computation: expected the text of a compiled program, `compiled.as_text()`")
    return computations, entry


def _instruction(line: str) -> Instruction:
    left, right = line.strip().split(" = ", 1)
    shape_end = _closing(right, 0) if right.startswith("(") else right.index(" ")
    shape, right = right[:shape_end], right[shape_end:].strip()
    opcode, right = right.split("(", 1)
    end = _closing("(" + right, 0) - 1
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        opcode=opcode,
        result=tuple(_arrays(shape)),
        operands=tuple(_NAME.findall(right[: end - 1])),
        rest=right if opcode in ("constant", "parameter") else right[end:],
        is_root=left.startswith("ROOT "),
    )


def _closing(text: str, start: int) -> int:
    """The position behind the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


@functools.lru_cache(maxsize=4096)
def _arrays(shape: str) -> list[Array]:
    found = []
    for match in _ARRAY.finditer(shape):
        sizes = tuple(int(size.removeprefix("<=")) for size in match["sizes"].split(",") if size)
        space = re.search(r"S\((\d+)\)", match["layout"] or "")
        found.append(Array(match["dtype"], sizes, space is None or space[1] == "0"))
    return found


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits[1]) if digits else 8


def _main_bytes(instruction: Instruction) -> float:
    return sum(a.bytes for a in instruction.result if a.is_in_main_memory)


def _flops(instruction: Instruction, defined: Mapping[str, Instruction]) -> float:
    if instruction.opcode not in ("dot", "convolution") or len(instruction.operands) < 2:
        return 0.0
    left, right = (defined[name].result[0].sizes for name in instruction.operands[:2])
    out = instruction.result[0].sizes
    if instruction.opcode == "dot":
        contracted = _integers(instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
        return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)
    return _convolution_flops(instruction, left, right, out)


def _convolution_flops(
    instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]
) -> float:
    """Without products with padding; a TPU writes products with batch axes as convolutions that have much of it."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    assert labels is not None, instruction.rest[:200]
    lefts, rights, outs = labels[1], labels[2], labels[3]
    window = dict(re.findall(r"(\w+)=([^ }]+)", instruction.attribute(r"window=\{([^}]*)\}") or ""))
    split = lambda key, default: window[key].split("x") if key in window else itertools.repeat(default)
    spatial = [c for c in outs if c.isdigit()]
    settings = zip(*(split(key, d) for key, d in _WINDOW.items()), strict=False)
    pairs = 1.0
    for axis, (size, stride, pad, left_dilation, right_dilation) in zip(sorted(spatial), settings, strict=False):
        low = int(pad.split("_")[0])
        inputs, step = left[lefts.index(axis)], int(left_dilation)
        valid = 0
        for o in range(out[outs.index(axis)]):
            for w in range(int(size)):
                at = o * int(stride) + w * int(right_dilation) - low
                valid += 0 <= at <= (inputs - 1) * step and at % step == 0
        pairs *= valid
    return 2.0 * pairs * out[outs.index("b")] * out[outs.index("f")] * right[rights.index("i")]


_WINDOW = {"size": "1", "stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}


def _integers(text: str | None) -> list[int]:
    return [int(part) for part in (text or "").split(",") if part]


def _in_and_out(instruction: Instruction, defined: Mapping[str, Instruction]) -> tuple[float, float]:
    """Bytes that a device gives to a collective, and that it gets."""
    given = sum(a.bytes for name in instruction.operands if name in defined for a in defined[name].result)
    got = sum(a.bytes for a in instruction.result)
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        got -= given  # the result names what was given, too
    return given, got


def _sent(kind: str, before: float, after: float, n: int) -> float:
    """Bytes that a device sends around a ring of n."""
    if n < 2:
        return 0.0
    if kind == "all-gather":
        return after * (n - 1) / n
    if kind == "all-reduce":
        return 2 * before * (n - 1) / n
    if kind in ("reduce-scatter", "all-to-all", "ragged-all-to-all"):
        return before * (n - 1) / n
    return before  # permute, broadcast


def _group_size(instruction: Instruction) -> int:
    """Devices that take part together, from any of the ways to write them."""
    rest = instruction.rest
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(_integers(found[1]))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=", rest):
        return _integers(found[1])[-1]
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest):
        sizes: dict[str, Any] = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        return math.prod(sizes[name] for name in re.findall(r"'([^']+)'", found[2]))
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        return 2 if "{" in found[1] else 1
    return 1
