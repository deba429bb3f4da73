"""Adapted functions, adapters and checkpoints on a mesh of eight fake devices, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(module: str, check: str) -> str:
    """Run a check in a process of its own, with eight devices and in float64, and return what it printed."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}
    command = [sys.executable, "-m", f"tests.{module}", check]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | flags, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    ("check", "lines"),
    [("auto", 4), ("explicit", 4), ("adapter", 1), ("restore", 3), ("fingerprint", 1), ("collectives", 1)],
)
def test_on_eight_devices(check: str, lines: int) -> None:
    out = run("eight_devices", check)
    assert out.count("ok ") == lines, out


@pytest.mark.parametrize(
    ("check", "lines"),
    [
        ("specs", 1),
        ("quantized", 1),
        ("training-auto", 7),
        ("training-explicit", 7),
        ("collectives-auto", 9),
        ("collectives-explicit", 9),
    ],
)
def test_derived_shardings(check: str, lines: int) -> None:
    out = run("eight_devices_shardings", check)
    assert out.count("ok ") == lines, out
