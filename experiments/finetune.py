"""Fine-tune a pretrained language model with LoRA or another method: one command, one directory.

    python -m experiments.finetune --config=configs/quickstart.py [--config.method=dora --config.lora.rank=16 …]

The methods are those of experiments/training/recipes.py. Every setting of the configuration can be given on
the command line; the result, the logs and `report.html` are in `config.run_dir`. The same command started
again goes on where the run was, and does nothing more to a finished one.

Exit status: 0 when the run is finished; 1 for wrong settings or data; 2 for a wrong command line; 3 when a
loss was not finite (the last good state is saved); 143 after SIGTERM and 130 after SIGINT (the state is
saved: start again to go on).
"""

import shlex
import sys
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from experiments import command_line

_CONFIG = config_flags.DEFINE_config_file("config", help_string="file with the settings, such as configs/quickstart.py")

EXIT_WRONG_INPUT, EXIT_NOT_FINITE = 1, 3


def main(arguments: Sequence[str]) -> int:
    """Run what the flags say; return the exit status."""
    from experiments.data import DownloadError
    from experiments.training import run
    from experiments.training.loop import NonFiniteLossError
    from experiments.training.stopping import Stopped, StopSignals

    command = shlex.join(["python", "-m", "experiments.finetune", *sys.argv[1:]])
    try:
        with StopSignals().installed() as stop:
            run.finetune(_CONFIG.value, command=command, stop=stop)
    except (ValueError, DownloadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_NOT_FINITE
    except Stopped as stopped:
        print(f"{stopped}: the state is saved; the same command goes on from there", file=sys.stderr)
        return stopped.exit_status
    return 0


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=command_line.parse)
