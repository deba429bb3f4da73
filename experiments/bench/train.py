"""How fast a training step is: against the frozen decoder's forward and backward pass, and against PEFT.

    python -m experiments.bench.train [--shape 32m] [--tokens 8x256] [--dtype float32] [--variants floor,lora-all-8,…]
        [--repeats 10] [--torch-python PYTHON] [--json FILE]

A decoder of the Llama family with random weights, next-token cross-entropy over all positions, AdamW. Every variant
runs in a process of its own; the processes take turns, one step each, so that what disturbs the machine disturbs all.
Times are medians over turns, ratios medians of the turns' ratios.

    forward           the loss alone
    floor             the loss and its gradient for the embedded tokens: what any adapter near the input needs
    lora-qv-8, -64    LoRA on query and value, of rank 8 and 64
    lora-all-8, -64   LoRA on the seven linear layers of every block
    dora-all-8, qlora-all-8 (NF4, double quantisation), full
    peft-8, peft-compiled-8    the same as lora-all-8 by PEFT, eager and through torch.compile

The last ones need torch, transformers and peft, in this Python or in the one that `--torch-python` names; without them
they are left out, and the table says so. MFU counts the FLOPs that the variant needs (products with weights and of the
attention, forward and backward; a weight's gradient only where it is trained) over the peak of the chip, on a CPU of
that of a product of two large matrices, measured beforehand.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import platform
import statistics
import subprocess
import sys
from typing import Any

from experiments.bench.worker_settings import SHAPES, Settings, needed_flops

VARIANTS = (
    *("forward", "floor", "lora-qv-8", "lora-qv-64", "lora-all-8", "lora-all-64", "dora-all-8", "qlora-all-8", "full"),
    *("peft-8", "peft-compiled-8"),
)
BASELINE = "peft-8"
HERE = pathlib.Path(__file__).parent


class Worker:
    """A process that holds one variant, ready to run a step when told to."""

    def __init__(self, settings: Settings, python: str):
        """Start it; `facts` are what it says of itself once it is ready."""
        is_torch = settings.variant.startswith("peft")
        program = [str(HERE / "train_peft.py")] if is_torch else ["-m", "experiments.bench.train_worker"]
        self._process = subprocess.Popen(
            [python if is_torch else sys.executable, *program, json.dumps(dataclasses.asdict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.variant = settings.variant
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.variant}: its process ended with {self._process.wait()}; see above what it said")

    def _tell(self, word: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(word, file=self._process.stdin, flush=True)
        return self._answer()

    def step(self) -> float:
        """Run a step and return its seconds."""
        return self._tell("step")["seconds"]

    def end(self) -> dict[str, Any]:
        """End the process and return its last words: loss and peak memory."""
        last = self._tell("end")
        self._process.wait()
        return last


def measure(shape: str, batch: int, length: int, dtype: str, variants: list[str], repeats: int, python: str) -> Any:
    """Run all variants in turns and return a row for each."""
    workers = [Worker(Settings(shape, variant, batch, length, dtype), python) for variant in variants]
    times: dict[str, list[float]] = {worker.variant: [] for worker in workers}
    for worker in workers:
        worker.step()  # what is done once
    for _ in range(repeats):
        for worker in workers:
            times[worker.variant].append(worker.step())
    rows = []
    for worker in workers:
        name, own = worker.variant, times[worker.variant]
        median = statistics.median(own)
        settings = Settings(shape, name, batch, length, dtype)
        over = lambda other, own=own: statistics.median(b / a for a, b in zip(times[other], own, strict=True))
        peak = workers[0].facts["peak_flops"]
        rows.append(
            {
                "variant": name,
                "seconds": median,
                "tokens_per_s": batch * length / median,
                "mfu": needed_flops(settings) / median / peak if peak else None,
                "over_floor": over("floor") if "floor" in times else None,
                "speed_over_peft": 1 / over(BASELINE) if BASELINE in times else None,
                "speed_over_compiled_peft": 1 / over("peft-compiled-8") if "peft-compiled-8" in times else None,
                **worker.facts,
                **worker.end(),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as markdown."""
    number = lambda x, form: "–" if x is None else format(x, form)
    lines = [
        "| step | tokens/s | MFU | time ÷ floor | speed ÷ PEFT | ÷ PEFT compiled | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['variant']} | {row['tokens_per_s']:.0f} | {number(row['mfu'], '.1%')} "
            f"| {number(row['over_floor'], '.3f')} | {number(row['speed_over_peft'], '.2f')} "
            f"| {number(row['speed_over_compiled_peft'], '.2f')} | {row['peak_bytes'] / 2**20:.0f} |"
        )
    return "\n".join(lines)


def has_torch(python: str) -> bool:
    """Tell whether a Python has what PEFT's side needs."""
    names = ("torch", "transformers", "peft")
    if python == sys.executable:
        return all(importlib.util.find_spec(name) for name in names)
    return (
        subprocess.run([python, "-c", f"import {', '.join(names)}"], capture_output=True, check=False).returncode == 0
    )


def main() -> None:
    """Print the table, and write what was measured as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="32m", choices=SHAPES)
    parser.add_argument("--tokens", default="8x256", help="batch x length")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    batch, length = map(int, args.tokens.split("x"))
    variants = args.variants.split(",")
    if unknown := sorted(set(variants) - set(VARIANTS)):
        parser.error(f"--variants: unknown {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    if any(name.startswith("peft") for name in variants) and not has_torch(args.torch_python):
        print(
            "PEFT is not compared: torch, transformers and peft are not installed; --torch-python names where they are"
        )
        variants = [name for name in variants if not name.startswith("peft")]
    rows = measure(args.shape, batch, length, args.dtype, variants, args.repeats, args.torch_python)
    facts = {"shape": args.shape, "tokens": args.tokens, "dtype": args.dtype, "repeats": args.repeats}
    facts |= {"machine": f"{platform.system()} {platform.machine()}", "device": rows[0]["device"]}
    versions = dict(item for row in rows for item in row["versions"].items())
    print(f"\n{args.shape}, {args.tokens} tokens, {args.dtype}, on {facts['device']}; {versions}\n")
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({**facts, "versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
