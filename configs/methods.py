r"""Which method of fine-tuning learns most, and at what cost?

    python -m experiments.ablate --config=configs/methods.py

TODO
"""

from ml_collections import config_dict

from experiments import problems
from experiments.study import settings


def get_config() -> config_dict.ConfigDict:
    """Return the settings of the study."""
    config = settings.defaults()
    config.name = "methods"
    config.run_dir = "runs/methods"
    config.problem.update(problems.defaults("sentences"))
    config.problem.retained_examples = 16
    config.axes.update(
        method=("full", "bitfit", "bottleneck", "prompt", "prefix", "lora", "dora", "adalora", "qlora"),
        rank=(8,),
        lr=(3e-4, 1e-3, 3e-3, 1e-2),
        seed=(0, 1, 2),
        steps=(20,),
    )
    config.evaluation.points = 2
    return config
