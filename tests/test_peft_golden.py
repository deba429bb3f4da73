"""Every directory that PEFT wrote for these tests: read, evaluated, and written again to the bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import peft
from tests.agreement import assert_identical
from tests.peft_models import GOLDEN, PEFT_TOL, base_of, config_of, decoder, tensors_of, tied, toy

ADAPTERS = sorted(p.name for p in (GOLDEN / "peft/adapters").iterdir())
REFUSED = {"tied_not", "tied_save_not", "toy_save"}
STARTED = {"pissa", "pissa_dora", "olora"}
MORE = sorted({p.parent.name for p in (GOLDEN / "peft_more").glob("*/adapter_config.json")} - REFUSED - {"gpt2"})


def assert_written_again(base, adapter, directory, tmp_path):
    """The file's bytes, and an equal adapter when it is read again."""
    base.save(tmp_path / "again", adapter)
    written = (tmp_path / "again/adapter_model.safetensors").read_bytes()
    assert written == (directory / "adapter_model.safetensors").read_bytes()
    again = base.load(tmp_path / "again")
    assert again.methods == adapter.methods
    assert_identical(again.params, adapter.params)
    assert_identical(again.state, adapter.state)


@pytest.mark.parametrize("case", ADAPTERS)
def test_shared_cases_give_the_logits_and_are_written_again(case, tmp_path):
    directory, base = GOLDEN / "peft/adapters" / case, decoder()
    adapter = base.load(directory)
    golden = np.load(directory / "golden.npz")
    assert np.abs(golden["adapted_logits"] - golden["disabled_logits"]).max() > 100 * PEFT_TOL
    np.testing.assert_allclose(base(adapter), golden["adapted_logits"], rtol=0, atol=PEFT_TOL)
    assert_written_again(base, adapter, directory, tmp_path)


def test_ranks_and_scalings_of_every_module(tmp_path):
    adapter = decoder().load(GOLDEN / "peft/adapters/patterns")
    effective = json.loads((GOLDEN / "peft/adapters/patterns/effective.json").read_text())
    state = adapter.state["layers/attn/value/kernel"]["scale"]
    assert adapter.params["layers/attn/value/kernel"]["a"].shape == (2, 64, 16)  # ranks 16 and 8
    wanted = [effective["scaling"][f"base_model.model.model.layers.{i}.self_attn.v_proj"] for i in range(2)]
    np.testing.assert_array_equal(state, wanted)
    assert not np.any(adapter.params["layers/attn/value/kernel"]["a"][1, :, 8:])
    assert adapter.state["layers/mlp/gate/kernel"]["scale"].shape == ()  # the same in all layers


def test_concatenated_adapter(tmp_path):
    directory, base = GOLDEN / "peft/combinations/comb_cat", decoder()
    adapter = base.load(directory)
    golden = np.load(directory / "golden.npz")
    np.testing.assert_allclose(base(adapter), golden[golden.files[0]], rtol=0, atol=PEFT_TOL)
    assert_written_again(base, adapter, directory, tmp_path)


def test_pruned_adalora(tmp_path):
    directory, base = GOLDEN / "peft/adalora/final", decoder()
    adapter = base.load(directory)
    arrays = adapter.params["layers/attn/query/kernel"]
    assert arrays["a"].shape == (2, 64, 6) and float(arrays["updates"]) == 1
    assert [int(n) for n in (arrays["e"] != 0).sum(1)] == [5, 0]  # layer 1 has no triplet left
    np.testing.assert_allclose(
        adapter.state["layers/attn/query/kernel"]["scale"], np.float32(8) / np.float32(6 + 1e-5), rtol=1e-7
    )
    golden = np.load(GOLDEN / "peft/adalora/golden.npz")
    key = next(k for k in golden.files if "logits" in k)
    np.testing.assert_allclose(base(adapter), golden[key], rtol=0, atol=PEFT_TOL)
    assert_written_again(base, adapter, directory, tmp_path)
    kept, written = config_of(directory), config_of(tmp_path / "again")
    for name in ("rank_pattern", "init_r", "target_r", "lora_alpha", "total_step", "tinit", "tfinal", "deltaT"):
        assert written[name] == kept[name], name


def test_unpruned_adalora(tmp_path):
    directory, base = GOLDEN / "peft/adalora/init", decoder()
    adapter = base.load(directory)
    assert float(adapter.params["layers/attn/query/kernel"]["updates"]) == 0
    assert_written_again(base, adapter, directory, tmp_path)
    assert config_of(tmp_path / "again")["rank_pattern"] is None


@pytest.mark.parametrize("case", [c for c in MORE if c not in STARTED])
def test_further_cases_give_the_outputs_and_are_written_again(case, tmp_path):
    directory, base = GOLDEN / "peft_more" / case, base_of(case)
    adapter = base.load(directory)
    wanted = np.load(directory / "golden.npz")["adapted"]
    got = base(adapter)
    got = got[:, -1:] if got.ndim == 3 else got
    np.testing.assert_allclose(got, wanted, rtol=0, atol=PEFT_TOL)
    assert_written_again(base, adapter, directory, tmp_path)


