r"""Which method of fine-tuning learns most, and at what cost?

    python -m experiments.ablate --config=configs/methods.py

MiniLM (22.7 M parameters) with a new head learns whether sentences from movie reviews are positive, by full
fine-tuning, BitFit, bottleneck adapters, prompt and prefix tuning, LoRA, DoRA, AdaLoRA and QLoRA; four learning rates
and three seeds each, 108 runs of 20 updates.
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
