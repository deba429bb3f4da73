"""The training loop: updates, logs, evaluations and checkpoints, and going on after a kill."""

import math
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import config_dict
from tqdm import tqdm

import lorax
from experiments.data import Batches
from experiments.training import devices, optimiser, step, update
from experiments.training.metrics import MetricsLog, NoLog
from experiments.training.run_directory import RunDirectory
from experiments.training.stopping import Stopped, StopSignals
from lorax.checkpoint import TrainCheckpoints

PROGRESS_BAR = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps, {remaining} left{postfix}"

# Evaluates the adapter after a step: scalars for the step's line in metrics.jsonl.
Watch = Callable[[int, lorax.Adapter], dict[str, Any]]


class NonFiniteLossError(Exception):
    """An update's loss or gradient was not finite; the state before it is in the checkpoints."""

    def __init__(self, at_step: int, output: step.StepOutput):
        """Remember the step, counted from 1."""
        loss, norm = float(output.loss), float(output.gradient_norm)
        super().__init__(
            f"step {at_step}: the loss is {loss}, the norm of its gradient {norm}. "
            f"The state after step {at_step - 1} is kept. Try a lower config.train.learning_rate, a longer "
            "config.train.warmup_steps, or float32 instead of bfloat16, in another --config.run_dir"
        )
        self.step = at_step


class Trained(NamedTuple):
    """The adapter after the last step, what an update takes, and the last line of the log.

    Bytes: of the optimiser's state; and at most of an update's temporary arrays, as its programs say (None when this
    process made no update).
    """

    adapter: lorax.Adapter
    opt_state_bytes: int
    temporary_bytes: int | None
    last: dict[str, Any]


class _Update(NamedTuple):
    """An update that was started and may still be running; `data_state` is the position before its batch."""

    step: int
    output: step.StepOutput
    tokens: int
    data_state: dict[str, Any]
    is_compiling: bool


def train(
    config: config_dict.ConfigDict,
    directory: RunDirectory,
    params: Any,
    adapter: lorax.Adapter,
    loss: step.LossFn,
    batches: Batches,
    mesh: Mesh,
    *,
    watch: Watch,
    stop: StopSignals,
) -> Trained:
    """Train `adapter` to the last step, from the directory's newest checkpoint if it has one.

    The numbers of an update are fetched after the next one was started, so that the device does not wait for
    the host.

    Args:
        config: the settings.
        directory: where logs and checkpoints go.
        params: the base.
        adapter: as initialised; donated.
        loss: of `step.summed_loss`.
        batches: the training data, at their beginning.
        mesh: where the base lies; rows are split over it. Of several processes each builds its own rows.
        watch: called at the evaluations.
        stop: signals; one that comes while an update runs is acted on after it. Of several processes all stop after
            the same update.

    Raises:
        NonFiniteLossError: an update was not finite. The state before it was saved.
        Stopped: a signal came. The state after the update of that moment was saved.
    """
    run = _Run(config, directory, params, adapter, loss, batches, mesh, watch)
    try:
        with stop.deferred():
            run.to_the_end(stop)
        if run.is_told_to_stop:  # by the signal that another process got
            raise Stopped(signal.SIGTERM)
        temporary = max((_temporary_bytes(program) for program in run.programs.values()), default=None)
        return Trained(run.state.adapter, _bytes(run.state.opt_state), temporary, run.metrics.last)
    finally:
        run.close()


