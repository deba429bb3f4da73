r"""Do adapters of other ranks and seeds learn the same directions?

    python -m experiments.ablate --config=configs/subspaces.py

MiniLM (22.7 M parameters) with a new head learns whether sentences from movie reviews are positive, by LoRA of ranks
8 and 64 at query and value; three learning rates and three seeds, 18 runs of 40 updates. Compared are the output
sides of the updates, since the input side is mostly what it started as.
"""

from ml_collections import config_dict

from experiments import problems
from experiments.study import settings


def get_config() -> config_dict.ConfigDict:
    """Return the settings of the study."""
    config = settings.defaults()
    config.name = "subspaces"
    config.run_dir = "runs/subspaces"
    config.problem.update(problems.defaults("sentences"))
    config.problem.retained_examples = 0
    config.axes.update(
        targets=("qv",),
        rank=(8, 64),
        lr=(7e-4, 2e-3, 6e-3),
        seed=(0, 1, 2),
        steps=(40,),
    )
    config.keep = "all"  # adapters: subspaces can be compared at the same rate too
    return config
