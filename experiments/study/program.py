"""The compiled program of a group of runs: a chunk of updates of a stack of adapters over one frozen base.

Axes: T updates of a chunk, N runs (members of the stack), B examples in a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorax
from experiments.study import order
from experiments.study.adaptation import Adaptations, Base
from experiments.study.axes import Cell
from experiments.study.problem import examples
from lorax import analysis


class State(NamedTuple):
    """What an update changes: a stack of N adapters and their optimisers' state."""

    stack: lorax.Adapter
    opt_state: Any


class Log(NamedTuple):
    """Numbers of T updates of N runs, each [T, N]: mean loss before an update, norm of its gradient before clipping,
    and whether the run had diverged by then.
    """  # noqa: D205

    loss: Any
    gradient_norm: Any
    diverged: Any


class Inputs(NamedTuple):
    """What a chunk of updates reads: rows [T, N, B] of the training data, the updates' numbers [T], keys [N]."""

    rows_TxNxB: Any
    steps_T: Any
    dropout_keys_N: Any


class Program(NamedTuple):
    """A compiled chunk.

    Attributes:
        run: `(params, data, state, inputs) -> (state, log)`; the state is donated.
        peak_bytes: arguments, temporaries and results that are no arguments.
        temporary_bytes: temporaries alone.
        flops: of the products of one update, of all runs.
        compile_seconds: tracing and compiling.
    """

    run: Callable[..., tuple[State, Log]]
    peak_bytes: int
    temporary_bytes: int
    flops: float
    compile_seconds: float


class Programs:
    """Compiles the programs of groups; groups of equal shape, such as other seeds of the same settings, share one.

    Args:
        adaptations: of the study.
        batch: examples in an update.
    """

    def __init__(self, adaptations: Adaptations, batch: int):
        self.adaptations, self.batch = adaptations, batch
        self._compiled: dict[Any, Program] = {}

    def start(self, cells: Sequence[Cell]) -> State:
        """Return the stack of the cells' adapters and their optimisers' state as they start."""
        # one program: its results share no buffer, and all of them are to be donated
        return jax.jit(self._start(cells))([self.adaptations.adapter(cell.settings) for cell in cells])

    def abstract_start(self, cells: Sequence[Cell]) -> State:
        """Return its shapes.

        Raises:
            ValueError: the cells' adapters cannot be members of one stack.
        """
        return jax.eval_shape(self._start(cells), [self.adaptations.abstract(cell.settings) for cell in cells])

    def _start(self, cells: Sequence[Cell]) -> Callable[[list[lorax.Adapter]], State]:
        def start(adapters: list[lorax.Adapter]) -> State:
            stack = lorax.stack(adapters)
            return State(stack, self.optimiser(cells, stack).init(stack.params))

        return start

    def optimiser(self, cells: Sequence[Cell], stack: lorax.Adapter) -> optax.GradientTransformationExtraArgs:
        """Return the optimiser of a stack, with a learning rate and a weight decay for each member."""
        settings = [cell.settings for cell in cells]
        return lorax.optim.stacked(
            self.adaptations.optimiser(settings[0]),
            stack,
            learning_rate=np.asarray([s["lr"] for s in settings], np.float32),
            weight_decay=np.asarray([s["weight_decay"] for s in settings], np.float32),
        )

    def inputs(self, cells: Sequence[Cell]) -> Inputs:
        """Return what all updates of the cells read: each its own order of the data and its own dropout."""
        data = self.adaptations.base(cells[0].settings).problem.data["train"]
        rows = [
            order.rows(
                examples(data), s["examples"], steps=s["steps"], batch=self.batch, seed=s["seed"]
            )
            for s in (cell.settings for cell in cells)
        ]  # fmt: skip
        steps = np.arange(cells[0].settings["steps"], dtype=np.int32)
        keys = jnp.stack([self.adaptations.keys(cell.settings["seed"])[1] for cell in cells])
        return Inputs(np.stack(rows, axis=1), steps, keys)

    def compiled(self, cells: Sequence[Cell], state: State, steps: int) -> Program:
        """Return the program that makes `steps` updates of the cells, compiled if none of their shapes was.

        Args:
            cells: the runs.
            state: theirs, or its shapes.
            steps: T.
        """
        settings = cells[0].settings
        base, count = self.adaptations.base(settings), len(cells)
        leaves, tree = jax.tree.flatten(state)
        shapes = tuple((x.shape, str(x.dtype)) for x in leaves)
        key = self.adaptations.program(settings), tree, shapes, steps
        if key not in self._compiled:
            shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.int32)
            keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
            inputs = Inputs(shape(steps, count, self.batch), shape(steps), keys)
            chunk = updates(
                base, self.optimiser(cells, state.stack), has_dropout=any(c.settings["dropout"] for c in cells)
            )
            self._compiled[key] = _compile(chunk, base.params, base.problem.data["train"], state, inputs)
        return self._compiled[key]


