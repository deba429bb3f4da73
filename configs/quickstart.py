"""TODO."""

from ml_collections import config_dict

from experiments.training import settings


def get_config() -> config_dict.ConfigDict:
    """Return the settings of the quickstart."""
    config = settings.defaults()
    config.name = "quickstart"
    config.run_dir = "runs/quickstart"
    config.data.row_tokens = 256
    config.train.rows = 2
    config.train.steps = 75
    config.train.warmup_steps = 8
    config.train.learning_rate = 1e-3
    config.evaluation.examples = 256
    config.evaluation.loss_examples = 64
    config.evaluation.every = 25
    config.evaluation.progress_examples = 32
    config.checkpoint.every = 10
    return config
