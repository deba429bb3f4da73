"""From the settings to what the loop needs: the model, the batches' layout, the adapter and its sites."""

import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import config_dict

import lorax
from experiments import data, models
from experiments.training import recipes, step

MODEL_NAMES = {"smollm2": "SmolLM2-135M-Instruct"}


def load_model(config: config_dict.ConfigDict, mesh: Mesh | None = None) -> models.Model:
    """Load the model of `config.model` onto a mesh, quantised on the way unless the method does that itself.

    Raises:
        ValueError: if it is not there, of another architecture, or has no tokenizer.
    """
    settings = config.model
    remat = None if settings.remat == "none" else settings.remat
    formats = {} if recipes.find(config).is_quantising else recipes.formats(config)
    dtype = jnp.dtype(settings.dtype)
    model = models.load(
        settings.source, dtype=dtype, remat=remat, attention=settings.attention, formats=formats, mesh=mesh
    )
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


def adapt(
    config: config_dict.ConfigDict, loss: step.LossFn, params: Any, batches: Iterable[data.Batch]
) -> tuple[Any, lorax.Adapter]:
    """Trace the loss and return the base and a fresh adapter of it.

    Args:
        config: the settings.
        loss: of `step.summed_loss`.
        params: as `load_model` returned them.
        batches: of the training data, at least one; with placeholders, each row begins with them.

    Returns:
        `params`, quantised if the method does that itself, and the adapter.

    Raises:
        ValueError: if a pattern matches nothing that can be adapted.
    """
    spec, recipe, batches = recipes.spec(config), recipes.find(config), iter(batches)
    inputs = step.loss_inputs(next(batches))
    sites = lorax.trace(loss, params, inputs)
    make = lambda key, params: lorax.init(key, spec, sites, params)
    where = lorax.shardings(params, jax.eval_shape(make, jax.random.key(config.seed), params))
    adapter = jax.jit(make, out_shardings=where)(jax.random.key(config.seed), params)  # one program, not one an array
    if recipe.reads_inputs:
        others = map(step.loss_inputs, itertools.islice(batches, config.eva.batches - 1))
        adapter = lorax.eva(loss, params, adapter, [(inputs,), *((x,) for x in others)], rho=config.eva.rho)
    if recipe.is_quantising:
        params, adapter = lorax.loftq(params, adapter, recipes.formats(config), sites=sites)
    if any(isinstance(method, lorax.Prefix) for method in adapter.methods.values()):
        first_row = {name: array[:1] for name, array in inputs.items()}
        adapter = jax.jit(lambda params, adapter: lorax.prefix_from(loss, params, adapter, first_row))(params, adapter)
    return params, adapter


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
