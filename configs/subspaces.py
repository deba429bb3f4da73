r"""Do adapters of other ranks and seeds learn the same directions?

    python -m experiments.ablate --config=configs/subspaces.py

TODO
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
    return config
