"""Encoders from Hugging Face directories: the outputs are those of transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models
from experiments.models import bert, clip, encoders, prenorm, vit
from tests.experiments.encoder_directories import GOLDEN, copy, edit_config, outputs

REFERENCE_TOL = 2e-5  # float32 against float32, numbers up to 5


def load(name: str):
    return models.load_encoder(GOLDEN / name)


@pytest.fixture(scope="module")
def roberta() -> encoders.TextEncoder:
    return load("roberta")


@pytest.fixture(scope="module")
def classifier() -> encoders.ImageEncoder:
    return load("vit_classifier")


@pytest.fixture(scope="module")
def pair() -> encoders.ImageTextEncoder:
    return load("clip")


def assert_same_hidden(encoder: encoders.TextEncoder, want: dict[str, np.ndarray]) -> None:
    got = jax.jit(encoder.apply)(encoder.params, want["tokens"], want["mask"])
    shown = want["mask"] == 1
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[shown], want["hidden"][shown], atol=REFERENCE_TOL, rtol=0)


# BERT and RoBERTa.


def test_roberta_agrees_with_the_reference(roberta):
    assert_same_hidden(roberta, outputs("roberta"))


def test_roberta_with_a_classifier_and_another_padding_agrees_with_the_reference():
    encoder = load("roberta_classifier")
    assert (encoder.config.padding_id, encoder.config.max_tokens, encoder.config.types) == (3, 10, 1)
    assert_same_hidden(encoder, outputs("roberta_classifier"))


def test_xlm_roberta_without_a_prefix_agrees_with_the_reference():
    assert_same_hidden(load("xlm_roberta"), outputs("xlm_roberta"))


def test_bert_with_a_classifier_agrees_with_the_reference():
    encoder = load("bert_classifier")
    assert encoder.config.padding_id is None
    assert_same_hidden(encoder, outputs("bert_classifier"))


def test_positions_skip_padding_tokens(roberta):
    """A padding token takes no position, where it stands and whether or not the mask lets it in."""
    tokens, mask = np.array([[5, 6, 7, 8], [1, 5, 6, 7]], np.int32), np.array([[1, 1, 1, 0], [0, 1, 1, 1]])
    hidden = np.asarray(roberta.apply(roberta.params, tokens, mask))
    np.testing.assert_allclose(hidden[1, 1:], hidden[0, :3], atol=REFERENCE_TOL)


def test_given_positions_count_from_the_first_token(roberta):
    tokens = np.array([[5, 6, 7, 8]], np.int32)
    mask = np.ones_like(tokens)
    want = roberta.apply(roberta.params, tokens, mask)
    got = roberta.apply(roberta.params, tokens, mask, positions=jnp.arange(4))
    np.testing.assert_array_equal(got, want)
    turned = roberta.apply(roberta.params, tokens[:, [3, 0, 1, 2]], mask, positions=jnp.array([3, 0, 1, 2]))
    np.testing.assert_allclose(turned[:, 1:], want[:, :3], atol=REFERENCE_TOL)


def test_texts_as_long_as_the_positions_reach(roberta):
    tokens = np.full((1, 11), 5, np.int32)
    assert roberta.apply(roberta.params, tokens[:, :10], tokens[:, :10] > 0).shape == (1, 10, 16)
    with pytest.raises(ValueError, match="11 long.*max_positions=12, 2 of which are unused"):
        roberta.apply(roberta.params, tokens, tokens > 0)
    with pytest.raises(ValueError, match="max_positions=2 leaves no row behind padding_id=1"):
        bert.BertConfig(vocab_size=4, layers=1, dim=8, heads=2, ffn_dim=4, max_positions=2, padding_id=1)


# ViT.


def test_vit_and_its_classifier_agree_with_the_reference(classifier):
    want = outputs("vit_classifier")
    hidden = jax.jit(classifier.apply)(classifier.params, want["images"])
    np.testing.assert_allclose(hidden, want["hidden"], atol=REFERENCE_TOL, rtol=0)
    logits = jax.jit(classifier.logits)(classifier.params, want["images"])
    np.testing.assert_allclose(logits, want["logits"], atol=REFERENCE_TOL, rtol=0)
    np.testing.assert_array_equal(classifier.features(classifier.params, want["images"]).shape, (3, 16))


def test_vit_without_a_classifier_or_biases_agrees_with_the_reference():
    encoder, want = load("vit"), outputs("vit")
    assert "head" not in encoder.params and "bias" not in encoder.params["layers"]["attn"]["query"]
    hidden = jax.jit(encoder.apply)(encoder.params, want["images"])
    np.testing.assert_allclose(hidden, want["hidden"], atol=REFERENCE_TOL, rtol=0)
    with pytest.raises(ValueError, match="no head"):
        encoder.logits(encoder.params, want["images"])


def test_images_of_another_shape_are_refused(classifier):
    with pytest.raises(ValueError, match=r"shape \(1, 3, 12, 12\), wanted \(batch, 12, 12, 3\).*last axis"):
        classifier.apply(classifier.params, np.zeros((1, 3, 12, 12), np.float32))


def test_shapes_of_vision_transformers_are_checked():
    stack = prenorm.StackConfig(layers=1, dim=8, heads=2, ffn_dim=8, norm_eps=1e-5)
    with pytest.raises(ValueError, match="image=12 is not a multiple of patch=5"):
        vit.VisionConfig(image=12, patch=5, channels=3, stack=stack)
    with pytest.raises(ValueError, match="dim=8 is not a multiple of heads=3"):
        prenorm.StackConfig(layers=1, dim=8, heads=3, ffn_dim=8, norm_eps=1e-5)
    with pytest.raises(ValueError, match=r"activation='swish'.*quick_gelu"):
        prenorm.StackConfig(layers=1, dim=8, heads=2, ffn_dim=8, norm_eps=1e-5, activation="swish")


# CLIP.


def assert_same_pair(encoder: encoders.ImageTextEncoder, want: dict[str, np.ndarray]) -> None:
    @jax.jit
    def run(params, images, tokens, mask):
        return {
            "image_embeds": encoder.embed_images(params, images),
            "text_embeds": encoder.embed_texts(params, tokens, mask),
            "text_embeds_without_mask": encoder.embed_texts(params, tokens),
            "logits_per_image": encoder.apply(params, images, tokens, mask),
        }

    got = run(encoder.params, want["images"], want["tokens"], want["mask"])
    for name, array in got.items():
        np.testing.assert_allclose(array, want[name], atol=REFERENCE_TOL, rtol=0, err_msg=name)


def test_clip_agrees_with_the_reference(pair):
    assert_same_pair(pair, outputs("clip"))


def test_clip_of_the_first_checkpoints_agrees_with_the_reference():
    encoder, want = load("clip_legacy"), outputs("clip_legacy")
    assert encoder.config.text.eos_id is None
    assert np.abs(want["text_embeds"] - want["text_embeds_without_mask"]).max() > 0.1  # a row is padded in front
    assert_same_pair(encoder, want)


def test_hidden_states_of_texts_agree_with_the_reference(pair):
    want = outputs("clip")
    module = clip.TextEncoder(pair.config.text)
    hidden = module.apply({"params": pair.params["text"]}, want["tokens"], want["mask"])
    shown = want["mask"] == 1
    np.testing.assert_allclose(np.asarray(hidden)[shown], want["text_hidden"][shown], atol=REFERENCE_TOL, rtol=0)


def test_what_follows_the_end_of_a_text_changes_nothing(pair):
    tokens = np.array([[9, 10, 7, 11, 12], [9, 10, 7, 7, 30]], np.int32)
    first, second = np.asarray(pair.embed_texts(pair.params, tokens))
    np.testing.assert_allclose(first, second, atol=REFERENCE_TOL)
    with pytest.raises(ValueError, match="tokens are 10 long.*max_positions=9"):
        pair.embed_texts(pair.params, np.zeros((1, 10), np.int32))


def test_old_copies_of_a_part_count(tmp_path, pair):
    directory = copy("clip", tmp_path)
    parts = ("text_config", "vision_config")
    raw = json.loads((directory / "config.json").read_text())
    edit_config(
        directory,
        **{f"{part}_dict": raw[part] for part in parts},
        **{part: {**raw[part], "hidden_act": "gelu", "num_hidden_layers": 1} for part in parts},
    )
    assert models.load_encoder(directory).config == pair.config


# Numerics.


def test_bfloat16_computes_in_bfloat16():
    for name, call in [("roberta", ("tokens", "mask")), ("vit", ("images",)), ("clip", ("tokens",))]:
        encoder, want = models.load_encoder(GOLDEN / name, dtype=jnp.bfloat16), outputs(name)
        assert {leaf.dtype for leaf in jax.tree.leaves(encoder.params)} == {jnp.dtype(jnp.bfloat16)}
        module, params = (encoder.apply, encoder.params)
        if isinstance(encoder, encoders.ImageTextEncoder):
            text = clip.TextEncoder(encoder.config.text)
            module, params = (lambda p, *args, text=text: text.apply({"params": p}, *args)), encoder.params["text"]
        hidden = jax.jit(module)(params, *(want[key] for key in call))
        assert hidden.dtype == jnp.bfloat16
        reference = want["text_hidden" if name == "clip" else "hidden"]
        shown = want["mask"] == 1 if "mask" in want else ...
        np.testing.assert_allclose(np.asarray(hidden, np.float32)[shown], reference[shown], atol=0.25)
