"""The public names and their signatures: a change here breaks other people's code."""

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lorax
import lorax.checkpoint

NAMES = {
    "AdaLoRA", "Adapter", "Bottleneck", "DoRA", "FP4", "Full", "IA3", "Int4", "Int8", "LoHa", "LoKr", "LoRA", "LoRAFA",
    "Method", "NF4", "Prefix", "Prompt", "Site", "Sites", "Spec", "TrainableTokens", "VeRA", "adapt", "analysis",
    "checkpoint", "dequantize", "eva", "explain", "init", "join", "labels", "loftq", "mask", "merge", "merge_quantized",
    "optim", "peft", "prefix_from", "quantize", "register", "restore", "save", "select", "shardings", "split", "stack",
    "trace", "unmerge", "unstack", "__version__",
}  # fmt: skip
LOW_RANK = "rank=8, alpha=None, rank_stabilized=False, dropout=0.0, dtype='float32', initializer='uniform'"

# Names, kinds and defaults of parameters: annotations may become more precise.
SIGNATURES = {
    "trace": "(fn, params, *args, **kwargs)",
    "Spec": "(rules)",
    "Spec.resolve": "(self, sites)",
    "init": "(key, spec, sites, params)",
    "adapt": "(fn, *, strict=False)",
    "explain": "(fn, params, adapter, *args, **kwargs)",
    "split": "(params, adapter)",
    "join": "(frozen, trainable)",
    "mask": "(params, adapter)",
    "labels": "(adapter)",
    "merge": "(params, adapter)",
    "unmerge": "(merged, adapter)",
    "save": "(path, adapter, *, base, metadata=None)",
    "restore": "(path, *, base, shardings=None)",
    "register": "(cls)",
    "LoRA": f"(*, {LOW_RANK}, bias=False)",
    "DoRA": f"(*, {LOW_RANK})",
    "LoRAFA": f"(*, {LOW_RANK})",
    "LoHa": f"(*, {LOW_RANK})",
    "LoKr": f"(*, {LOW_RANK}, factor=-1)",
    "AdaLoRA": "(*, rank=12, target_rank=None, alpha=None, dropout=0.0, dtype='float32', initial_std=0.02)",
    "VeRA": "(*, rank=256, d_initial=0.1, projection_seed=0, dropout=0.0, dtype='float32')",
    "IA3": "(*, on='output', dtype='float32')",
    "Bottleneck": "(*, rank=64, activation='gelu', dtype='float32')",
    "Prompt": "(*, length=8, tokens=(), dtype='float32')",
    "Prefix": "(*, length=8, initial_std=0.02, dtype='float32')",
    "TrainableTokens": "(*, tokens=(), dtype=None)",
    "eva": "(fn, params, adapter, batches, *, rho=2.0, whiten=False, adjusts_scale=True, memory=1073741824)",
    "loftq": "(params, adapter, rules, *, sites=None, iterations=5)",
    "prefix_from": "(fn, params, adapter, *args, **kwargs)",
    "quantize": "(params, rules, *, sites=None)",
    "dequantize": "(params)",
    "merge_quantized": "(params, adapter)",
    "NF4": "(*, block=64, double=True)",
    "FP4": "(*, block=64, double=False, variant='bnb')",
    "Int4": "(*, block=64, symmetric=True)",
    "Int8": "()",
    "optim.adalora": (
        "(inner, adapter, *, total_steps, warmup_steps=0, final_steps=0, interval=1, beta1=0.85, beta2=0.85, "
        "orthogonal_weight=0.5)"
    ),
    "optim.live_ranks": "(adapter)",
    "optim.stacked": "(make, stack, **settings)",
    "shardings": "(params, adapter, *, members=None)",
    "optim.shardings": "(opt_state, adapter, where, *, memory_kind=None)",
    "quant.shardings": "(params, where)",
    "stack": "(adapters)",
    "unstack": "(adapter)",
    "select": "(adapter, index)",
    "analysis.subspace_similarity": "(a, b, i, j)",
    "analysis.subspace_map": "(a, b)",
    "analysis.spectra": "(adapter, params=None)",
    "analysis.effective_rank": "(values)",
    "analysis.stable_rank": "(values)",
    "analysis.amplification": "(params, adapter, path, rank=None)",
    "analysis.cosine": "(a, b, params=None)",
    "analysis.parameters": "(adapter)",
    "analysis.rank_for_budget": "(make, sites, budget)",
    "analysis.flops": "(fn, *args, while_trips=None)",
    "optim.lora_plus_groups": "(adapter)",
    "optim.offload": "(inner)",
    "optim.orthogonality": "(adapter)",
    "peft.Module": "(module, kind=None, transposed=None, tied='lm_head')",
    "peft.load": "(directory, params, sites, *, names)",
    "peft.save": "(directory, adapter, params, *, names, portable=False, task_type=None, base_model=None)",
    "Full": "(*, dtype=None)",
    "Adapter.replace": "(self, **changes)",
    "Method.init": "(self, key, site, base)",
    "Method.weight": "(self, w, *args, **arrays)",
    "Method.refuses": "(self, site)",
    "checkpoint.save": "(path, adapter, *, base, metadata=None)",
    "checkpoint.restore": "(path, *, base, shardings=None)",
    "checkpoint.metadata": "(path)",
    "checkpoint.TrainCheckpoints": "(directory, *, keep=3)",
    "checkpoint.TrainCheckpoints.save": (
        "(self, step, adapter, *, opt_state, base, rng=None, data_state=None, metadata=None)"
    ),
    "checkpoint.TrainCheckpoints.restore": (
        "(self, *, base, opt_state_like, rng_like=None, step=None, shardings=None)"
    ),
    "checkpoint.TrainCheckpoints.latest_step": "(self)",
    "checkpoint.TrainCheckpoints.wait": "(self)",
    "checkpoint.TrainCheckpoints.close": "(self)",
}


