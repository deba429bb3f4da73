r"""Does a higher rank help, and where does that stop?

    python -m experiments.ablate --config=configs/rank.py

TODO
"""

from ml_collections import config_dict

from experiments import problems
from experiments.study import settings


def get_config() -> config_dict.ConfigDict:
    """Return the settings of the study."""
    config = settings.defaults()
    config.name = "rank"
    config.run_dir = "runs/rank"
    config.problem.update(problems.defaults("digits"))
    config.axes.update(
        targets=("qv", "all"),
        rank=(1, 2, 4, 8, 16, 64),
        lr=(3e-3, 1e-2, 3e-2, 1e-1),
        seed=(0, 1, 2),
        steps=(60,),
    )
    config.evaluation.update(points=3, batch=64)
    return config
