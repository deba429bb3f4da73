"""The methods, one file each."""

from lorax.methods.base import Method, register
from lorax.methods.full import Full
from lorax.methods.lora import LoRA

__all__ = ["Full", "LoRA", "Method", "register"]
