"""What does fine-tuning over a 4-bit base cost in accuracy, and save in bytes?

python -m experiments.finetune --config=configs/qlora.py
"""

from ml_collections import config_dict

from configs import quickstart


def get_config() -> config_dict.ConfigDict:
    """Return the settings of the quickstart over a base in NF4."""
    config = quickstart.get_config()
    config.name = "qlora"
    config.run_dir = "runs/qlora"
    config.model.update(dtype="bfloat16", quantize="nf4", double_quantization=True)
    config.train.offload = True
    return config
