"""Adapted functions, adapters and checkpoints on a mesh of eight fake devices, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(module: str, *check: str) -> str:
    """Run a check in a process of its own, with eight devices and in float64, and return what it printed."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}
    command = [sys.executable, "-m", f"tests.{module}", *check]
    env = os.environ | flags
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    ("check", "lines"),
    [("auto", 4), ("explicit", 4), ("adapter", 1), ("restore", 3), ("fingerprint", 1), ("collectives", 1)],
)
def test_on_eight_devices(check: str, lines: int) -> None:
    out = run("eight_devices", check)
    assert out.count("ok ") == lines, out


def test_shardings_are_those_of_the_base() -> None:
    assert run("eight_devices_shardings", "specs") == "ok specs\n"
    assert run("eight_devices_shardings", "quantized") == "ok quantised\n"


def test_training_with_derived_shardings_equals_one_device() -> None:
    assert run("eight_devices_shardings", "training", "few").count("ok ") == 2 * 3


def test_a_sharded_adapter_communicates_no_weight() -> None:
    assert run("eight_devices_shardings", "collectives", "few").count("ok ") == 2 * (3 + 2)


@pytest.mark.slow
@pytest.mark.parametrize(("check", "lines"), [("training", 7), ("collectives", 7 + 2)])
def test_on_every_layout(check: str, lines: int) -> None:
    assert run("eight_devices_shardings", check).count("ok ") == 2 * lines
