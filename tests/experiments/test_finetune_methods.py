"""Runs with every method of the table, over plain and quantised bases, with the optimiser's state in host memory."""

import json
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from experiments import models
from experiments.training import metrics, preparation, recipes, run, step
from experiments.training.settings import QUERY_VALUE
from experiments.training.stopping import Stopped, StopSignals
from tests.experiments.finetune_tiny import LAYERS, Inputs

SAME_LOSS = 1e-5
STEPS = 6
# Beside the runs that the other tests share, these go through what is theirs alone: placeholders.
DEFAULT = ("prompt", "prefix")
NEEDS = {
    "loftq": {"model.quantize": "int4"},
    "prompt": {"data.batching": "bucketed", "tuning.length": 3},
    "prefix": {"data.batching": "bucketed", "tuning.length": 3},
    "eva": {"eva.batches": 2},
    "vera": {"vera.rank": 8},
    "bottleneck": {"bottleneck.rank": 4},
    "bottleneck_pfeiffer": {"bottleneck.rank": 4, "bottleneck.activation": "tanh"},
}
QLORA = {"model.quantize": "nf4", "train.offload": True}
ADALORA = {"method": "adalora", "lora.rank": 3, "adalora.target_rank": 1, "lora.targets": QUERY_VALUE, **QLORA}


@pytest.fixture(scope="module", autouse=True)
def _compiled_in_a_hurry():
    """The programs are tiny and run a few times: time goes into compiling them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs.write(tmp_path_factory.mktemp("tiny"))


def configured(inputs, name, **changes):
    few = {"train.steps": STEPS, "train.rows": 4, "evaluation.every": 0, "checkpoint.every": 3}
    few |= {"evaluation.examples": 2, "evaluation.max_new_tokens": 2}
    return inputs.config(inputs.folder / name, **few | changes)


def finetune(inputs, name, **changes):
    """A run's result, its directory and the steps that it logged."""
    config = configured(inputs, name, **changes)
    with StopSignals().installed() as stop:
        result = run.finetune(config, command="python -m experiments.finetune", stop=stop)
    return result, inputs.folder / name, logged(inputs.folder / name)


def logged(run_dir):
    return metrics.read_metrics(run_dir / "metrics.jsonl")


@pytest.fixture(scope="module")
def qlora(inputs):
    return finetune(inputs, "qlora", **QLORA)


@pytest.fixture(scope="module")
def adalora(inputs):
    return finetune(inputs, "adalora_nf4", **ADALORA)


# Every method.


def marked(name):
    return name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("method", [marked(name) for name in recipes.RECIPES if name != "bitfit"])
def test_a_run_learns_saves_and_reports(inputs, method):
    result, run_dir, steps = finetune(inputs, method, method=method, **NEEDS.get(method, {}))
    assert result["status"] == "finished"
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert all(np.isfinite(row["loss"]) and row["gradient_norm"] > 0 for row in steps)
    loss = result["evaluation"]["loss"]
    assert loss["after"] < loss["before"]
    assert (run_dir / "report.html").exists()
    assert (run_dir / "adapter_peft").exists() == recipes.RECIPES[method].has_peft_form
    check = result["merge_check"]
    assert "skipped" in check or check["same_token"] == check["positions"] > 0


@pytest.mark.parametrize(
    ("method", "paths"),
    [
        ("dora", r"layers/attn/(key|out|query|value)/kernel|layers/mlp/(down|gate|up)/kernel"),
        ("ia3", r"layers/attn/(key|value)/kernel|layers/mlp/down/kernel"),
        ("norm", r"layers/(attn|mlp)_norm/scale|final_norm/scale"),
        ("full", r".*"),
        ("bottleneck", r"layers/attn/out/kernel|layers/mlp/down/kernel"),
        ("bottleneck_pfeiffer", r"layers/mlp/down/kernel"),
        ("prompt", r"embed/embedding"),
        ("prefix", r"layers/attn/(key|value)/kernel"),
    ],
)
def test_targets_suit_the_method(sites, inputs, method, paths):
    chosen = recipes.spec(configured(inputs, "targets", method=method)).resolve(sites)
    assert list(chosen) == [site.path for site in sites if re.fullmatch(paths, site.path)]


def test_given_targets_win(sites, inputs):
    given = (r"layers/attn/query/kernel",)
    for method, wanted in (("dora", list(given)), ("ia3", [*given, "layers/mlp/down/kernel"])):
        config = configured(inputs, "targets", **{"method": method, "lora.targets": given})
        assert sorted(recipes.spec(config).resolve(sites)) == wanted
    methods = recipes.spec(config).resolve(sites)
    assert [methods[path].on for path in wanted] == ["output", "input"]


@pytest.fixture(scope="module")
def sites(inputs):
    model = models.load(inputs.folder / "model")
    return lorax.trace(model.apply, model.params, jnp.zeros((1, 16), jnp.int32))


