"""From the settings to what the loop needs: the model, the batches' layout, the adapter and its sites."""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import config_dict

import lorax
from experiments import data, models
from experiments.training import step

MODEL_NAMES = {"smollm2": "SmolLM2-135M-Instruct"}


def load_model(settings: config_dict.ConfigDict) -> models.Model:
    """Load the model of `config.model`.

    Raises:
        ValueError: if it is not there, of another architecture, or has no tokenizer.
    """
    remat = None if settings.remat == "none" else settings.remat
    model = models.load(settings.source, dtype=jnp.dtype(settings.dtype), remat=remat)
    if model.tokenizer is None:
        raise ValueError(
            f"config.model.source = {settings.source!r}: the model has no tokenizer, so it cannot read text; "
            "put its tokenizer.json and tokenizer_config.json beside its config.json"
        )
    return model


def model_name(settings: config_dict.ConfigDict) -> str:
    """Return what to call the model in the report."""
    return MODEL_NAMES.get(settings.source, settings.source)


def batch_layout(config: config_dict.ConfigDict) -> data.Packed | data.Bucketed:
    """Return how samples are put into batches of `train.rows` × `data.row_tokens` tokens."""
    rows, length = config.train.rows, config.data.row_tokens
    if config.data.batching == "packed":
        return data.Packed(rows=rows, length=length)
    lengths = tuple(sorted({size for size in config.data.buckets if size < length} | {length}))
    return data.Bucketed(lengths=lengths, batch_tokens=rows * length)


def make_adapter(config: config_dict.ConfigDict, loss: step.LossFn, params: Any, batch: data.Batch) -> lorax.Adapter:
    """Trace the loss and return a fresh LoRA adapter of the leaves that `lora.targets` match.

    Raises:
        ValueError: if a pattern matches nothing that can be adapted.
    """
    method = lorax.LoRA(
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        rank_stabilized=config.lora.rank_stabilized,
        dropout=config.lora.dropout,
        dtype=config.lora.dtype,
    )
    spec = lorax.Spec({pattern: method for pattern in config.lora.targets})
    sites = lorax.trace(loss, params, step.loss_inputs(batch))
    make = jax.jit(lambda key, params: lorax.init(key, spec, sites, params))  # one program, not one an array
    return make(jax.random.key(config.seed), params)


def describe_sites(loss: step.LossFn, params: Any, adapter: lorax.Adapter, batch: data.Batch) -> list[dict[str, Any]]:
    """Return a row for each adapted leaf: what the trace found, and how the adapted loss computes it."""
    rows = {row.path: row for row in lorax.explain(loss, params, adapter, step.loss_inputs(batch))}
    return [
        {
            "path": site.path,
            "kind": site.kind,
            "shape": list(site.shape),
            "dtype": site.dtype,
            "method": _method(adapter.methods[site.path]),
            "trainable": sum(array.size for array in jax.tree.leaves(adapter.params[site.path])),
            "how": rows[site.path].how,
            "reason": rows[site.path].reason,
        }
        for site in adapter.sites
    ]


def _method(method: lorax.Method) -> str:
    rank = getattr(method, "rank", None)
    return type(method).__name__ + (f", rank {rank}" if rank else "")
