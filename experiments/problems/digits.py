"""Digits of new classes, for a small vision transformer that is trained here on the other ones.

The 1,797 handwritten digits of scikit-learn (8 x 8 pixels; Alpaydin and Kaynak 1998) are parted by class. A vision
transformer learns the base classes once, in seconds, and is kept in a cache directory. The problem is to adapt it to
the other classes, with a new head beside whatever method. What is retained is how well the old head, which stays as it
is, still tells the base classes apart from what the adapted encoder gives it.

An image's pixels decide which split it is in, so that no index file is needed and copies never stand on both sides.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorax
from experiments.models.vit import Vit, VitConfig
from experiments.problems import pretraining
from experiments.problems.places import PLACEMENTS, TARGETS
from experiments.problems.settings import whole_number
from experiments.study.problem import SPLITS, Arrays, Problem, Retained

DEFAULTS: dict[str, Any] = {
    "base_classes": (0, 1, 2, 3, 4),  # learned here beforehand; the others are the problem
    "validation_percent": 20.0,  # of the images
    "test_percent": 30.0,
    "model": {"patch": 2, "layers": 4, "dim": 64, "heads": 4, "ffn_dim": 256},
    "pretraining": {
        "seed": 0,
        "steps": 400,
        "rows": 64,  # images in a step
        "learning_rate": 2e-3,
        "weight_decay": 0.05,
        "noise": 0.1,  # standard deviation of what is added to pixels in [0, 1]; the classes are few images each
    },
    "cache_dir": "",  # where the trained model is kept; empty: the user's cache directory
}

GREYS = 16  # the largest value of a pixel


def load(config: Any) -> Problem:
    """Load the digits and the model trained on the base classes, which is trained first if it is not in the cache.

    Args:
        config: with the settings of `DEFAULTS` in `config.problem`.

    Raises:
        ValueError: the base classes are not some, and not all, of the digits, the splits leave nothing to train on, or
            the model is of another shape than it can have.
    """
    settings = config.problem
    base, new = _classes(settings.base_classes)
    for name, value in settings.model.items():
        whole_number(f"model.{name}", value, 1)
    for name in ("steps", "rows"):
        whole_number(f"pretraining.{name}", settings.pretraining[name], 1)
    images_NxSxS, labels_N = read()
    splits_N = split_of(images_NxSxS, settings.validation_percent, settings.test_percent)

    def part(classes: Sequence[int], split: str) -> Arrays:
        chosen = np.isin(labels_N, classes) & (splits_N == split)
        return {
            "images": (images_NxSxS[chosen] / GREYS).astype(np.float32),
            "labels": np.searchsorted(classes, labels_N[chosen]).astype(np.int32),
        }

    model = VitConfig(image=images_NxSxS.shape[1], classes=len(base), **settings.model.to_dict())
    trained_on = part(base, "train")
    pretrained = pretraining.pretrained(model, trained_on, settings.pretraining, settings.cache_dir)
    data = {split: part(new, split) for split in SPLITS}
    counts = ", ".join(f"{len(data[split]['labels']):,} {split}" for split in SPLITS)
    facts = {
        "Data": f"handwritten digits of scikit-learn, the classes {_listed(new)}: {counts}",
        "Base": f"a vision transformer trained on {len(trained_on['labels']):,} images of the classes {_listed(base)}",
    }
    return _problem(model, pretrained, data, part(base, "test"), len(new), facts)


def _problem(
    model: VitConfig,
    pretrained: Mapping[str, Any],
    data: Mapping[str, Arrays],
    base_test: Arrays,
    classes: int,
    facts: Mapping[str, str],
    placeholders: int = 0,
) -> Problem:
    encoder = {name: leaf for name, leaf in pretrained.items() if name != "head"}
    # Not among the parameters: nothing that is trained can reach it, whatever a pattern matches.
    old_head = pretrained["head"]
    module: Any = Vit(model)

    def features(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        return module.apply({"params": params}, batch["images"], placeholders, method=Vit.features)

    def new_logits(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        return _dense(features(params, batch), params["classifier"])

    def old_logits(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        return _dense(features(params, batch), old_head)

    classifier = {"kernel": jnp.zeros((model.dim, classes)), "bias": jnp.zeros(classes)}
    return Problem(
        name="digits",
        fn=new_logits,
        params={**encoder, "classifier": classifier},
        loss=cross_entropy,
        score=is_correct,
        data=data,
        targets=TARGETS,
        always={r"classifier/.*": lorax.Full()},
        placements=PLACEMENTS
        | {"bitfit": r".*/bias", "norm": r".*norm/(scale|bias)", "prompt": r"positions/embedding"},
        quantizable=TARGETS["all"],
        with_placeholders=lambda count: _problem(model, pretrained, data, base_test, classes, facts, count),
        retained=Retained(
            fn=old_logits,
            loss=cross_entropy,
            score=is_correct,
            score_name="accuracy on the base classes",
            data=base_test,
        ),
        tokens_per_example=model.patches + placeholders,
        facts=facts,
    )


def _dense(x_BxD: jax.Array, layer: Mapping[str, jax.Array]) -> jax.Array:
    return x_BxD @ layer["kernel"] + layer["bias"]


def cross_entropy(logits_BxC: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Return the nats of each label, B."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxC, batch["labels"])


def is_correct(logits_BxC: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Return 1 where the most probable class is the label, B."""
    return (jnp.argmax(logits_BxC, axis=-1) == batch["labels"]).astype(jnp.float32)


def read() -> tuple[np.ndarray, np.ndarray]:
    """Return the images, uint8 N x S x S with values up to `GREYS`, and the digits that they show, int N.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise ValueError("the digits are part of scikit-learn, which is missing: pip install scikit-learn") from None
    digits: Any = datasets.load_digits()
    return digits.images.astype(np.uint8), digits.target


def split_of(images_NxSxS: np.ndarray, validation_percent: float, test_percent: float) -> np.ndarray:
    """Return the name of each image's split, decided by its pixels alone.

    Raises:
        ValueError: the percentages leave nothing for one of the splits.
    """
    if not (validation_percent > 0 and test_percent > 0 and validation_percent + test_percent < 100):
        raise ValueError(
            f"config.problem.validation_percent = {validation_percent!r} and test_percent = {test_percent!r}: expected "
            "two numbers above 0, together below 100"
        )
    digests = [hashlib.sha256(image.tobytes()).digest() for image in images_NxSxS]
    percent_N = np.array([int.from_bytes(digest[:8], "big") % 10_000 / 100 for digest in digests])
    held_out = validation_percent + test_percent
    return np.select([percent_N < test_percent, percent_N < held_out], ["test", "validation"], "train")


def _classes(chosen: Sequence[int]) -> tuple[list[int], list[int]]:
    base = sorted(set(chosen))
    new = [digit for digit in range(10) if digit not in base]
    if not set(base) < set(range(10)) or min(len(base), len(new)) < 2:
        raise ValueError(f"config.problem.base_classes = {tuple(chosen)!r}: expected two to eight of the digits 0 to 9")
    return base, new


def _listed(classes: Sequence[int]) -> str:
    return ", ".join(map(str, classes))
