"""What a method costs: parameters, FLOPs and temporary memory of a training step with AdamW, against LoRA's.

    python -m experiments.bench.method_cost [--tokens 4x128] [--rank 8] [--methods LoRA,DoRA] [--repeats 5]

FLOPs and bytes are XLA's own analysis of the compiled step, which is not run: the parameters are shapes. `--repeats`
runs it as well, in turns with the first method's, and adds the median ratio of the times. The adapter and the
optimiser's state are donated, as in training: otherwise XLA keeps activations in the results' buffers, which do not
count as temporary, and full fine-tuning looks frugal.

"frozen" is the decoder alone: its loss, and the loss with its gradient for the embedded tokens, to which a method adds.
A method that adapts nothing near the embedding needs less than that.

The second table is of a decoder whose layers are scanned, over weights in float32 and in NF4. It has no FLOPs, since
XLA counts a loop's body once.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lorax
from experiments.bench.decoder import Shape, biased_dense, decoder, init_params, loss, with_biases
from experiments.bench.methods import Entry, entries
from experiments.bench.step_cost import adapted_step, cost, seconds
from experiments.models.llama import Llama, LlamaConfig

TX = optax.adamw(1e-3)
TRAINING_STEPS = 1000  # AdaLoRA's schedule has to know them; no count depends on them
NONE = "–"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A compiled training step.

    Args:
        base: the frozen parameters, as shapes.
        adapter: likewise.
        tx: the optimiser.
        run: `run(base, adapter, opt_state, tokens)` returns the next adapter and state, and the loss.
        cost: "GFLOP", "temp MiB" and "constants MiB".
    """

    base: Any
    adapter: lorax.Adapter
    tx: optax.GradientTransformation
    run: Callable[..., Any]
    cost: dict[str, float]

    @property
    def parameters(self) -> int:
        """The numbers that are trained."""
        return sum(x.size for x in jax.tree.leaves(self.adapter.params))


def optimiser(adapter: lorax.Adapter) -> optax.GradientTransformation:
    """Return AdamW, for AdaLoRA with the budget update around it."""
    has_budget = any(isinstance(method, lorax.AdaLoRA) for method in adapter.methods.values())
    return lorax.optim.adalora(TX, adapter, total_steps=TRAINING_STEPS) if has_budget else TX


def compile_step(fn: Callable[..., Any], params: Any, spec: lorax.Spec, tokens: Any, rules: Any = None) -> Step:
    """Compile a training step without running anything.

    Args:
        fn: `fn(params, tokens)` returns logits.
        params: shapes of the parameters.
        spec: which sites get which method.
        tokens: shape of the tokens.
        rules: what `lorax.quantize` is to store in which format; None leaves all in float32.
    """
    sites = lorax.trace(fn, params, tokens)
    base = params if rules is None else jax.eval_shape(lambda p: lorax.quantize(p, rules, sites=sites), params)
    adapter = jax.eval_shape(lambda p: lorax.init(jax.random.key(1), spec, sites, p), base)
    tx = optimiser(adapter)
    step = jax.jit(adapted_step(fn, tx), donate_argnums=(1, 2))
    run = step.lower(base, adapter, jax.eval_shape(tx.init, adapter.params), tokens).compile()
    return Step(base=base, adapter=adapter, tx=tx, run=run, cost=cost(run))


def frozen_cost(shape: Shape, tokens: Any, *, has_backward: bool) -> dict[str, float]:
    """Return the cost of the decoder's loss, with or without its gradient for the embedded tokens."""

    def of_rows(rows: jax.Array, params: Any, tokens: jax.Array) -> jax.Array:
        places = jnp.arange(tokens.size).reshape(tokens.shape)
        return loss(decoder(shape)({**params, "embed": rows}, places), tokens)

    def run(params: Any, tokens: jax.Array) -> Any:
        rows = jnp.take(params["embed"], tokens.reshape(-1), axis=0)
        return (jax.value_and_grad(of_rows) if has_backward else of_rows)(rows, params, tokens)

    return cost(jax.jit(run).lower(_params(shape), tokens).compile())


def time_ratio(first: Step, second: Step, tokens: Any, repeats: int) -> float:
    """Return the median, over turns, of the second step's time as a multiple of the first's."""

    def runner(step: Step) -> Callable[[], Any]:
        base, adapter = jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), (step.base, step.adapter))
        read = jnp.zeros(tokens.shape, tokens.dtype)
        held = (adapter, step.tx.init(adapter.params))  # donated: a step goes on from the one before

        def once() -> Any:
            nonlocal held
            adapter, opt_state, value = step.run(base, *held, read)
            held = (adapter, opt_state)
            return value

        return once

    times = seconds({"first": runner(first), "second": runner(second)}, repeats)
    return statistics.median(b / a for a, b in zip(times["first"], times["second"], strict=True))


