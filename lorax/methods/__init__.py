"""The methods, one file each."""

from lorax.methods.adalora import AdaLoRA
from lorax.methods.base import Method, register
from lorax.methods.bottleneck import Bottleneck
from lorax.methods.dora import DoRA
from lorax.methods.full import Full
from lorax.methods.ia3 import IA3
from lorax.methods.loha import LoHa
from lorax.methods.lokr import LoKr
from lorax.methods.lora import LoRA
from lorax.methods.lorafa import LoRAFA
from lorax.methods.prefix import Prefix, Prompt
from lorax.methods.trainable_tokens import TrainableTokens
from lorax.methods.vera import VeRA

__all__ = [
    "IA3",
    "AdaLoRA",
    "Bottleneck",
    "DoRA",
    "Full",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAFA",
    "Method",
    "Prefix",
    "Prompt",
    "TrainableTokens",
    "VeRA",
    "register",
]
