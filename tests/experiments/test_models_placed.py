"""Models that are loaded onto a mesh, on eight fake devices and in two processes."""

import os
import socket
import subprocess
import sys

import numpy as np

from experiments.models.placed import PlacedArray
from tests.experiments.finetune_tiny import ROOT

MODULE = "tests.experiments.eight_devices_loading"


def start(devices: int, *arguments: str) -> subprocess.Popen:
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", MODULE, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | flags, **pipes)


def printed(process: subprocess.Popen) -> str:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, out + errors[-4000:]
    return out


def test_every_device_gets_its_part_of_the_same_values():
    assert printed(start(8)) == "ok directories\nok quantised\nok flash\n"


def test_a_process_holds_what_its_devices_hold():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [start(2, port, str(i)) for i in range(2)]
    try:
        assert [printed(process) for process in processes] == ["ok processes\n"] * 2
    finally:
        for process in processes:
            process.kill()


def test_rows_fill_an_array():
    array = PlacedArray((3, 2), np.float32)
    for i in (2, 0, 1):
        array.fill(np.full(2, i, np.float32), i)
    assert array.done().tolist() == [[0, 0], [1, 1], [2, 2]]
