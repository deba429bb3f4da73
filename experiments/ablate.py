"""Run an ablation study: a grid of runs over one frozen base, many trained in one program; one command, one directory.

    python -m experiments.ablate --config=configs/ablate_rank_targets.py [--config.size=full --config.axes.rank=1,2,4 …]

The configuration declares the axes (experiments/study/settings.py); every combination of their values is a run. The
results, the logs and `report.html` are in `config.run_dir`. The same command started again goes on where the study
was. Started several times at once, also on other hosts that share the directory, the processes share the work; each
uses one device, on a machine with several GPUs that of its CUDA_VISIBLE_DEVICES.

Exit status: 0 when the study is finished, or all that is left is other processes' work; 1 for wrong settings or data; 2
for a wrong command line; 143 after SIGTERM and 130 after SIGINT (the state is saved: start again to go on).
"""

import ast
import difflib
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from experiments import command_line
from experiments.study.settings import AXES, axis_values

_CONFIG = config_flags.DEFINE_config_file("config", help_string="file with the axes and settings of a study")
_AXES = flags.DEFINE_multi_string("axis", [], "NAME=VALUES: the same as --config.axes.NAME=VALUES, such as rank=1,2,4")

EXIT_WRONG_INPUT = 1


def main(arguments: Sequence[str]) -> int:
    """Run what the flags say; return the exit status."""
    from experiments import problems
    from experiments.data import DownloadError
    from experiments.study import runner, settings
    from experiments.training.stopping import Stopped, StopSignals

    command = shlex.join(["python", "-m", "experiments.ablate", *sys.argv[1:]])
    try:
        given = {f"axes.{name}": axis_values(text) for name, _, text in (axis.partition("=") for axis in _AXES.value)}
        given |= config_flags.get_override_values(flags.FLAGS["config"])
        config = settings.resolve(
            _CONFIG.value, given, question(config_flags.get_config_filename(flags.FLAGS["config"]))
        )
        with StopSignals().installed() as stop:
            is_finished = runner.run(config, problems.load(config), command=command, stop=stop)
    except (ValueError, DownloadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    except Stopped as stopped:
        print(f"{stopped}: the state is saved; the same command goes on from there", file=sys.stderr)
        return stopped.exit_status
    if not is_finished:
        print("the runs that are left are other processes' work; the last of them writes the report")
    return 0


def question(path: str) -> str:
    """Return what a study asks: the first paragraph of its configuration file's docstring."""
    text = ast.get_docstring(ast.parse(pathlib.Path(path).read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def parse(arguments: Sequence[str]) -> list[str]:
    """Parse the command line; an unknown axis or setting ends the process with the nearest known one."""
    return command_line.parse(_axes_apart(arguments))


def _axes_apart(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with `--axis=NAME=VALUES` for `--config.axes.NAME=VALUES`: ml_collections reads no lists."""
    rewritten, following = [], iter(arguments)
    for argument in following:
        match = re.fullmatch(r"--?config\.axes\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            rewritten.append(argument)
            continue
        name, values = match[1], next(following, "") if match[2] is None else match[2]
        if name not in AXES:
            (nearest,) = difflib.get_close_matches(name, AXES, n=1, cutoff=0)
            print(f"error: unknown axis config.axes.{name}: the nearest is config.axes.{nearest}", file=sys.stderr)
            sys.exit(command_line.EXIT_USAGE)
        rewritten.append(f"--axis={name}={values}")
    return rewritten


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse)
