"""Fills the decoder's parameters, one tensor at a time, from whatever holds the tensors."""

from collections.abc import Callable, Iterable
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from experiments.models.llama import Llama, LlamaConfig
from experiments.models.names import names_for


def leaf_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, by leaf path."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    tree: Any = jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)["params"]
    leaves: dict[str, Any] = flax.traverse_util.flatten_dict(tree, sep="/")
    return {path: leaf.shape for path, leaf in leaves.items()}


def fill_params(
    config: LlamaConfig, tensors: Iterable[str], read: Callable[[str], np.ndarray], *, dtype: Any, source: str
) -> dict[str, Any]:
    """Builds the parameter tree; beside it only one tensor is held in memory at a time.

    Args:
        config: shape of the decoder.
        tensors: names of the tensors that the source holds, as Hugging Face names them.
        read: returns one of them by name.
        dtype: dtype of the parameters.
        source: what to call the source in errors.

    Returns:
        Nested dict of arrays, without the outer "params".

    Raises:
        ValueError: if a tensor is missing, left over, or of another shape than the config asks for.
    """
    names, shapes = names_for(config), leaf_shapes(config)
    wanted = {
        path: [f"{name.module.format(layer=i)}.weight" for i in range(config.layers if name.stacked else 1)]
        for path, name in names.items()
    }
    _check_complete({t for group in wanted.values() for t in group}, set(tensors), config, source)
    leaves = {}
    for path, name in names.items():
        shape = shapes[path]
        leaf = np.empty(shape, dtype)
        rows = leaf if name.stacked else leaf[None]
        for row, tensor in zip(rows, wanted[path], strict=True):
            try:
                row[...] = name.to_leaf(read(tensor), row.shape)
            except ValueError as error:
                raise ValueError(f"{source}: {tensor} does not fill {path}: {error}") from error
        leaves[path] = jnp.asarray(leaf)
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def _check_complete(wanted: set[str], given: set[str], config: LlamaConfig, source: str) -> None:
    # Old exports hold the rotary frequencies, which follow from the config.
    redundant = {t for t in given if t.endswith(".rotary_emb.inv_freq")}
    if config.tied:
        redundant.add("lm_head.weight")  # the same numbers as the embedding
    missing, extra = sorted(wanted - given), sorted(given - wanted - redundant)
    if missing:
        raise ValueError(f"{source}: {len(missing)} tensors are missing, among them {missing[:3]}")
    if extra:
        raise ValueError(
            f"{source}: {len(extra)} tensors have no place in this decoder, among them {extra[:3]}; "
            "it reads the Llama architecture without biases"
        )
