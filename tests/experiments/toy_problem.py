"""A problem so small that a study of it takes seconds: a network of two layers that learns to tell points apart."""

import jax.numpy as jnp
import numpy as np
import optax

import lorax
from experiments.study.problem import Problem, Retained

INPUTS, HIDDEN, CLASSES = 6, 16, 3
SIZES = {"train": 96, "validation": 40, "test": 50}
PLACEMENTS = {
    "bitfit": r"layers/\w+/bias",
    "norm": r"norm/scale",
    "prompt": r"embed",
    "prefix": r"layers/up/kernel",
    "bottleneck_houlsby": (r"layers/up/kernel", r"layers/down/kernel"),
    "bottleneck_pfeiffer": r"layers/down/kernel",
    "ia3_output": r"layers/up/kernel",
    "ia3_input": r"layers/down/kernel",
}


def hidden(params, batch):
    """Sequences of points, looked up, mixed by two layers and averaged."""
    rows_BxTxI = params["embed"][batch["tokens"]] + batch["points"]
    layers = params["layers"]
    scaled_BxTxI = rows_BxTxI * params["norm"]["scale"]
    hidden_BxTxH = jnp.tanh(scaled_BxTxI @ layers["up"]["kernel"] + layers["up"]["bias"])
    mixed_BxTxI = hidden_BxTxH @ layers["down"]["kernel"] + layers["down"]["bias"]
    return jnp.mean(jnp.tanh(mixed_BxTxI), axis=1)


def forward(params, batch):
    return hidden(params, batch) @ params["head"]["kernel"] + params["head"]["bias"]


def loss(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])


def score(logits, batch):
    return jnp.argmax(logits, axis=-1) == batch["label"]


def make_params():
    draw = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(draw.normal(0, 1 / shape[0] ** 0.5, shape), jnp.float32)
    return {
        "embed": normal(8, INPUTS),
        "norm": {"scale": jnp.ones(INPUTS)},
        "layers": {
            "up": {"kernel": normal(INPUTS, HIDDEN), "bias": jnp.zeros(HIDDEN)},
            "down": {"kernel": normal(HIDDEN, INPUTS), "bias": jnp.zeros(INPUTS)},
        },
        "head": {"kernel": jnp.zeros((INPUTS, CLASSES)), "bias": jnp.zeros(CLASSES)},
    }


def make_data(count, seed, positions=2):
    draw = np.random.default_rng([seed, count])
    points = draw.normal(0, 1, (count, positions, INPUTS)).astype(np.float32)
    label = np.argmax(points.sum(1)[:, :CLASSES] * points.sum(1)[:, CLASSES:], axis=-1).astype(np.int32)
    return {"points": points, "tokens": np.zeros((count, positions), np.int32), "label": label}


def with_placeholders(length):
    """The same problem with `length` positions in front, which hold a token and no point."""
    front = lambda x: np.concatenate([np.zeros((len(x), length, *x.shape[2:]), x.dtype), x], axis=1)
    longer = lambda data: data | {name: front(data[name]) for name in ("points", "tokens")}
    plain = make()
    return Problem(**(vars(plain) | {"data": {name: longer(data) for name, data in plain.data.items()}}))


def make():
    return Problem(
        name="toy",
        fn=forward,
        params=make_params(),
        loss=loss,
        score=score,
        data={split: make_data(count, seed) for seed, (split, count) in enumerate(SIZES.items())},
        targets={"up": r"layers/up/kernel", "down": r"layers/down/kernel", "all": r"layers/.*/kernel"},
        always={r"head/.*": lorax.Full()},
        placements=PLACEMENTS,
        with_placeholders=with_placeholders,
        retained=Retained(
            fn=lambda params, batch: jnp.tanh(batch["points"] @ params["layers"]["up"]["kernel"]),
            loss=lambda outputs, batch: jnp.mean(jnp.square(outputs - batch["before"]), axis=(1, 2)),
            data=retained(),
            score_name="agreement",
        ),
        tokens_per_example=2,
    )


def retained():
    data = make_data(30, 9)
    kernel = np.asarray(make_params()["layers"]["up"]["kernel"])
    return {"points": data["points"], "before": np.tanh(data["points"] @ kernel), "tokens": data["tokens"]}
