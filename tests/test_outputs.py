"""Methods that act on the output of a product, against the same thing written into the function by hand."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.methods.bottleneck import ACTIVATIONS
from tests.agreement import (
    BF16_TOL,
    F32_TOL,
    FAST_COMPILE,
    assert_changes_nothing,
    assert_close,
    assert_identical,
    how,
    normal,
    randomised,
    run,
    value_and_grads,
)
from tests.contract import FORMS, IDS, METHODS, D, F, H, K, X, refusal, started

EXACT = 1e-6
LENGTH = 2  # of prompts and prefixes


def bottleneck(y: Any, hand: Any) -> Any:
    """`y + φ(y·D + d)·U + u`, the output axes joined."""
    rank = hand["down_bias"].shape[0]
    flat = y.reshape(*y.shape[: y.ndim - hand["up_bias"].ndim], -1)
    hand = {n: x.astype(y.dtype) for n, x in hand.items()}
    hidden = jax.nn.gelu(flat @ hand["down"].reshape(-1, rank) + hand["down_bias"])
    return y + (hidden @ hand["up"].reshape(rank, -1)).reshape(y.shape) + hand["up_bias"]


def bias(y: Any, hand: Any) -> Any:
    """`y + s·bias`, at the scaling 3/2."""
    return y + 1.5 * hand["bias"].astype(y.dtype)


def prefix(y: Any, hand: Any) -> Any:
    """The first positions of the axis before the output's own replaced."""
    values = hand["prefix"].astype(y.dtype)
    index = (..., slice(0, LENGTH), *[slice(None)] * (values.ndim - 1))
    return y.at[index].set(values)


BY_HAND: dict[str, Callable[[Any, Any], Any]] = {
    "Bottleneck": bottleneck,
    "LoRA with a bias": bias,
    "Prefix": prefix,
}
# A cut weight and rows of several groups have no output of their own; a custom derivative is the author's.
WITHOUT = ("cut before the product", "ragged", "custom jvp")
CASES = [(f, m) for f in FORMS for m in BY_HAND if f not in WITHOUT and not refusal(f, m)]
# Enough of them to meet every rule: a product, a convolution, a lookup that is no output, experts, layers.
QUICK = {
    *(("heads in", m) for m in BY_HAND),
    *(("scan with remat", m) for m in BY_HAND),
    *(("experts", m) for m in ("Bottleneck", "Prefix")),
    *(("tied embedding", m) for m in ("Bottleneck", "Prefix")),
    *((f, "Bottleneck") for f in ("conv grouped and dilated", "embedding", "picked expert")),
    *((f, "LoRA with a bias") for f in ("conv", "embedding")),
}
assert set(CASES) >= QUICK


@pytest.mark.parametrize(
    ("name", "method"), [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES]
)
def test_it_is_what_one_would_write_by_hand(name: str, method: str) -> None:
    form = FORMS[name]
    adapter = randomised(run(lambda: started(name, method)))
    assert how(form.fn, form.params, adapter, form.x) == {"w": "factored"}

    def by_hand(adapter: Any, x: Any) -> Any:
        params = dict(form.params)
        if method == "LoRA with a bias":  # the low-rank part has a merged weight of its own
            plain = started(name, "LoRA")
            factors = {n: adapter.params["w"][n] for n in "ab"}
            params = lorax.merge(params, plain.replace(params={"w": factors}, state=adapter.state))
        return form.fn({**params, "hand": adapter.params["w"]}, x, BY_HAND[method])

    adapted = lambda adapter, x: lorax.adapt(form.fn)(form.params, adapter, x)
    if form.is_reversible:
        forms = [lambda a, x, f=f: value_and_grads(f, a, x) for f in (adapted, by_hand)]
    else:
        forms = [adapted, by_hand]
    got, want = run(lambda a, x: [f(a, x) for f in forms], adapter, form.x)
    tol = BF16_TOL if "bfloat16" in name else F32_TOL
    assert_close(got, want, 5 * tol)
    plain = run(form.fn, form.params, form.x)
    changed = got[0] if form.is_reversible else got
    difference = max(
        float(np.max(np.abs(np.asarray(x - y, np.float32))))
        for x, y in zip(jax.tree.leaves(changed), jax.tree.leaves(plain), strict=True)
    )
    assert difference > 0.01, "nothing was changed: the check is void"


