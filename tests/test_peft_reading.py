"""Reading is all or nothing: what a config means, and every way in which a directory is refused."""

import re

import numpy as np
import pytest

import lorax
from lorax import peft
from lorax.peft import targets
from lorax.peft.config import Config, parse
from tests.agreement import assert_close, assert_identical
from tests.peft_models import GOLDEN, config_of, decoder, tensors_of, tied, write

QV = GOLDEN / "peft/adapters/qv_r8"
STEM = "base_model.model.model.layers.{}.self_attn.{}.{}"
MODULES = [
    f"model.layers.{i}.{m}"
    for i in (0, 1, 10, 11)
    for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.experts.0.up_proj")
] + ["lm_head", "model.embed_tokens"]


def chosen(**config):
    return [m for m in MODULES if targets.is_target(Config(peft_type="LORA", **config), m)]


def refused(tmp_path, *needles, config=None, tensors=None, drop=(), base=None):
    """Load a changed copy of a good directory, and check the complaint."""
    document = {**config_of(QV), **(config or {})}
    arrays = {k: v for k, v in tensors_of(QV).items() if k not in drop} | (tensors or {})
    with pytest.raises(ValueError) as caught:
        (base or decoder()).load(write(tmp_path, document, arrays))
    for needle in needles:
        assert needle in str(caught.value), str(caught.value)


# What PEFT's own check_target_module_exists returned for these.
MATCHES = [
    ({"target_modules": ["q_proj"]}, 4),
    ({"target_modules": ["proj"]}, 0),
    ({"target_modules": ["1.self_attn.q_proj"]}, 1),
    ({"target_modules": ["up_proj"]}, 8),
    ({"target_modules": ["lm_head", "embed_tokens"]}, 2),
    ({"target_modules": r".*\.q_proj"}, 4),
    ({"target_modules": r"q_proj"}, 0),
    ({"target_modules": r"model\.layers\.1\..*proj"}, 4),
    ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["1.self_attn.q_proj"]}, 7),
    ({"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"}, 3),
    ({"target_modules": ["q_proj"], "exclude_modules": r"layers\.1"}, 4),
    ({"target_modules": ["q_proj"], "layers_to_transform": [1, 10]}, 2),
    ({"target_modules": ["q_proj"], "layers_to_transform": 11}, 1),
    ({"target_modules": ["q_proj"], "layers_to_transform": []}, 4),
    ({"target_modules": ["up_proj"], "layers_to_transform": [0]}, 2),
    ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}, 1),
    ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]}, 1),
    ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"}, 0),
    ({"target_modules": ["model.layers.1.self_attn.q_proj"], "layers_to_transform": [0]}, 1),
    ({"target_modules": ["lm_head", "q_proj"], "layers_to_transform": [0]}, 2),
    ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}, 4),
    ({"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["self_attn"]}, 0),
]


@pytest.mark.parametrize(("config", "count"), MATCHES)
def test_targets_are_matched_as_by_peft(config, count):
    assert len(chosen(**config)) == count


@pytest.mark.parametrize(("config", "count"), MATCHES)
def test_peft_agrees_on_the_targets(config, count):
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = peft.LoraConfig(**config)
    assert [m for m in MODULES if check_target_module_exists(theirs, m)] == chosen(**config)
    assert count == len(chosen(**config))


def test_the_first_pattern_that_matches_gives_rank_and_alpha():
    config = Config(
        peft_type="LORA",
        r=8,
        lora_alpha=16,
        rank_pattern={"proj": 9, r"layers\.1\..*": 2, "q_proj": 4, r"^model\.layers\.0\.self_attn\.v_proj": 3},
        alpha_pattern={"v_proj": 1.5},
    )
    rank = lambda m: targets.factors(config, m).rank
    got = [rank(f"model.layers.{i}.self_attn.{p}_proj") for i in (0, 1, 10) for p in "qvo"]
    assert got == [4, 3, 8, 2, 2, 2, 4, 8, 8]
    assert targets.factors(config, "model.layers.1.self_attn.v_proj").scaling == 0.75
    stabilized = Config(peft_type="LORA", r=16, lora_alpha=8, use_rslora=True)
    assert targets.factors(stabilized, "a").scaling == 2


def test_all_linear_leaves_the_output_layer_out():
    kinds = {m: "linear" for m in MODULES} | {"model.embed_tokens": "embedding"}
    config = Config(peft_type="LORA", target_modules="all-linear")
    assert set(MODULES) - set(targets.selected(config, kinds, ())[0]) == {"lm_head", "model.embed_tokens"}


def test_null_targets_are_filled_in_where_the_tensors_decide(tmp_path):
    adapter = decoder().load(write(tmp_path / "a", {**config_of(QV), "target_modules": None}, tensors_of(QV)))
    assert sorted(adapter.methods) == ["layers/attn/query/kernel", "layers/attn/value/kernel"]
    values = [k for k in tensors_of(QV) if "v_proj" in k]
    refused(tmp_path / "b", "target_modules is null", config={"target_modules": None}, drop=values)


def test_the_smallest_config(tmp_path):
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    adapter = decoder().load(write(tmp_path, config, tensors_of(QV)))
    assert adapter.methods == decoder().load(QV).methods


@pytest.mark.parametrize(
    "key, value",
    [
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 3}),
        ("corda_config", {"a": 1}),
        ("kasa_config", {"a": 1}),
        ("layer_replication", [[0, 2]]),
        ("loftq_config", {"loftq_bits": 4}),
        ("megatron_config", {"a": 1}),
        ("monteclora_config", {"a": 1}),
        ("use_bdlora", {"nblocks": 2}),
        ("use_qalora", True),
        ("velora_config", {"scale": 1.0}),
        ("a_key_of_the_future", 3),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("peft_type", "VERA"),
        ("bias", "some"),
        ("r", 0),
        ("r", "8"),
        ("lora_alpha", None),
        ("rank_pattern", {"q_proj": "8"}),
        ("alpha_pattern", {"q_proj": None}),
        ("target_parameters", "experts"),
        ("target_parameters", ["experts.nothing"]),
        ("modules_to_save", ["nothing"]),
        ("layers_pattern", "layers"),
    ],
)
def test_keys_that_change_the_meaning_are_refused(tmp_path, key, value):
    refused(tmp_path, key, config={key: value})


