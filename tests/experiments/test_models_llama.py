"""The decoder against reference logits, and against itself: packing, remat, chosen positions."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models
from experiments.models.llama import Llama, LlamaConfig

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "peft"
GOLDEN_TOL = 1e-4  # float32 logits in another framework
SAME_TOL = 1e-5  # the same sums in another order


@pytest.fixture(scope="module")
def model() -> models.Model:
    return models.load(GOLDEN / "base")


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "inputs.npz") as archive:
        return dict(archive)


def next_token_loss(model: models.Model, params, tokens) -> jax.Array:
    scores = jax.nn.log_softmax(model.apply(params, tokens)[:, :-1])
    return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1).mean()


def test_logits_agree_with_the_reference(model, reference):
    logits = model.apply(model.params, reference["input_ids"])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, reference["base_logits"], atol=GOLDEN_TOL, rtol=0)


def test_param_paths_and_shapes(model):
    kernels = model.params["layers"]
    assert kernels["attn"]["query"]["kernel"].shape == (2, 64, 4, 16)
    assert kernels["attn"]["key"]["kernel"].shape == (2, 64, 2, 16)
    assert kernels["attn"]["out"]["kernel"].shape == (2, 4, 16, 64)
    assert kernels["mlp"]["down"]["kernel"].shape == (2, 176, 64)
    assert kernels["mlp_norm"]["scale"].shape == (2, 64)
    assert model.params["head"]["kernel"].shape == (64, 128)
    paths = {"/".join(str(key.key) for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(model.params)}
    assert paths == set(model.peft_names)


@pytest.mark.slow
def test_packed_rows_equal_separate_sequences(model, reference):
    tokens = reference["input_ids"]
    first, second = tokens[0, :7], tokens[1, :4]
    row = np.concatenate([first, second, [0]])[None]  # the last token is padding
    segments = np.array([[1] * 7 + [2] * 4 + [0]])
    positions = np.array([[*range(7), *range(4), 0]])
    packed = model.apply(model.params, row, positions=positions, segment_ids=segments)
    np.testing.assert_allclose(packed[:, :7], model.apply(model.params, first[None]), atol=SAME_TOL)
    np.testing.assert_allclose(packed[:, 7:11], model.apply(model.params, second[None]), atol=SAME_TOL)
    assert np.isfinite(packed).all()
    unmarked = model.apply(model.params, row, positions=positions)
    assert np.abs(unmarked[:, 7:11] - packed[:, 7:11]).max() > 100 * SAME_TOL  # the segments did it


def test_padding_before_a_sequence_changes_nothing(model, reference):
    tokens = reference["input_ids"][:1, :8]
    padded = np.concatenate([np.zeros((1, 3), tokens.dtype), tokens], axis=1)
    segments = (np.arange(11) >= 3).astype(np.int32)[None]
    positions = np.maximum(np.arange(11) - 3, 0)[None]
    logits = model.apply(model.params, padded, positions=positions, segment_ids=segments)
    np.testing.assert_allclose(logits[:, 3:], model.apply(model.params, tokens), atol=SAME_TOL)


@pytest.mark.parametrize(
    "remat", ["full", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dots", "dots_no_batch"))]
)
def test_remat_changes_neither_value_nor_gradient(model, reference, remat):
    other = dataclasses.replace(model, config=dataclasses.replace(model.config, remat=remat))
    tokens = reference["input_ids"]
    want = jax.value_and_grad(next_token_loss, argnums=1)(model, model.params, tokens)
    got = jax.value_and_grad(next_token_loss, argnums=1)(other, model.params, tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=SAME_TOL), got, want)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want[1])) > 100 * SAME_TOL
    plain, checkpointed = (
        str(jax.make_jaxpr(jax.grad(lambda p, m=m: next_token_loss(m, p, tokens)))(model.params))
        for m in (model, other)
    )
    assert "remat" in checkpointed and "remat" not in plain


def test_unembedding_chosen_positions_equals_all_logits(model, reference):
    tokens = reference["input_ids"]
    hidden = model.apply(model.params, tokens, logits=False)
    assert hidden.shape == (3, 12, 64)
    chosen = model.unembed(model.params, hidden[:, [2, 11]])
    np.testing.assert_allclose(chosen, model.apply(model.params, tokens)[:, [2, 11]], atol=SAME_TOL)


def test_tied_head_is_the_transposed_embedding(model, reference):
    tied = dataclasses.replace(model, config=dataclasses.replace(model.config, tied=True))
    params = {k: v for k, v in model.params.items() if k != "head"}
    untied = {**params, "head": {"kernel": params["embed"]["embedding"].T}}
    tokens = reference["input_ids"]
    np.testing.assert_allclose(tied.apply(params, tokens), model.apply(untied, tokens), atol=SAME_TOL)


def test_bfloat16_computes_in_bfloat16_and_stays_near(reference):
    low = models.load(GOLDEN / "base", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(low.params)} == {jnp.dtype(jnp.bfloat16)}
    assert low.apply(low.params, reference["input_ids"], logits=False).dtype == jnp.bfloat16
    logits = low.apply(low.params, reference["input_ids"])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, reference["base_logits"], atol=0.1)


def test_rotary_divisors_stretch_positions(model):
    config = dataclasses.replace(model.config, rope_divisors=(2.0,) * 8)
    tokens = np.arange(1, 7)[None]
    stretched = Llama(config).apply({"params": model.params}, tokens, 2 * np.arange(6)[None])
    np.testing.assert_allclose(stretched, model.apply(model.params, tokens), atol=SAME_TOL)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kv_heads": 3}, "multiple of kv_heads=3"),
        ({"head_dim": 15}, "head_dim=15"),
        ({"remat": "some"}, "remat='some'"),
        ({"rope_divisors": (1.0,)}, "rope_divisors"),
    ],
)
def test_config_refuses(change, match):
    good = {"vocab_size": 8, "layers": 1, "dim": 8, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn_dim": 8}
    with pytest.raises(ValueError, match=match):
        LlamaConfig(**{**good, "max_positions": 8, **change})


def test_wrong_tokens_are_refused(model):
    with pytest.raises(ValueError, match=r"shape \(5,\)"):
        model.apply(model.params, np.zeros(5, np.int32))
    with pytest.raises(ValueError, match="max_positions=64"):
        model.apply(model.params, np.zeros((1, 65), np.int32))