dense = lambda p, x: x @ p["w"]
PARAMS = {"w": normal(1, D, F)}


def made(method: lorax.Method, fn: Any = dense, params: Any = PARAMS, *args: Any) -> Any:
    """The adapter as `init` makes it."""
    args = args or (X,)
    return lorax.init(jax.random.key(0), lorax.Spec({".*": method}), lorax.trace(fn, params, *args), params)


# Bottleneck.


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    adapter = randomised(made(lorax.Bottleneck(rank=3, activation=activation)))
    hand = adapter.params["w"]
    y = X @ PARAMS["w"]
    fn = {"gelu": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu, "tanh": jnp.tanh}[activation]
    want = y + fn(y @ hand["down"] + hand["down_bias"]) @ hand["up"] + hand["up_bias"]
    assert_close(lorax.adapt(dense)(PARAMS, adapter, X), want)


def test_a_new_bottleneck_is_no_change_bit_for_bit_and_trains() -> None:
    adapter = made(lorax.Bottleneck(rank=3))
    assert_changes_nothing(dense, PARAMS, adapter, X)
    down = adapter.params["w"]["down"]
    assert abs(float(jnp.std(down)) * F**0.5 - 1) < 0.5
    assert all(not np.any(x) for n, x in adapter.params["w"].items() if n != "down")
    loss = lambda p: jnp.sum(lorax.adapt(dense)(PARAMS, adapter.replace(params=p), X) ** 2)
    grads = jax.grad(loss)(adapter.params)["w"]
    assert np.any(grads["up"]) and np.any(grads["up_bias"]) and not np.any(grads["down"])


def test_placements_are_specs() -> None:
    """Houlsby's: after attention's and the feed-forward's output weights; Pfeiffer's: after the latter alone."""

    def block(p: Any, x: Any) -> Any:
        x = x + jnp.tanh(x @ p["query"]) @ p["out"]
        return x + jnp.tanh(x @ p["up"]) @ p["down"]

    params = {n: normal(i, *s) for i, (n, s) in enumerate({"query": (D, D), "out": (D, D), "up": (D, F)}.items())}
    params["down"] = normal(9, F, D)
    sites = lorax.trace(block, params, X)
    for pattern, paths in (("out|down", {"out", "down"}), ("down", {"down"})):
        adapter = randomised(lorax.init(jax.random.key(0), lorax.Spec({pattern: METHODS["Bottleneck"]}), sites, params))
        assert set(adapter.params) == paths
        hand = adapter.params
        after = lambda y, n, hand=hand: bottleneck(y, hand[n]) if n in hand else y
        h = X + after(jnp.tanh(X @ params["query"]) @ params["out"], "out")
        want = h + after(jnp.tanh(h @ params["up"]) @ params["down"], "down")
        assert_close(lorax.adapt(block)(params, adapter, X), want)


@pytest.mark.parametrize(
    "reading",
    [
        lambda p, x: x @ jnp.tanh(p["w"]),
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"])) + jnp.sum(p["w"]),
        lambda p, x: x @ p["w"][:, :4],
        lambda p, x: x @ jnp.concatenate([p["w"], p["w"]], axis=1),
        lambda p, x: (x @ p["w"], p["w"]),
    ],
    ids=["tanh", "norm", "part of the outputs", "joined", "returned"],
)
@pytest.mark.parametrize("method", BY_HAND)
def test_a_weight_that_is_no_operand_of_a_product_is_refused(reading: Any, method: str) -> None:
    """Said with the path and a remedy, and never a silent nothing."""
    adapter = made(METHODS[method], reading)
    for call in (lambda: lorax.adapt(reading)(PARAMS, adapter, X), lambda: lorax.explain(reading, PARAMS, adapter, X)):
        with pytest.raises(ValueError, match=r"^w: .*acts on the output of a product.*Leave it out of the spec"):
            call()