class _Run:
    """A run under way: its state, its position and its open files."""

    def __init__(
        self,
        config: config_dict.ConfigDict,
        directory: RunDirectory,
        params: Any,
        adapter: lorax.Adapter,
        loss: step.LossFn,
        batches: Batches,
        mesh: Mesh,
        watch: Watch,
    ):
        self.config, self.params, self.batches, self.watch = config, params, batches, watch
        # as a table, because what is computed on the device during an update waits for it
        self.learning_rates = np.asarray(optimiser.schedule(config.train)(jnp.arange(config.train.steps)))
        self.update, transformation, (where, of_state, everywhere) = update.build(config, params, adapter, loss, mesh)
        adapter = jax.device_put(adapter, where)
        self.rng = jax.device_put(jax.random.key(config.seed), everywhere)
        self.shares = devices.Shares(mesh, config.train.accumulate)
        self.is_told_to_stop = False
        self.checkpoints = TrainCheckpoints(directory.path / "checkpoints", keep=config.checkpoint.keep)
        opt_state = jax.device_put(transformation.init(adapter.params), of_state)
        _check_nothing_frozen(adapter, opt_state)
        self.saved_step = self.checkpoints.latest_step()
        self.step = self.saved_step or 0
        if self.saved_step is not None:
            saved = self.checkpoints.restore(base=params, opt_state_like=opt_state, rng_like=self.rng, shardings=where)
            adapter, opt_state, self.rng = saved.adapter, saved.opt_state, saved.rng
            batches.restore(saved.data_state)
            print(f"going on after step {self.step} of {config.train.steps}")
        self.state = step.TrainState(adapter, opt_state, jax.device_put(np.bool_(False), everywhere))
        self.metrics = MetricsLog(directory.path, resumed_step=self.step) if devices.is_main() else NoLog()
        self.elapsed = self.metrics.last.get("elapsed_s", 0.0)
        self.tokens = self.metrics.last.get("tokens", 0)
        self.programs: dict[Any, Any] = {}  # the compiled update, by the shapes of a batch
        self.clock = time.perf_counter()

    def to_the_end(self, stop: StopSignals) -> None:
        """Update until the last step or a signal, and leave a checkpoint of where that is."""
        steps = self.config.train.steps
        if not self.step and self.config.evaluation.every:
            self.metrics.write(0, self.watch(0, self.state.adapter))
        with tqdm(
            total=steps,
            initial=self.step,
            desc="training",
            bar_format=PROGRESS_BAR,
            dynamic_ncols=True,
            disable=not devices.is_main(),
        ) as progress:
            self.clock = time.perf_counter()
            running = None
            while self.step < steps and not self._has_to_stop(stop):
                started = self._start_update(stop.received)
                if running is not None:
                    self._log(running, progress)
                running = started
                if self._is_due(self.config.evaluation.every) or self._is_due(self.config.checkpoint.every):
                    self._log(running, progress)
                    running = None
            if running is not None:
                self._log(running, progress)
        if self.saved_step != self.step:
            self._save(self.batches.state())
        self.checkpoints.wait()

    def _has_to_stop(self, stop: StopSignals) -> bool:
        return stop.received if jax.process_count() == 1 else self.is_told_to_stop

    def _start_update(self, is_told: bool) -> _Update:
        before = self.batches.state()
        planned = self.batches.next_plan()
        rows = planned.shape.rows
        rng = jax.random.fold_in(self.rng, self.step) if self.config.lora.dropout else None
        parts = self.shares.batch(self.batches.build(planned, self.shares.rows(rows)), rows)
        told = self.shares.told(is_told)
        shapes = tuple(array.shape for array in parts.values())
        is_compiling = shapes not in self.programs
        if is_compiling:
            self.programs[shapes] = self.update.lower(self.params, self.state, parts, rng, told).compile()
        self.state, output = self.programs[shapes](self.params, self.state, parts, rng, told)
        self.step += 1
        return _Update(self.step, output, self.batches.positions(planned), before, is_compiling)

    def _log(self, update: _Update, progress: tqdm) -> None:
        """Wait for an update and write its line, then do what is due after it."""
        loss, norm = float(update.output.loss), float(update.output.gradient_norm)
        took = time.perf_counter() - self.clock
        self.is_told_to_stop |= bool(update.output.is_told_to_stop)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._keep_last_good(update)
            raise NonFiniteLossError(update.step, update.output)
        self.elapsed += took
        self.tokens += update.tokens
        line = {
            "loss": loss,
            "learning_rate": float(self.learning_rates[update.step - 1]),
            "gradient_norm": norm,
            **{name: float(value) for name, value in update.output.terms.items()},
            "tokens": self.tokens,
            "elapsed_s": round(self.elapsed, 3),
        }
        if not update.is_compiling:  # the time of an update that compiles says nothing of the throughput
            line["tokens_per_s"] = round(update.tokens / took, 2)
        progress.set_postfix_str(f"loss {loss:.4f}, {update.tokens / took:.0f} tokens/s", refresh=False)
        progress.update()
        if update.step == self.step and self._is_due(self.config.evaluation.every):
            line |= self.watch(update.step, self.state.adapter)
        self.metrics.write(update.step, line)
        if update.step == self.step and self._is_due(self.config.checkpoint.every):
            self._save(self.batches.state())
        self.clock = time.perf_counter()

    def _is_due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.train.steps)

    def _keep_last_good(self, bad: _Update) -> None:
        # The bad update, and one that may have been started after it, left the state as it was before.
        self.step = bad.step - 1
        if self.step != self.saved_step:
            self._save(bad.data_state)
        self.checkpoints.wait()

    def _save(self, data_state: dict[str, Any]) -> None:
        self.metrics.sync()  # a run that resumes from this checkpoint counts on the lines up to here
        self.checkpoints.save(
            self.step,
            self.state.adapter,
            opt_state=self.state.opt_state,
            rng=self.rng,
            data_state=data_state,
            base=self.params,
            metadata={"name": self.config.name},
        )
        self.saved_step = self.step

    def close(self) -> None:
        """Wait for what is being saved and close the files."""
        self.checkpoints.close()
        self.metrics.close()


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _temporary_bytes(program: Any) -> int:
    analysis = program.memory_analysis()
    return 0 if analysis is None else analysis.temp_size_in_bytes


def _check_nothing_frozen(adapter: lorax.Adapter, opt_state: Any) -> None:
    """A moment of a frozen leaf would cost what an adapter is there to save."""
    trained = {leaf.shape for leaf in jax.tree.leaves(adapter.params)}
    assert all(leaf.shape in trained or leaf.ndim == 0 for leaf in jax.tree.leaves(opt_state))
