"""What a chip can do at most, as its maker publishes it."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Published peaks of one chip.

    Args:
        flops: products in bfloat16 without sparsity, FLOP/s.
        memory: bytes of its main memory that a program may use; of a TPU as its compiler enforces it, which is a
            little less than what is published.
        bandwidth: of its main memory, bytes/s.
        network: that it sends to others over its own links, bytes/s.
        source: where that is published.
    """

    flops: float
    memory: float
    bandwidth: float
    network: float
    source: str


_TPU = "https://cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"

# By jax.Device.device_kind. Links: all of a chip's together, in one direction.
CHIPS = {
    "TPU v5 lite": Chip(flops=197e12, memory=15.75 * GIB, bandwidth=819e9, network=200e9, source=_TPU + "v5e"),
    "TPU v5": Chip(flops=459e12, memory=95.74 * GIB, bandwidth=2765e9, network=600e9, source=_TPU + "v5p"),
    "TPU v6 lite": Chip(flops=918e12, memory=31.25 * GIB, bandwidth=1640e9, network=448e9, source=_TPU + "v6e"),
    "NVIDIA A100-SXM4-40GB": Chip(
        flops=312e12, memory=40 * GIB, bandwidth=1555e9, network=300e9, source=_NVIDIA + "a100"
    ),
    "NVIDIA A100-SXM4-80GB": Chip(
        flops=312e12, memory=80 * GIB, bandwidth=2039e9, network=300e9, source=_NVIDIA + "a100"
    ),
    "NVIDIA H100 80GB HBM3": Chip(
        flops=989e12, memory=80 * GIB, bandwidth=3350e9, network=450e9, source=_NVIDIA + "h100"
    ),
    "NVIDIA H200": Chip(flops=989e12, memory=141e9, bandwidth=4800e9, network=450e9, source=_NVIDIA + "h200"),
    "NVIDIA L4": Chip(flops=121e12, memory=24e9, bandwidth=300e9, network=32e9, source=_NVIDIA + "l4"),
    "NVIDIA RTX A6000": Chip(flops=155e12, memory=48e9, bandwidth=768e9, network=56e9, source=_NVIDIA + "rtx-a6000"),
}
