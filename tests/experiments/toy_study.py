"""A study of seconds: two ranks, two learning rates and two seeds of a network of two layers."""

import dataclasses
import os
import pathlib
import subprocess
import sys

from experiments.study import runner, settings
from experiments.training.stopping import StopSignals
from tests.experiments import toy_problem

ROOT = pathlib.Path(__file__).parents[2]
PROBLEM = f"{ROOT / 'tests/experiments/toy_problem.py'}:make"
STEPS = 12
AXES = {"rank": (1, 3), "targets": ("all",), "lr": (1e-2, 3e-2), "seed": (0, 1), "steps": (STEPS,), "alpha": (4,)}
METHODS = {"vera.rank": 4, "bottleneck.rank": 4, "tuning.length": 2, "adalora.target_rank": 1}


def get_config():
    """Settings of a study of eight runs, without its place."""
    config = settings.defaults()
    config.name = "toy"
    config.problem.name = PROBLEM
    config.axes.update(AXES)
    config.train.batch = 8
    config.evaluation.update(points=3, batch=16)
    config.grouping.padding = 0.25
    config.latency.repeats = 2
    config.checkpoint_seconds = 0.0
    config.update_from_flattened_dict(METHODS)
    return config


def resolved(run_dir="unused", question="Does it work?", **changes):
    """The resolved settings; `changes` are values of axes."""
    config = get_config()
    config.run_dir = str(run_dir)
    config.axes.update(changes)
    return settings.resolve(config, {}, question)


def run(config, problem=None):
    """Run a study in this process."""
    with StopSignals().installed() as stop:
        return runner.run(config, problem or toy_problem.make(), command="python -m experiments.ablate", stop=stop)


@dataclasses.dataclass(frozen=True)
class Processes:
    """Starts studies in processes of their own, which share what they compile."""

    folder: pathlib.Path

    def start(self, run_dir, *arguments):
        file = self.folder / "toy.py"
        if not file.exists():
            file.write_text('"""Does it work?"""\n\nfrom tests.experiments.toy_study import get_config as get_config\n')
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs"), "PYTHONPATH": str(ROOT)}
        cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.ablate", f"--config={file}", f"--config.run_dir={run_dir}", *arguments],
            cwd=ROOT,
            env=os.environ | cache,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
