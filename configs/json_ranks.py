r"""Which rank does a language model of 135 M parameters need to answer in JSON?

    python -m experiments.ablate --config=configs/json_ranks.py

SmolLM2 (135 M parameters) learns to answer `{"sentiment": "positive"}`, the task of `configs/quickstart.py`: LoRA of
ranks 1 and 8 at every linear layer, three learning rates, two seeds, 12 runs of 16 updates of 8 sentences. A score is
1 where the greedy answer is the right one, token by token.
"""

from ml_collections import config_dict

from experiments import problems
from experiments.study import settings


def get_config() -> config_dict.ConfigDict:
    """Return the settings of the study."""
    config = settings.defaults()
    config.name = "json_ranks"
    config.run_dir = "runs/json_ranks"
    config.problem.update(problems.defaults("json"))
    config.problem.domains = ("movies",)
    config.problem.validation_examples = 64
    config.problem.test_examples = 192
    config.axes.update(
        rank=(1, 8),
        lr=(3e-4, 1e-3, 3e-3),
        seed=(0, 1),
        steps=(16,),
    )
    config.train.batch = 8
    return config
