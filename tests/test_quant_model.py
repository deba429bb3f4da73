"""Models whose linear layers are quantised while they are loaded."""

import pathlib
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorax
from experiments import models
from experiments.training.settings import EVERY_LINEAR
from lorax.quant import FP4, NF4, Int8, is_quantized, quantize
from tests.test_quant import as_the_cpu_kernel_reads

GOLDEN = pathlib.Path(__file__).parent / "golden"
LOGITS = 1e-3


def in_format(format):
    return dict.fromkeys(EVERY_LINEAR, format)


@pytest.mark.parametrize(
    ("format", "dtype"),
    [(NF4(), jnp.float32), (NF4(), jnp.bfloat16), (FP4(double=True), jnp.float32), (Int8(), jnp.float32)],
    ids=str,
)
def test_loaded_nodes_are_those_of_the_loaded_parameters(format, dtype):
    loaded = models.load(GOLDEN / "peft/base", dtype=dtype, formats=in_format(format))
    whole = models.load(GOLDEN / "peft/base", dtype=dtype)
    sites = lorax.trace(whole.apply, whole.params, np.zeros((1, 8), np.int32))
    wanted = quantize(whole.params, in_format(format), sites=sites)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, wanted)
    quantised = [site.path for site in sites if is_quantized(lorax.paths.flatten(loaded.params)[0][site.path])]
    assert quantised == [site.path for site in sites if site.path.startswith("layers") and site.kind == "linear"]


def test_logits_of_qlora():
    """Those of PEFT over bitsandbytes, whose one fault is repeated here: see golden/quant/README.md."""
    model = models.load(GOLDEN / "peft/base", formats=in_format(NF4(block=64, double=True)))
    down = model.params["layers"]["mlp"]["down"]
    model.params["layers"]["mlp"]["down"] = {"kernel": as_the_cpu_kernel_reads(down["kernel"])}
    ids = np.load(GOLDEN / "peft/inputs.npz")["input_ids"]
    sites = lorax.trace(model.apply, model.params, ids)
    adapter = lorax.peft.load(GOLDEN / "peft/adapters/qv_r8", model.params, sites, names=model.peft_names)
    got = jax.jit(lorax.adapt(model.apply))(model.params, adapter, ids)
    np.testing.assert_allclose(got, np.load(GOLDEN / "quant/qlora_qv_r8.npz")["logits"], rtol=0, atol=LOGITS)


def test_full_precision_is_never_held_whole(tmp_path):
    """Of the arrays on the host, that is; layer by layer they go to the device, which keeps the nodes."""
    layers = 64
    small = load_file(GOLDEN / "peft/base/model.safetensors")
    tensors = {name: x for name, x in small.items() if ".layers." not in name}
    for i in range(layers):
        own = {name: x for name, x in small.items() if ".layers.0." in name}
        tensors |= {name.replace(".layers.0.", f".layers.{i}."): x.copy() for name, x in own.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = (GOLDEN / "peft/base/config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"num_hidden_layers": 2', f'"num_hidden_layers": {layers}'))

    def load(formats):
        models.load(tmp_path, formats=formats)  # once to compile
        tracemalloc.start()
        model = models.load(tmp_path, formats=formats)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return model, peak

    whole, all_at_once = load(None)
    _, by_layer = load(in_format(NF4()))
    largest = max(x.nbytes for path, x in lorax.paths.flatten(whole.params)[0].items() if path.startswith("layers"))
    assert all_at_once > largest  # a stack is filled on the host
    assert by_layer < largest / 2


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layers/mlp/dwn/kernel", "matches no parameter to quantise; the nearest linear layers are layers/mlp/down"),
        (".*", "would quantise embed/embedding, .*norm/scale, which are no linear layers"),
    ],
)
def test_patterns_have_to_mean_linear_layers(pattern, message):
    with pytest.raises(ValueError, match=message):
        models.load(GOLDEN / "peft/base", formats={pattern: NF4()})
