"""LoRA on the pretrained encoders: what a trace finds in them, and that adapting equals merging."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lorax
from experiments import models
from tests.experiments.encoder_directories import GOLDEN, outputs

MERGE_TOL = 2e-5  # float32, numbers up to 5
LAYERS = ("attn/key", "attn/out", "attn/query", "attn/value", "mlp/down", "mlp/up")


def layers_of(stack: str) -> dict[str, str]:
    return {f"{stack}layers/{name}/kernel": "linear" for name in LAYERS}


# Directory -> what is called with which inputs, and the kinds of its sites.
CASES = {
    "roberta": (
        "apply",
        ("tokens", "mask"),
        # The one row of embed/types is read as a whole: there is nothing to look up in it.
        {**layers_of(""), "embed/tokens/embedding": "embedding", "embed/positions/embedding": "embedding"},
    ),
    "vit_classifier": (
        "logits",
        ("images",),
        {**layers_of(""), "patches/kernel": "conv", "positions/embedding": "embedding", "head/kernel": "linear"},
    ),
    "clip": (
        "apply",
        ("images", "tokens", "mask"),
        {
            **layers_of("text/"),
            **layers_of("vision/"),
            "text/tokens/embedding": "embedding",
            "text/positions/embedding": "embedding",
            "text_projection/kernel": "linear",
            "vision/patches/kernel": "conv",
            "vision/positions/embedding": "embedding",
            "vision_projection/kernel": "linear",
        },
    ),
}


class Case:
    """An encoder, its function and inputs, and an adapter of random factors on every kernel."""

    def __init__(self, name: str) -> None:
        self.directory = GOLDEN / name
        call, inputs, self.kinds = CASES[name]
        self.encoder, arrays = models.load_encoder(GOLDEN / name), outputs(name)
        self.fn, self.params = getattr(self.encoder, call), self.encoder.params
        self.args = [jnp.asarray(arrays[key]) for key in inputs]
        self.sites = lorax.trace(self.fn, self.params, *self.args)
        spec = lorax.Spec({r".*/kernel": lorax.LoRA(rank=2)})
        adapter = lorax.init(jax.random.key(0), spec, self.sites, self.params)
        draw = np.random.default_rng(0)
        self.adapter = adapter.replace(
            params=jax.tree.map(lambda x: 0.2 * draw.normal(size=x.shape).astype("f"), adapter.params)
        )


@pytest.fixture(scope="module", params=list(CASES))
def case(request) -> Case:
    return Case(request.param)


def test_every_weight_is_found(case):
    assert {site.path: site.kind for site in case.sites if site.is_adaptable} == case.kinds


def test_nothing_is_materialised(case):
    rows = {row.path: row.how for row in lorax.explain(case.fn, case.params, case.adapter, *case.args)}
    kernels = [path for path, kind in case.kinds.items() if kind != "embedding"]
    assert rows == dict.fromkeys(kernels, "factored")


def test_adapting_equals_merging(case):
    adapted = jax.jit(lorax.adapt(case.fn, strict=True))(case.params, case.adapter, *case.args)
    fn = jax.jit(case.fn)
    merged = fn(lorax.merge(case.params, case.adapter), *case.args)
    shown = np.asarray(case.args[1]) == 1 if len(case.args) == 2 else ...  # hidden states at padding mean nothing
    np.testing.assert_allclose(np.asarray(adapted)[shown], np.asarray(merged)[shown], atol=MERGE_TOL, rtol=0)
    assert np.abs(np.asarray(adapted - fn(case.params, *case.args))[shown]).max() > 1e3 * MERGE_TOL


def test_peft_directories_name_the_modules_of_the_checkpoint(case, tmp_path):
    """Factors come back as they were, and stand beside the weights whose shape they have."""
    names = case.encoder.peft_names
    lorax.peft.save(tmp_path, case.adapter, case.params, names=names, task_type="FEATURE_EXTRACTION")
    read = lorax.peft.load(tmp_path, case.params, case.sites, names=names)
    jax.tree.map(np.testing.assert_array_equal, read.params, case.adapter.params)
    factors = load_file(tmp_path / "adapter_model.safetensors")
    base = load_file(case.directory / "model.safetensors")
    assert factors
    for name, factor in factors.items():
        module, side = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        weight = base[f"{module}.weight"]
        assert factor.shape[1:] == (weight.shape[1:] if side == "lora_A" else (2, *(1 for _ in weight.shape[2:])))
