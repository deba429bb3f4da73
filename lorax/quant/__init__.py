"""Quantised weights: formats, the node that stands for a leaf, and functions that quantise parameters."""

from lorax.paths import is_quantized
from lorax.quant.formats import FP4, NF4, Format, Int4, Int8
from lorax.quant.node import Quantized
from lorax.quant.quantize import dequantize, quantize, quantize_leaf, shardings, stack_nodes

__all__ = [
    "FP4",
    "NF4",
    "Format",
    "Int4",
    "Int8",
    "Quantized",
    "dequantize",
    "is_quantized",
    "quantize",
    "quantize_leaf",
    "shardings",
    "stack_nodes",
]
