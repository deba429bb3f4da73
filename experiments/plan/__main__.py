"""Say whether a fine-tuning run fits, and how fast it can be, before it is started.

    python -m experiments.plan --config=configs/quickstart.py --topology=v5e:4x4 [--config.mesh.fsdp=16 …]

The training step of `experiments.finetune` with these settings is compiled for the devices, from shapes alone: no
weights are read, nothing is run, and for a TPU none is needed (`pip install 'lorax-flax[tpu-plan]'`).
`--topology=local` is for the devices of this machine. The model is that of `config.model.source`, of which config.json
is enough, or one of `--shape` by its size.

It prints, for each device, the bytes of what is held and what a step needs beside it, FLOPs of products, bytes of main
memory that are moved, and the collectives, all as often as loops run them. The times are what the chip's published
peaks allow: no step is faster than the longest of them, and one without any overlap takes their sum.

`--search=N` compiles up to N programs with other settings, each a small change of the best so far, and prints those of
which no other is both smaller and faster; times are those without overlap.

Exit status: 0 if it fits or that is not known; 1 for wrong settings; 5 if it does not fit.
"""

import functools
import sys
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from experiments import command_line
from experiments.bench.worker_settings import SHAPES

_CONFIG = config_flags.DEFINE_config_file("config", help_string="file with the settings, such as configs/quickstart.py")
_TOPOLOGY = flags.DEFINE_string("topology", "local", "the devices: local, or TPUs such as v5e:4x4")
_SHAPE = flags.DEFINE_enum("shape", None, list(SHAPES), "the model by its size, instead of config.model.source")
_ANSWERS = flags.DEFINE_integer("answers", 0, "tokens of a row that bear loss; 0: all")
_MEMORY = flags.DEFINE_float("memory", 0, "memory of a device in GB (10^9 bytes); 0: what a program may use there")
_SEARCH = flags.DEFINE_integer("search", 0, "programs to compile at most, in search of settings that fit or are faster")

EXIT_WRONG_INPUT, EXIT_TOO_LARGE = 1, 5


def main(arguments: Sequence[str]) -> int:
    """Plan what the flags say; return the exit status."""
    from experiments.bench.sizes import by_size
    from experiments.plan import program, report, search, topology

    try:
        on = topology.devices(_TOPOLOGY.value)
        plan_of = functools.partial(
            program.plan,
            on=on,
            shape=by_size(_SHAPE.value) if _SHAPE.value else None,
            answers=_ANSWERS.value or None,
            limit=_MEMORY.value * 1e9 or None,
        )
        tried = search.search(_CONFIG.value, on, plan_of, most=max(1, _SEARCH.value))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    print(report.text(tried[0].plan, _CONFIG.value))
    if _SEARCH.value:
        print(report.found(tried))
    return EXIT_TOO_LARGE if tried[0].plan.fits is False else 0


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=command_line.parse)
