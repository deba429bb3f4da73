"""LoRA for any JAX function.

`trace` finds how a function uses its parameters, `Spec` says which of them get which method, `init` makes the
trainable partition, and `adapt` evaluates the unchanged function with it. See the README for a first example.
"""

from lorax import analysis, checkpoint, optim, peft
from lorax import interpret as _interpret  # noqa: F401  fills the rule tables
from lorax.adapt import adapt, explain
from lorax.adapter import Adapter, init, join, labels, mask, split
from lorax.capture import prefix_from
from lorax.checkpoint import restore, save
from lorax.eva import eva
from lorax.loftq import loftq
from lorax.merge import merge, merge_quantized, unmerge
from lorax.methods import (
    IA3,
    AdaLoRA,
    Bottleneck,
    DoRA,
    Full,
    LoHa,
    LoKr,
    LoRA,
    LoRAFA,
    Method,
    Prefix,
    Prompt,
    TrainableTokens,
    VeRA,
    register,
)
from lorax.quant import FP4, NF4, Int4, Int8, dequantize, quantize
from lorax.sharding import shardings
from lorax.sites import Site, Sites, trace
from lorax.spec import Spec
from lorax.stack import select, stack, unstack
from lorax.version import __version__

__all__ = [
    "FP4",
    "IA3",
    "NF4",
    "AdaLoRA",
    "Adapter",
    "Bottleneck",
    "DoRA",
    "Full",
    "Int4",
    "Int8",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAFA",
    "Method",
    "Prefix",
    "Prompt",
    "Site",
    "Sites",
    "Spec",
    "TrainableTokens",
    "VeRA",
    "adapt",
    "analysis",
    "checkpoint",
    "dequantize",
    "eva",
    "explain",
    "init",
    "join",
    "labels",
    "loftq",
    "mask",
    "merge",
    "merge_quantized",
    "optim",
    "peft",
    "prefix_from",
    "quantize",
    "register",
    "restore",
    "save",
    "select",
    "shardings",
    "split",
    "stack",
    "trace",
    "unmerge",
    "unstack",
    "__version__",
]