def test_all_complaints_about_the_config_come_at_once():
    _, problems = parse({"peft_type": "LORA", "use_qalora": True, "kasa_config": {"a": 1}, "x": 2, "r": 0})
    assert len(problems) == 4


@pytest.mark.parametrize(
    "key, value",
    [
        ("a_key_of_the_future", None),
        ("use_qalora", False),
        ("loftq_config", {}),
        ("runtime_config", {"ephemeral_gpu_offload": True}),
        ("peft_version", "9.9"),
        ("init_lora_weights", "gaussian"),
        ("init_lora_weights", False),
        ("eva_config", {"rho": 2.0}),
        ("lora_dropout", 0.5),
        ("lora_alpha", 16.0),
    ],
)
def test_keys_that_do_not_are_accepted(tmp_path, key, value):
    adapter = decoder().load(write(tmp_path, {**config_of(QV), key: value}, tensors_of(QV)))
    assert float(adapter.state["layers/attn/query/kernel"]["scale"]) == 2
    assert next(iter(adapter.methods.values())).dropout == (0.5 if key == "lora_dropout" else 0.0)


def test_missing_and_left_over_and_misshapen_tensors_are_listed_together(tmp_path):
    missing = [STEM.format(1, "q_proj", "lora_A.weight"), STEM.format(0, "v_proj", "lora_B.weight")]
    extra = {
        STEM.format(0, "k_proj", "lora_A.weight"): np.zeros((8, 64), np.float32),
        STEM.format(0, "q_proj", "lora_magnitude_vector"): np.zeros(64, np.float32),
    }
    wrong = {STEM.format(0, "q_proj", "lora_B.weight"): np.zeros((32, 8), np.float32)}
    refused(tmp_path, *missing, *extra, *wrong, "[32, 8]", "[64, 8]", tensors=extra | wrong, drop=missing)


def test_a_wrong_rank_is_a_wrong_shape(tmp_path):
    refused(tmp_path, "has shape [8, 64], expected [4, 64]", config={"r": 4})


def test_a_wrong_prefix_is_no_silent_base_model(tmp_path):
    """Of another wrapper, and none at all."""
    whole = tensors_of(QV)
    hint = "the prefix differs: layers.0.self_attn.q_proj here"
    arrays = {k.replace("base_model.model.", "base_model."): v for k, v in whole.items()}
    refused(tmp_path / "a", "missing tensors", "unmatched tensors", hint, tensors=arrays, drop=whole)
    bare = {k.removeprefix("base_model.model."): v for k, v in whole.items()}
    refused(tmp_path / "b", "every name has to begin with 'base_model.model.'", tensors=bare, drop=whole)


def test_targets_without_tensors_are_missing(tmp_path):
    refused(tmp_path, "o_proj.lora_A.weight [8, 64]", config={"target_modules": ["q_proj", "v_proj", "o_proj"]})


def test_tensors_without_a_target_are_unmatched(tmp_path):
    refused(tmp_path, "v_proj.lora_A.weight", "PEFT would drop", config={"target_modules": ["q_proj"]})


