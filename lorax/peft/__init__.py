"""Exchange with PEFT: `save` writes an adapter as a directory of Hugging Face's PEFT, and `load` reads one.

Modules are named by a table `{leaf path: module path}`; `llama_names` is that of the Llama family, and `Module` a line
that says more than the path.
"""

from lorax.peft.names import Module, llama_names
from lorax.peft.reading import load
from lorax.peft.writing import save

__all__ = ["Module", "llama_names", "load", "save"]
