"""The table of names, layouts of leaves, and the file format."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import LoRA, paths, peft
from lorax.peft import tensors
from lorax.peft.layout import Layout
from lorax.peft.names import Table
from tests.agreement import normal
from tests.peft_models import decoder, tied, toy


def heads(p, x):
    return jnp.einsum("bhk,hkd->bd", jnp.einsum("bd,dhk->bhk", x, p["q"]), p["o"])


PARAMS = {"q": normal(0, 6, 2, 3), "o": normal(1, 2, 3, 6)}
X = normal(2, 4, 6)


def test_several_axes_are_flattened_in_their_order(tmp_path):
    """Factors as nn.Linear would have them: numbers worked out by hand."""
    sites = lorax.trace(heads, PARAMS, X)
    adapter = lorax.init(jax.random.key(0), lorax.Spec({".*": LoRA(rank=2)}), sites, PARAMS)
    names = {"q": "attn.q_proj", "o": "attn.o_proj"}
    adapter = adapter.replace(
        params={
            "q": {"a": normal(3, 6, 2), "b": normal(4, 2, 2, 3)},
            "o": {"a": normal(5, 2, 3, 2), "b": normal(6, 2, 6)},
        }
    )
    peft.save(tmp_path, adapter, PARAMS, names=names)
    found = tensors.read(tmp_path / "adapter_model.safetensors")
    get = lambda name: found[f"base_model.model.attn.{name}.weight"]
    p = adapter.params
    np.testing.assert_array_equal(get("q_proj.lora_A"), p["q"]["a"].T)
    np.testing.assert_array_equal(get("q_proj.lora_B"), p["q"]["b"].reshape(2, 6).T)
    np.testing.assert_array_equal(get("o_proj.lora_A"), p["o"]["a"].reshape(6, 2).T)
    np.testing.assert_array_equal(get("o_proj.lora_B"), p["o"]["b"].T)


@pytest.mark.parametrize(
    "base, kinds",
    [
        (decoder, {("embedding", False), ("linear", False), ("vector", False)}),
        (tied, {("embedding", True), ("linear", False), ("vector", False)}),
        (toy, {("embedding", False), ("linear", False), ("vector", False), ("conv", False), ("parameter", False)}),
    ],
)
def test_layouts_are_undone_by_their_inverses(base, kinds):
    base, rng = base(), np.random.default_rng(0)
    table = Table(base.names, _leaves(base), base.sites)
    assert {(layout.kind, layout.is_swapped) for layout in table.layouts.values()} == kinds
    for layout in table.layouts.values():
        whole = rng.normal(size=layout.shape)
        parts = {i: layout.part(whole, i) for i in np.ndindex(layout.stack_shape)}
        np.testing.assert_array_equal(layout.stacked(parts), whole)
        for part in parts.values():
            there = layout.weight_to_torch(part)
            assert there.shape == layout.weight_shape()
            np.testing.assert_array_equal(layout.weight_from_torch(there), part)
        if layout.kind != "vector":
            shapes = layout.factor_shapes(3)
            a, b = (rng.normal(size=s) for s in shapes)
            back = layout.to_peft(*layout.from_peft(a, b, 3))
            np.testing.assert_array_equal(back[0], a)
            np.testing.assert_array_equal(back[1], b)


def _leaves(base):
    return paths.flatten(base.params)[0]


def test_kernels_with_the_channels_first():
    """Torch's and Equinox's out × in × space needs no move, flax's space × in × out does."""
    shapes = {(4, 5, 1, 3): ((1, 2, 3), (0,)), (1, 3, 5, 4): ((0, 1, 2), (3,))}
    for shape, (fan_in, fan_out) in shapes.items():
        site = lorax.Site(path="k", kind="conv", shape=shape, dtype="float32", fan_in=fan_in, fan_out=fan_out)
        layout = Layout.of("k", shape, site, fields=0, kind=None, transposed=None, fan_in=None, tied="lm_head")
        assert layout.weight_shape() == (4, 5, 1, 3)
        assert layout.factor_shapes(2) == ((2, 5, 1, 3), (4, 2, 1, 1))


