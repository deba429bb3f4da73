"""Several real processes over loopback, two devices each: losses of one process, own rows, kills, other numbers."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest

import lorax
from experiments import data, models
from tests.experiments.finetune_tiny import ROOT, Inputs

ENDS_S = 60.0  # all processes of a run have ended so long after one was killed
LONG_S = 300.0  # a limit for processes that hang; a run takes seconds on a machine that is free
STEPS = 12
LOSS_TOL = 2e-4  # float32: sums over other devices, through twelve updates of Adam
SAME, CLOSE = {"learning_rate", "tokens", "answered"}, {"loss", "heldout_loss", "gradient_norm"}
CLEAR = ("another process has ended", "another task died")  # what the run says itself, or JAX where it ends the process


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs.write(tmp_path_factory.mktemp("processes"))


class Job:
    """The processes of one run, with a file of what each printed."""

    def __init__(self, inputs: Inputs, run_dir: pathlib.Path, count: int, **changes):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        changes = {"train.rows": 8, "train.steps": STEPS, "lora.dropout": 0.1, **changes}
        command = inputs.command(run_dir, **changes)
        more = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(ROOT)}
        # Programs that one run compiled are found by the next: compiling would take most of the time.
        more |= {"JAX_COMPILATION_CACHE_DIR": str(inputs.folder / f"programs{count}")}
        more |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.outputs = [run_dir.with_name(f"{run_dir.name}.{count}.{i}.{time.time_ns()}") for i in range(count)]
        self.processes = []
        for i, output in enumerate(self.outputs):
            which = [f"--coordinator={address}", f"--processes={count}", f"--process={i}"] if count > 1 else []
            self.processes.append(
                subprocess.Popen(
                    command + which, cwd=ROOT, env=os.environ | more, stdout=output.open("w"), stderr=subprocess.STDOUT
                )
            )

    def printed(self, i: int) -> str:
        return self.outputs[i].read_text(errors="replace")

    def wait(self, timeout: float = LONG_S) -> list[int]:
        """Wait for all; those that hang are killed, and fail the test."""
        end = time.monotonic() + timeout
        try:
            return [p.wait(max(0.1, end - time.monotonic())) for p in self.processes]
        finally:
            for p in self.processes:
                p.kill()

    def finish(self) -> None:
        codes = self.wait()
        assert not any(codes), "\n".join(self.printed(i)[-3000:] for i in range(len(codes)))


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def wait_for_steps(job, run_dir, count):
    """Wait until a checkpoint of `count` steps or more is complete."""
    end = time.monotonic() + LONG_S
    checkpoints = run_dir / "checkpoints"
    while not any(p.name.isdigit() and int(p.name) >= count for p in checkpoints.glob("*")):
        assert all(p.poll() is None for p in job.processes), "\n".join(map(job.printed, range(len(job.processes))))
        assert time.monotonic() < end, "the run saves nothing"
        time.sleep(0.01)


def assert_same_run(run_dir, other, inputs):
    """Every step is there once, with the same losses and batches, and the adapters are the same."""
    ours, theirs = rows(run_dir), rows(other)
    assert [row["step"] for row in ours] == list(range(len(theirs)))
    for mine, wanted in zip(ours, theirs, strict=True):
        for name in SAME:
            assert mine.get(name) == wanted.get(name), (name, mine, wanted)
        for name in CLOSE & wanted.keys():
            np.testing.assert_allclose(mine[name], wanted[name], rtol=LOSS_TOL, err_msg=f"{name} {mine}")
    params = models.load(inputs.folder / "model").params
    factors = [lorax.restore(path / "adapter", base=params).params for path in (run_dir, other)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=20 * LOSS_TOL), *factors)


@pytest.fixture(scope="module")
def alone(inputs):
    """A run of one process with one device."""
    run_dir = inputs.folder / "alone"
    job = Job(inputs, run_dir, 1)
    job.finish()
    assert len(rows(run_dir)) == STEPS + 1
    return run_dir


@pytest.mark.parametrize(
    ("count", "mesh"), [(2, {"mesh.fsdp": 2}), pytest.param(4, {"mesh.tensor": 2}, marks=pytest.mark.slow)]
)
def test_processes_train_as_one_does(inputs, alone, count, mesh):
    run_dir = inputs.folder / f"together{count}"
    Job(inputs, run_dir, count, **mesh).finish()
    assert_same_run(run_dir, alone, inputs)
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["processes"] == count and environment["devices"].startswith(f"{2 * count} ×")
    assert (run_dir / "report.html").exists() and (run_dir / "adapter_peft" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("victim", "how", "after"),
    [
        (1, signal.SIGKILL, 1),
        pytest.param(0, signal.SIGKILL, 4, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, 4, marks=pytest.mark.slow),
    ],
)
def test_one_killed_ends_all_and_another_number_goes_on(inputs, alone, victim, how, after):
    run_dir = inputs.folder / f"killed{victim}{how}"
    job = Job(inputs, run_dir, 2, **{"mesh.fsdp": 2})
    wait_for_steps(job, run_dir, 4)
    job.processes[victim].send_signal(how)
    others = [i for i in range(2) if i != victim]
    end = time.monotonic() + ENDS_S
    for i in others:
        code = job.processes[i].wait(max(0.1, end - time.monotonic()))  # raises if it lives longer
        assert code != 0
        assert any(text in job.printed(i) for text in CLEAR), job.printed(i)[-3000:]
    job.processes[victim].kill()
    job.wait()
    assert not (run_dir / "result.json").exists()
    restarted = Job(inputs, run_dir, after, **{"mesh.fsdp": 2})
    restarted.finish()
    assert "going on after step" in restarted.printed(0)
    assert_same_run(run_dir, alone, inputs)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_after_the_same_update(inputs, alone):
    run_dir = inputs.folder / "signalled"
    job = Job(inputs, run_dir, 2)
    wait_for_steps(job, run_dir, 4)
    job.processes[1].send_signal(signal.SIGTERM)
    codes = job.wait(ENDS_S)
    assert codes == [143, 143], "\n".join(map(job.printed, range(2)))
    Job(inputs, run_dir, 2).finish()
    assert_same_run(run_dir, alone, inputs)


@pytest.mark.slow
def test_wrong_settings_end_all_processes(inputs):
    job = Job(inputs, inputs.folder / "wrong", 2, **{"mesh.fsdp": 3})
    assert job.wait(ENDS_S) == [1, 1]
    assert all("config.mesh" in job.printed(i) for i in range(2))
    uneven = Job(inputs, inputs.folder / "uneven", 2, **{"train.rows": 6})
    assert uneven.wait(ENDS_S) == [1, 1]
    assert all("does not divide" in uneven.printed(i) for i in range(2))


def test_each_process_builds_its_own_rows_alone():
    encoded = [
        data.Encoded(tokens=np.arange(i, i + 9, dtype=np.int32), is_answer=np.arange(9) > 4, sample=i)
        for i in range(24)
    ]
    batches = data.Batches(encoded, data.Packed(rows=8, length=16), seed=0)
    planned = batches.next_plan()
    whole = batches.build(planned)
    shares = [batches.build(planned, rows) for rows in ([0, 1, 4, 5], [2, 3, 6, 7])]
    for name, array in whole.items():
        assert shares[0][name].shape[0] == 4
        np.testing.assert_array_equal(shares[0][name], array[[0, 1, 4, 5]])
        np.testing.assert_array_equal(shares[1][name], array[[2, 3, 6, 7]])
    assert batches.positions(planned) == int((whole["segment_ids"] > 0).sum())
