r"""What does fine-tuning over a 4-bit base cost in accuracy, and save in bytes?

    python -m experiments.finetune --config=configs/qlora.py

The quickstart's data, adapter and steps over the same model with its linear layers in NF4 (double quantisation, blocks
of 64), products in bfloat16, the optimiser's moments in host memory between updates. Against 16 and 32 bits:

    python -m experiments.finetune --config=configs/qlora.py --config.model.quantize=none \
        --config.run_dir=runs/qlora16
    python -m experiments.finetune --config=configs/qlora.py --config.model.quantize=none \
        --config.model.dtype=float32 --config.run_dir=runs/qlora32

Measured on two CPU cores, megabytes; right answers of 192, with 95 % intervals:

    base       base   adapter   moments   temporaries    peak   accuracy before -> after           held-out loss
    NF4         111      9.8       19.5         1,346   1,487   17.7 % -> 87.0 % (81.5 to 91.0)    0.521 -> 0.045
    bfloat16    269      9.8       19.5         1,771   2,069   22.9 % -> 89.1 % (83.9 to 92.7)    0.463 -> 0.037
    float32     538      9.8       19.5         1,216   1,783   20.8 % -> 89.6 % (84.5 to 93.2)    0.471 -> 0.036

The peak is the sum of the other columns. Temporaries are XLA's count of the update's program, mostly activations; on a
CPU a bfloat16 product is computed in float32, so that both copies of its operands count. 167, 171 and 172 answers are
right, which is within each other's intervals. The linear layers take 54.8 of the 111 MB (4.127 bits a weight), the rest
is the embedding in bfloat16.
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