def updates(
    base: Base, optimiser: optax.GradientTransformationExtraArgs, *, has_dropout: bool
) -> Callable[[Any, Mapping[str, jax.Array], State, Inputs], tuple[State, Log]]:
    """Return `(params, data, state, inputs) -> (state, log)`: T updates of N runs, one after the other.

    The base is not differentiated and has no axis of members, so that its products and its memory are those of one run.

    Args:
        base: the frozen side.
        optimiser: of `lorax.optim.stacked`.
        has_dropout: whether some run has any.
    """
    problem, adapted = base.problem, lorax.adapt(base.problem.fn)

    def loss(trainable: Any, adapter: lorax.Adapter, params: Any, batch: Any, key: jax.Array) -> jax.Array:
        dropout = {"rng": key} if has_dropout else {}
        outputs = adapted(params, adapter.replace(params=trainable), batch, **dropout)
        return jnp.mean(problem.loss(outputs, batch).astype(jnp.float32))

    def chunk(params: Any, data: Mapping[str, jax.Array], state: State, inputs: Inputs) -> tuple[State, Log]:
        def of_member(adapter: lorax.Adapter, rows_B: jax.Array, key: jax.Array, step: jax.Array) -> Any:
            batch = {name: array[rows_B] for name, array in data.items()}
            of_step = jax.random.fold_in(key, step)
            return jax.value_and_grad(loss)(adapter.params, adapter, params, batch, of_step)

        def update(state: State, now: tuple[jax.Array, jax.Array]) -> tuple[State, Log]:
            rows_NxB, step = now
            stack = state.stack
            losses_N, gradients = jax.vmap(of_member, (0, 0, 0, None))(stack, rows_NxB, inputs.dropout_keys_N, step)
            moved, opt_state = optimiser.update(gradients, state.opt_state, stack.params, value=losses_N)
            stack = stack.replace(params=optax.apply_updates(stack.params, moved))
            return State(stack, opt_state), Log(losses_N, jax.vmap(optax.tree.norm)(gradients), opt_state.diverged)

        return jax.lax.scan(update, state, (inputs.rows_TxNxB, inputs.steps_T))

    return chunk


def _compile(chunk: Callable[..., Any], *arguments: Any) -> Program:
    started = time.perf_counter()
    compiled = jax.jit(chunk, donate_argnums=2).lower(*arguments).compile()
    seconds = time.perf_counter() - started
    steps = arguments[-1].steps_T.shape[0]
    return Program(compiled, *memory(compiled), float(analysis.flops(chunk, *arguments)) / steps, seconds)


def memory(compiled: Any) -> tuple[int, int]:
    """Return the bytes that a compiled program holds at most, as XLA plans them, and those of its temporaries."""
    analysis = compiled.memory_analysis()
    if analysis is None:  # a backend that does not say
        return 0, 0
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    peak = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + results
    return int(peak), int(analysis.temp_size_in_bytes)
