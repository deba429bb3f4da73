"""Fine-tune a pretrained language model with LoRA or another method: one command, one directory.

    python -m experiments.finetune --config=configs/quickstart.py [--config.method=dora --config.lora.rank=16 …]

The methods are those of experiments/training/recipes.py. Every setting of the configuration can be given on
the command line; the result, the logs and `report.html` are in `config.run_dir`. The same command started
again goes on where the run was, and does nothing more to a finished one.

On several hosts, or with several processes on one, every process gets the same command and its number:

    python -m experiments.finetune --config=... --coordinator=HOST:PORT --processes=4 --process=0     (1, 2, 3)

`--coordinator=auto` asks the cluster for them (TPU pods, Slurm, Open MPI). `config.mesh` says how the devices of all
processes are used; the run directory is one that all of them can write to. If a process dies, all end within a minute;
started again, also as another number of processes, the run goes on from its last checkpoint.

Exit status: 0 when the run is finished; 1 for wrong settings or data; 2 for a wrong command line; 3 when a
loss was not finite (the last good state is saved); 4 when another process cannot be reached any more; 143 after
SIGTERM and 130 after SIGINT (the state is saved: start again to go on).
"""

import os
import shlex
import sys
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from experiments import command_line

_CONFIG = config_flags.DEFINE_config_file("config", help_string="file with the settings, such as configs/quickstart.py")

_COORDINATOR = flags.DEFINE_string("coordinator", "", "address of the first of several processes, host:port, or auto")
_PROCESSES = flags.DEFINE_integer("processes", 1, "how many processes there are")
_PROCESS = flags.DEFINE_integer("process", 0, "which of them this is, from 0")

EXIT_WRONG_INPUT, EXIT_NOT_FINITE, EXIT_ALONE = 1, 3, 4


def main(arguments: Sequence[str]) -> int:
    """Run what the flags say; return the exit status."""
    import jax

    from experiments.data import DownloadError
    from experiments.training import devices, run
    from experiments.training.loop import NonFiniteLossError
    from experiments.training.stopping import Stopped, StopSignals

    command = shlex.join(["python", "-m", "experiments.finetune", *sys.argv[1:]])
    try:
        if _COORDINATOR.value:
            devices.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        if not devices.is_main():
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  the main process says it
        with StopSignals().installed() as stop:
            run.finetune(_CONFIG.value, command=command, stop=stop)
    except (ValueError, DownloadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_NOT_FINITE
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        which = f"process {jax.process_index()} of {jax.process_count()}"
        print(
            f"error: {which}: {str(error).splitlines()[0]}\nIf another process has ended or cannot be reached, start "
            "all of them again with the same command: the run goes on from its last complete checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_ALONE)  # an orderly end would wait for the others
    except Stopped as stopped:
        print(f"{stopped}: the state is saved; the same command goes on from there", file=sys.stderr)
        return stopped.exit_status
    return 0


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=command_line.parse)
