"""LoRA-FA: `B` alone is trained, and what its backward pass keeps is as wide as the rank."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorax
from lorax.methods.lorafa import LoRAFA
from tests.agreement import (
    adapter_for,
    assert_agrees,
    assert_changes_nothing,
    assert_close,
    assert_identical,
    how,
    normal,
    randomised,
    run,
)

SAME = 1e-6


def dense(p: Any, x: Any) -> Any:
    return x @ p["w"]


def started(fn: Any, params: Any, *args: Any, **settings: Any) -> Any:
    """The adapter as `init` makes it."""
    method = LoRAFA(**{"rank": 2, "alpha": 3, **settings})
    return lorax.init(jax.random.key(0), lorax.Spec({".*": method}), lorax.trace(fn, params, *args), params)


def test_by_hand() -> None:
    params, x = {"w": normal(1, 6, 5)}, normal(2, 3, 6)
    adapter = randomised(started(dense, params, x, alpha=5))
    a, b = adapter.state["w"]["a"], adapter.params["w"]["b"]
    assert_close(lorax.adapt(dense)(params, adapter, x), x @ params["w"] + 2.5 * (x @ a) @ b)
    assert how(dense, params, adapter, x) == {"w": "factored"}


def test_b_alone_is_trained_and_a_is_loras() -> None:
    params, x = {"w": normal(1, 6, 5)}, normal(2, 3, 6)
    adapter = started(dense, params, x)
    assert {n: v.shape for n, v in adapter.params["w"].items()} == {"b": (2, 5)}
    assert {n: v.shape for n, v in adapter.state["w"].items()} == {"a": (6, 2), "scale": ()}
    spec = lorax.Spec({"w": lorax.LoRA(rank=2, alpha=3)})
    lora = lorax.init(jax.random.key(0), spec, adapter.sites, params)
    assert_identical(adapter.state["w"]["a"], lora.params["w"]["a"])
    loss = lambda adapter: jnp.sum(jnp.sin(lorax.adapt(dense)(params, adapter, x)))
    grads = [jax.grad(lambda p, a=a: loss(a.replace(params=p)))(a.params)["w"] for a in (adapter, lora)]
    assert_close(grads[0]["b"], grads[1]["b"], SAME)


LAYOUTS = {
    "heads": (lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"]), (6, 4, 5), (2, 6)),
    "stack": (lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0], (3, 6, 6), (2, 6)),
    "experts": (lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"]), (4, 6, 5), (4, 2, 6)),
    "conv": (lambda p, x: lax.conv(x, p["w"], (1,), "SAME"), (5, 4, 3), (2, 4, 6)),
}


@pytest.mark.slow
@pytest.mark.parametrize("initializer", ["uniform", "pissa", "olora"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_every_layout(layout: str, initializer: str) -> None:
    fn, w, x = LAYOUTS[layout]
    params, x = {"w": normal(1, *w)}, normal(2, *x)
    adapter = started(fn, params, x, initializer=initializer)
    assert_close(run(lorax.adapt(fn), params, adapter, x), run(fn, params, x), SAME)
    assert_identical(lorax.merge(params, adapter), params)  # exactly, also where B does not start at zero
    moved = randomised(adapter)
    assert_agrees(fn, params, moved, x)
    assert how(fn, params, moved, x) == {"w": "factored"}
    assert_close(lorax.unmerge(lorax.merge(params, moved), moved), params)


@pytest.mark.parametrize("initializer", ["pissa", "olora"])
def test_a_start_read_off_the_weight_is_subtracted_in_b(initializer: str) -> None:
    params, x = {"w": normal(1, 6, 5)}, normal(2, 3, 6)
    adapter = started(dense, params, x, initializer=initializer)
    state = adapter.state["w"]
    assert set(state) == {"a", "scale", "b0"}
    assert_identical(state["b0"], adapter.params["w"]["b"])
    moved = randomised(adapter)
    want = params["w"] + 1.5 * state["a"] @ (moved.params["w"]["b"] - state["b0"])
    assert_close(lorax.merge(params, moved)["w"], want)


def lookup(p: Any, ids: Any) -> Any:
    return p["table"][ids]


def test_an_embedding_starts_with_random_rows_and_is_trained() -> None:
    params, ids = {"table": normal(1, 50, 12)}, jnp.array([[0, 6], [3, 49]])
    adapter = started(lookup, params, ids)
    np.testing.assert_allclose(np.std(adapter.state["table"]["a"]), 1, rtol=0.2)
    assert_changes_nothing(lookup, params, adapter, ids)
    grads = jax.grad(lambda p: jnp.sum(lorax.adapt(lookup)(params, adapter.replace(params=p), ids) ** 2))(
        adapter.params
    )
    assert np.all(np.any(np.asarray(grads["table"]["b"]), axis=1))
    assert_agrees(lookup, params, randomised(adapter), ids)


def test_dropout_and_bfloat16() -> None:
    params, x = {"w": normal(1, 6, 5, dtype=jnp.bfloat16)}, normal(2, 3, 6, dtype=jnp.bfloat16)
    adapter = adapter_for(dense, params, x, method=LoRAFA(rank=2, dropout=0.5))
    drop = lorax.adapt(dense)(params, adapter, x, rng=jax.random.key(0))
    plain = lorax.adapt(dense)(params, adapter, x)
    assert drop.dtype == plain.dtype == jnp.bfloat16
    assert np.any(np.asarray(drop != plain))


def test_saved_and_restored(tmp_path: Path) -> None:
    params, x = {"w": normal(1, 6, 5)}, normal(2, 3, 6)
    adapter = randomised(started(dense, params, x, initializer="pissa"))
    lorax.save(tmp_path / "adapter", adapter, base=params)
    back = lorax.restore(tmp_path / "adapter", base=params)
    assert back.plan == adapter.plan
    assert_identical(back, adapter)


def test_wrong_settings_are_refused_in_its_own_name() -> None:
    with pytest.raises(ValueError, match=re.escape("LoRAFA: rank is 0")):
        LoRAFA(rank=0)


# Memory.

DEPTH, WIDTH, ROWS, RANK = 12, 256, 1024, 4


def chain(p: Any, x: Any) -> Any:
    """Linear layers with a bias in between: their derivatives need no activation, the factors' alone do."""
    for w, bias in zip(p["w"], p["bias"], strict=True):
        x = x @ w + bias
    return x


def temporaries(method: Any) -> int:
    """Bytes that a compiled gradient step needs besides its arguments and results."""
    params = {"w": [jnp.zeros((WIDTH, WIDTH))] * DEPTH, "bias": [jnp.zeros(WIDTH)] * DEPTH}
    x = jnp.ones((ROWS, WIDTH))
    sites = lorax.trace(chain, params, x)
    adapter = jax.eval_shape(lambda: lorax.init(jax.random.key(0), lorax.Spec({"w/.*": method}), sites, params))
    loss = lambda p, rest, params, x: jnp.sum(lorax.adapt(chain)(params, rest.replace(params=p), x) ** 2)
    compiled = jax.jit(jax.grad(loss)).lower(adapter.params, adapter.replace(params=None), params, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_backward_pass_keeps_no_activation() -> None:
    """LoRA keeps the input of each of its layers; here all that is kept of a layer is `rank` numbers a row."""
    activation = ROWS * WIDTH * 4
    lora, frozen = temporaries(lorax.LoRA(rank=RANK)), temporaries(LoRAFA(rank=RANK))
    assert lora > (DEPTH - 1) * activation
    assert frozen < 5 * activation
    assert lora - frozen > (DEPTH - 5) * activation
