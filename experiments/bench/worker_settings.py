"""What the processes of `experiments.bench.train` are told, and how many FLOPs a step needs. Imports nothing else."""

import dataclasses

_OF_LLAMA = {"vocabulary": 32000, "tied": False}
_OF_LLAMA_3 = {"vocabulary": 128256, "tied": False}
# Sizes of decoders of the Llama family: the one of this repository's other benchmarks, SmolLM2-135M's, those of Llama
# (Touvron et al. 2023, arXiv:2302.13971), of Llama 3.1 (8b, 70b, 405b) and of Llama 3.2 (1b, 3b).
SHAPES = {
    "tiny": {"layers": 2, "dim": 32, "heads": 4, "kv_heads": 2, "ffn": 64, "vocabulary": 128, "tied": False},
    "32m": {"layers": 8, "dim": 512, "heads": 8, "kv_heads": 4, "ffn": 1408, "vocabulary": 8192, "tied": False},
    "135m": {"layers": 30, "dim": 576, "heads": 9, "kv_heads": 3, "ffn": 1536, "vocabulary": 49152, "tied": True},
    "1b": {"layers": 16, "dim": 2048, "heads": 32, "kv_heads": 8, "ffn": 8192, "vocabulary": 128256, "tied": True},
    "3b": {"layers": 28, "dim": 3072, "heads": 24, "kv_heads": 8, "ffn": 8192, "vocabulary": 128256, "tied": True},
    "8b": {"layers": 32, "dim": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336, **_OF_LLAMA_3},
    "70b": {"layers": 80, "dim": 8192, "heads": 64, "kv_heads": 8, "ffn": 28672, **_OF_LLAMA_3},
    "405b": {"layers": 126, "dim": 16384, "heads": 128, "kv_heads": 8, "ffn": 53248, **_OF_LLAMA_3},
    "llama-7b": {"layers": 32, "dim": 4096, "heads": 32, "kv_heads": 32, "ffn": 11008, **_OF_LLAMA},
    "llama-13b": {"layers": 40, "dim": 5120, "heads": 40, "kv_heads": 40, "ffn": 13824, **_OF_LLAMA},
    "llama-33b": {"layers": 60, "dim": 6656, "heads": 52, "kv_heads": 52, "ffn": 17920, **_OF_LLAMA},
    "llama-65b": {"layers": 80, "dim": 8192, "heads": 64, "kv_heads": 64, "ffn": 22016, **_OF_LLAMA},
}
LEARNING_RATE = 1e-4


@dataclasses.dataclass(frozen=True)
class Settings:
    """One variant of a step: a name of `SHAPES`, a variant, rows and their length in tokens, the weights' dtype."""

    shape: str
    variant: str
    batch: int
    length: int
    dtype: str

    @property
    def rank(self) -> int:
        """The rank of the adapter; 0 where there is none."""
        last = self.variant.rsplit("-", 1)[-1]
        return int(last) if last.isdigit() else 0

    @property
    def is_all(self) -> bool:
        """Whether all seven linear layers of a block are adapted, and not query and value alone."""
        return "-qv-" not in self.variant


def linear_sizes(shape: str) -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of the linear layers of a block."""
    s = SHAPES[shape]
    dim, ffn, kv = s["dim"], s["ffn"], s["dim"] // s["heads"] * s["kv_heads"]
    attention = {"query": (dim, dim), "key": (dim, kv), "value": (dim, kv), "out": (dim, dim)}
    return attention | {"gate": (dim, ffn), "up": (dim, ffn), "down": (ffn, dim)}


def needed_flops(settings: Settings) -> float:
    """Return the FLOPs that a step needs: of products alone, none of them computed twice.

    A token needs 2 a weight and 4·length·dim a layer in the attention; backwards as much again for the gradients of
    activations, twice as much in the attention, where both factors are activations, and as much as forward for those of
    weights that are trained.
    """
    s, tokens = SHAPES[settings.shape], settings.batch * settings.length
    sizes = linear_sizes(settings.shape)
    weights = 2 * tokens * (s["layers"] * sum(i * o for i, o in sizes.values()) + s["dim"] * s["vocabulary"])
    attention = 4 * tokens * settings.length * s["layers"] * s["dim"]
    if settings.variant == "forward":
        return weights + attention
    chosen = sizes.values() if settings.is_all else (sizes["query"], sizes["value"])
    factors = 2 * tokens * settings.rank * s["layers"] * sum(i + o for i, o in chosen)
    return (3 if settings.variant == "full" else 2) * weights + 3 * (attention + factors)
