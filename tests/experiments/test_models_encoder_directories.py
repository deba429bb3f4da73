"""What the loader of encoders takes, leaves out and refuses."""

import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import models
from tests.experiments.encoder_directories import GOLDEN, copy, edit_config, edit_tensors


def assert_same_params(a: models.Encoder, b: models.Encoder) -> None:
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def unprefixed(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The bare encoder out of a model with a head."""
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("name, prefix", [("roberta", "roberta."), ("bert_classifier", "bert.")])
def test_the_bare_encoder_is_that_of_a_model_with_a_head(tmp_path, name, prefix):
    edit_tensors(copy(name, tmp_path), lambda tensors: unprefixed(tensors, prefix))
    bare, whole = models.load_encoder(tmp_path), models.load_encoder(GOLDEN / name)
    assert_same_params(bare, whole)
    query = "encoder.layer.{layer}.attention.self.query"
    assert bare.peft_names["layers/attn/query/kernel"].module == query
    assert whole.peft_names["layers/attn/query/kernel"].module == prefix + query


def test_the_bare_vit_is_that_of_a_classifier(tmp_path):
    edit_tensors(copy("vit_classifier", tmp_path), lambda tensors: unprefixed(tensors, "vit."))
    edit_config(tmp_path, architectures=["ViTModel"])
    bare, whole = models.load_encoder(tmp_path), models.load_encoder(GOLDEN / "vit_classifier")
    assert whole.params.pop("head").keys() == {"kernel", "bias"}
    assert_same_params(bare, whole)


def test_a_sharded_directory_equals_a_single_file(tmp_path):
    copy("clip", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({k: v for k, v in tensors.items() if weight_map[k] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same_params(models.load_encoder(tmp_path), models.load_encoder(GOLDEN / "clip"))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002"):
        models.load_encoder(tmp_path)


def test_a_zip_file_reads_like_a_directory(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as file:
        for name in ("config.json", "model.safetensors"):
            file.write(GOLDEN / "roberta" / name, name)
    zipped = models.load_encoder(zipfile.Path(tmp_path / "model.zip"))
    assert_same_params(zipped, models.load_encoder(GOLDEN / "roberta"))


def test_names_of_the_first_bert_checkpoints_are_read(tmp_path):
    def old(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    copy("bert_classifier", tmp_path)
    edit_tensors(tmp_path, lambda tensors: {old(name): array for name, array in tensors.items()})
    assert_same_params(models.load_encoder(tmp_path), models.load_encoder(GOLDEN / "bert_classifier"))


def test_what_follows_from_the_config_is_left_out(tmp_path):
    numbers = np.arange(10, dtype=np.int64)[None]
    added = {
        "bert_classifier": ("bert.embeddings.position_ids", "cls.seq_relationship.bias"),
        "clip": ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
        "vit": ("embeddings.mask_token",),
    }
    for name, more in added.items():
        edit_tensors(copy(name, tmp_path), lambda tensors, more=more: tensors | dict.fromkeys(more, numbers))
        assert_same_params(models.load_encoder(tmp_path), models.load_encoder(GOLDEN / name))


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("roberta", "encoder.adapter.weight"),  # no head's, and not the encoder's
        ("roberta", "roberta.encoder.layer.2.output.dense.bias"),  # a layer more than the config has
        ("xlm_roberta", "lm_head.bias"),  # there are no heads beside a bare encoder
        ("vit", "classifier.bias"),  # the config's architecture has no classifier
        ("vit", "encoder.layer.0.attention.attention.query.bias"),  # qkv_bias is false
        ("clip", "vision_model.embeddings.patch_embedding.bias"),
    ],
)
def test_a_tensor_without_a_place_is_named(tmp_path, name, tensor):
    edit_tensors(copy(name, tmp_path), lambda tensors: tensors | {tensor: np.zeros(4, np.float32)})
    with pytest.raises(ValueError, match=rf"no place.*{tensor}"):
        models.load_encoder(tmp_path)


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("roberta", "roberta.encoder.layer.1.output.dense.bias"),
        ("vit_classifier", "classifier.weight"),
        ("vit", "embeddings.cls_token"),
        ("clip", "logit_scale"),
        ("clip", "vision_model.pre_layrnorm.bias"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path, name, tensor):
    edit_tensors(copy(name, tmp_path), lambda tensors: {k: v for k, v in tensors.items() if k != tensor})
    with pytest.raises(ValueError, match=rf"missing.*{tensor}"):
        models.load_encoder(tmp_path)


@pytest.mark.parametrize(
    "name, tensor, shape",
    [
        ("vit", "embeddings.patch_embeddings.projection.weight", (16, 1, 2, 8)),  # of the right size
        ("vit", "embeddings.cls_token", (1, 2, 8)),
        ("vit", "embeddings.position_embeddings", (1, 16, 10)),
        ("roberta", "roberta.encoder.layer.0.attention.self.key.bias", (8,)),
        ("roberta", "roberta.embeddings.LayerNorm.weight", (8,)),
        ("clip", "text_projection.weight", (16, 12)),
        ("clip", "logit_scale", (2,)),
    ],
)
def test_a_tensor_of_another_shape_is_named(tmp_path, name, tensor, shape):
    edit_tensors(copy(name, tmp_path), lambda tensors: tensors | {tensor: np.zeros(shape, np.float32)})
    with pytest.raises(ValueError, match=rf"{tensor}.*has shape \({shape[0]}.*asks for"):
        models.load_encoder(tmp_path)


@pytest.mark.parametrize(
    "name, change, match",
    [
        ("roberta", {"model_type": "distilbert"}, r"model_type='distilbert', wanted one of .*'xlm-roberta'"),
        ("roberta", {"is_decoder": True}, "is_decoder=True"),
        ("roberta", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("roberta", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ("vit", {"hidden_act": "relu"}, "hidden_act='relu'.*quick_gelu"),
        ("vit", {"image_size": [12, 16]}, r"image_size=\[12, 16\].*square"),
        ("vit", {"patch_size": 5}, "image=12 is not a multiple of patch=5"),
        ("clip", {"text_config": {"hidden_act": "relu"}}, "text_config: hidden_act='relu'"),
    ],
)
def test_what_the_encoders_do_not_compute_is_refused(tmp_path, name, change, match):
    edit_config(copy(name, tmp_path), **change)
    with pytest.raises(ValueError, match=match):
        models.load_encoder(tmp_path)


def test_a_list_of_equal_sides_is_a_square(tmp_path):
    edit_config(copy("vit", tmp_path), image_size=[12, 12])
    assert models.load_encoder(tmp_path).config == models.load_encoder(GOLDEN / "vit").config


def test_a_place_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        models.load_encoder(tmp_path)
    copy("vit", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor model.safetensors.index.json"):
        models.load_encoder(tmp_path)


def test_the_tokenizer_neither_cuts_nor_pads(tmp_path):
    assert models.load_encoder(GOLDEN / "roberta").tokenizer is None
    from tests.experiments import tiny_encoder

    encoder = models.load_encoder(tiny_encoder.write(tmp_path), dtype=jnp.bfloat16)
    assert encoder.tokenizer.encode("b cz ? a a a").ids == [2, 5, 6, 12, 1, 4, 4, 4, 3]