def signature(thing: Any) -> str:
    """A callable's signature without annotations."""
    whole = inspect.signature(thing)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in whole.parameters.values()]
    return str(whole.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def test_the_public_names_are_these() -> None:
    assert set(lorax.__all__) == NAMES
    assert len(lorax.__all__) == len(NAMES)
    assert all(hasattr(lorax, name) for name in NAMES)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_these(name: str) -> None:
    thing: Any = lorax
    for part in name.split("."):
        thing = getattr(thing, part)
    assert signature(thing) == SIGNATURES[name]


def test_everything_public_is_documented_and_annotated() -> None:
    for name in SIGNATURES:
        thing: Any = lorax
        for part in name.split("."):
            thing = getattr(thing, part)
        assert inspect.getdoc(thing), name
        if inspect.isfunction(thing):
            bare = [p.name for p in inspect.signature(thing).parameters.values() if p.annotation is p.empty]
            assert set(bare) <= {"self"}, (name, bare)


def test_fields_of_results_are_these() -> None:
    fn = lambda p, x: x @ p["w"]
    params, x = {"w": jnp.eye(3)}, jnp.ones((2, 3))
    sites = lorax.trace(fn, params, x)
    (site,) = sites
    assert {f.name for f in dataclasses.fields(site)} == {
        "path", "kind", "shape", "dtype", "fan_in", "fan_out", "stack", "uses",
    }  # fmt: skip
    assert (site.path, site.kind, site.shape, site.dtype) == ("w", "linear", (3, 3), "float32")
    adapter = lorax.init(jax.random.key(0), lorax.Spec({"w": lorax.LoRA(rank=1)}), sites, params)
    assert {f.name for f in dataclasses.fields(adapter)} == {"params", "state", "plan"}
    assert {path: set(arrays) for path, arrays in adapter.params.items()} == {"w": {"a", "b"}}
    assert {path: set(arrays) for path, arrays in adapter.state.items()} == {"w": {"scale"}}
    (row,) = lorax.explain(fn, params, adapter, x)
    assert {f.name for f in dataclasses.fields(row)} == {"path", "how", "reason"}
    assert {f.name for f in dataclasses.fields(lorax.checkpoint.TrainState)} == {
        "step", "adapter", "opt_state", "rng", "data_state", "metadata",
    }  # fmt: skip


FROZEN = [
    *(lorax.LoRA(rank=4, alpha=8), lorax.DoRA(), lorax.AdaLoRA(), lorax.LoRAFA(), lorax.VeRA(), lorax.LoHa()),
    *(lorax.LoKr(), lorax.IA3(), lorax.Full(), lorax.Bottleneck(), lorax.Prompt(), lorax.Prefix()),
    *(lorax.TrainableTokens(tokens=(3,)), lorax.NF4(), lorax.FP4(), lorax.Int4(), lorax.Int8()),
]


def test_methods_and_formats_are_frozen_hashable_and_keyword_only() -> None:
    for method in FROZEN:
        assert hash(method) == hash(dataclasses.replace(method))
        assert method == dataclasses.replace(method)
        with pytest.raises(dataclasses.FrozenInstanceError):
            method.dtype = "float64"
        with pytest.raises(TypeError):
            type(method)(4)
    assert lorax.LoRA(rank=4) != lorax.LoRA(rank=8)
    assert lorax.LoRA(dtype=jnp.float32) == lorax.LoRA(dtype="float32")


def test_specs_and_sites_are_hashable_values() -> None:
    make = lambda: lorax.Spec({"a": lorax.LoRA(), "b": None})
    assert hash(make()) == hash(make())
    assert make() == make()
    assert make() != lorax.Spec({"b": None, "a": lorax.LoRA()}), "the order of patterns is part of a spec"
    trace = lambda: lorax.trace(lambda p, x: x @ p["w"], {"w": jnp.eye(3)}, jnp.ones((2, 3)))
    assert hash(trace()["w"]) == hash(trace()["w"])
    assert trace()["w"] == trace()["w"]
