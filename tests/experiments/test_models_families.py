"""Decoders of Hugging Face directories against logits that transformers computed: see tests/golden/decoders."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from experiments import models
from experiments.models import hf_config

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "decoders"
FAMILIES = sorted(folder.name for folder in GOLDEN.iterdir() if folder.is_dir())
WINDOWED = ("gemma3", "mistral", "qwen2")
PLAIN = {
    "qkv_bias": False,
    "qk_norm": False,
    "norm_offset": 0.0,
    "post_norms": False,
    "activation": "silu",
    "embed_scale": 1.0,
    "query_scale": None,
    "attn_softcap": None,
    "final_softcap": None,
    "rope_theta": 10000.0,
    "rope_divisors": None,
    "local_rope_theta": None,
    "rope_layers": None,
    "windows": None,
}


def reference(family: str) -> tuple[jax.Array, np.ndarray]:
    stored = np.load(GOLDEN / family / "logits.npz")
    return jnp.asarray(stored["tokens"]), stored["logits"]


def logits(model: models.Model, *args, **kwargs) -> np.ndarray:
    return np.asarray(jax.jit(lambda p: model.apply(p, *args, **kwargs))(model.params))


def test_all_families_are_here():
    assert set(FAMILIES) == {
        *("gemma2", "gemma3", "gemma3_vision", "llama3", "mistral", "qwen2", "qwen3", "smollm3"),
    }


def test_logits_agree_with_transformers():
    for family in FAMILIES:
        tokens, want = reference(family)
        np.testing.assert_allclose(logits(models.load(GOLDEN / family), tokens), want, atol=1e-4, err_msg=family)


def features() -> list[tuple[str, str]]:
    """Each setting in which a family is not like Llama 2."""
    found = []
    for family in FAMILIES:
        config = hf_config.read_config(GOLDEN / family)
        found += [(family, name) for name, plain in PLAIN.items() if getattr(config, name) != plain]
    return found


def test_every_feature_is_in_some_family():
    assert {name for _, name in features()} == set(PLAIN)


@pytest.mark.parametrize(("family", "name"), features())
def test_no_feature_can_be_left_out(family, name):
    model, (tokens, want) = models.load(GOLDEN / family), reference(family)
    config = dataclasses.replace(model.config, **{name: PLAIN[name]})
    if name in ("qkv_bias", "qk_norm", "post_norms"):  # the parameters stay, unused
        params = models.Llama(config).init(jax.random.key(0), tokens)["params"]
        kept = dict(jax.tree_util.tree_leaves_with_path(model.params))
        params = jax.tree_util.tree_map_with_path(lambda path, _: kept[path], params)
        model = dataclasses.replace(model, params=params)
    without = logits(dataclasses.replace(model, config=config), tokens)
    assert np.abs(without - want).max() > 1e-3


def older(file: dict) -> dict:
    """The same config.json as transformers 4 writes it."""
    file = dict(file)
    if "text_config" in file:
        return {**file, "text_config": older(file["text_config"])}
    file.pop("layer_types", None)
    rope = file.pop("rope_parameters")
    if "full_attention" in rope:
        file["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        file["sliding_window_pattern"] = file.pop("_sliding_window_pattern")
    file["rope_theta"] = rope["rope_theta"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    file["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
    return file


def test_the_config_of_transformers_4_says_the_same():
    for family in FAMILIES:
        file = json.loads((GOLDEN / family / "config.json").read_text())
        written = older(file)
        assert written != file
        got = hf_config.decoder_config(written, family)
        assert got == hf_config.read_config(GOLDEN / family), family


def test_gemma_config_may_leave_out_what_is_the_default():
    # As published with Gemma 3: a nested config holds what differs from the defaults of transformers 4.
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = hf_config.decoder_config(
        {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}, "gemma-3-4b"
    )
    assert (config.heads, config.kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)
    assert (config.rope_theta, config.local_rope_theta, config.rope_divisors) == (1e6, 1e4, (8.0,) * 128)
    assert config.windows == ((1024,) * 5 + (0,)) * 5 + (1024,) * 4
    assert (config.embed_scale, config.query_scale, config.tied) == (2560**0.5, 1 / 16, True)


@pytest.mark.parametrize(
    ("family", "change", "match"),
    [
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma2", {"hidden_activation": "relu"}, "hidden_activation='relu'"),
        ("gemma3", {"layer_types": ["chunked_attention"] * 7}, "chunked_attention"),
        ("smollm3", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama3", {"rope_parameters": {"rope_type": "yarn"}}, "'yarn'"),
        ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("qwen2", {"architectures": ["Qwen2MoeForCausalLM"]}, "Qwen2MoeForCausalLM"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(tmp_path, family, change, match):
    file = json.loads((GOLDEN / family / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**file, **change}))
    with pytest.raises(ValueError, match=match):
        hf_config.read_config(tmp_path)


def test_a_tensor_of_another_model_is_refused(tmp_path):
    folder = shutil.copytree(GOLDEN / "mistral", tmp_path / "model")
    (folder / "config.json").write_text((GOLDEN / "qwen3" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"tensors are missing.*k_norm"):
        models.load(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_equals_full_forward_passes(family):
    model = models.load(GOLDEN / family)
    shared = list(range(3, 21))  # longer than any window; prompts of unequal length, padded on the left
    prompts = [[*shared, *rest] for rest in ([7], [9, 30, 12, 11, 10, 60, 61], [5, 6])]
    width = len(shared) + 7 + 6
    forward = jax.jit(lambda tokens: model.apply(model.params, tokens))

    def greedy(prompt: list[int]) -> list[int]:
        row = [*prompt]
        for _ in range(6):
            padded = jnp.asarray([row + [0] * (width - len(row))])
            row.append(int(forward(padded)[0, len(row) - 1].argmax()))
        return row[len(prompt) :]

    got = model.generate(model.params, prompts, max_new_tokens=6, stop_ids=[])
    assert got == [greedy(prompt) for prompt in prompts]


@pytest.mark.parametrize("family", WINDOWED)
def test_packed_rows_equal_separate_sequences(family):
    model, (tokens, want) = models.load(GOLDEN / family), reference(family)
    lengths = (7, 20, 11)
    rows = [tokens[i % 2, :length] for i, length in enumerate(lengths)]
    packed = {
        "positions": jnp.concatenate([jnp.arange(length) for length in lengths])[None],
        "segment_ids": jnp.repeat(jnp.arange(3), jnp.array(lengths))[None],
    }
    got = logits(model, jnp.concatenate(rows)[None], **packed)[0]
    want = np.concatenate([want[i % 2, :length] for i, length in enumerate(lengths)])
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_takes_an_adapter(family):
    model, (tokens, _) = models.load(GOLDEN / family), reference(family)
    linear = {path for path, name in model.peft_names.items() if name.kind == "linear"}
    assert len(linear) >= 7
    sites = lorax.trace(lambda params: model.apply(params, tokens), model.params)
    adapter = lorax.init(jax.random.key(0), lorax.Spec({".*kernel": lorax.LoRA(rank=2)}), sites, model.params)
    adapter = jax.tree.map(lambda x: x + 0.1 if x.dtype == jnp.float32 else x, adapter)
    assert {site.path for site in adapter.sites} >= linear
    adapted = jax.jit(lorax.adapt(lambda params: model.apply(params, tokens)))(model.params, adapter)
    merged = model.apply(lorax.merge(model.params, adapter), tokens)
    np.testing.assert_allclose(adapted, merged, atol=1e-4)
    assert np.abs(adapted - reference(family)[1]).max() > 1e-2
