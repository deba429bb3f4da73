"""Cached, padded, batched generation against one full forward pass a token."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from experiments import models
from experiments.models import generation
from experiments.training import subject
from tests.agreement import FAST_COMPILE

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "peft"
SAME_TOL = 1e-5


@pytest.fixture(scope="module")
def model() -> models.Model:
    """The reference base with its weights enlarged, so that what it says depends on the whole prompt."""
    base = models.load(GOLDEN / "base")
    bigger = jax.tree.map(lambda w: w * 4 if w.ndim > 2 else w, base.params)
    return dataclasses.replace(base, params=bigger)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 128, size=n).tolist() for n in (5, 1, 20, 16, 9, 17, 3)]


def greedy(apply, params, prompt, new) -> list[int]:
    """One uncached pass for each token, on a row of fixed width: causal, so what follows does not matter."""
    tokens = list(prompt)
    for _ in range(new):
        row = np.zeros((1, 48), np.int32)
        row[0, : len(tokens)] = tokens
        tokens.append(int(jnp.argmax(apply(params, row)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_equals_full_forward_passes(model, prompts, batch_size):
    apply = jax.jit(model.apply)
    want = [greedy(apply, model.params, prompt, 6) for prompt in prompts]
    got = model.generate(model.params, prompts, max_new_tokens=6, batch_size=batch_size)
    assert got == want
    assert len({tuple(answer) for answer in want}) == len(prompts)  # the answers depend on the prompts


@pytest.mark.slow
def test_common_prefix_is_read_once_and_changes_nothing(model, prompts):
    shared = np.random.default_rng(1).integers(3, 128, size=19).tolist()
    with_prefix = [shared + prompt for prompt in prompts if len(prompt) < 18]
    assert generation._common_prefix(with_prefix) == shared[:16]
    apply = jax.jit(model.apply)
    want = [greedy(apply, model.params, prompt, 4) for prompt in with_prefix]
    assert model.generate(model.params, with_prefix, max_new_tokens=4, batch_size=4) == want


def test_common_prefix_leaves_every_prompt_a_token():
    assert generation._common_prefix([[1] * 32, [1] * 32]) == [1] * 16
    assert generation._common_prefix([[1] * 33, [1] * 40]) == [1] * 32
    assert generation._common_prefix([[1] * 33]) == []
    assert generation._common_prefix([[1] * 33, [2] * 33]) == []


def test_stop_tokens_end_a_row_and_are_not_returned(model, prompts):
    free = model.generate(model.params, prompts, max_new_tokens=6)
    stop = free[0][2]
    cut = model.generate(model.params, prompts, max_new_tokens=6, stop_ids=[stop])
    assert cut[0] == free[0][: free[0].index(stop)]
    for short, long in zip(cut, free, strict=True):
        assert short == (long[: long.index(stop)] if stop in long else long)


def test_step_logits_equal_the_full_forward(model, prompts):
    step = jax.jit(generation.cached_step(model.config, None))
    tokens = np.asarray([prompts[2]])
    cache = models.llama.empty_cache(model.config, 1, 24)
    visible = jnp.ones((1, 24), bool)
    logits, cache = step(model.params, cache, tokens[:, :12], jnp.arange(12)[None], visible, 0)
    full = jax.jit(model.apply)(model.params, tokens)
    np.testing.assert_allclose(logits, full[:, 11], atol=SAME_TOL, rtol=SAME_TOL)
    logits, _ = step(model.params, cache, tokens[:, 12:], jnp.arange(12, 20)[None], visible, 12)
    np.testing.assert_allclose(logits, full[:, 19], atol=SAME_TOL, rtol=SAME_TOL)


def adapt_step(step):
    return lambda pair, *args: lorax.adapt(step, strict=True)(*pair, *args)


@pytest.mark.slow
def test_unmerged_adapter_says_what_the_merged_weights_say(model, prompts):
    sites = lorax.trace(model.apply, model.params, np.zeros((1, 4), np.int32))
    spec = lorax.Spec({r"layers/.*kernel": lorax.LoRA(rank=4, alpha=8)})
    adapter = lorax.init(jax.random.key(0), spec, sites, model.params)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    noisy = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), adapter.params)
    adapter = adapter.replace(params=noisy)
    merged = model.generate(lorax.merge(model.params, adapter), prompts, max_new_tokens=5)
    unmerged = model.generate((model.params, adapter), prompts, max_new_tokens=5, transform=adapt_step)
    assert unmerged == merged
    assert merged != model.generate(model.params, prompts, max_new_tokens=5)


PLACEHOLDERS = [7, 3, 9]


def first_positions(model, spec, seed=0):
    """An adapter of the model with the rules of `spec`, far from its start."""
    sites = lorax.trace(model.apply, model.params, np.zeros((1, 8), np.int32))
    adapter = lorax.init(jax.random.key(seed), lorax.Spec(spec), sites, model.params)
    draw = np.random.default_rng(seed)
    moved = jax.tree.map(lambda x: x + jnp.float32(0.3) * draw.normal(size=x.shape).astype("f"), adapter.params)
    return adapter.replace(params=moved)


@pytest.fixture
def _compiled_in_a_hurry():
    """The programs run once: time goes into compiling them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


