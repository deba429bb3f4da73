"""Killed at any moment and started again, or shared by processes, a study ends as one that was left alone."""

import json
import signal
import time

import numpy as np
import pytest

from experiments.study.store import StudyDirectory
from tests.experiments.toy_study import Processes

pytestmark = pytest.mark.slow
LONG_S = 400.0  # a limit for a process that hangs; a study takes seconds on a machine that is free
# four groups of two runs, whose updates are stored at sixty places: time to be killed in
ARGUMENTS = (
    "--config.axes.steps=120",
    "--config.evaluation.points=60",
    "--config.grouping.members=2",
    "--config.keep=all",
)
TIMES = ("costs", "group")  # what differs from one time to the next


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return Processes(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def uninterrupted(processes):
    """The directory of a study in one piece."""
    run_dir = processes.folder / "uninterrupted"
    printed = finish(processes.start(run_dir, *ARGUMENTS))
    assert f"report: {run_dir / 'report.html'}" in printed
    return run_dir


def finish(process):
    printed, _ = process.communicate(timeout=LONG_S)
    assert process.returncode == 0, printed
    return printed


def results(run_dir):
    return {path.parent.name: path for path in run_dir.glob("cells/*/result.json")}


def wait_until(process, holds):
    """Wait; fails if the process ends before."""
    end = time.monotonic() + LONG_S
    while not holds():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "the study does not get there"
        time.sleep(0.002)


def stored(run_dir):
    """The bytes and the time of change of all files of the runs that are finished."""
    files = [file for result in results(run_dir).values() for file in result.parent.rglob("*") if file.is_file()]
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def assert_same_study(run_dir, other):
    ours, theirs = results(run_dir), results(other)
    assert ours.keys() == theirs.keys() and len(ours) == 8
    for name in ours:
        mine, wanted = json.loads(ours[name].read_text()), json.loads(theirs[name].read_text())
        assert {k: v for k, v in mine.items() if k not in TIMES} == {k: v for k, v in wanted.items() if k not in TIMES}
        assert (ours[name].parent / "curve.json").read_bytes() == (theirs[name].parent / "curve.json").read_bytes()
        with np.load(ours[name].parent / "items.npz") as a, np.load(theirs[name].parent / "items.npz") as b:
            assert a.files == b.files
            for array in a.files:
                np.testing.assert_array_equal(a[array], b[array])
    assert not list(run_dir.glob("groups/*.npz"))


def test_killed_again_and_again_it_ends_with_the_same_results(processes, uninterrupted):
    run_dir = processes.folder / "killed"
    # In the first group's updates; while runs are stored; in a later group: what exactly is hit is left to chance.
    moments = [
        lambda: (run_dir / "groups/g0.npz").exists(),
        lambda: len(results(run_dir)) >= 1,
        lambda: len(results(run_dir)) >= 4 and list(run_dir.glob("groups/*.npz")),
    ]
    finished = {}
    for moment in moments:
        process = processes.start(run_dir, *ARGUMENTS)
        wait_until(process, moment)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.communicate()
        assert finished.items() <= stored(run_dir).items()
        finished = stored(run_dir)
    assert finished
    finish(processes.start(run_dir, *ARGUMENTS))
    assert finished.items() <= stored(run_dir).items()
    assert_same_study(run_dir, uninterrupted)


def test_on_sigterm_it_saves_exits_and_goes_on(processes, uninterrupted):
    run_dir = processes.folder / "terminated"
    process = processes.start(run_dir, *ARGUMENTS)
    wait_until(process, lambda: (run_dir / "groups/g0.npz").exists())
    process.terminate()
    printed, _ = process.communicate(timeout=LONG_S)
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert "the state is saved" in printed
    saved = StudyDirectory(run_dir).read_arrays("groups/g0.npz")
    assert saved is not None and 0 < len(saved["log/loss"]) <= 120
    printed = finish(processes.start(run_dir, *ARGUMENTS))
    assert f"group g0: going on after update {len(saved['log/loss'])} of 120" in printed
    assert_same_study(run_dir, uninterrupted)


def test_two_processes_share_the_groups(processes, uninterrupted):
    run_dir = processes.folder / "shared"
    both = [processes.start(run_dir, *ARGUMENTS) for _ in range(2)]
    printed = [finish(process) for process in both]
    trained = [[f"g{place}" for place in range(4) if f"group g{place}: 2 runs" in text] for text in printed]
    assert sorted(trained[0] + trained[1]) == ["g0", "g1", "g2", "g3"]  # each once
    assert trained[0] and trained[1]
    groups = [json.loads((run_dir / f"groups/g{place}.json").read_text()) for place in range(4)]
    assert {group["process"]["pid"] for group in groups} == {process.pid for process in both}
    assert sum("report: " in text for text in printed) >= 1
    assert_same_study(run_dir, uninterrupted)


def test_the_question_and_the_command_are_stored(uninterrupted):
    assert json.loads((uninterrupted / "config.json").read_text())["question"] == "Does it work?"
    command = json.loads((uninterrupted / "environment.json").read_text())["command"]
    assert command.startswith("python -m experiments.ablate --config=") and "--config.axes.steps=120" in command
