"""Decoders of the Llama family by their size."""

from experiments.bench.worker_settings import SHAPES
from experiments.models.llama import LlamaConfig


def by_size(name: str) -> LlamaConfig:
    """Return a decoder by its name in `SHAPES`, for rows of up to 131072 tokens."""
    sizes = SHAPES[name]
    return LlamaConfig(
        vocab_size=sizes["vocabulary"],
        layers=sizes["layers"],
        dim=sizes["dim"],
        heads=sizes["heads"],
        kv_heads=sizes["kv_heads"],
        head_dim=sizes["dim"] // sizes["heads"],
        ffn_dim=sizes["ffn"],
        max_positions=2**17,
        tied=sizes["tied"],
    )
