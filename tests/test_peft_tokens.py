"""`TrainableTokens`: trained rows of a looked-up table."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import TrainableTokens
from tests.agreement import abstract, assert_agrees, assert_identical, how, normal, randomised, run

PARAMS = {"embed": normal(0, 7, 4), "head": normal(1, 4, 5)}
TOKENS = jnp.asarray([[1, 3, 6], [3, 0, 5]])


def untied(p, tokens):
    return jnp.tanh(p["embed"][tokens]) @ p["head"]


def tied(p, tokens):
    return jnp.tanh(jnp.take(p["embed"], tokens, axis=0)) @ p["embed"].T


def stacked(p, tokens):
    """A table for every layer of a scan."""
    add = lambda x, table: (x + jnp.take(table, tokens, axis=0), None)
    return jax.lax.scan(add, jnp.zeros((2, 3, 4)), p["tables"])[0]


def adapter_of(fn, params, method, path="embed"):
    return lorax.init(jax.random.key(0), lorax.Spec({path: method}), lorax.trace(fn, params, TOKENS), params)


@pytest.mark.parametrize("fn", [untied, tied])
def test_it_starts_as_no_change_at_all(fn):
    adapter = adapter_of(fn, PARAMS, TrainableTokens(tokens=(3, 5)))
    np.testing.assert_array_equal(run(lorax.adapt(fn), PARAMS, adapter, TOKENS), run(fn, PARAMS, TOKENS))
    assert_identical(lorax.merge(PARAMS, adapter), PARAMS)


@pytest.mark.parametrize("fn", [untied, tied])
def test_the_merged_table_has_the_trained_rows_and_its_own(fn):
    adapter = randomised(adapter_of(fn, PARAMS, TrainableTokens(tokens=(3, 5))))
    merged = lorax.merge(PARAMS, adapter)["embed"]
    np.testing.assert_allclose(merged[jnp.asarray([3, 5])], adapter.params["embed"]["value"], rtol=1e-6)
    others = jnp.asarray([0, 1, 2, 4, 6])
    np.testing.assert_array_equal(merged[others], PARAMS["embed"][others])


@pytest.mark.parametrize("fn", [untied, tied])
def test_it_agrees_with_its_merged_table_without_building_it(fn):
    adapter = randomised(adapter_of(fn, PARAMS, TrainableTokens(tokens=(3, 5))))
    assert how(fn, PARAMS, adapter, TOKENS) == {"embed": "factored"}
    assert_agrees(fn, PARAMS, adapter, TOKENS)


def test_tables_of_a_scan():
    params = {"tables": normal(3, 2, 7, 4)}
    adapter = randomised(adapter_of(stacked, params, TrainableTokens(tokens=(3, 6)), "tables"))
    assert adapter.params["tables"]["value"].shape == (2, 2, 4)
    assert_agrees(stacked, params, adapter, TOKENS)


def test_gradients_reach_the_trained_rows_alone():
    adapter = adapter_of(untied, PARAMS, TrainableTokens(tokens=(3, 2)))
    loss = lambda p: jnp.sum(lorax.adapt(untied)(PARAMS, adapter.replace(params=p), TOKENS) ** 2)
    grad = jax.jit(jax.grad(loss))(adapter.params)["embed"]["value"]
    assert np.all(np.any(np.asarray(grad) != 0, axis=1) == [True, False])  # row 2 is not looked up


def test_abstract_params_and_checkpoints(tmp_path):
    method = TrainableTokens(tokens=(3, 5))
    sites = lorax.trace(untied, abstract(PARAMS), TOKENS)
    make = lambda p: lorax.init(jax.random.key(0), lorax.Spec({"embed": method}), sites, p)
    shapes = jax.eval_shape(make, abstract(PARAMS))
    assert shapes.params["embed"]["value"].shape == (2, 4)
    lorax.save(tmp_path / "a", make(PARAMS), base=PARAMS)
    assert lorax.restore(tmp_path / "a", base=PARAMS).methods == {"embed": method}


def test_dtype_of_the_rows():
    adapter = adapter_of(untied, PARAMS, TrainableTokens(tokens=(3,), dtype="bfloat16"))
    assert adapter.params["embed"]["value"].dtype == jnp.bfloat16
    assert adapter_of(untied, PARAMS, TrainableTokens(tokens=(3,))).params["embed"]["value"].dtype == jnp.float32


@pytest.mark.parametrize("tokens", [(), (1, 1), (-1,), (1.5,)])
def test_tokens_have_to_be_rows(tokens):
    with pytest.raises(ValueError, match="tokens is " + re.escape(repr(tokens))):
        TrainableTokens(tokens=tokens)


def test_sites_without_such_rows_are_refused():
    with pytest.raises(ValueError, match="it has 7 rows and the last token is 7"):
        adapter_of(untied, PARAMS, TrainableTokens(tokens=(7,)))
    with pytest.raises(ValueError, match="no row of it is looked up"):
        adapter_of(untied, PARAMS, TrainableTokens(tokens=(1,)), "head")


def test_it_cannot_be_unmerged():
    adapter = adapter_of(untied, PARAMS, TrainableTokens(tokens=(3,)))
    with pytest.raises(ValueError, match="TrainableTokens cannot be unmerged"):
        lorax.unmerge(lorax.merge(PARAMS, adapter), adapter)