def compare_methods(
    shape: Shape, chosen: Sequence[Entry], batch: int, length: int, repeats: int = 0
) -> dict[str, Step]:
    """Print a row for each method, with ratios to the first one, and return their steps by name."""
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    size = sum(x.size for x in jax.tree.leaves(_params(shape)))
    title = f"{shape.layers} layers, d {shape.d_model}, feed-forward {shape.d_ff}, vocabulary {shape.vocabulary}"
    print(f"\n{title}, {batch}×{length} tokens; {size:,} parameters\n")
    over = f"÷ {chosen[0].name}"
    heads = ["method", "setting", "sites", "parameters of a site", "parameters", "adapter MiB", "optimiser MiB"]
    heads += ["mergeable", "GFLOP", over, "over frozen", "temporary MiB", over, "over frozen"]
    forward, frozen = (frozen_cost(shape, tokens, has_backward=b) for b in (False, True))
    rows: list[list[Any]] = []
    for name, of in (("frozen, forward", forward), ("frozen, and backward", frozen)):
        rows.append([name, *[NONE] * 7, f"{of['GFLOP']:.2f}", NONE, NONE, f"{of['temp MiB']:.1f}", NONE, NONE])
    steps: dict[str, Step] = {}
    for entry in chosen:
        fn = decoder(shape, biased_dense) if entry.has_biases else decoder(shape)
        params = jax.eval_shape(with_biases, _params(shape)) if entry.has_biases else _params(shape)
        steps[entry.name] = compile_step(fn, params, entry.spec, tokens)
        rows.append(_row(entry, steps[entry.name], steps[chosen[0].name], frozen))
    if repeats:
        heads.append(f"time {over}")
        first, *others = steps.values()
        ratios = [f"{time_ratio(first, step, tokens, repeats):.2f}" for step in others]
        rows = [[*row, time] for row, time in zip(rows, [NONE, NONE, "1.00", *ratios], strict=True)]
    print(markdown(heads, rows))
    return steps


def _row(entry: Entry, step: Step, first: Step, frozen: dict[str, float]) -> list[Any]:
    adapter = step.adapter
    row = [entry.name, entry.setting, len(adapter.sites), entry.formula, f"{step.parameters:,}"]
    row += [_mebibytes((adapter.params, adapter.state)), _mebibytes(jax.eval_shape(step.tx.init, adapter.params))]
    row += ["yes" if entry.is_mergeable else "no"]
    for what, decimals in (("GFLOP", 2), ("temp MiB", 1)):
        value, reference, least = step.cost[what], first.cost[what], frozen[what]
        row += [f"{value:.{decimals}f}", f"{value / reference:.3f}", f"{100 * (value / least - 1):+.1f} %"]
    return row


def compare_scanned(
    config: LlamaConfig,
    rank: int,
    batch: int,
    length: int,
    *,
    remats: Sequence[str | None] = (None, "full"),
    names: Sequence[str] = ("LoRA", "DoRA", "DoRA, LoRA on the head", "LoRA over NF4", "DoRA over NF4"),
) -> dict[tuple[str | None, str], Step]:
    """Print the memory of steps of a scanned decoder, the first name's as reference; return them by remat and name."""
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    title = f"{config.layers} scanned layers, d {config.dim}, feed-forward {config.ffn_dim}, vocabulary"
    print(f"\n{title} {config.vocab_size}, {batch}×{length} tokens; all kernels adapted, or quantised and adapted\n")
    heads = ["recomputed in the backward pass", "step", "base MiB", "temporary MiB", f"÷ {names[0]}"]
    rows: list[list[Any]] = []
    steps: dict[tuple[str | None, str], Step] = {}
    for remat in remats:
        model = Llama(dataclasses.replace(config, remat=remat))
        params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        for name in names:
            method = lorax.DoRA if name.startswith("DoRA") else lorax.LoRA
            on_head = lorax.LoRA if name.endswith("LoRA on the head") else method
            spec = lorax.Spec({"head/.*": on_head(rank=rank), ".*kernel": method(rank=rank)})
            rules = {".*kernel": lorax.NF4()} if name.endswith("NF4") else None
            fn = lambda p, tokens, model=model: model.apply({"params": p}, tokens)
            step = steps[remat, name] = compile_step(fn, params, spec, tokens, rules)
            temporary, reference = step.cost["temp MiB"], steps[remat, names[0]].cost["temp MiB"]
            row = ["nothing" if remat is None else "every layer" if remat == "full" else remat, name]
            rows.append([*row, _mebibytes(step.base), f"{temporary:.1f}", f"{temporary / reference:.3f}"])
    print(markdown(heads, rows))
    return steps


def markdown(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table.

    >>> print(markdown(["a", "b"], [[1, "x"]]))
    | a | b |
    |---|---|
    | 1 | x |
    """
    lines = [heads, ["---"] * len(heads), *rows]
    body = [" | ".join(map(str, line)) for line in lines]
    return "\n".join(f"|{line.replace(' ', '')}|" if i == 1 else f"| {line} |" for i, line in enumerate(body))


def _params(shape: Shape) -> Any:
    return jax.eval_shape(lambda: init_params(jax.random.key(0), shape))


def _mebibytes(tree: Any) -> str:
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 2**20
    return f"{size:.2f}" if size < 10 else f"{size:.1f}"


def _chosen(names: str, rank: int) -> list[Entry]:
    known = {entry.name: entry for entry in entries(rank)}
    unknown = [name for name in filter(None, names.split(",")) if name not in known]
    if unknown:
        raise ValueError(f"--methods has {unknown}; known are {', '.join(known)}")
    return [known[name] for name in names.split(",")] if names else list(known.values())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", default="4x128", help="batch x length")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--methods", default="", help="names from the table, with commas; the first is the reference")
    parser.add_argument("--repeats", type=int, default=0, help="also run the steps, so often")
    parser.add_argument("--no-scanned", action="store_true", help="leave out the second table")
    args = parser.parse_args(arguments)
    batch, length = map(int, args.tokens.split("x"))
    shape = Shape(layers=args.layers)
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")
    compare_methods(shape, _chosen(args.methods, args.rank), batch, length, args.repeats)
    if not args.no_scanned:
        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            layers=shape.layers,
            dim=shape.d_model,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head,
            ffn_dim=shape.d_ff,
            max_positions=length,
        )
        compare_scanned(config, args.rank, batch, length)


if __name__ == "__main__":
    main()
