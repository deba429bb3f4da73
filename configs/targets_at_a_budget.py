r"""Which weights should a fixed number of trained parameters be spent on?

    python -m experiments.ablate --config=configs/targets_at_a_budget.py

TODO
"""

from ml_collections import config_dict

from experiments import problems
from experiments.study import settings


def get_config() -> config_dict.ConfigDict:
    """Return the settings of the study."""
    config = settings.defaults()
    config.name = "targets_at_a_budget"
    config.run_dir = "runs/targets_at_a_budget"
    config.problem.update(problems.defaults("digits"))
    config.axes.update(
        targets=("q", "k", "v", "o", "qk", "qv", "attention", "mlp", "all"),
        budget=(9216,),
        lr=(3e-3, 1e-2, 3e-2, 1e-1),
        seed=(0, 1, 2),
        steps=(60,),
    )
    config.evaluation.update(points=3, batch=64)
    return config