@pytest.mark.parametrize("case", sorted(STARTED))
def test_an_unconverted_start_is_taken_off_the_base_as_peft_does(case, tmp_path):
    directory, base = GOLDEN / "peft_more" / case, decoder()
    adapter = base.load(directory)
    assert "a0" in adapter.state["layers/attn/query/kernel"]
    got, wanted = base(adapter), np.load(directory / "golden.npz")["adapted"]
    np.testing.assert_allclose(got[:, -1:], wanted, rtol=0, atol=PEFT_TOL)
    base.save(tmp_path, adapter)  # plain factors of twice the rank, which no loader applies to the base
    assert config_of(tmp_path)["init_lora_weights"] is True
    shape = tensors_of(tmp_path)["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape
    assert shape == (4, 64)
    np.testing.assert_allclose(base(base.load(tmp_path)), got, rtol=0, atol=1e-5)


def test_weights_stored_as_in_by_out(tmp_path):
    """GPT-2's Conv1D: factors are as ever, and whole weights in × out."""
    directory = GOLDEN / "peft_more/gpt2"
    golden = np.load(directory / "golden.npz")
    stems = {
        "attn": "transformer.h.0.attn.c_attn",
        "out": "transformer.h.0.attn.c_proj",
        "down": "transformer.h.0.mlp.c_proj",
        "up": "transformer.h.0.mlp.c_fc",
    }
    get = lambda kind, stem, what: jnp.asarray(golden[f"{kind}.{stem}.{what}"])
    params = {k: {"w": get("base", s, "weight"), "b": get("base", s, "bias")} for k, s in stems.items()}

    def fn(p, x):
        y = x @ p["attn"]["w"] + p["attn"]["b"]
        y = y[:, :8] @ p["out"]["w"] + p["out"]["b"]
        return (y @ p["up"]["w"] + p["up"]["b"]) @ p["down"]["w"] + p["down"]["b"]

    names = {f"{k}/w": peft.Module(s, transposed=False) for k, s in stems.items()}
    names |= {f"{k}/b": f"{s}.bias" for k, s in stems.items()}
    adapter = peft.load(directory, params, lorax.trace(fn, params, jnp.ones((2, 8))), names=names)
    merged = lorax.merge(params, adapter)
    for k, s in stems.items():
        for ours, theirs in (("w", "weight"), ("b", "bias")):
            np.testing.assert_allclose(merged[k][ours], get("merged", s, theirs), rtol=0, atol=1e-5)
    peft.save(tmp_path, adapter, params, names=names)
    assert config_of(tmp_path)["fan_in_fan_out"] is True
    written = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert written == (directory / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("case", ["tied_not", "tied_save_not"])
def test_one_use_of_a_tied_table_is_refused(case):
    with pytest.raises(ValueError, match=r"model.embed_tokens .* without ensure_weight_tying.*embed/embedding"):
        tied().load(GOLDEN / "peft_more" / case)


def test_a_stacked_leaf_has_one_method():
    with pytest.raises(ValueError, match="blocks/up/kernel: some of its layers .* a leaf has one method"):
        toy().load(GOLDEN / "peft_more/toy_save")


def test_adapters_keep_their_dtype():
    adapter = decoder().load(GOLDEN / "peft_more/bf16")
    assert {x.dtype for x in jax.tree.leaves(adapter.params)} == {jnp.dtype("bfloat16")}
    assert {m.dtype for m in adapter.methods.values()} == {"bfloat16"}


@pytest.mark.parametrize("case", ["qv_r8", "patterns"])
def test_layers_with_leaves_of_their_own(case, tmp_path):
    """The same directory on unstacked layers: a field of the leaf path in place of a stacked axis."""
    base = decoder()
    layers = [jax.tree.map(lambda x, i=i: x[i], base.params["layers"]) for i in range(2)]
    params = {**base.params, "layers": layers}
    restacked = lambda p: {**p, "layers": jax.tree.map(lambda *x: jnp.stack(x), *p["layers"])}
    fn = lambda p, x: base.fn(restacked(p), x)
    loop = lambda p, x: _products(p, x)
    sites = lorax.trace(loop, params, jnp.ones((2, 64)))
    names = peft.llama_names(layers="layers/{layer}")
    adapter = peft.load(GOLDEN / "peft/adapters" / case, params, sites, names=names)
    assert adapter.params["layers/0/attn/query/kernel"]["a"].shape[0] == 64
    golden = np.load(GOLDEN / "peft/adapters" / case / "golden.npz")["adapted_logits"]
    np.testing.assert_allclose(fn(lorax.merge(params, adapter), base.x), golden, rtol=0, atol=PEFT_TOL)
    peft.save(tmp_path, adapter, params, names=names)
    written = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert written == (GOLDEN / "peft/adapters" / case / "adapter_model.safetensors").read_bytes()


def _products(p, x):
    """Every product of the decoder's layers, which is what sites are found by."""
    for layer in p["layers"]:
        attn, mlp = layer["attn"], layer["mlp"]
        q, k, v = (jnp.einsum("bd,dnh->bnh", x, attn[n]["kernel"]) for n in ("query", "key", "value"))
        x = x + jnp.einsum("bnh,nhd->bd", q + jnp.repeat(k + v, 2, 1), attn["out"]["kernel"])
        x = x + (x @ mlp["gate"]["kernel"] * (x @ mlp["up"]["kernel"])) @ mlp["down"]["kernel"]
    return x @ p["head"]["kernel"]
