"""A vision transformer trained here, once: plain optax on all parameters, the result kept in a cache directory.

Axes: N images, B images of a step, S side of an image.
"""

import hashlib
import json
import pathlib
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.numpy
from ml_collections import config_dict

from experiments.data.batches import shuffled
from experiments.models.vit import Vit, VitConfig
from experiments.problems import cache
from experiments.study.problem import Arrays

RECIPE = 1  # part of a cached model's name: raise it when `train` or the model changes
WARMUP = 0.1  # part of the steps


def pretrained(model: VitConfig, data: Arrays, settings: config_dict.ConfigDict, cache_dir: str) -> dict[str, Any]:
    """Return the model's parameters after training, out of the cache if they are in it.

    Args:
        model: shape of the model.
        data: "images" float32 N x S x S with values in [0, 1] and "labels" int32 N.
        settings: `steps`, `rows`, `learning_rate`, `weight_decay`, `noise` and `seed`.
        cache_dir: where models are kept, under a name that says what they were trained on and how; empty: the user's
            cache directory.

    Returns:
        Nested dict of float32 arrays.

    Raises:
        ValueError: what is in the cache is damaged.
    """
    path = cache.directory(cache_dir) / "digits" / f"vit-{_digest(model, data, settings)}.safetensors"
    if not path.exists():
        params = jax.device_get(train(model, data, settings))
        cache.write(path, safetensors.numpy.save(flax.traverse_util.flatten_dict(params, sep="/")))
    return read(path, model)


def train(model: VitConfig, data: Arrays, settings: config_dict.ConfigDict) -> dict[str, Any]:
    """Train a model from scratch with AdamW; the same arguments give the same parameters.

    Args:
        model: shape of the model.
        data: as in `pretrained`; an epoch has all images but those that do not fill its last batch.
        settings: as in `pretrained`.
    """
    order_stepsxB = _order(len(data["labels"]), settings)
    rate = optax.warmup_cosine_decay_schedule(0, settings.learning_rate, round(WARMUP * settings.steps), settings.steps)
    optimiser = optax.adamw(rate, weight_decay=settings.weight_decay)
    module: Any = Vit(model)

    def loss(params: Any, images_BxSxS: jax.Array, labels_B: jax.Array) -> jax.Array:
        logits_BxC = module.apply({"params": params}, images_BxSxS)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BxC, labels_B).mean()

    @jax.jit
    def run(key: jax.Array, order_stepsxB: jax.Array, images_NxSxS: jax.Array, labels_N: jax.Array) -> Any:
        def step(state: tuple[Any, Any], inputs: tuple[jax.Array, jax.Array]) -> tuple[tuple[Any, Any], None]:
            (params, opt_state), (chosen_B, noise_key) = state, inputs
            images_BxSxS = images_NxSxS[chosen_B]
            noise_BxSxS = settings.noise * jax.random.normal(noise_key, images_BxSxS.shape)
            gradient = jax.grad(loss)(params, images_BxSxS + noise_BxSxS, labels_N[chosen_B])
            updates, opt_state = optimiser.update(gradient, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        init_key, noise_key = jax.random.split(key)
        params = module.init(init_key, images_NxSxS[:1])["params"]
        noise_keys = jax.random.split(noise_key, len(order_stepsxB))
        (params, _), _ = jax.lax.scan(step, (params, optimiser.init(params)), (order_stepsxB, noise_keys))
        return params

    return run(jax.random.key(settings.seed), order_stepsxB, data["images"], data["labels"])


def _order(count: int, settings: config_dict.ConfigDict) -> np.ndarray:
    """Return which images are in which step's batch, steps x B: epoch by epoch, each in another order."""
    rows = min(settings.rows, count)
    batches = count // rows
    epochs = range(-(-settings.steps // batches))
    orders = [shuffled(count, settings.seed, epoch)[: batches * rows].reshape(batches, rows) for epoch in epochs]
    return np.concatenate(orders)[: settings.steps]


def read(path: pathlib.Path, model: VitConfig) -> dict[str, Any]:
    """Read the parameters of a model.

    Raises:
        ValueError: the file is damaged, or holds other parameters.
    """
    image = jax.ShapeDtypeStruct((1, model.image, model.image), jnp.float32)
    like: Any = jax.eval_shape(Vit(model).init, jax.random.key(0), image)["params"]
    wanted = {name: leaf.shape for name, leaf in flax.traverse_util.flatten_dict(like, sep="/").items()}
    try:
        leaves = safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not readable ({error}); delete it, and it is made anew") from error
    found = {name: leaf.shape for name, leaf in leaves.items()}
    if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise ValueError(
            f"{path}: {wrong[0]} has the shape {found.get(wrong[0])}, the model asks for {wanted.get(wrong[0])}; "
            "delete the file, and it is made anew"
        )
    return flax.traverse_util.unflatten_dict({name: jnp.asarray(leaf) for name, leaf in leaves.items()}, sep="/")


def _digest(model: VitConfig, data: Arrays, settings: config_dict.ConfigDict) -> str:
    """Return a name for all that the parameters follow from."""
    digest = hashlib.sha256(json.dumps([RECIPE, str(model), settings.to_dict()], sort_keys=True).encode())
    for name in sorted(data):
        digest.update(f"{name} {data[name].shape} {data[name].dtype}".encode() + data[name].tobytes())
    return digest.hexdigest()[:16]
