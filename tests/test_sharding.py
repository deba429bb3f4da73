"""Adapted functions, adapters and checkpoints on a mesh of eight fake devices, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("check", "lines"),
    [("auto", 4), ("explicit", 4), ("adapter", 1), ("restore", 3), ("fingerprint", 1), ("collectives", 1)],
)
def test_on_eight_devices(check: str, lines: int) -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}
    env = os.environ | flags
    command = [sys.executable, "-m", "tests.eight_devices", check]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count("ok ") == lines, done.stdout
