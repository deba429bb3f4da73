r"""How many directions does a network need to carry over from women to men?

    python -m experiments.ablate --config=configs/own_function.py

A study of a function of one's own: this file is the configuration and the problem at once. `make` returns
`(fn, params, loss, data)` as a `Problem`; everything else, from the grid to the report, is as for the other studies.

The network is three matrices and `tanh`, trained here on the 235 women of scikit-learn's diabetes data (Efron et al.
2004, doi:10.1214/009053604000000067: ten measurements, the progression after a year) and adapted to the 207 men.
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
        lr=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        seed=(0, 1, 2, 3, 4),
        steps=(40,),
    )
    return config


def fn(params, batch):
    """Return the predicted progressions, in standard deviations."""
    hidden = jnp.tanh(batch["x"] @ params["first"]["kernel"])
    hidden = jnp.tanh(hidden @ params["second"]["kernel"])
    return (hidden @ params["last"]["kernel"])[:, 0]


def loss(outputs, batch):
    """Return the squared error of each person."""
    return jnp.square(outputs - batch["y"])


def make() -> Problem:
    """Return the problem: the function trained on women, and the data of men."""
    data = datasets.load_diabetes()
    x = np.asarray(data.data / data.data.std(axis=0), np.float32)
    y = np.asarray((data.target - data.target.mean()) / data.target.std(), np.float32)
    is_man = data.data[:, data.feature_names.index("sex")] > 0
    people = np.random.default_rng(0).permutation(np.flatnonzero(is_man))
    parts = dict(zip(("test", "validation", "train"), np.split(people, [70, 110]), strict=True))
    return Problem(
        name="diabetes of men",
        fn=fn,
        params=pretrained({"x": x[~is_man], "y": y[~is_man]}),
        loss=loss,
        data={split: {"x": x[rows], "y": y[rows]} for split, rows in parts.items()},
        targets={"all": r".*/kernel"},
        score_name="minus the squared error",
    )


def pretrained(women):
    """Return the parameters after 200 updates on the women."""
    sizes = {"first": (10, 32), "second": (32, 32), "last": (32, 1)}
    keys = jax.random.split(jax.random.key(0), len(sizes))
    draw = lambda key, size: jax.random.normal(key, size) / size[0] ** 0.5
    params = {name: {"kernel": draw(key, size)} for key, (name, size) in zip(keys, sizes.items(), strict=True)}
    tx = optax.adamw(1e-3, weight_decay=0.1)

    def step(carry, _):
        params, state = carry
        gradient = jax.grad(lambda p: jnp.mean(loss(fn(p, women), women)))(params)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=200)
    return params