# Bias.


def test_a_bias_starts_at_zero_has_loras_scaling_and_its_own_gradient() -> None:
    method = lorax.LoRA(rank=4, alpha=8, bias=True)
    adapter = made(method)
    assert_identical(adapter.params["w"]["bias"], jnp.zeros(F))
    assert_changes_nothing(dense, PARAMS, adapter, X)
    moved = adapter.replace(params={"w": {**adapter.params["w"], "bias": jnp.ones(F)}})
    assert_close(lorax.adapt(dense)(PARAMS, moved, X), X @ PARAMS["w"] + 2)
    other = moved.replace(state={"w": {"scale": jnp.float32(0.5)}})
    assert_close(lorax.adapt(dense)(PARAMS, other, X), X @ PARAMS["w"] + 0.5)
    assert not method.is_mergeable
    assert lorax.LoRA(rank=4).is_mergeable


def test_a_scale_a_layer_scales_each_layers_bias() -> None:
    form = FORMS["scan"]
    adapter = randomised(run(lambda: started("scan", "LoRA with a bias")))
    scales = jnp.asarray([0.5, 1.0, 2.0])
    adapter = adapter.replace(state={"w": {"scale": scales}})
    a, b, shift = (adapter.params["w"][n] for n in ("a", "b", "bias"))

    def by_hand(x: Any) -> Any:
        sums = []
        for i, s in enumerate(scales):
            sums.append(jnp.sum(x))
            x = jnp.tanh(x @ form.params["w"][i] + s * (x @ a[i]) @ b[i] + s * shift[i])
        return x, jnp.stack(sums)

    assert_close(run(lorax.adapt(form.fn), form.params, adapter, form.x), run(by_hand, form.x))


# Prompt.

TABLE = {"table": normal(1, 7, D), "w": normal(2, D, D)}


def language_model(p: Any, ids: Any) -> Any:
    """Causal sums of what is looked up: every position sees the ones before it."""
    x = jnp.cumsum(p["table"][ids], axis=-2)
    return jnp.tanh(x @ p["w"]) @ p["table"].T


def prompted(method: lorax.Prompt, seed: int = 0) -> Any:
    sites = lorax.trace(language_model, TABLE, IDS)
    return lorax.init(jax.random.key(seed), lorax.Spec({"table": method}), sites, TABLE)


def test_a_prompt_replaces_the_first_positions_of_what_is_looked_up() -> None:
    adapter = randomised(prompted(METHODS["Prompt"]))

    def by_hand(adapter: Any, ids: Any) -> Any:
        rows = TABLE["table"][ids].at[:, :LENGTH].set(adapter.params["table"]["prompt"])
        return jnp.tanh(jnp.cumsum(rows, axis=-2) @ TABLE["w"]) @ TABLE["table"].T

    def both(adapter: Any, ids: Any) -> Any:
        adapted = lambda a, ids: lorax.adapt(language_model)(TABLE, a, ids)
        return value_and_grads(adapted, adapter, ids), value_and_grads(by_hand, adapter, ids)

    got, want = run(both, adapter, IDS)
    assert_close(got, want)
    assert np.any(got[1][0]["table"]["prompt"])
    assert how(language_model, TABLE, adapter, IDS) == {"table": "factored"}


def test_placeholders_of_any_value_do_the_same() -> None:
    adapter = randomised(prompted(METHODS["Prompt"]))
    call = jax.jit(lambda ids: lorax.adapt(language_model)(TABLE, adapter, ids), compiler_options=FAST_COMPILE)
    assert_identical(call(IDS), call(IDS.at[:, :LENGTH].set(3)))
    assert not np.allclose(call(IDS), call(IDS.at[:, LENGTH].set(6)), atol=1e-3)


