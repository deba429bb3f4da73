r"""Which rank does a language model of 135 M parameters need to answer in JSON?

    python -m experiments.ablate --config=configs/json_ranks.py

SmolLM2 (135 M parameters) learns to answer `{"sentiment": "positive"}`, the task of `configs/quickstart.py`: LoRA of
ranks 1 and 8 at every linear layer, three learning rates, two seeds, 12 runs of 16 updates of 8 sentences. A score is
1 where the greedy answer is the right one, token by token. It took 37 minutes on two busy CPU cores, 15 of them for
updates.

Measured (right answers on 192 test sentences, per cent, with 95 % intervals over seeds and sentences; 9.9 before):

    rank 1   85.7 (70.7 to 100), at the rate 3e-3, the edge of the grid (on validation 87.5 there and at 1e-3)
    rank 8   87.5 (67.2 to 100), at the rate 1e-3

Rank 8 less rank 1 is 1.8 points (-28 to 32): with two seeds an interval is as wide as that, and nothing can be said
about ranks, though both are far above what the model did before. All twelve runs lie between 77 and 90 %, after 128
sentences. This shows that the runner takes a language model; a study of ranks would have more seeds
(`--config.axes.seed=0,1,2,3,4`).
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
