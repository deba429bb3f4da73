"""(IA)³: gains on the outputs or the inputs of a weight."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from tests.agreement import assert_agrees, assert_close, assert_identical, how, normal, randomised, run
from tests.contract import FORMS, D, F, X, moved, started

EXACT = 1e-6
dense = lambda p, x: x @ p["w"]
PARAMS = {"w": normal(1, D, F)}


def made(method: lorax.Method, fn: Any = dense, params: Any = PARAMS, x: Any = X) -> Any:
    return lorax.init(jax.random.key(0), lorax.Spec({".*": method}), lorax.trace(fn, params, x), params)


@pytest.mark.parametrize("on", ["output", "input"])
def test_by_hand(on: str) -> None:
    adapter = randomised(made(lorax.IA3(on=on)))
    (gain,) = adapter.params["w"].values()
    want = (X @ PARAMS["w"]) * gain if on == "output" else (X * gain) @ PARAMS["w"]
    assert gain.shape == ((F,) if on == "output" else (D,))
    assert_close(lorax.adapt(dense)(PARAMS, adapter, X), want)
    assert how(dense, PARAMS, adapter, X) == {"w": "factored"}


@pytest.mark.parametrize("method", ["IA3", "IA3 of inputs"])
@pytest.mark.parametrize("name", ["transposed", "heads in", "conv", "tied embedding", "experts", "nested scan"])
def test_the_merged_weight_is_the_weight_times_the_gains(name: str, method: str) -> None:
    form, adapter = FORMS[name], moved(name, method)
    site = adapter.sites["w"]
    (gain,) = adapter.params["w"].values()
    spans = site.axes("SI" if method == "IA3 of inputs" else "SO")
    order = sorted(range(len(spans)), key=lambda i: spans[i])
    shape = [n if a in spans else 1 for a, n in enumerate(site.shape)]
    want = np.asarray(form.params["w"]) * np.asarray(gain).transpose(order).reshape(shape)
    np.testing.assert_allclose(lorax.merge(form.params, adapter)["w"], want, rtol=1e-6)


@pytest.mark.parametrize("method", ["IA3", "IA3 of inputs"])
def test_it_starts_at_one_and_changes_nothing(method: str) -> None:
    for name in ("heads in", "embedding", "scan"):
        form, adapter = FORMS[name], started(name, method)
        assert all(np.all(np.asarray(x) == 1) for x in jax.tree.leaves(adapter.params))
        assert not jax.tree.leaves(adapter.state)
        both = lambda a, form=form: (lorax.adapt(form.fn)(form.params, a, form.x), form.fn(form.params, form.x))
        assert_close(*run(both, adapter), EXACT)
        assert_identical(lorax.merge(form.params, adapter), form.params)


def test_the_gains_of_the_paper() -> None:
    """Keys, values and the activation inside the feed-forward: gains on two outputs and on one input."""

    def block(p: Any, x: Any) -> Any:
        q, k, v = (x @ p[n] for n in ("query", "key", "value"))
        x = x + jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k)) @ v
        return x + jnp.tanh(x @ p["up"]) @ p["down"]

    sizes = {"query": (D, D), "key": (D, D), "value": (D, D), "up": (D, F), "down": (F, D)}
    params = {n: normal(i, *s) for i, (n, s) in enumerate(sizes.items())}
    spec = lorax.Spec({"key|value": lorax.IA3(), "down": lorax.IA3(on="input")})
    adapter = randomised(lorax.init(jax.random.key(0), spec, lorax.trace(block, params, X), params))
    k_gain, v_gain = (adapter.params[n]["gain"] for n in ("key", "value"))
    inner = adapter.params["down"]["input_gain"]
    q, k, v = X @ params["query"], k_gain * (X @ params["key"]), v_gain * (X @ params["value"])
    x = X + jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k)) @ v
    want = x + (inner * jnp.tanh(x @ params["up"])) @ params["down"]
    assert_close(lorax.adapt(block)(params, adapter, X), want)
    assert sum(x.size for x in jax.tree.leaves(adapter.params)) == 2 * D + F
    assert_agrees(block, params, adapter, X)
    merged = run(lorax.merge, params, adapter)
    assert_close(run(lorax.unmerge, merged, adapter), params)


def test_a_gain_of_zero_cuts_an_output_off() -> None:
    adapter = made(lorax.IA3())
    adapter = adapter.replace(params={"w": {"gain": jnp.ones(F).at[3].set(0)}})
    got = lorax.adapt(dense)(PARAMS, adapter, X)
    assert not np.any(got[..., 3])
    loss = lambda p: jnp.sum(lorax.adapt(dense)(PARAMS, adapter.replace(params=p), X))
    grads = jax.grad(loss)(adapter.params)["w"]["gain"]
    assert_close(grads, jnp.sum(X @ PARAMS["w"], axis=(0, 1)))  # and may come back


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("IA3: on is 'inputs'; it has to be 'output' or 'input'")):
        lorax.IA3(on="inputs")
