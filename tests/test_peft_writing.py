"""What `save` writes: the same bytes, exact targets, plain factors for PiSSA, portable factors, and what it refuses."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import IA3, AdaLoRA, LoRA, LoRAFA, TrainableTokens, peft
from lorax.peft.files import WEIGHTS
from tests.agreement import assert_identical
from tests.peft_models import GOLDEN, config_of, decoder, tensors_of, tied, toy, write

QV = "layers/attn/(query|value)/kernel"
ROUND_OFF = 1e-5  # logits, after factors are rounded once more


def assert_read_back(base, adapter, directory, **kwargs):
    base.save(directory, adapter, **kwargs)
    again = base.load(directory)
    np.testing.assert_allclose(base(again), base(adapter), rtol=0, atol=ROUND_OFF)
    return config_of(directory), tensors_of(directory)


def test_two_saves_give_the_same_bytes(tmp_path):
    base = decoder()
    adapter = base.init({QV: LoRA(rank=2), "layers/mlp/.*": LoRA(rank=3, alpha=7)})
    for name in ("a", "b"):
        base.save(tmp_path / name, adapter)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(os.listdir(tmp_path / "a")) == ["adapter_config.json", "adapter_model.safetensors"]


def test_config_of_a_plain_adapter(tmp_path):
    base = decoder()
    base.save(tmp_path, base.init({QV: LoRA(rank=2, alpha=5, dropout=0.1)}))
    config = config_of(tmp_path)
    assert config.pop("target_modules") == ["q_proj", "v_proj"]
    assert config == {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 5,
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.1,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "revision": None,
    }
    base.save(tmp_path, base.init({QV: LoRA(rank=2)}), task_type="FEATURE_EXTRACTION", base_model="me/mine")
    config = config_of(tmp_path)
    assert (config["task_type"], config["base_model_name_or_path"]) == ("FEATURE_EXTRACTION", "me/mine")


def test_modules_that_differ_get_explicit_patterns(tmp_path):
    base = decoder()
    adapter = base.init({QV: LoRA(rank=2, alpha=5), "layers/mlp/down/kernel": LoRA(rank=3, alpha=1.5)})
    config, _ = assert_read_back(base, adapter, tmp_path)
    down = [rf"^model\.layers\.{i}\.mlp\.down_proj" for i in range(2)]
    assert (config["r"], config["lora_alpha"]) == (2, 5)
    assert config["rank_pattern"] == dict.fromkeys(down, 3)
    assert config["alpha_pattern"] == dict.fromkeys(down, 1.5)


def test_short_names_never_match_a_module_without_factors(tmp_path):
    """The head's name ends like no other, the first layer's does: only it is named in full."""
    base = decoder()
    adapter = base.init({QV + "|head/kernel": LoRA(rank=2)})
    params = jax.tree.map(lambda x: x, adapter.params)
    params["layers/attn/value/kernel"] = {k: x.at[1].set(0) for k, x in params["layers/attn/value/kernel"].items()}
    config, arrays = assert_read_back(base, adapter.replace(params=params), tmp_path)
    assert config["target_modules"] == ["lm_head", "model.layers.0.self_attn.v_proj", "q_proj"]
    assert not any("layers.1.self_attn.v_proj" in k for k in arrays)


def test_a_module_that_names_does_not_know_makes_all_names_full(tmp_path):
    base = decoder()
    names = {k: v for k, v in base.names.items() if "mlp" not in k}  # might be another q_proj
    peft.save(tmp_path, base.init({QV: LoRA(rank=2)}), base.params, names=names)
    assert config_of(tmp_path)["target_modules"][0] == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("initializer", ["pissa", "olora"])
@pytest.mark.parametrize("method", [LoRA, lorax.DoRA])
def test_started_factors_become_plain_ones_of_twice_the_rank(tmp_path, initializer, method):
    base = decoder()
    adapter = base.init({QV: method(rank=2, alpha=5, initializer=initializer)})
    config, arrays = assert_read_back(base, adapter, tmp_path)
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (4, 10, True)
    a = arrays["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"]
    b = arrays["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]
    ours = {k: np.asarray(x[1]) for k, x in adapter.arrays("layers/attn/value/kernel").items() if np.ndim(x) > 1}
    np.testing.assert_array_equal(a.T, np.concatenate([ours["a"], ours["a0"]], -1))
    np.testing.assert_array_equal(b.T, np.concatenate([ours["b"], -ours["b0"]]).reshape(4, -1))


@pytest.mark.parametrize("initializer", ["uniform", "pissa"])
def test_a_frozen_a_is_written_as_lora(tmp_path, initializer):
    base = decoder()
    config, _ = assert_read_back(base, base.init({QV: LoRAFA(rank=2, alpha=5, initializer=initializer)}), tmp_path)
    assert (config["r"], config["lora_alpha"]) == (2, 5)


def test_portable_folds_scales_and_pads_ranks(tmp_path):
    base = decoder()
    spec = {QV: LoRA(rank=2, alpha=5), "layers/mlp/.*": LoRA(rank=3, alpha=1, rank_stabilized=True)}
    config, arrays = assert_read_back(base, base.init(spec), tmp_path, portable=True)
    assert (config["r"], config["lora_alpha"]) == (3, 3)
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config.get("use_rslora")
    assert {x.shape[0] for k, x in arrays.items() if "lora_A" in k} == {3}
    assert all(k.endswith(("lora_A.weight", "lora_B.weight")) for k in arrays)
    again = base.load(tmp_path)  # zeros that a file has are no padding to be cut off
    base.save(tmp_path / "again", again)
    assert_identical(tensors_of(tmp_path / "again"), arrays)


def test_portable_adalora_is_plain_lora(tmp_path):
    base = decoder()
    adapter = base.load(GOLDEN / "peft/adalora/final")
    config, arrays = assert_read_back(base, adapter, tmp_path, portable=True)
    assert config["peft_type"] == "LORA" and config["r"] == config["lora_alpha"] == 6
    assert not any("lora_E" in k for k in arrays)


@pytest.mark.parametrize(
    "spec, what",
    [
        ({QV: lorax.DoRA(rank=2)}, r"query/kernel \(DoRA\)"),
        ({QV: LoRA(rank=2, bias=True)}, r"query/kernel \(a bias on B\)"),
        ({QV: LoRA(rank=2), "head/kernel": lorax.Full()}, r"head/kernel \(trained in full\)"),
        ({QV: LoRA(rank=2), "embed/.*": TrainableTokens(tokens=(1,))}, r"embed/embedding \(trained rows\)"),
    ],
)
def test_portable_refuses_what_servers_do(tmp_path, spec, what):
    with pytest.raises(ValueError, match=what):
        decoder().save(tmp_path, decoder().init(spec), portable=True)
    assert not os.listdir(tmp_path)


def test_methods_without_a_form_are_listed(tmp_path):
    base = decoder()
    adapter = base.init({QV: IA3(), "head/kernel": LoRA(rank=2)})
    with pytest.raises(ValueError, match=r"query/kernel \(IA3\), layers/attn/value/kernel \(IA3\).*lorax\.merge"):
        base.save(tmp_path, adapter)


@pytest.mark.parametrize(
    "base, spec, what",
    [
        (decoder, {QV: LoRA(rank=2), "head/kernel": lorax.DoRA(rank=2)}, "one kind of factors"),
        (decoder, {"embed/.*": AdaLoRA(rank=2)}, "AdaLoRA of embeddings"),
        (tied, {"embed/.*": lorax.DoRA(rank=2)}, "DoRA of a tied table"),
        (decoder, {"embed/.*": LoRA(rank=2, bias=True)}, "bias on the factors of an embedding"),
        (toy, {"experts/up": lorax.DoRA(rank=2)}, "DoRA, AdaLoRA or bias of a parameter"),
        (decoder, {QV: AdaLoRA(rank=2), "head/kernel": AdaLoRA(rank=3, alpha=5)}, "one lora_alpha"),
    ],
)
def test_what_peft_lacks_is_refused(tmp_path, base, spec, what):
    with pytest.raises(ValueError, match=what):
        base().save(tmp_path, base().init(spec))
    assert not os.listdir(tmp_path)


def test_a_missing_name_prints_a_suggestion(tmp_path):
    base = decoder()
    names = {k: v for k, v in base.names.items() if "value" not in k}
    with pytest.raises(ValueError, match=r"'layers/attn/value/kernel': 'model\.layers\.\{layer\}\.self_attn\.v_proj'"):
        peft.save(tmp_path, base.init({QV: LoRA(rank=2)}), base.params, names=names)


def test_nan_is_not_written(tmp_path):
    base = decoder()
    adapter = base.init({QV: LoRA(rank=2)})
    params = jax.tree.map(lambda x: x, adapter.params)
    params["layers/attn/query/kernel"]["a"] = params["layers/attn/query/kernel"]["a"].at[0, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="layers/attn/query/kernel: the adapter's 'a' holds NaN"):
        base.save(tmp_path, adapter.replace(params=params))


def test_trained_biases_become_bias_or_whole_modules(tmp_path):
    base = toy()
    own = base.init({"blocks/up/bias": lorax.Full(), "blocks/up/kernel": LoRA(rank=2)})
    config, arrays = assert_read_back(base, own, tmp_path / "own")
    assert config["bias"] == "lora_only" and "base_model.model.blocks.0.0.base_layer.bias" in arrays
    some = base.init({"norm/bias": lorax.Full(), "blocks/up/kernel": LoRA(rank=2)})
    config, arrays = assert_read_back(base, some, tmp_path / "some")
    assert config["bias"] == "all" and "base_model.model.norm.bias" in arrays
    whole = base.init({"head/kernel": lorax.Full(), "blocks/up/kernel": LoRA(rank=2)})
    config, arrays = assert_read_back(base, whole, tmp_path / "whole")
    assert config["modules_to_save"] == ["head"] and config["bias"] == "none"
    np.testing.assert_array_equal(arrays["base_model.model.head.bias"], base.params["head"]["bias"])


def test_adapters_without_factors(tmp_path):
    config, _ = assert_read_back(toy(), toy().init({".*bias": lorax.Full()}), tmp_path)
    assert config["target_modules"] == "dummy-target-modules" and config["bias"] == "all"


def test_rows_of_a_table(tmp_path):
    base = decoder()
    adapter = base.init({"embed/.*": TrainableTokens(tokens=(5, 2)), QV: LoRA(rank=2)})
    config, arrays = assert_read_back(base, adapter, tmp_path)
    assert config["trainable_token_indices"] == [5, 2]
    rows = arrays["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    np.testing.assert_array_equal(rows, adapter.params["embed/embedding"]["value"])


@pytest.mark.slow
def test_an_adapter_trained_on_after_reading_is_written_as_it_is(tmp_path):
    """Padding is a fixed point of training, and stays out of the files; changed layers of a saved stack come in."""
    base = decoder()
    adapter = base.load(GOLDEN / "peft/adapters/patterns")
    loss = lambda p: jnp.sum(jnp.sin(lorax.adapt(base.fn)(base.params, adapter.replace(params=p), base.x)))
    grads = jax.jit(jax.grad(loss))(adapter.params)
    trained = adapter.replace(params=jax.tree.map(lambda x, g: x - 1e-3 * g, adapter.params, grads))
    _, arrays = assert_read_back(base, trained, tmp_path)
    before = tensors_of(GOLDEN / "peft/adapters/patterns")
    assert {k: x.shape for k, x in arrays.items()} == {k: x.shape for k, x in before.items()}
    assert all(np.any(arrays[k] != before[k]) for k in arrays)


def test_an_adapter_that_went_through_a_checkpoint_keeps_its_ranks(tmp_path):
    base = decoder()
    directory = GOLDEN / "peft/adapters/patterns"
    lorax.save(tmp_path / "checkpoint", base.load(directory), base=base.params)
    adapter = lorax.restore(tmp_path / "checkpoint", base=base.params)
    base.save(tmp_path / "peft", adapter)
    assert_identical(tensors_of(tmp_path / "peft"), tensors_of(directory))


def test_other_files_stay_and_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    base = decoder()
    base.save(tmp_path, base.init({QV: LoRA(rank=2)}))
    (tmp_path / "README.md").write_text("mine")
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    replace, calls = os.replace, []

    def fails_once(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("the disk is full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(OSError, match="full"):
        base.save(tmp_path, base.init({QV: LoRA(rank=4)}))
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
    monkeypatch.undo()
    base.save(tmp_path, base.init({QV: LoRA(rank=4)}))
    assert config_of(tmp_path)["r"] == 4 and (tmp_path / "README.md").read_text() == "mine"


def test_bfloat16_params_and_factors(tmp_path):
    base = decoder()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base.params)
    adapter = base.init({QV: LoRA(rank=2, dtype="bfloat16"), "head/kernel": lorax.Full()})
    adapter = adapter.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapter.params))
    peft.save(tmp_path, adapter, params, names=base.names)
    assert {x.dtype for x in tensors_of(tmp_path).values()} == {jnp.dtype("bfloat16")}
    again = peft.load(tmp_path, params, base.sites, names=base.names)
    assert_identical(again.params, adapter.params)


@pytest.mark.slow
def test_pruned_triplets_are_left_out(tmp_path):
    """An adapter whose budget updates have set some of `e` to zero, in one layer all."""
    base = decoder()
    adapter = base.init({QV: AdaLoRA(rank=3, alpha=5), "layers/mlp/down/kernel": AdaLoRA(rank=3, alpha=5)})
    params = jax.tree.map(lambda x: x, adapter.params)
    path = "layers/attn/query/kernel"
    params[path]["e"] = params[path]["e"].at[0, 1].set(0).at[1].set(0)
    config, arrays = assert_read_back(base, adapter.replace(params=params), tmp_path)
    assert config["rank_pattern"]["model.layers.0.self_attn.q_proj.lora_E"] == [True, False, True]
    assert arrays["base_model.model.model.layers.1.self_attn.q_proj.lora_A"].shape == (0, 64)
    assert arrays["base_model.model.model.layers.0.self_attn.q_proj.lora_B"].shape == (64, 2)
    assert (config["init_r"], config["lora_alpha"], config["peft_type"]) == (3, 5, "ADALORA")


@pytest.mark.slow
def test_triplets_of_different_ranks_are_padded(tmp_path):
    base = decoder()
    alpha = 5 * (2 + 1e-5) / (3 + 1e-5)  # the same scaling
    spec = {QV: AdaLoRA(rank=3, alpha=5), "head/kernel": AdaLoRA(rank=2, alpha=alpha)}
    config, _ = assert_read_back(base, base.init(spec), tmp_path)
    assert config["rank_pattern"]["lm_head.lora_E"] == [True, True, False]


@pytest.mark.parametrize("base", [decoder, tied])
def test_a_decoder_is_a_causal_language_model(tmp_path, base):
    base().save(tmp_path, base().init({QV: LoRA(rank=2)}))
    assert config_of(tmp_path)["task_type"] == "CAUSAL_LM"


def renamed(base, **modules):
    """The same base with other modules for some leaves."""
    return dataclasses.replace(base, names={**base.names, **modules})


def test_a_tied_table_of_a_name_that_peft_does_not_tie_has_its_head_targeted_too(tmp_path):
    """PEFT would drop the factors of GPT-2's `lm_head`, whatever `ensure_weight_tying` says."""
    base = renamed(tied(), **{"embed/embedding": peft.Module("transformer.wte", "embedding")})
    adapter = base.init({"embed/embedding": LoRA(rank=3, alpha=5), QV: LoRA(rank=2)})
    config, tensors = assert_read_back(base, adapter, tmp_path / "a")
    assert {"lm_head", "wte"} <= set(config["target_modules"]) and "ensure_weight_tying" not in config
    assert config["rank_pattern"] == {r"^transformer\.wte": 3, "^lm_head": 3}
    table = [tensors[f"base_model.model.transformer.wte.lora_embedding_{x}"] for x in "AB"]
    head = [tensors[f"base_model.model.lm_head.lora_{x}.weight"] for x in "BA"]
    np.testing.assert_array_equal(head[0], table[0].T)
    np.testing.assert_array_equal(head[1], table[1].T)
    base.save(tmp_path / "b", base.load(tmp_path / "a"))
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()

    differing = {**tensors, "base_model.model.lm_head.lora_B.weight": 2 * head[0]}
    with pytest.raises(ValueError, match="factors of transformer.wte and lm_head differ"):
        base.load(write(tmp_path / "c", config, differing))
    alone = {**config, "target_modules": [m for m in config["target_modules"] if m != "lm_head"]}
    with pytest.raises(ValueError, match="or is none that PEFT ties"):
        base.load(write(tmp_path / "d", {**alone, "ensure_weight_tying": True}, tensors))


def test_a_task_brings_its_head_along(tmp_path):
    """Trained or not: PEFT saves `score` of its own accord and refuses a directory without it."""
    base = renamed(decoder(), **{"head/kernel": peft.Module("score", "linear")})
    adapter = base.init({QV: LoRA(rank=2)})
    config, tensors = assert_read_back(base, adapter, tmp_path, task_type="SEQ_CLS")
    assert config["modules_to_save"] == ["score"]
    np.testing.assert_array_equal(tensors["base_model.model.score.weight"], np.asarray(base.params["head"]["kernel"]).T)
    with pytest.raises(ValueError, match="ends in score or classifier, and names has none"):
        decoder().save(tmp_path / "none", adapter, task_type="SEQ_CLS")


def test_saved_modules_are_named_in_full_where_names_is_not_complete(tmp_path):
    """A norm that has no name might end in the same word."""
    base = decoder()
    base = dataclasses.replace(base, names={k: v for k, v in base.names.items() if "norm" not in k or "attn" in k})
    base.save(tmp_path, base.init({"layers/attn_norm/scale": lorax.Full()}))
    saved = config_of(tmp_path)["modules_to_save"]
    assert saved == [f"model.layers.{i}.input_layernorm" for i in range(len(saved))] != []