def test_a_new_prompt_stands_for_its_own_tokens() -> None:
    for method in (lorax.Prompt(length=2), lorax.Prompt(length=2, tokens=(4, 1))):
        adapter = prompted(method)
        tokens = adapter.state["table"]["tokens"]
        if method.tokens:
            assert tokens.tolist() == [4, 1]
        ids = IDS.at[:, :LENGTH].set(tokens)
        assert_close(lorax.adapt(language_model)(TABLE, adapter, ids), language_model(TABLE, ids), EXACT)
    assert prompted(lorax.Prompt(length=2), 1).state["table"]["tokens"].tolist() != [4, 1]


@pytest.mark.parametrize("count", [1, LENGTH])
def test_a_decoder_with_a_cache_goes_on_token_by_token(count: int) -> None:
    """As many positions as the prompt has, or fewer, are later tokens."""
    adapter = randomised(prompted(METHODS["Prompt"]))
    later = IDS[:, :count]
    assert_close(lorax.adapt(language_model)(TABLE, adapter, later), language_model(TABLE, later), EXACT)
    whole = randomised(made(METHODS["Prefix"]))
    assert_close(lorax.adapt(dense)(PARAMS, whole, X[:, :count]), X[:, :count] @ PARAMS["w"], EXACT)


# Prefix.


def attention(p: Any, x: Any) -> Any:
    """Attention of several heads, every position seeing all."""
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[n]) for n in ("query", "key", "value"))
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
    return jnp.einsum("bhts,bshk->bthk", weights, v)


def test_a_prefix_gives_every_token_more_keys_and_values() -> None:
    """The outputs behind the placeholders are those of attention with learned keys and values in front."""
    params = {n: normal(i, D, H, K) for i, n in enumerate(("query", "key", "value"))}
    sites = lorax.trace(attention, params, X)
    adapter = lorax.init(jax.random.key(0), lorax.Spec({"key|value": METHODS["Prefix"]}), sites, params)
    adapter = randomised(adapter)
    got = run(lorax.adapt(attention), params, adapter, X)[:, LENGTH:]
    rest = X[:, LENGTH:]
    q, k, v = (jnp.einsum("btd,dhk->bthk", rest, params[n]) for n in ("query", "key", "value"))
    front = lambda n, y: jnp.concatenate(
        [jnp.broadcast_to(adapter.params[n]["prefix"], (len(y), LENGTH, H, K)), y], axis=1
    )
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, front("key", k)))
    assert_close(got, jnp.einsum("bhts,bshk->bthk", weights, front("value", v)))


def test_a_prefix_changes_only_the_first_positions_of_its_product() -> None:
    adapter = made(lorax.Prefix(length=LENGTH, initial_std=0.3))
    values = adapter.params["w"]["prefix"]
    assert 0.1 < float(jnp.std(values)) < 0.6
    got = lorax.adapt(dense)(PARAMS, adapter, X)
    assert_close(got[:, LENGTH:], (X @ PARAMS["w"])[:, LENGTH:], EXACT)
    assert_identical(got[0, :LENGTH], values)


@pytest.mark.parametrize(
    ("make", "needle"),
    [
        (lambda: lorax.Bottleneck(rank=0), "Bottleneck: rank is 0"),
        (lambda: lorax.Bottleneck(activation="swish"), "Bottleneck: activation is 'swish'; known are gelu, relu"),
        (lambda: lorax.Prompt(length=0), "Prompt: length is 0"),
        (lambda: lorax.Prompt(length=3, tokens=(1, 2)), "Prompt: 2 tokens for a length of 3"),
        (lambda: lorax.Prefix(length=0), "Prefix: length is 0"),
        (lambda: prompted(lorax.Prompt(length=2, tokens=(3, 99))), "it has 7 rows and no [99]"),
    ],
)
def test_wrong_settings_are_refused(make: Any, needle: str) -> None:
    with pytest.raises(ValueError, match=re.escape(needle)):
        make()