PROMPT = {"embed/embedding": lorax.Prompt(length=3)}
PREFIX = {r"layers/attn/(key|value)/kernel": lorax.Prefix(length=3)}
LORA = {r"layers/attn/query/kernel": lorax.LoRA(rank=2)}


@pytest.mark.parametrize(
    ("spec", "shared"),
    [(PROMPT, 0), (PREFIX, 0), (PROMPT | LORA, 17)],
    ids=["prompt", "prefix", "prompt and LoRA after a common prefix"],
)
@pytest.mark.usefixtures("_compiled_in_a_hurry")
def test_learned_first_positions_are_read_once_and_by_every_prompt(model, spec, shared):
    adapter = first_positions(model, spec)
    rng = np.random.default_rng(1)
    beginning = rng.integers(3, 128, size=shared).tolist()
    # among them, with either beginning, one that fills its row: no padding stands where learned positions were
    asked = [beginning + rng.integers(3, 128, size=length).tolist() for length in (5, 16, 15)]
    pair = (model.params, adapter)
    apply = subject.adapted(model.apply)
    apply = jax.jit(apply).lower(pair, np.zeros((1, 48), np.int32)).compile(FAST_COMPILE)
    want = [greedy(apply, pair, PLACEHOLDERS + prompt, 4) for prompt in asked]
    how = {"transform": subject.adapted, "after": subject.adapted_later, "placeholders": PLACEHOLDERS}
    assert model.generate(pair, asked, max_new_tokens=4, batch_size=2, **how) == want
    other = (model.params, first_positions(model, spec, seed=1))
    assert want != [greedy(apply, other, PLACEHOLDERS + prompt, 4) for prompt in asked]


def test_placeholders_count_as_positions(model):
    with pytest.raises(ValueError, match="prompt 0 has 58 tokens; with 7 more"):
        model.generate(model.params, [[1] * 58], max_new_tokens=4, placeholders=PLACEHOLDERS)


@pytest.mark.slow
def test_quantised_base_says_what_its_dequantised_weights_say(model, prompts):
    stored = lorax.quantize(model.params, {r"layers/mlp/.*kernel": lorax.NF4()})
    sites = lorax.trace(model.apply, stored, np.zeros((1, 4), np.int32))
    adapter = lorax.init(jax.random.key(0), lorax.Spec({"layers/.*kernel": lorax.LoRA(rank=2)}), sites, stored)
    want = model.generate(lorax.dequantize(stored), prompts, max_new_tokens=5)
    assert model.generate((stored, adapter), prompts, max_new_tokens=5, transform=subject.adapted) == want
    assert want != model.generate(model.params, prompts, max_new_tokens=5)


def test_one_program_serves_all_batches_of_a_bucket(model):
    traced = []

    def count_traces(step):
        return lambda *args: (traced.append(args[2].shape), step(*args))[1]

    rng = np.random.default_rng(2)
    few = [rng.integers(3, 128, size=length).tolist() for length in (3, 7, 15, 16, 2)]
    model.generate(model.params, few[:2], max_new_tokens=2, batch_size=2, transform=count_traces)
    first = len(traced)
    model.generate(model.params, few, max_new_tokens=2, batch_size=2, transform=count_traces)
    assert len(traced) == first
    assert set(traced) == {(2, 16), (2, 1)}


def test_wrong_requests_are_refused(model):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        model.generate(model.params, [[1], []], max_new_tokens=2)
    with pytest.raises(ValueError, match="prompt 0 has 60 tokens"):
        model.generate(model.params, [[1] * 60], max_new_tokens=5)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        model.generate(model.params, [[1]], max_new_tokens=0)
    assert model.generate(model.params, [], max_new_tokens=2) == []
