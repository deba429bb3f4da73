"""LoRA for any JAX function.

`trace` finds how a function uses its parameters, `Spec` says which of them get which method, `init` makes the
trainable partition, and `adapt` evaluates the unchanged function with it. See the README for a first example.
"""

from lorax import checkpoint
from lorax import interpret as _interpret  # noqa: F401  fills the rule tables
from lorax.adapt import adapt, explain
from lorax.adapter import Adapter, init, join, labels, mask, split
from lorax.checkpoint import restore, save
from lorax.merge import merge, unmerge
from lorax.methods import Full, LoRA, Method, register
from lorax.sites import Site, Sites, trace
from lorax.spec import Spec
from lorax.version import __version__

__all__ = [
    "Adapter",
    "Full",
    "LoRA",
    "Method",
    "Site",
    "Sites",
    "Spec",
    "adapt",
    "checkpoint",
    "explain",
    "init",
    "join",
    "labels",
    "mask",
    "merge",
    "register",
    "restore",
    "save",
    "split",
    "trace",
    "unmerge",
    "__version__",
]
