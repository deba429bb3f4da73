r"""How many directions must change in a network that knows tumours' sizes to tell which are malignant?

    python -m experiments.ablate --config=configs/own_function.py

A study of a function of one's own: this file is the configuration and the problem at once. `make` returns
`(fn, params, loss, data)` as a `Problem`; everything else, from the grid to the report, is as for the other studies.

The network is three matrices and `tanh`. It is trained here to tell the largest area of a tumour's cells from ten means
over them, on half of scikit-learn's breast cancer data (Street, Wolberg and Mangasarian 1993, 569 patients), and
adapted to tell malignant from benign on the other half: LoRA of four ranks and all weights, five learning rates, five
seeds, 125 runs of 40 updates. It took 2 minutes on two busy CPU cores.

Measured (test accuracy on 140 patients, with 95 % intervals): before 88.6 %; rank 1 91.9 % (87.9 to 95.7), rank 2 91.0
(87.0 to 94.8), rank 4 92.7 (88.6 to 96.5), rank 8 92.6 (88.5 to 96.4), all weights 92.3 (88.0 to 96.4). None of these
are told apart, and differences below 3.4 points could not have been.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import config_dict
from sklearn import datasets

from experiments.study import settings
from experiments.study.problem import Problem


def get_config() -> config_dict.ConfigDict:
    """Return the settings of the study."""
    config = settings.defaults()
    config.name = "own_function"
    config.run_dir = "runs/own_function"
    config.problem.name = f"{__file__}:make"
    config.axes.update(
        method=("lora", "full"),
        rank=(1, 2, 4, 8),
        lr=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        seed=(0, 1, 2, 3, 4),
        steps=(40,),
    )
    return config


def fn(params, batch):
    """Return a number for each tumour: an area in standard deviations, or the log odds of its being malignant."""
    hidden = jnp.tanh(batch["x"] @ params["first"]["kernel"])
    hidden = jnp.tanh(hidden @ params["second"]["kernel"])
    return (hidden @ params["last"]["kernel"])[:, 0]


def loss(outputs, batch):
    """Return the nats of each diagnosis."""
    return optax.sigmoid_binary_cross_entropy(outputs, batch["is_malignant"])


def score(outputs, batch):
    """Return 1 where the diagnosis is right."""
    return (outputs > 0) == (batch["is_malignant"] > 0)


def make() -> Problem:
    """Return the problem: the function trained on areas, and the data of diagnoses."""
    data = datasets.load_breast_cancer()
    standard = np.asarray((data.data - data.data.mean(axis=0)) / data.data.std(axis=0), np.float32)
    means, area = standard[:, :10], standard[:, list(data.feature_names).index("worst area")]
    is_malignant = (data.target == list(data.target_names).index("malignant")).astype(np.float32)
    patients = np.random.default_rng(0).permutation(len(means))
    names = ("pretraining", "train", "validation", "test")
    parts = dict(zip(names, np.split(patients, [269, 369, 429]), strict=True))
    first = parts.pop("pretraining")
    return Problem(
        name="diagnoses",
        fn=fn,
        params=pretrained(means[first], area[first]),
        loss=loss,
        score=score,
        data={split: {"x": means[rows], "is_malignant": is_malignant[rows]} for split, rows in parts.items()},
        targets={"all": r".*/kernel"},
    )


def pretrained(x, area):
    """Return the parameters after 300 updates on areas."""
    sizes = {"first": (10, 32), "second": (32, 32), "last": (32, 1)}
    keys = jax.random.split(jax.random.key(0), len(sizes))
    draw = lambda key, size: jax.random.normal(key, size) / size[0] ** 0.5
    params = {name: {"kernel": draw(key, size)} for key, (name, size) in zip(keys, sizes.items(), strict=True)}
    tx = optax.adam(3e-3)

    def step(carry, _):
        params, state = carry
        gradient = jax.grad(lambda p: jnp.mean(jnp.square(fn(p, {"x": x}) - area)))(params)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=300)
    return params
