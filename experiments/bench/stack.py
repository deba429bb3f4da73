"""What a stack of N adapters costs against the same N runs one after the other.

    python -m experiments.bench.stack [--members 1,2,4,8,16,32] [--tokens 1x32,4x256] [--layers 4] [--repeats 5]

A member is LoRA on every linear layer of a decoder, of rank 2, 4, 8 or 16, with a learning rate and a batch of its own;
a run is one step of training with AdamW. The stack pads all ranks to 16; alone, each run has its own. The first table
of a token count is of the programs: seconds to compile the stack's step, also as a multiple of one run's and of those
of all N (which compile once for each different rank), each the shortest of several times, taken in turns; FLOPs and
temporary memory by XLA's analysis, a member; and the memory that one more member adds, less that of its own adapter,
moments and batch, against one run's temporary memory. The second table is of times, interleaved: a step of all members
together and of the N runs one after the other. The base is an argument of both, and is held once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lorax
from experiments.bench.decoder import Shape, decoder, init_params, loss
from experiments.bench.step_cost import KERNELS, seconds

RANKS = (2, 4, 8, 16)
COMPILES = 5
MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled training step.

    Args:
        run: `run(params, adapter, opt_state, tokens)` returns the next adapter and state, and the losses.
        compile_anew: compiles the step once more.
        compile_seconds: what XLA took, without tracing, each time.
        flops: of a step.
        temporary: bytes.
        own: bytes of adapter, optimiser's state and batch.
        held: what the next step starts from.
        tokens: the batch.
    """

    run: Callable[..., Any]
    compile_anew: Callable[[], Any]
    compile_seconds: list[float]
    flops: float
    temporary: int
    own: int
    held: list[Any]
    tokens: jax.Array

    def step(self, params: Any) -> Any:
        """Take a step; its arguments are donated, so that it goes on from the one before."""
        *self.held[:], value = self.run(params, *self.held, self.tokens)
        return value


def build(step: Callable[..., Any], params: Any, adapter: Any, opt_state: Any, tokens: jax.Array) -> Program:
    """Compile a step."""
    took: list[float] = []
    abstract = jax.tree.map(jax.typeof, (params, adapter, opt_state, tokens))  # the arrays are donated

    def compile_anew() -> Any:
        anew = functools.partial(step)  # what was lowered before would be compiled once and kept
        lowered = jax.jit(anew, donate_argnums=(1, 2)).lower(*abstract)
        start = time.perf_counter()
        compiled = lowered.compile()
        took.append(time.perf_counter() - start)
        return compiled

    compiled = compile_anew()
    own = sum(x.nbytes for x in jax.tree.leaves((adapter, opt_state, tokens)))
    return Program(
        run=compiled,
        compile_anew=compile_anew,
        compile_seconds=took,
        flops=compiled.cost_analysis()["flops"],
        temporary=compiled.memory_analysis().temp_size_in_bytes,
        own=own,
        held=[adapter, opt_state],
        tokens=tokens,
    )


class Grid:
    """N runs: together as one program, and each by itself.

    Args:
        shape: of the decoder.
        params: its parameters.
        tokens: batch and length.
    """

    def __init__(self, shape: Shape, params: Any, tokens: tuple[int, int]):
        """Trace the decoder."""
        self._fn, self._params, self._vocabulary, self._tokens = decoder(shape), params, shape.vocabulary, tokens
        self._sites = lorax.trace(self._fn, params, jax.ShapeDtypeStruct(tokens, jnp.int32))
        self._alone: dict[int, Program] = {}

    def _member(self, number: int) -> tuple[lorax.Adapter, jax.Array]:
        spec = lorax.Spec({KERNELS: lorax.LoRA(rank=RANKS[-1 - number % len(RANKS)])})
        adapter = lorax.init(jax.random.key(number), spec, self._sites, self._params)
        return adapter, jax.random.randint(jax.random.key(100 + number), self._tokens, 0, self._vocabulary)

    def _value_and_grad(self, adapter: lorax.Adapter, params: Any, tokens: jax.Array) -> Any:
        adapted = lorax.adapt(self._fn, strict=True)
        of = lambda p: loss(adapted(params, adapter.replace(params=p), tokens), tokens)
        return jax.value_and_grad(of)(adapter.params)

    def together(self, count: int) -> Program:
        """Compile a step of the first members."""
        adapters, tokens = zip(*(self._member(i) for i in range(count)), strict=True)
        stack = lorax.stack(adapters)
        make = lambda adapter, learning_rate: optax.adamw(learning_rate)
        tx = lorax.optim.stacked(make, stack, learning_rate=[1e-4 * (i + 1) for i in range(count)])

        def step(params: Any, stack: lorax.Adapter, opt_state: Any, tokens: jax.Array) -> Any:
            losses, grads = jax.vmap(self._value_and_grad, (0, None, 0))(stack, params, tokens)
            updates, opt_state = tx.update(grads, opt_state, stack.params, value=losses)
            return stack.replace(params=optax.apply_updates(stack.params, updates)), opt_state, losses

        return build(step, self._params, stack, tx.init(stack.params), jnp.stack(tokens))

    def alone(self, number: int) -> Program:
        """Compile a step of one member, or return that of one of its rank: a rate needs no other program."""
        kind = number % len(RANKS)
        if kind not in self._alone:
            adapter, tokens = self._member(kind)
            tx = optax.adamw(1e-4)

            def step(params: Any, adapter: lorax.Adapter, opt_state: Any, tokens: jax.Array) -> Any:
                value, grads = self._value_and_grad(adapter, params, tokens)
                updates, opt_state = tx.update(grads, opt_state, adapter.params)
                return adapter.replace(params=optax.apply_updates(adapter.params, updates)), opt_state, value

            self._alone[kind] = build(step, self._params, adapter, tx.init(adapter.params), tokens)
        return self._alone[kind]