def test_layers_and_experts_are_two_stacked_axes(tmp_path):
    """Experts that are modules of their own: a field for every stacked axis; one of them has no factors."""
    body = lambda x, w: (jnp.tanh(jnp.einsum("ebi,eio->ebo", x, w)), None)
    fn = lambda p, x: jax.lax.scan(body, x, p["up"])[0]
    params, x = {"up": normal(0, 2, 3, 6, 6)}, normal(1, 3, 4, 6)
    sites = lorax.trace(fn, params, x)
    adapter = lorax.init(jax.random.key(0), lorax.Spec({"up": LoRA(rank=2)}), sites, params)
    a, b = normal(2, 2, 3, 6, 2).at[1, 2].set(0), normal(3, 2, 3, 2, 6).at[1, 2].set(0)
    adapter = adapter.replace(params={"up": {"a": a, "b": b}})
    names = {"up": "layers.{layer}.experts.{expert}.up_proj"}
    peft.save(tmp_path, adapter, params, names=names)
    found = tensors.read(tmp_path / "adapter_model.safetensors")
    assert len(found) == 10 and not any("1.experts.2" in k for k in found)
    np.testing.assert_array_equal(found["base_model.model.layers.1.experts.0.up_proj.lora_A.weight"], a[1, 0].T)
    again = peft.load(tmp_path, params, sites, names=names)
    np.testing.assert_array_equal(again.params["up"]["a"], a)
    np.testing.assert_array_equal(again.params["up"]["b"], b)


@pytest.mark.parametrize(
    "names, what",
    [
        ({"embed": 3}, r"names\['embed'\] is 3"),
        ({"nowhere": "a"}, "no leaf 'nowhere'"),
        ({"blocks/up/kernel": "blocks.0"}, "0 fields in braces and the weight of shape .* 1 stacked"),
        ({"experts/up": "experts.up"}, "kind='parameter'"),
        ({"norm/scale": "norm.{layer}.{expert}"}, "only 1 axes"),
        ({"embed": peft.Module("embed", kind="table")}, "kind is 'table'"),
        ({"embed": "embed", "head/kernel": "embed"}, r"both embed\.weight"),
    ],
)
def test_wrong_lines(names, what):
    base = toy()
    with pytest.raises(ValueError, match=what):
        Table(names, _leaves(base), base.sites)


def test_a_matrix_that_nothing_reads_needs_a_kind(tmp_path):
    """Its values alone do not say how torch stores it; a square one would go wrong without a word."""
    fn = lambda p, x: x * jnp.sum(jnp.sin(p["w"])) @ p["v"]
    params, x = {"w": normal(0, 3, 3), "v": normal(1, 3, 3)}, normal(2, 2, 3)
    sites = lorax.trace(fn, params, x)
    spec = lorax.Spec({"w": lorax.Full(), "v": LoRA(rank=1)})
    adapter = lorax.init(jax.random.key(0), spec, sites, params)
    with pytest.raises(ValueError, match="w .*: no product reads it.*kind='linear'"):
        peft.save(tmp_path, adapter, params, names={"w": "w", "v": "v"})
    names = {"w": peft.Module("w", kind="linear"), "v": "v"}
    peft.save(tmp_path, adapter, params, names=names)
    found = tensors.read(tmp_path / "adapter_model.safetensors")
    np.testing.assert_array_equal(found["base_model.model.w.weight"], params["w"].T)


def test_llama_names_are_those_of_the_decoder():
    base = decoder()
    ours = peft.llama_names()
    assert {k: (n.module, n.kind) for k, n in ours.items()} == {k: (n.module, n.kind) for k, n in base.names.items()}
    assert "head/kernel" not in peft.llama_names(head=None)


def test_tensors_are_laid_out_as_by_the_formats_own_writer():
    safetensors = pytest.importorskip("safetensors.numpy")
    arrays = {"b": np.ones((2, 3), np.float16), "a": np.zeros(3, np.float32), "c": np.ones((0, 4), np.float32)}
    assert tensors.encode(arrays) == safetensors.save(arrays, {"format": "pt"})
    assert tensors.encode(dict(reversed(arrays.items()))) == tensors.encode(arrays)


def test_bfloat16_keeps_its_bits():
    x = normal(0, 3, 5).astype(jnp.bfloat16)
    back = tensors.decode(tensors.encode({"x": np.asarray(x)}), "memory")["x"]
    assert back.dtype == x.dtype and back.tobytes() == np.asarray(x).tobytes()


def test_foreign_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"x \(int32\)"):
        tensors.encode({"x": np.zeros(2, np.int32)})
    header = json.dumps({"x": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    with pytest.raises(ValueError, match="x has dtype I64"):
        tensors.decode(struct.pack("<Q", len(header)) + header + b"\0" * 8, "memory")
