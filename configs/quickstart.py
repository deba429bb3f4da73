"""TODO."""

from ml_collections import config_dict

from experiments.training import settings


def get_config() -> config_dict.ConfigDict:
    """Return the settings of the quickstart."""
    config = settings.defaults()
    config.name = "quickstart"
    config.run_dir = "runs/quickstart"
    config.data.row_tokens = 256
    config.train.update(steps=40, rows=2, learning_rate=1e-3, warmup_steps=4)
    config.evaluation.update(examples=192, loss_examples=64, max_new_tokens=16, every=10, progress_examples=32)
    config.checkpoint.every = 10
    return config
