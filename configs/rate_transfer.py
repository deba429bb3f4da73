r"""Does the best learning rate of one rank hold at another?

    python -m experiments.ablate --config=configs/rate_transfer.py

TODO
"""

from ml_collections import config_dict

from experiments import problems
from experiments.study import settings


def get_config() -> config_dict.ConfigDict:
    """Return the settings of the study."""
    config = settings.defaults()
    config.name = "rate_transfer"
    config.run_dir = "runs/rate_transfer"
    config.problem.update(problems.defaults("digits"))
    config.axes.update(
        method=("lora", "full"),
        rank=(1, 4, 16, 64),
        alpha=(16.0, "rank"),
        lr=(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
        seed=(0, 1, 2),
        steps=(60,),
    )
    config.evaluation.update(points=3, batch=64)
    return config
