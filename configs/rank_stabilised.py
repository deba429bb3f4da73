r"""Does scaling by α/√r (rsLoRA) beat α/r at high ranks, once each has its own learning rate?

    python -m experiments.ablate --config=configs/rank_stabilised.py

TODO
"""

from ml_collections import config_dict

from experiments import problems
from experiments.study import settings


def get_config() -> config_dict.ConfigDict:
    """Return the settings of the study."""
    config = settings.defaults()
    config.name = "rank_stabilised"
    config.run_dir = "runs/rank_stabilised"
    config.problem.update(problems.defaults("digits"))
    config.axes.update(
        method=("lora", "rslora"),
        rank=(1, 4, 16, 64),
        lr=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        seed=(0, 1, 2),
        steps=(60,),
    )
    config.evaluation.update(points=3, batch=64)
    return config