# Wrong settings.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dorra"}, "config.method = 'dorra': unknown, the nearest is dora"),
        ({"method": "prompt"}, "config.data.batching = 'packed': expected bucketed, because config.method = prompt"),
        ({"method": "loftq"}, "config.model.quantize = 'none': expected a format such as nf4"),
        ({"lora.initializer": "pisa"}, "LoRA: initializer is 'pisa'"),
        ({"method": "bottleneck", "bottleneck.activation": "gel"}, "Bottleneck: activation is 'gel'"),
        ({"model.quantize": "nf5"}, "config.model.quantize = 'nf5': expected none or nf4"),
    ],
)
def test_wrong_settings_are_named_before_any_work(inputs, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        finetune(inputs, "wrong", **changes)
    assert not (inputs.folder / "wrong").exists()


def test_a_model_without_biases_has_nothing_for_bitfit(inputs):
    with pytest.raises(ValueError, match=r"pattern '\.\*/bias' with Full selects no parameter"):
        finetune(inputs, "bitfit", method="bitfit")


# A quantised base, an optimiser's state in host memory, AdaLoRA's budget.


@pytest.mark.slow
def test_adapter_for_peft_loads_back_to_the_same_logits(inputs, qlora):
    _, run_dir, _ = qlora
    model = preparation.load_model(configured(inputs, "qlora", **QLORA))
    tokens = jnp.arange(32).reshape(2, 16)
    sites = lorax.trace(model.apply, model.params, tokens)
    ours = lorax.restore(run_dir / "adapter", base=model.params)
    theirs = lorax.peft.load(run_dir / "adapter_peft", model.params, sites, names=model.peft_names)
    logits = jax.jit(lorax.adapt(model.apply))
    got = logits(model.params, theirs, tokens)
    np.testing.assert_array_equal(got, logits(model.params, ours, tokens))
    untrained = jax.tree.map(jnp.zeros_like, ours.params)
    assert not np.allclose(got, logits(model.params, ours.replace(params=untrained), tokens), atol=1e-2)


def test_budget_counts_what_a_quantised_base_takes(qlora):
    result, run_dir, _ = qlora
    budget = json.loads((run_dir / "budget.json").read_text())
    linear = LAYERS * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    table_and_norms = 258 * 32 + 32 * (2 * LAYERS + 1)
    assert budget["frozen_parameters"] == linear + table_and_norms
    # rows of 32 and 48 are no whole blocks, so each layer is stored as one row; scales of scales and means besides
    assert budget["frozen_bytes"] - 4 * table_and_norms == pytest.approx(linear * 4.127 / 8, rel=0.02)
    assert budget["step_temporary_bytes"] > 0
    assert result["merge_check"] == {"skipped": "the base is quantised"}


@pytest.mark.slow
def test_loftq_quantises_the_base_with_a_view_to_the_adapter(inputs):
    rank = {"method": "loftq", "model.quantize": "int4", "lora.rank": 8, "lora.targets": QUERY_VALUE}
    config = configured(inputs, "loftq_base", **rank)
    model = preparation.load_model(config)
    example = {name: np.zeros((1, 8), np.int32) for name in step.MODEL_INPUTS}
    params, adapter = preparation.adapt(config, step.summed_loss(model), model.params, [example])
    value = lambda tree: tree["layers"]["attn"]["value"]["kernel"]
    wanted, stored = value(model.params), value(params)
    assert isinstance(value(model.params), jax.Array) and stored.format == lorax.Int4()
    plain = stored.with_values(wanted).dequantize()
    nearer = value(lorax.merge({**params}, adapter))
    error = lambda weight: float(jnp.linalg.norm(weight - wanted))
    assert error(nearer) < 0.7 * error(plain)


@pytest.mark.slow
def test_adalora_stops_and_goes_on_within_its_budget_bit_for_bit(inputs, adalora, monkeypatch):
    result, run_dir, steps = adalora
    write = metrics.MetricsLog.write

    def write_and_stop(self, step, values):
        write(self, step, values)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(metrics.MetricsLog, "write", write_and_stop)
    with pytest.raises(Stopped):
        finetune(inputs, "stopped", **ADALORA)
    monkeypatch.undo()
    assert len(logged(inputs.folder / "stopped")) < STEPS
    again, stopped_dir, resumed = finetune(inputs, "stopped", **ADALORA)
    for row, wanted in zip(resumed, steps, strict=True):
        for name in ("step", "loss", "gradient_norm", "orthogonality", "live_triplets"):
            assert row[name] == wanted[name]
    assert again["evaluation"] == result["evaluation"]
    params = preparation.load_model(configured(inputs, "base", **ADALORA)).params
    adapters = [lorax.restore(folder / "adapter", base=params) for folder in (run_dir, stopped_dir)]
    jax.tree.map(np.testing.assert_array_equal, *(adapter.params for adapter in adapters))
    assert sum(int(ranks.sum()) for ranks in lorax.optim.live_ranks(adapters[0]).values()) == 2 * LAYERS


@pytest.mark.slow
def test_adalora_logs_the_loss_of_the_task_alone(qlora, adalora):
    first, of_lora = adalora[2][0], qlora[2][0]
    assert first["loss"] == pytest.approx(of_lora["loss"], rel=SAME_LOSS)  # neither has changed the base yet
    assert first["orthogonality"] > 1
