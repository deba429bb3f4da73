r"""How do methods do with few examples to learn from?

    python -m experiments.ablate --config=configs/low_data.py

MiniLM (22.7 M parameters) with a new head learns the sentiment of sentences from four domains (movies, products,
tweets, editorials), by LoRA of rank 8 at every linear layer or by all weights, from 100, 1,000 or 10,000 examples
that the seed draws; five learning rates and three seeds, 90 runs of 40 updates of 32 examples. It took 47 minutes on
two busy CPU cores.

Measured (test accuracy on 600 sentences, per cent, with 95 % intervals over seeds and sentences; 46.0 before; all
weights at a rate of 1e-4, LoRA at 1e-3):

    examples               100                   1,000                  10,000
    all weights    79.6 (75.8 to 83.4)    84.1 (80.9 to 87.2)    84.0 (80.3 to 87.7)
    LoRA           78.4 (73.7 to 83.2)    83.3 (80.1 to 86.6)    83.2 (80.0 to 86.5)

A thousand examples are better than a hundred, by 4.7 points over both methods (1.2 to 8.2; all intervals hold at once).
The two methods are not told apart at any number (all weights ahead by 1.1, -4.4 to 6.6; 0.7, -3.0 to 4.5; 0.8, -3.0 to
4.6), nor averaged (0.9, -1.2 to 2.9). So that LoRA is ahead with 100 examples and level after (63.8 against 60.2 %,
then 85.6 against 85.8: Hu et al. 2021, arXiv:2106.09685, table 16) did not reproduce and is not refuted: its 3.6 points
are within the intervals. That 10,000 examples are no better than 1,000 says nothing about data: 40 updates see 1,280
of them. The rate says more than the method: at 1e-3, LoRA's best, all weights are 11 points below it with 100
examples and 21 with 1,000, and with rates from 3e-4 up alone they would have been on the edge of their grid.
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
