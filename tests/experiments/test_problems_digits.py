"""The digits: the vision transformer, its pretraining and its cache, and the problem of the other classes."""

import doctest
import functools
import pathlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import config_dict

import lorax
from experiments import problems
from experiments.models import vit
from experiments.models.vit import Vit, VitConfig
from experiments.problems import cache, digits, pretraining
from experiments.study.problem import SPLITS, Problem

pytest.importorskip("sklearn")
REFERENCE_TOL = 1e-5  # the same sums in float64
TINY = {
    "model": {"layers": 2, "dim": 16, "heads": 2, "ffn_dim": 32},
    "pretraining": {"steps": 3, "rows": 16},
}


def settings(folder: pathlib.Path, **changes) -> config_dict.ConfigDict:
    given = {"name": "digits", "cache_dir": str(folder), **TINY, **changes}
    return config_dict.ConfigDict({"problem": given})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("digits")


@pytest.fixture(scope="module")
def problem(folder) -> Problem:
    return problems.load(settings(folder))


def untrained(config: VitConfig):
    """Parameters of a model, all zero."""
    image = jax.ShapeDtypeStruct((1, config.image, config.image), jnp.float32)
    shapes = jax.eval_shape(Vit(config).init, jax.random.key(0), image)["params"]
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


# The model.


def moved(params):
    """Parameters, each number somewhere else."""
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.5 * draw.normal(size=x.shape).astype("f"), params)


