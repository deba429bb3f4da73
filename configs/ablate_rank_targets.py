r"""Which weights should LoRA adapt, and at what rank?

    python -m experiments.ablate --config=configs/ablate_rank_targets.py

MiniLM (22.7 M parameters) with a new head learns whether sentences from movie reviews are positive: ranks 1, 4, 16 and
64 at query and value, all of attention, or the feed-forward layers; three learning rates and three seeds each, 108
runs. `--config.size=full` is the grid of a paper: 6 ranks, 6 sets of weights, 5 learning rates and 5 seeds, 900 runs.
"""

from ml_collections import config_dict

from experiments import problems
from experiments.study import settings


def get_config() -> config_dict.ConfigDict:
    """Return the settings of the study."""
    config = settings.defaults()
    config.name = "ablate_rank_targets"
    config.run_dir = "runs/ablate_rank_targets"
    config.problem.update(problems.defaults("sentences"))
    config.problem.retained_examples = 8
    config.axes.update(
        targets=("qv", "attention", "mlp"),
        rank=(1, 4, 16, 64),
        lr=(7e-4, 2e-3, 6e-3),
        seed=(0, 1, 2),
        steps=(18,),
    )
    config.evaluation.points = 2
    config.sizes.full = {
        "axes": {
            "targets": ("q", "v", "qv", "attention", "mlp", "all"),
            "rank": (1, 2, 4, 8, 16, 64),
            "lr": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
            "seed": tuple(range(5)),
            "steps": (200,),
        }
    }
    return config
