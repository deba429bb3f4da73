r"""How do methods do with few examples to learn from?

    python -m experiments.ablate --config=configs/low_data.py

MiniLM (22.7 M parameters) with a new head learns the sentiment of sentences from four domains (movies, products,
tweets, editorials), by LoRA of rank 8 at every linear layer or by all weights, from 100, 1,000 or 10,000 examples
that the seed draws; five learning rates and three seeds, 90 runs of 40 updates of 32 examples.
"""

from ml_collections import config_dict

from experiments import problems
from experiments.study import settings


def get_config() -> config_dict.ConfigDict:
    """Return the settings of the study."""
    config = settings.defaults()
    config.name = "low_data"
    config.run_dir = "runs/low_data"
    config.problem.update(problems.defaults("sentences"))
    config.problem.domains = ("movies", "amazon", "tweets", "editorials")
    config.problem.max_tokens = 28
    config.problem.test_examples = 600
    config.problem.validation_examples = 300
    config.problem.retained_examples = 0
    config.axes.update(
        method=("full", "lora"),
        examples=(100, 1000, 10000),
        lr=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
        seed=(0, 1, 2),
        steps=(40,),
    )
    config.evaluation.points = 2
    return config