def vit_in_numpy(p, images, config: VitConfig, placeholders: int):
    """The features of images, written a patch and a head at a time, in float64."""

    def dense(x, layer):
        kernel = np.asarray(layer["kernel"], np.float64)
        return np.tensordot(x, kernel, axes=kernel.ndim - np.ndim(layer["bias"])) + layer["bias"]

    def norm(x, layer):
        spread = np.sqrt(x.var(-1, keepdims=True) + config.norm_eps)
        return (x - x.mean(-1, keepdims=True)) / spread * layer["scale"] + layer["bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    features = []
    for image in np.asarray(images, np.float64):
        starts = range(0, config.image, config.patch)
        patches = [image[i : i + config.patch, j : j + config.patch].ravel() for i in starts for j in starts]
        positions = np.asarray(p["positions"]["embedding"], np.float64)
        x = np.concatenate([positions[[0] * placeholders], dense(np.stack(patches), p["embed"]) + positions])
        for index in range(config.layers):
            layer = jax.tree.map(lambda leaf, index=index: leaf[index], p["layers"])
            y = norm(x, layer["attn_norm"])
            query, key, value = (dense(y, layer["attn"][name]) for name in ("query", "key", "value"))
            heads = np.zeros(query.shape)
            for head in range(config.heads):
                scores = query[:, head] @ key[:, head].T / np.sqrt(query.shape[-1])
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                heads[:, head] = weights / weights.sum(-1, keepdims=True) @ value[:, head]
            x = x + dense(heads, layer["attn"]["out"])
            x = x + dense(gelu(dense(norm(x, layer["mlp_norm"]), layer["mlp"]["up"])), layer["mlp"]["down"])
        features.append(norm(x, p["final_norm"])[placeholders:].mean(axis=0))
    return np.stack(features)


@pytest.mark.parametrize("placeholders", [0, 2])
def test_encoder_agrees_with_numpy(placeholders):
    config = VitConfig(image=6, patch=2, layers=2, dim=12, heads=3, ffn_dim=20, classes=4)
    images = np.random.default_rng(1).random((3, 6, 6), np.float32)
    params = moved(untrained(config))

    @jax.jit
    def features(params, images):
        return Vit(config).apply({"params": params}, images, placeholders, method=Vit.features)

    wanted = vit_in_numpy(params, images, config, placeholders)
    tolerance = REFERENCE_TOL * np.abs(wanted).max()
    np.testing.assert_allclose(features(params, images), wanted, atol=tolerance, rtol=0)


def test_leaf_paths_are_those_that_targets_name(problem):
    paths = set(flax.traverse_util.flatten_dict(problem.params, sep="/"))
    attention = {
        f"layers/attn/{name}/{part}" for name in ("query", "key", "value", "out") for part in ("kernel", "bias")
    }
    assert attention | {"layers/mlp/up/kernel", "layers/mlp/down/bias", "layers/attn_norm/scale"} <= paths
    assert {"embed/kernel", "positions/embedding", "final_norm/bias", "classifier/kernel"} <= paths
    assert problem.params["layers"]["attn"]["out"]["kernel"].shape == (2, 2, 8, 16)


def test_wrong_shapes_are_errors():
    with pytest.raises(ValueError, match="image=8 is not a multiple of patch=3"):
        VitConfig(patch=3)
    with pytest.raises(ValueError, match="dim=64 is not a multiple of heads=5"):
        VitConfig(heads=5)
    with pytest.raises(ValueError, match=r"images have shape \(2, 6, 6\), wanted \(batch, 8, 8\)"):
        Vit(VitConfig()).init(jax.random.key(0), jnp.zeros((2, 6, 6)))


# Data.


def test_every_image_is_in_one_split_that_its_pixels_decide():
    images, labels = digits.read()
    assert images.shape == (1797, 8, 8) and images.max() == digits.GREYS
    splits = digits.split_of(images, 20.0, 30.0)
    shares = [np.mean(splits == split) for split in SPLITS]
    np.testing.assert_allclose(shares, [0.5, 0.2, 0.3], atol=0.03)
    order = np.random.default_rng(0).permutation(len(images))
    np.testing.assert_array_equal(digits.split_of(images[order], 20.0, 30.0), splits[order])
    wider = digits.split_of(images, 10.0, 40.0)
    assert set(wider[splits == "test"]) == {"test"}  # what is held out stays so
    assert set(labels) == set(range(10))


def test_classes_are_parted_and_numbered_from_zero(problem):
    images, labels = digits.read()
    new = {image.tobytes() for image, label in zip(images, labels, strict=True) if label >= 5}
    for split in SPLITS:
        data = problem.data[split]
        assert set(data["labels"]) == set(range(5))
        assert {(digits.GREYS * image).astype(np.uint8).tobytes() for image in data["images"]} <= new
    assert problem.retained is not None
    kept = {(digits.GREYS * image).astype(np.uint8).tobytes() for image in problem.retained.data["images"]}
    assert kept.isdisjoint(new)
    assert problem.data["train"]["images"].dtype == np.float32 and problem.data["train"]["images"].max() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_classes": (0, 1, 12)}, r"base_classes = \(0, 1, 12\): expected two to eight of the digits"),
        ({"base_classes": tuple(range(10))}, "expected two to eight"),
        ({"base_classes": (3,)}, "expected two to eight"),
        ({"test_percent": 85.0}, "together below 100"),
        ({"pretraining": {"steps": 0}}, r"pretraining\.steps = 0: expected a whole number of at least 1"),
        ({"model": {"layers": 0}}, r"model\.layers = 0: expected a whole number of at least 1"),
        (
            {"model": {"layer": 2}},
            r"unknown setting config\.problem\.model\.layer: the nearest is config\.problem\.model\.layers; a config",
        ),
        ({"model": {"layers": "2"}}, r"config\.problem\.model\.layers = '2': got str, expected int"),
    ],
)
def test_wrong_setting_is_an_error_before_any_work(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        problems.load(settings(tmp_path, **changes))
    assert not list(tmp_path.iterdir())


# Pretraining.


def test_trained_model_is_kept_and_used_again(folder, problem, monkeypatch):
    (kept,) = (folder / "digits").iterdir()
    monkeypatch.setattr(pretraining, "train", lambda *arguments: pytest.fail("trained again"))
    again = problems.load(settings(folder))
    jax.tree.map(np.testing.assert_array_equal, again.params, problem.params)
    assert list((folder / "digits").iterdir()) == [kept]


def recorded(monkeypatch) -> list:
    """Replace training by an untrained model, and record its settings."""
    calls = []

    def train(model, data, given):
        calls.append(given.to_dict())
        return untrained(model)

    monkeypatch.setattr(pretraining, "train", train)
    return calls


@pytest.mark.parametrize(
    "changes",
    [
        {"pretraining": {**TINY["pretraining"], "seed": 1}},
        {"model": {**TINY["model"], "heads": 4}},
        {"base_classes": (0, 1, 2)},
        {"test_percent": 40.0},
    ],
)
def test_other_settings_train_another_model(tmp_path, monkeypatch, changes):
    calls = recorded(monkeypatch)
    for given in ({}, changes, {}):
        problems.load(settings(tmp_path, **given))
    assert len(calls) == len(list((tmp_path / "digits").iterdir())) == 2


def test_other_images_train_another_model(tmp_path, monkeypatch):
    calls = recorded(monkeypatch)
    given = config_dict.ConfigDict(digits.DEFAULTS["pretraining"])
    images, labels = np.zeros((4, 8, 8), np.float32), np.zeros(4, np.int32)
    for data in ({"images": images}, {"images": images + 1}, {"labels": labels + 1}, {"images": images}):
        pretraining.pretrained(VitConfig(), {"images": images, "labels": labels} | data, given, str(tmp_path))
    assert len(calls) == 3


@pytest.mark.slow
def test_training_is_deterministic_and_follows_its_settings():
    data = {"images": np.random.default_rng(0).random((40, 8, 8), np.float32), "labels": np.arange(40, dtype="i") % 3}
    model = VitConfig(classes=3, **TINY["model"])
    given = config_dict.ConfigDict(digits.DEFAULTS["pretraining"] | {"steps": 4, "rows": 16})
    first, again = (pretraining.train(model, data, given) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    given.noise = 0.5
    other = pretraining.train(model, data, given)
    assert not np.array_equal(first["embed"]["kernel"], other["embed"]["kernel"])


def test_every_epoch_has_every_image_once():
    given = config_dict.ConfigDict({"rows": 8, "steps": 7, "seed": 0})
    order = pretraining._order(26, given)
    assert order.shape == (7, 8)
    for epoch in (order[:3], order[3:6]):
        assert len(set(epoch.ravel())) == 24
    assert not np.array_equal(order[:3], order[3:6])
    assert pretraining._order(5, given).shape == (7, 5)  # fewer images than rows


def test_damaged_or_foreign_model_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    recorded(monkeypatch)
    problems.load(settings(tmp_path))
    (path,) = (tmp_path / "digits").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=rf"{path.name}: not readable .* delete it, and it is made anew"):
        problems.load(settings(tmp_path))
    path.write_bytes(whole)
    wider = VitConfig(classes=5, **TINY["model"] | {"ffn_dim": 48})
    with pytest.raises(
        ValueError, match=r"mlp/down/kernel has the shape \(2, 32, 16\), the model asks for \(2, 48, 16\)"
    ):
        pretraining.read(path, wider)


def test_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(cache.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        cache.write(tmp_path / "deep" / "file", b"content")
    assert not list((tmp_path / "deep").iterdir())


# The problem.


def batch_of(problem: Problem, count: int = 6):
    return {name: array[:count] for name, array in problem.data["train"].items()}


def test_new_head_starts_at_chance(problem):
    batch = batch_of(problem)
    logits = jax.jit(problem.fn)(problem.params, batch)
    np.testing.assert_allclose(problem.loss(logits, batch), np.full(6, np.log(5)), rtol=1e-6)
    assert list(problem.always) == ["classifier/.*"]


def test_score_is_whether_the_label_is_most_probable():
    logits, batch = jnp.array([[0.0, 2.0], [3.0, 1.0]]), {"labels": jnp.array([1, 1])}
    assert digits.is_correct(logits, batch).tolist() == [1, 0]
    np.testing.assert_allclose(digits.cross_entropy(logits, batch), np.log1p(np.exp([-2.0, 2.0])), rtol=1e-6)


def test_what_is_retained_is_the_pretrained_model(folder, problem):
    (path,) = (folder / "digits").iterdir()
    model = VitConfig(classes=5, **TINY["model"])
    pretrained = pretraining.read(path, model)
    retained = problem.retained
    assert retained is not None
    batch = {name: array[:6] for name, array in retained.data.items()}
    old_logits = jax.jit(retained.fn)
    logits = old_logits(problem.params, batch)
    wanted = jax.jit(Vit(model).apply)({"params": pretrained}, batch["images"])
    np.testing.assert_allclose(logits, wanted, atol=1e-6)
    assert "head" not in problem.params  # so that no pattern can adapt it
    other = jax.tree.map(lambda x: x + 1, problem.params["classifier"])
    np.testing.assert_array_equal(logits, old_logits(problem.params | {"classifier": other}, batch))
    assert not np.allclose(logits, old_logits(moved(problem.params), batch))


SITES = {  # method at each of the placements -> leaves that it has to adapt there
    "bitfit": (lorax.Full(), 10),
    "norm": (lorax.Full(), 6),
    "prompt": (lorax.Prompt(length=2), 1),
    "prefix": (lorax.Prefix(length=2), 2),
    "bottleneck_houlsby": (lorax.Bottleneck(rank=2), 2),
    "bottleneck_pfeiffer": (lorax.Bottleneck(rank=2), 1),
    "ia3_output": (lorax.IA3(), 2),
    "ia3_input": (lorax.IA3(on="input"), 1),
}


def adapter_of(problem: Problem, patterns, method, transform=jax.jit):
    spec = {pattern: method for pattern in problems.checks.as_patterns(patterns)}
    sites = lorax.trace(problem.fn, problem.params, batch_of(problem))
    make = lambda key, params: lorax.init(key, lorax.Spec({**problem.always, **spec}), sites, params)
    return transform(make)(jax.random.key(0), problem.params)


def shape_of(make):
    return functools.partial(jax.eval_shape, make)


def test_placements_are_where_their_methods_can_go(problem):
    assert problem.placements.keys() == SITES.keys()
    assert problem.with_placeholders is not None
    behind = problem.with_placeholders(2)
    for name, (method, count) in SITES.items():
        adapter = adapter_of(behind, behind.placements[name], method, shape_of)
        adapted = {site.path for site in adapter.sites} - {"classifier/kernel", "classifier/bias"}
        assert len(adapted) == count, name


@pytest.mark.parametrize(
    ("target", "count"), [("q", 1), ("qk", 2), ("qv", 2), ("attention", 4), ("mlp", 2), ("all", 6)]
)
def test_targets_are_the_named_products(problem, target, count):
    adapter = adapter_of(problem, problem.targets[target], lorax.LoRA(rank=2), shape_of)
    assert len(adapter.sites) == count + 2


@pytest.mark.parametrize("name", ["prompt", pytest.param("prefix", marks=pytest.mark.slow)])
def test_placeholders_are_what_a_prompt_or_prefix_learns(problem, name):
    assert problem.with_placeholders is not None
    behind = problem.with_placeholders(2)
    assert (problem.tokens_per_example, behind.tokens_per_example) == (16, 18)
    problems.check(behind)
    adapter = adapter_of(behind, behind.placements[name], SITES[name][0])
    batch = batch_of(behind)
    classifier = {"kernel": jnp.ones((16, 5)) * jnp.arange(5.0), "bias": jnp.zeros(5)}
    params = behind.params | {"classifier": classifier}  # a head of zeros would hide what is in front of it
    held = {path: leaf for path, leaf in adapter.params.items() if not path.startswith("classifier")}

    @jax.jit
    @jax.grad
    def gradient(learned):
        head = {f"classifier/{name}": {"value": classifier[name]} for name in classifier}
        outputs = lorax.adapt(behind.fn)(params, adapter.replace(params=learned | head), batch)
        return behind.loss(outputs, batch).sum()

    for path, leaf in gradient(held).items():
        assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(leaf)), path


@pytest.mark.slow
def test_pretrained_model_knows_the_base_classes(tmp_path):
    found = problems.load(config_dict.ConfigDict({"problem": {"name": "digits", "cache_dir": str(tmp_path)}}))
    retained = found.retained
    assert retained is not None and retained.score is not None
    logits = jax.jit(retained.fn)(found.params, retained.data)
    assert float(retained.score(logits, retained.data).mean()) > 0.93


@pytest.mark.parametrize("module", [vit, problems, problems.settings])
def test_examples_in_docstrings_hold(module):
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed
