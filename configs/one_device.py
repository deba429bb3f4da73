r"""How large a model can one device fine-tune over a base in four bits?

    python -m experiments.plan --config=configs/one_device.py --shape=llama-65b --topology=v5p:1x1x1 --memory=48

The setting of QLoRA's memory figures (Dettmers et al. 2023, arXiv:2305.14314, figure 6): one row of 512 tokens, LoRA of
rank 64 in bfloat16 at every linear layer, NF4 with double quantisation, each layer's activations computed again in the
backward pass. There 7B takes 6.9 GB, 65B 45.0 GB.

Planned for one TPU, from shapes alone (GB, 10^9 bytes):

    model          base   adapter   moments   temporaries     peak
    llama-7b       3.87      0.32      0.64          1.74     6.57
    llama-65b     34.46      1.60      3.20          7.08    46.34

Base and moments can be split over more devices, and the moments kept in host memory (`--config.train.offload`).
"""

from ml_collections import config_dict

from configs import quickstart


def get_config() -> config_dict.ConfigDict:
    """Return the settings of one row on one device."""
    config = quickstart.get_config()
    config.name = "one_device"
    config.run_dir = "runs/one_device"
    config.model.update(dtype="bfloat16", quantize="nf4", double_quantization=True, remat="full")
    config.lora.update(rank=64, dtype="bfloat16")
    config.data.row_tokens = 512
    config.train.update(rows=1, accumulate=1, loss_chunk=128)
    return config
