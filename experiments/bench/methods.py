"""The methods of the literature at the bench decoder: which leaves each adapts, and how many numbers it trains there.

Letters of the closed forms: I fan-in, O fan-out, r rank, n positions of the prompt or prefix, D width of the decoder.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import lorax

LINEAR = r"(layers/\d+/\w+|head)/kernel"
KEYS_AND_VALUES = r"layers/\d+/(key|value)/kernel"
NORMS = r"(layers/\d+/)?norm\w*"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A method as it is commonly used.

    Args:
        name: what the table calls it.
        setting: its rank or length, and where it is put, in words.
        rules: what `lorax.Spec` gets.
        formula: numbers trained at a site, for the reader.
        numbers: the same as a function of the site, to hold the adapter against.
        has_biases: whether it needs a decoder that has biases.
    """

    name: str
    setting: str
    rules: dict[str, lorax.Method]
    formula: str
    numbers: Callable[[lorax.Site], int]
    has_biases: bool = False

    @property
    def spec(self) -> lorax.Spec:
        """Which leaves get the method."""
        return lorax.Spec(self.rules)

    @property
    def is_mergeable(self) -> bool:
        """Whether all that it does can be merged into the weights."""
        return all(method.is_mergeable for method in self.rules.values())


def entries(
    rank: int = 8, vera_rank: int = 256, adalora_rank: int = 12, width: int = 64, length: int = 8
) -> list[Entry]:
    """Return all methods, LoRA first.

    Args:
        rank: of the methods with factors, VeRA and AdaLoRA excepted.
        vera_rank: the projections' of VeRA, which trains hardly more numbers at a large one.
        adalora_rank: what AdaLoRA starts with; two thirds of it are left at the end.
        width: of the bottleneck adapters.
        length: positions of a prompt or prefix.

    >>> [entry.name for entry in entries() if not entry.is_mergeable]
    ['adapter, Houlsby', 'adapter, Pfeiffer', 'prompt tuning', 'prefix tuning']
    """
    everywhere = f"rank {rank}, all linear"
    thin = lambda r: lambda site: r * (site.size("I") + site.size("O"))
    outputs = lambda site: site.size("O")
    bottleneck = lambda site: 2 * width * site.size("O") + width + site.size("O")
    leaf = lambda site: math.prod(site.shape)
    adalora = lorax.AdaLoRA(rank=adalora_rank)

    def kronecker(site: lorax.Site) -> int:
        small_in, small_out = (_divisor(site.size(side)) for side in "IO")
        return small_in * small_out + rank * (site.size("I") // small_in + site.size("O") // small_out)

    rows = [
        ("LoRA", everywhere, {LINEAR: lorax.LoRA(rank=rank)}, "r(I + O)", thin(rank)),
        ("rsLoRA", everywhere, {LINEAR: lorax.LoRA(rank=rank, rank_stabilized=True)}, "r(I + O)", thin(rank)),
        ("LoRA from PiSSA", everywhere, {LINEAR: lorax.LoRA(rank=rank, initializer="pissa")}, "r(I + O)", thin(rank)),
        (
            "DoRA",
            everywhere,
            {LINEAR: lorax.DoRA(rank=rank)},
            "r(I + O) + O",
            lambda site: thin(rank)(site) + outputs(site),
        ),
        (
            "AdaLoRA",
            f"rank {adalora_rank} → {adalora.budget}, all linear",
            {LINEAR: adalora},
            "r(I + O + 1) + 1",
            lambda site: thin(adalora_rank)(site) + adalora_rank + 1,
        ),
        ("LoRA-FA", everywhere, {LINEAR: lorax.LoRAFA(rank=rank)}, "rO", lambda site: rank * outputs(site)),
        (
            "VeRA",
            f"rank {vera_rank}, all linear",
            {LINEAR: lorax.VeRA(rank=vera_rank)},
            "r + O",
            lambda site: vera_rank + outputs(site),
        ),
        ("LoHa", everywhere, {LINEAR: lorax.LoHa(rank=rank)}, "2r(I + O)", thin(2 * rank)),
        ("LoKr", everywhere, {LINEAR: lorax.LoKr(rank=rank)}, "m·k + r(I/m + O/k), m ≤ √I, k ≤ √O", kronecker),
        (
            "(IA)³",
            "key, value; down's input",
            {KEYS_AND_VALUES: lorax.IA3(), r"layers/\d+/down/kernel": lorax.IA3(on="input")},
            "O, or I",
            lambda site: site.size("I" if "/down/" in site.path else "O"),
        ),
        ("BitFit", "a bias at all linear", {r".*/bias": lorax.Full()}, "O", leaf),
        ("norm tuning", "all norms", {NORMS: lorax.Full()}, "D", leaf),
        ("full", "all leaves", {r".*": lorax.Full()}, "I·O", leaf),
        (
            "adapter, Houlsby",
            f"width {width}, out and down",
            {r"layers/\d+/(out|down)/kernel": lorax.Bottleneck(rank=width)},
            "2rO + r + O",
            bottleneck,
        ),
        (
            "adapter, Pfeiffer",
            f"width {width}, down",
            {r"layers/\d+/down/kernel": lorax.Bottleneck(rank=width)},
            "2rO + r + O",
            bottleneck,
        ),
        (
            "prompt tuning",
            f"{length} positions, embedding",
            {"embed": lorax.Prompt(length=length)},
            "nD",
            lambda site: length * outputs(site),
        ),
        (
            "prefix tuning",
            f"{length} positions, key and value",
            {KEYS_AND_VALUES: lorax.Prefix(length=length)},
            "nO",
            lambda site: length * outputs(site),
        ),
    ]
    fields = ("name", "setting", "rules", "formula", "numbers")
    return [Entry(**dict(zip(fields, row, strict=True)), has_biases=row[0] == "BitFit") for row in rows]


def _divisor(n: int) -> int:
    return max(m for m in range(1, math.isqrt(n) + 1) if n % m == 0)
