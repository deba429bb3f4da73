"""What is measured at sites: moments of inputs, first positions of outputs; EVA and prefixes start there."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorax
from lorax.capture import input_moments
from tests.agreement import F32_TOL, assert_changes_nothing, assert_close, assert_identical, normal


def moments_of(rows: Any) -> tuple[Any, Any, Any]:
    """The sums, by hand."""
    rows = np.asarray(rows, np.float64)
    return rows.T @ rows, rows.sum(0), float(len(rows))


def check(measured: Any, rows: Any) -> None:
    second, total, count = moments_of(rows)
    assert_close([measured.second, measured.total], [jnp.float32(second), jnp.float32(total)], F32_TOL)
    assert float(measured.rows) == count


def measured(fn: Any, params: Any, *args: Any) -> Any:
    return jax.jit(
        lambda p, *xs: input_moments(fn, p, [s for s in lorax.trace(fn, p, *xs) if s.kind == "linear"], *xs)
    )(params, *args)


def test_moments_of_a_chain() -> None:
    fn = lambda p, x: jnp.tanh(x @ p["u"]) @ p["v"]
    params, x = {"u": normal(1, 6, 5), "v": normal(2, 5, 4)}, normal(3, 2, 3, 6)
    found = measured(fn, params, x)
    check(found["u"], x.reshape(-1, 6))
    check(found["v"], jnp.tanh(x @ params["u"]).reshape(-1, 5))


def test_moments_follow_the_layout_of_the_weight() -> None:
    """Several fan-in axes, transposed before the use: moments come in the leaf's own order."""
    fn = lambda p, x: jnp.einsum("bkh,khd->bd", x.swapaxes(1, 2), p["w"].swapaxes(0, 1))
    params, x = {"w": normal(1, 2, 3, 4)}, normal(2, 5, 2, 3)  # x: b, h, k; w: h, k, d
    (site,) = lorax.trace(fn, params, x)
    assert site.fan_in == (0, 1)
    check(measured(fn, params, x)["w"], x.reshape(5, 6))


@pytest.mark.parametrize("remat", [False, True])
def test_moments_of_a_scan_come_layer_by_layer(remat: bool) -> None:
    body = lambda c, w: (jnp.tanh(c @ w), None)
    fn = lambda p, x: lax.scan(jax.checkpoint(body) if remat else body, x, p["w"])[0]
    params, x = {"w": normal(1, 3, 5, 5)}, normal(2, 4, 5)
    found = measured(fn, params, x)["w"]
    for layer in range(3):
        check(jax.tree.map(lambda m, i=layer: m[i], found), x)
        x = jnp.tanh(x @ params["w"][layer])


def test_moments_add_up_over_uses_and_keep_experts_apart() -> None:
    fn = lambda p, x, y: (x @ p["w"] + y @ p["w"], jnp.einsum("ebi,eio->ebo", jnp.stack([x, y]), p["e"]))
    params, x, y = {"w": normal(1, 4, 3), "e": normal(4, 2, 4, 3)}, normal(2, 5, 4), normal(3, 5, 4)
    found = measured(fn, params, x, y)
    check(found["w"], jnp.concatenate([x, y]))
    for i, rows in enumerate((x, y)):
        check(jax.tree.map(lambda m, i=i: m[i], found["e"]), rows)


def test_only_products_are_measured() -> None:
    fn = lambda p, ids: p["table"][ids]
    params, ids = {"table": normal(1, 7, 4)}, jnp.arange(3)
    with pytest.raises(ValueError, match=r"table \(embedding\)"):
        input_moments(fn, params, lorax.trace(fn, params, ids), ids)
    fn = lambda p, x: jnp.argmax(x @ p["w"], -1)
    params, x = {"w": normal(1, 6, 4)}, normal(2, 3, 6)
    with pytest.raises(ValueError, match="no floating point"):
        input_moments(fn, params, lorax.trace(fn, params, x), x)


def test_eva_starts_at_the_directions_of_the_inputs_and_changes_nothing() -> None:
    fn = lambda p, x: jnp.tanh(x @ p["u"]) @ p["v"]
    params = {"u": normal(1, 6, 5), "v": normal(2, 5, 4)}
    batches = [(normal(i, 16, 6) * jnp.array([5.0, 0.1, 0.1, 3.0, 0.1, 0.1]),) for i in (3, 4)]
    sites = lorax.trace(fn, params, *batches[0])
    adapter = lorax.init(jax.random.key(0), lorax.Spec({".*": lorax.LoRA(rank=2)}), sites, params)
    started = lorax.eva(fn, params, adapter, batches, rho=1.0)
    rows = np.concatenate([np.asarray(x) for (x,) in batches])
    _, _, directions = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(started.params["u"]["a"].T @ directions[:2].T), np.eye(2), atol=1e-3)
    assert_changes_nothing(fn, params, started, *batches[0])
    in_parts = lorax.eva(fn, params, adapter, batches, rho=1.0, memory=1)
    assert_close(in_parts.params, started.params, 1e-4)
    with pytest.raises(ValueError, match="needs batches"):
        lorax.eva(fn, params, adapter, [])


def attention(p: Any, tokens: Any) -> Any:
    """Two scanned layers of causal attention with one head."""

    def layer(x: Any, w: Any) -> Any:
        q, k, v = x @ w["q"], x @ w["k"], x @ w["v"]
        scores = jnp.where(jnp.tril(jnp.ones((x.shape[1],) * 2, bool)), q @ k.swapaxes(1, 2), -1e9)
        return x + jax.nn.softmax(scores) @ v, None

    return lax.scan(layer, p["embed"][tokens], p["layers"])[0]


def test_a_prefix_from_placeholders_changes_nothing_until_they_are_others() -> None:
    params = {
        "embed": normal(1, 11, 6, scale=1.0),
        "layers": {n: normal(i, 2, 6, 6) for i, n in enumerate("qkv", 2)},
    }
    tokens = jnp.array([[7, 8, 1, 2, 3], [7, 8, 4, 5, 6]])
    sites = lorax.trace(attention, params, tokens)
    spec = lorax.Spec({"layers/[kv]": lorax.Prefix(length=2), "layers/q": lorax.LoRA(rank=1)})
    adapter = lorax.init(jax.random.key(0), spec, sites, params)
    adapted = jax.jit(lorax.adapt(attention))
    want = attention(params, tokens)
    assert not np.allclose(adapted(params, adapter, tokens), want, atol=1e-2)
    started = lorax.prefix_from(attention, params, adapter, tokens)
    assert_close(adapted(params, started, tokens), want, F32_TOL)
    assert_identical(started.params["layers/q"], adapter.params["layers/q"])
    others = tokens.at[:, :2].set(jnp.array([9, 10]))
    assert_close(adapted(params, started, others)[:, 2:], want[:, 2:], F32_TOL)
    assert not np.allclose(attention(params, others)[:, 2:], want[:, 2:], atol=1e-2)
    with pytest.raises(ValueError, match="none of layers/q"):
        only = lorax.init(jax.random.key(0), lorax.Spec({"layers/q": lorax.LoRA(rank=1)}), sites, params)
        lorax.prefix_from(attention, params, only, tokens)
