r"""Does LoRA forget less than full fine-tuning where it has learned as much?

    python -m experiments.ablate --config=configs/forgetting.py

TODO
"""

from ml_collections import config_dict

from experiments import problems
from experiments.study import settings


def get_config() -> config_dict.ConfigDict:
    """Return the settings of the study."""
    config = settings.defaults()
    config.name = "forgetting"
    config.run_dir = "runs/forgetting"
    config.problem.update(problems.defaults("digits"))
    config.axes.update(
        method=("full", "lora"),
        rank=(1, 8, 64),
        lr=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 6e-2),
        seed=(0, 1, 2),
        steps=(60,),
    )
    config.evaluation.update(points=3, batch=64)
    return config