def report(grid: Grid, params: Any, counts: Sequence[int], repeats: int) -> None:
    """Print both tables of one token count."""
    largest = grid.alone(0)  # of rank 16, as the stack is padded to
    programs = {n: grid.together(n) for n in counts}
    for _ in range(COMPILES - 1):  # in turns, so that a busy moment of the machine is not one program's alone
        for program in (*programs.values(), *(grid.alone(i) for i in range(min(max(counts), len(RANKS))))):
            program.compile_anew()
    compiling = lambda program: min(program.compile_seconds)
    row = "{:>8}{:>11}{:>9}{:>13}{:>14}{:>10}{:>14}{:>16}"
    print(
        row.format("members", "compile s", "× one", "× one by one", "GFLOP/member", "× one", "temp MiB", "added/one's")
    )
    for n, program in programs.items():
        separately = sum({i % len(RANKS): compiling(grid.alone(i)) for i in range(n)}.values())
        added = (program.temporary - largest.temporary) / (n - 1) / largest.temporary if n > 1 else float("nan")
        print(
            row.format(
                n,
                f"{compiling(program):.2f}",
                f"{compiling(program) / compiling(largest):.2f}",
                f"{compiling(program) / separately:.2f}",
                f"{program.flops / n / 1e9:.2f}",
                f"{program.flops / n / largest.flops:.3f}",
                f"{program.temporary / MIB:.1f}",
                "–" if n == 1 else f"{added:.2f}",
            )
        )
    row = "{:>8}{:>20}{:>20}{:>20}{:>20}"
    print(
        row.format("members", "own MiB a member", "together ms/member", "one by one ms/member", "together/one by one")
    )
    for n, program in programs.items():
        singles = [grid.alone(i) for i in range(n)]
        steps = {
            "together": lambda p=program: p.step(params),
            "one by one": lambda s=singles: [p.step(params) for p in s],
        }
        times = seconds(steps, repeats)
        ratios = [a / b for a, b in zip(times["together"], times["one by one"], strict=True)]
        per_member = [f"{1e3 * statistics.median(times[name]) / n:.1f}" for name in steps]
        print(row.format(n, f"{program.own / n / MIB:.2f}", *per_member, f"{statistics.median(ratios):.2f}"))


def main() -> None:
    """Print the tables of each token count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", default="1,2,4,8,16,32")
    parser.add_argument("--tokens", default="1x32,4x256", help="batch x length, several")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d_model", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    d = args.d_model
    shape = Shape(
        layers=args.layers, d_model=d, heads=d // 64, kv_heads=d // 128, d_ff=d * 11 // 4, vocabulary=args.vocabulary
    )
    params = jax.jit(lambda: init_params(jax.random.key(0), shape))()
    size = sum(x.nbytes for x in jax.tree.leaves(params)) / MIB
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}; base {size:.0f} MiB, {args.layers} layers, d {d}")
    for text in args.tokens.split(","):
        batch, length = map(int, text.split("x"))
        print(f"\n{batch}×{length} tokens a member")
        report(Grid(shape, params, (batch, length)), params, [int(n) for n in args.members.split(",")], args.repeats)


if __name__ == "__main__":
    main()
