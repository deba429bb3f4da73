"""What a run ends with: the saved adapter, the check that merging changes nothing, and the byte counts."""

import pathlib
import resource
import sys
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import config_dict

import lorax
from experiments import data
from experiments.models import Model
from experiments.training import devices, step
from experiments.training.loop import Trained
from experiments.training.run_directory import bytes_on_disk

HUB_NAMES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def save_adapter(path: pathlib.Path, adapter: lorax.Adapter, params: Any, metadata: dict[str, Any]) -> lorax.Adapter:
    """Save the adapter and return it as restored from there.

    It is not saved again when the run was killed after doing so.

    Raises:
        ValueError: if what is there is another adapter.
    """
    if not devices.from_main(path.exists):
        lorax.save(path, adapter, base=params, metadata=metadata)
    restored = lorax.restore(path, base=params, shardings=lorax.shardings(params, adapter))
    same = jax.jit(lambda a, b: jax.tree.map(lambda x, y: jnp.all(x == y), a, b))(adapter.params, restored.params)
    if not all(map(bool, jax.tree.leaves(same))):
        raise ValueError(f"{path}: holds another adapter than this run's; move it away and start the run again")
    return restored


def save_peft(
    path: pathlib.Path, adapter: lorax.Adapter, params: Any, model: Model, settings: config_dict.ConfigDict
) -> None:
    """Write the adapter as a directory of Hugging Face's PEFT, for the same base there."""
    adapter = devices.whole(adapter)
    if devices.is_main():
        lorax.peft.save(path, adapter, params, names=model.peft_names, base_model=HUB_NAMES.get(settings.source))


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


def budget(params: Any, adapter: lorax.Adapter, outcome: Trained, directory: pathlib.Path) -> dict[str, int]:
    """Return parameters and bytes: trained, frozen, of the optimiser and an update, and of what is on the disk.

    A quantised leaf counts with the weights that it stands for and the bytes that it takes.
    """
    trained, fixed = jax.tree.leaves(adapter.params), jax.tree.leaves(adapter.state)
    frozen = jax.tree.leaves(params, is_leaf=lorax.quant.is_quantized)
    newest = max((int(p.name) for p in (directory / "checkpoints").iterdir() if p.name.isdigit()), default=None)
    more = {"adapter_file_bytes": bytes_on_disk(directory / "adapter")}
    if newest is not None:
        more["checkpoint_file_bytes"] = bytes_on_disk(directory / "checkpoints" / str(newest))
    if outcome.temporary_bytes is not None:
        more["step_temporary_bytes"] = outcome.temporary_bytes
    return {
        "trainable_parameters": sum(leaf.size for leaf in trained),
        "trainable_bytes": sum(leaf.nbytes for leaf in trained),
        "frozen_parameters": sum(leaf.size for leaf in frozen),
        "frozen_bytes": sum(leaf.nbytes for leaf in frozen),
        "fixed_bytes": sum(leaf.nbytes for leaf in fixed),
        "optimiser_bytes": outcome.opt_state_bytes,
        **more,
    }


def peak_memory_bytes() -> int:
    """Return the largest resident size this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux kibibytes
