"""What keeps long rows and large vocabularies small: attention by blocks, and logits of a chunk of positions."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from experiments import models
from experiments.models.decoder_config import LlamaConfig
from experiments.training import step
from tests.experiments.test_models_families import FAMILIES, GOLDEN, logits, reference

LONG, VOCABULARY = 8192, 32768
SMALL = LlamaConfig(
    vocab_size=VOCABULARY,
    layers=2,
    dim=32,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn_dim=64,
    max_positions=LONG,
    tied=True,
    remat="full",
)


def batch_of(rows: int, length: int, answers: int, vocabulary: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch with `answers` loss positions a row, the last of them filled up, as `experiments.data` makes it."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, (rows, length)).astype(np.int32)
    weights = np.ones((rows, answers), np.float32)
    weights[0, answers // 2 :] = 0
    return {
        "tokens": tokens,
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segment_ids": np.repeat(np.arange(1, 3, dtype=np.int32), length // 2)[None].repeat(rows, 0),
        "loss_positions": np.sort(rng.integers(0, length, (rows, answers)), axis=1).astype(np.int32),
        "loss_targets": rng.integers(0, vocabulary, (rows, answers)).astype(np.int32),
        "loss_weights": weights,
    }


def adapted_loss(model, batch, chunk):
    """The loss of an adapter on every linear layer and the head, as a function of its arrays."""
    loss = step.summed_loss(model, chunk)
    sites = lorax.trace(loss, model.params, batch)
    adapter = lorax.init(
        jax.random.key(0), lorax.Spec({".*(kernel|embedding)": lorax.LoRA(rank=2)}), sites, model.params
    )
    start = jax.tree.map(lambda x: x + 0.05, adapter.params)
    return lambda params: lorax.adapt(loss)(model.params, adapter.replace(params=params), batch), start


@pytest.mark.parametrize("family", ["llama3", "gemma2"])
def test_a_chunked_loss_has_the_same_value_and_gradient(family):
    model = models.load(GOLDEN / family)
    batch = batch_of(3, 16, 7, 64)
    (plain, start), (chunked, _) = (adapted_loss(model, batch, chunk) for chunk in (0, 3))
    want, got = (jax.jit(jax.value_and_grad(loss))(start) for loss in (plain, chunked))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), got[1], want[1])
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want[1])) > 0.1


def compiled(config: LlamaConfig, chunk: int, answers: int):
    """The gradient of an adapter's loss over one long row, compiled from shapes alone."""
    model = models.abstract(config)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch_of(1, LONG, answers, VOCABULARY))
    loss = step.summed_loss(model, chunk)
    sites = lorax.trace(loss, model.params, batch)
    spec = lorax.Spec({"layers/.*kernel": lorax.LoRA(rank=2)})
    adapter = jax.eval_shape(lambda p: lorax.init(jax.random.key(0), spec, sites, p), model.params)
    gradient = lambda base, adapter, batch: jax.grad(
        lambda p: lorax.adapt(loss)(base, adapter.replace(params=p), batch)
    )(adapter.params)
    return jax.jit(gradient).lower(model.params, adapter, batch).compile()


def test_logits_of_a_long_row_and_a_large_vocabulary_are_never_all_there():
    flash = dataclasses.replace(SMALL, attention="flash")
    whole, chunked = (compiled(flash, chunk, LONG) for chunk in (0, 512))
    logits = 4 * LONG * VOCABULARY
    all_of_them = [f"[1,{LONG},{VOCABULARY}]", f"[{LONG},{VOCABULARY}]"]
    assert any(shape in whole.as_text() for shape in all_of_them)
    assert not any(shape in chunked.as_text() for shape in all_of_them)
    assert whole.memory_analysis().temp_size_in_bytes > logits
    assert chunked.memory_analysis().temp_size_in_bytes < logits / 4


def test_scores_of_a_long_row_are_never_all_there():
    plain, flash = (compiled(dataclasses.replace(SMALL, attention=kind), 512, 16) for kind in ("plain", "flash"))
    scores = 4 * SMALL.heads * LONG * LONG
    assert plain.memory_analysis().temp_size_in_bytes > scores
    assert flash.memory_analysis().temp_size_in_bytes < scores / 4


@pytest.mark.parametrize("family", FAMILIES)
def test_flash_attention_agrees_with_transformers(family):
    tokens, want = reference(family)
    np.testing.assert_allclose(logits(models.load(GOLDEN / family, attention="flash"), tokens), want, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_flash_attention_has_the_same_gradient_of_packed_rows(family):
    batch = batch_of(2, 24, 5, 64)
    losses = [adapted_loss(models.load(GOLDEN / family, attention=kind), batch, 0) for kind in ("plain", "flash")]
    want, got = (jax.jit(jax.value_and_grad(loss))(start) for loss, start in losses)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3), got[1], want[1])


def test_without_tokamax_flash_attention_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    tokens, _ = reference("llama3")
    with pytest.raises(ValueError, match=r"pip install 'lorax-flax\[flash\]'"):
        logits(models.load(GOLDEN / "llama3", attention="flash"), tokens)