def test_a_missing_name_prints_a_suggestion():
    base = decoder()
    names = {k: v for k, v in base.names.items() if "value" not in k}
    line = "'layers/attn/value/kernel': 'model.layers.{layer}.self_attn.v_proj'"
    with pytest.raises(ValueError, match=re.escape(line)):
        peft.load(QV, base.params, base.sites, names=names)
    with pytest.raises(ValueError, match="layers/attn/qeury/kernel.*Nearest: layers/attn/query/kernel"):
        peft.load(QV, base.params, base.sites, names={**names, "layers/attn/qeury/kernel": "a.{layer}.b"})


def test_sites_that_were_left_out_are_named():
    base = decoder()
    some = [s for s in base.sites if "query" not in s.path]
    with pytest.raises(ValueError, match=r"layers/attn/query/kernel has no site: give all that lorax\.trace returns"):
        peft.load(QV, base.params, some, names=base.names)


def test_a_copy_of_a_table_has_to_be_the_base(tmp_path):
    directory = GOLDEN / "peft/adapters/embedding"
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    arrays = tensors_of(directory)
    other = write(tmp_path / "a", config_of(directory), {**arrays, key: arrays[key] + 1})
    with pytest.raises(ValueError, match="copy of the base and differs"):
        decoder().load(other)
    resized = {"base_model.model.lm_head.weight": np.zeros((130, 64), np.float32)}
    with pytest.raises(ValueError, match=r"\[130, 64\].*vocabulary was resized"):
        decoder().load(write(tmp_path / "b", config_of(directory), arrays | resized))


def test_the_twin_of_a_tied_table_has_to_repeat_it(tmp_path):
    directory = GOLDEN / "peft_more/tied_lora"
    arrays = tensors_of(directory)
    key = "base_model.model.lm_head.lora_A.weight"
    with pytest.raises(ValueError, match="lm_head.lora_A.weight differs from the tensor"):
        tied().load(write(tmp_path, config_of(directory), {**arrays, key: arrays[key] * 2}))


def test_damaged_files(tmp_path):
    directory = write(tmp_path, config_of(QV), tensors_of(QV))
    whole = (directory / "adapter_model.safetensors").read_bytes()
    for damaged in (whole[:-40], whole[:200], b"", whole + b"more"):
        (directory / "adapter_model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
            decoder().load(directory)
    (directory / "adapter_model.safetensors").write_bytes(whole)
    (directory / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        decoder().load(directory)


def test_other_files_and_folders(tmp_path):
    with pytest.raises(ValueError, match="holds no adapter_config.json"):
        decoder().load(tmp_path / "nowhere")
    directory = write(tmp_path / "named" / "mine", config_of(QV), tensors_of(QV))
    assert decoder().load(tmp_path / "named").methods == decoder().load(directory).methods
    write(tmp_path / "named" / "another", config_of(QV), tensors_of(QV))
    with pytest.raises(ValueError, match="another.*mine"):
        decoder().load(tmp_path / "named")
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin.*converted"):
        decoder().load(directory)


def test_rows_outside_the_table(tmp_path):
    directory = GOLDEN / "peft_more/tokens"
    config = {**config_of(directory), "trainable_token_indices": [5, 3, 128]}
    with pytest.raises(ValueError, match="rows 0 to 127"):
        decoder().load(write(tmp_path, config, tensors_of(directory)))


def test_some_layers_of_a_stack_are_saved(tmp_path):
    """The others keep the base's values, and are not written again."""
    key = "base_model.model.model.layers.1.input_layernorm.weight"
    config = {**config_of(QV), "modules_to_save": ["1.input_layernorm"]}
    directory = write(tmp_path / "a", config, {**tensors_of(QV), key: np.full(64, 2.0, np.float32)})
    base = decoder()
    adapter = base.load(directory)
    value = np.asarray(adapter.params["layers/attn_norm/scale"]["value"])
    np.testing.assert_array_equal(value, [base.params["layers"]["attn_norm"]["scale"][0], np.full(64, 2.0)])
    base.save(tmp_path / "b", adapter)
    assert config_of(tmp_path / "b")["modules_to_save"] == ["model.layers.1.input_layernorm"]
    assert_identical(tensors_of(tmp_path / "b"), tensors_of(directory))


@pytest.mark.slow
def test_a_quantised_base():
    """Factors are read as ever, and DoRA's norms are the dequantised weights'."""
    base = decoder()
    params = lorax.quantize(base.params, {"layers/(attn|mlp)/.*/kernel": lorax.NF4(block=64)}, sites=base.sites)
    dense = lorax.dequantize(params)
    directory = GOLDEN / "peft/adapters/dora"
    quantised = peft.load(directory, params, base.sites, names=base.names)
    assert_close(quantised.state, peft.load(directory, dense, base.sites, names=base.names).state, 1e-5)
    assert_identical(quantised.params, base.load(directory).params)
