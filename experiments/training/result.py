"""What a run ends with: the saved adapter, the check that merging changes nothing, and the byte counts."""

import pathlib
import resource
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorax
from experiments import data
from experiments.models import Model
from experiments.training import step
from experiments.training.run_directory import bytes_on_disk


def save_adapter(path: pathlib.Path, adapter: lorax.Adapter, params: Any, metadata: dict[str, Any]) -> lorax.Adapter:
    """Save the adapter and return it as restored from there.

    It is not saved again when the run was killed after doing so.

    Raises:
        ValueError: if what is there is another adapter.
    """
    if not path.exists():
        lorax.save(path, adapter, base=params, metadata=metadata)
    restored = lorax.restore(path, base=params)
    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), adapter.params, restored.params)
    if not all(jax.tree.leaves(same)):
        raise ValueError(f"{path}: holds another adapter than this run's; move it away and start the run again")
    return restored


def compare_merged(model: Model, params: Any, adapter: lorax.Adapter, merged: Any, batch: data.Batch) -> dict[str, Any]:
    """Return how far the logits of the merged weights are from those of the adapted function on a batch.

    Args:
        model: the model.
        params: the base.
        adapter: the trained adapter.
        merged: `lorax.merge(params, adapter)`.
        batch: held-out examples; the logits that predict the tokens of their answers are compared.
    """

    def logits(params: Any, batch: dict[str, Any]) -> jax.Array:
        hidden_BxTxD = model.apply(
            params,
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            logits=False,
        )
        return model.unembed(params, data.gather_loss_positions(hidden_BxTxD, batch["loss_positions"]))

    @jax.jit
    def differences(params: Any, adapter: lorax.Adapter, merged: Any, batch: dict[str, Any]) -> tuple[jax.Array, ...]:
        of_adapted_BxKxV = lorax.adapt(logits)(params, adapter, batch)
        of_merged_BxKxV = logits(merged, batch)
        counts_BxK = batch["loss_weights"] > 0
        apart_BxK = jnp.max(jnp.abs(of_adapted_BxKxV - of_merged_BxKxV), axis=-1)
        largest_BxK = jnp.max(jnp.abs(of_merged_BxKxV), axis=-1)
        same_BxK = jnp.argmax(of_adapted_BxKxV, axis=-1) == jnp.argmax(of_merged_BxKxV, axis=-1)
        return (
            jnp.max(jnp.where(counts_BxK, apart_BxK, 0)),
            jnp.max(jnp.where(counts_BxK, largest_BxK, 0)),
            jnp.sum(same_BxK & counts_BxK),
            jnp.sum(counts_BxK),
        )

    apart, largest, same, positions = differences(params, adapter, merged, step.loss_inputs(batch))
    return {
        "largest_difference": float(apart),
        "largest_logit": float(largest),
        "same_token": int(same),
        "positions": int(positions),
    }


def budget(params: Any, adapter: lorax.Adapter, opt_state_bytes: int, directory: pathlib.Path) -> dict[str, int]:
    """Return parameters and bytes: trained, frozen, of the optimiser, and of what is on the disk."""
    trained, frozen = jax.tree.leaves(adapter.params), jax.tree.leaves(params)
    newest = max((int(p.name) for p in (directory / "checkpoints").iterdir() if p.name.isdigit()), default=None)
    on_disk = {"adapter_file_bytes": bytes_on_disk(directory / "adapter")}
    if newest is not None:
        on_disk["checkpoint_file_bytes"] = bytes_on_disk(directory / "checkpoints" / str(newest))
    return {
        "trainable_parameters": sum(leaf.size for leaf in trained),
        "trainable_bytes": sum(leaf.nbytes for leaf in trained),
        "frozen_parameters": sum(leaf.size for leaf in frozen),
        "frozen_bytes": sum(leaf.nbytes for leaf in frozen),
        "optimiser_bytes": opt_state_bytes,
        **on_disk,
    }


def peak_memory_bytes() -> int:
    """Return the largest resident size this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux kibibytes
