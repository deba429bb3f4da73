"""Killed at any moment and started again, a run ends as one that was left alone, bit for bit; signals too."""

import json
import pathlib
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

import lorax
from experiments import models
from tests.experiments.finetune_tiny import Inputs

STEPS = 40
LONG_S = 400.0  # a limit for a process that hangs; a run takes seconds on a machine that is free
SAME = ("loss", "gradient_norm", "learning_rate", "tokens", "heldout_loss")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def uninterrupted(inputs):
    """A run in one piece, and everything that it printed."""
    run_dir = inputs.folder / "uninterrupted"
    return run_dir, finish(start(inputs, run_dir))


def start(inputs, run_dir):
    dropout = {"lora.dropout": 0.1}  # so that the random state counts too
    return inputs.start(run_dir, **{"train.steps": STEPS}, **dropout)


def finish(process):
    printed, _ = process.communicate(timeout=LONG_S)
    assert process.returncode == 0, printed
    return printed


def lines(run_dir):
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def rows(run_dir):
    return [json.loads(line) for line in lines(run_dir)]


def wait_for_steps(process, run_dir, count):
    """Wait until `count` lines are logged; fails if the process ends before."""
    end = time.monotonic() + LONG_S
    while len(lines(run_dir)) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "the run logs nothing"
        time.sleep(0.002)


def factors(run_dir, inputs):
    params = models.load(inputs.folder / "model").params
    return lorax.restore(run_dir / "adapter", base=params).params


def assert_same_run(run_dir, other, inputs):
    ours, theirs = rows(run_dir), rows(other)
    assert [row["step"] for row in ours] == list(range(STEPS + 1))
    for mine, wanted in zip(ours, theirs, strict=True):
        assert [mine.get(name) for name in SAME] == [wanted.get(name) for name in SAME]
    jax.tree.map(np.testing.assert_array_equal, factors(run_dir, inputs), factors(other, inputs))


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_losses_and_factors(inputs, uninterrupted):
    run_dir = inputs.folder / "killed"
    resumed = []
    # Somewhere after these steps: which part of an update or a checkpoint the kill hits is left to chance.
    for at in (1, 14, 31):
        process = start(inputs, run_dir)
        wait_for_steps(process, run_dir, at + 1)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        resumed.append(process.communicate()[0])
    resumed.append(finish(start(inputs, run_dir)))
    assert sum("going on after step" in printed for printed in resumed) >= 2
    assert_same_run(run_dir, uninterrupted[0], inputs)


@pytest.mark.slow
def test_on_sigterm_it_saves_exits_and_goes_on(inputs, uninterrupted):
    run_dir = inputs.folder / "terminated"
    process = start(inputs, run_dir)
    wait_for_steps(process, run_dir, 8)
    process.terminate()
    printed, _ = process.communicate(timeout=LONG_S)
    assert process.returncode == 128 + signal.SIGTERM, printed
    stopped_at = rows(run_dir)[-1]["step"]
    assert 7 <= stopped_at < STEPS
    # nothing of what was done is lost, although checkpoints are due at even steps only
    assert f"going on after step {stopped_at} of {STEPS}" in finish(start(inputs, run_dir))
    assert_same_run(run_dir, uninterrupted[0], inputs)


def test_a_finished_run_is_not_trained_again(inputs, uninterrupted):
    run_dir, _ = uninterrupted
    before = {name: (run_dir / name).read_bytes() for name in ("metrics.jsonl", "result.json")}
    printed = finish(start(inputs, run_dir))
    assert "finished before" in printed
    assert "step" not in printed.replace("finished before", "")
    assert {name: (run_dir / name).read_bytes() for name in before} == before


def test_two_processes_cannot_share_a_run(inputs):
    run_dir = inputs.folder / "shared"
    first = start(inputs, run_dir)
    wait_for_steps(first, run_dir, 1)
    second = start(inputs, run_dir)
    printed, _ = second.communicate(timeout=LONG_S)
    first.kill()
    first.communicate()
    assert second.returncode == 1
    assert f"{run_dir}: another process is running in it" in printed


def test_unknown_setting_on_the_command_line_names_the_nearest(inputs):
    command = [*inputs.command(inputs.folder / "unknown"), "--config.lora.rnk=3"]
    done = subprocess.run(command, cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: unknown setting config.lora.rnk: the nearest is config.lora.rank\n"
    assert not (inputs.folder / "unknown").exists()
