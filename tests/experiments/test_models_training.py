"""Fine-tuning the reference base with lorax reproduces the reference run."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import lorax
from experiments import models

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "peft"
RUN = GOLDEN / "train" / "qv_r8"
LOSS_TOL = 1e-3  # relative, over 20 steps
GRADIENT_TOL = 1e-4
PATHS = ("layers/attn/query/kernel", "layers/attn/value/kernel")


def factors(model: models.Model, file: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
    """Reads lora_A (rank x in) and lora_B (out x rank) of every layer into stacked factors a and b."""
    tensors = load_file(file)
    shapes = {"query": (4, 16), "value": (2, 16)}
    found = {}
    for path in PATHS:
        module = model.peft_names[path].module
        heads = shapes[path.split("/")[2]]
        keys = [f"base_model.model.{module.format(layer=i)}" for i in range(model.config.layers)]
        a = np.stack([tensors.pop(f"{key}.lora_A.weight").T for key in keys])
        b = np.stack([tensors.pop(f"{key}.lora_B.weight").T.reshape(8, *heads) for key in keys])
        found[path] = {"a": a, "b": b}
    assert not tensors
    return found


@pytest.fixture(scope="module")
def model() -> models.Model:
    return models.load(GOLDEN / "base")


@pytest.fixture(scope="module")
def adapter(model):
    sites = lorax.trace(model.apply, model.params, np.zeros((1, 4), np.int32))
    spec = lorax.Spec({r"layers/attn/(query|value)/kernel": lorax.LoRA(rank=8, alpha=16)})
    adapter = lorax.init(jax.random.key(0), spec, sites, model.params)
    initial = factors(model, RUN / "init" / "adapter_model.safetensors")
    jax.tree.map(lambda mine, theirs: np.testing.assert_equal(mine.shape, theirs.shape), adapter.params, initial)
    return adapter.replace(params=jax.tree.map(jnp.asarray, initial))


@pytest.fixture(scope="module")
def loss(model, adapter):
    with np.load(RUN / "golden.npz") as archive:
        tokens = archive["input_ids"]
    adapted = lorax.adapt(model.apply, strict=True)

    def mean_cross_entropy(trainable):
        logits = adapted(model.params, adapter.replace(params=trainable), tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    return mean_cross_entropy


def test_gradients_of_the_first_step(model, adapter, loss):
    want = factors(model, RUN / "grads_step0.safetensors")
    got = jax.grad(loss)(adapter.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=GRADIENT_TOL, rtol=0), got, want)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(want)) > 100 * GRADIENT_TOL


def test_losses_and_gradient_norms_of_twenty_adamw_steps(adapter, loss):
    reference = json.loads((RUN / "train.json").read_text())
    b1, b2 = reference["betas"]
    optimiser = optax.adamw(reference["lr"], b1=b1, b2=b2, eps=reference["eps"], weight_decay=reference["weight_decay"])

    @jax.jit
    def step(trainable, state):
        value, gradient = jax.value_and_grad(loss)(trainable)
        updates, state = optimiser.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, value, optax.tree.norm(gradient)

    trainable, state = adapter.params, optimiser.init(adapter.params)
    losses, norms = [], []
    for _ in range(20):
        trainable, state, value, norm = step(trainable, state)
        losses.append(float(value))
        norms.append(float(norm))
    np.testing.assert_allclose(losses, reference["losses"], rtol=LOSS_TOL)
    np.testing.assert_allclose(norms, reference["grad_norms"], rtol=LOSS_TOL)
