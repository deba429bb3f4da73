"""`adapt` and `explain` as calls: keywords, static and wrong arguments, what is named and what is kept."""

import re
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lorax
from tests.agreement import adapter_for, assert_close, assert_identical, normal

PARAMS = {"w": normal(1, 6, 5), "b": normal(2, 5)}
X = normal(3, 4, 6)
KEY = jax.random.key(7)
plain = lambda p, x: x @ p["w"] + p["b"]


def dropping(p: Any, x: Any, rng: Any = None) -> Any:
    return plain(p, x) if rng is None else plain(p, jnp.where(jax.random.bernoulli(rng, 0.5, x.shape), x, 0))


# The function's own `rng`.


def test_a_function_with_an_rng_of_its_own_gets_it() -> None:
    adapter = adapter_for(dropping, PARAMS, X)
    adapted, merged = lorax.adapt(dropping), lorax.merge(PARAMS, adapter)
    assert_close(adapted(PARAMS, adapter, X, rng=KEY), dropping(merged, X, rng=KEY))
    assert_close(adapted(PARAMS, adapter, X, KEY), dropping(merged, X, KEY))
    assert_close(adapted(PARAMS, adapter, X), dropping(merged, X))
    assert not jnp.allclose(dropping(merged, X, KEY), dropping(merged, X))


def test_a_required_rng_may_be_none_and_a_default_stays() -> None:
    def required(p: Any, x: Any, *, rng: Any) -> Any:
        return dropping(p, x, rng)

    def defaulted(p: Any, x: Any, *, rng: Any = KEY) -> Any:
        return dropping(p, x, rng)

    adapter = adapter_for(plain, PARAMS, X)
    merged = lorax.merge(PARAMS, adapter)
    assert_close(lorax.adapt(required)(PARAMS, adapter, X, rng=None), plain(merged, X))
    assert_close(lorax.adapt(required)(PARAMS, adapter, X, rng=KEY), dropping(merged, X, KEY))
    assert_close(lorax.adapt(defaulted)(PARAMS, adapter, X), dropping(merged, X, KEY))


def test_an_rng_that_is_no_key_is_handed_on() -> None:
    fn = lambda p, x, rng: plain(p, x) + rng["noise"]
    adapter = adapter_for(plain, PARAMS, X)
    noise = normal(4, 4, 5)
    got = lorax.adapt(fn)(PARAMS, adapter, X, rng={"noise": noise})
    assert_close(got, plain(lorax.merge(PARAMS, adapter), X) + noise)


def test_adapter_and_function_draw_from_streams_of_their_own() -> None:
    """With the function's mask undone, what is left of the adapter's part differs from the function's mask."""
    size = 64
    params, x = {"w": jnp.zeros((size, size))}, jnp.ones((1, size))

    def fn(p: Any, x: Any, rng: Any = None) -> Any:
        masks = (
            [] if rng is None else [jax.random.bernoulli(jax.random.fold_in(rng, i), 0.5, x.shape) for i in range(4)]
        )
        return x @ p["w"], masks

    adapter = adapter_for(fn, params, x, method=lorax.LoRA(rank=size, dropout=0.5))
    eye = {"w": {"a": jnp.eye(size), "b": jnp.eye(size)}}
    kept, masks = lorax.adapt(fn)(params, adapter.replace(params=eye), x, rng=KEY)
    assert 0.2 < jnp.mean(kept > 0) < 0.8
    assert all(0.2 < jnp.mean((kept > 0) == mask) < 0.8 for mask in masks)


def test_adapting_twice_hands_the_rng_to_the_inner_adapter() -> None:
    inner = adapter_for(plain, PARAMS, X, method=lorax.LoRA(rank=2, dropout=0.5))
    once = lambda p, x, rng=None: lorax.adapt(plain)(p, inner, x, rng=rng)
    outer = adapter_for(once, PARAMS, X, method=lorax.Full(), only="b")
    twice = lorax.adapt(once)
    assert_close(twice(PARAMS, outer, X, rng=KEY), once(lorax.merge(PARAMS, outer), X, rng=KEY))
    assert not jnp.allclose(twice(PARAMS, outer, X, rng=KEY), twice(PARAMS, outer, X))
    direct = lorax.adapt(lorax.adapt(plain))(PARAMS, outer, inner, X, rng=KEY)
    assert_close(direct, twice(PARAMS, outer, X, rng=KEY))


# Static arguments.


def test_static_arguments_by_name_under_jit() -> None:
    def fn(p: Any, x: Any, squared: bool = False) -> Any:
        y = plain(p, x)
        return y**2 if squared else y

    adapter = adapter_for(fn, PARAMS, X)
    adapted = jax.jit(lorax.adapt(fn), static_argnames="squared")
    assert_close(adapted(PARAMS, adapter, X, squared=True), fn(lorax.merge(PARAMS, adapter), X, squared=True))
    assert_close(adapted(PARAMS, adapter, X), fn(lorax.merge(PARAMS, adapter), X))


# Wrong arguments.


def test_what_is_no_adapter_is_named() -> None:
    adapter = adapter_for(plain, PARAMS, X)
    for wrong, kind in ((X, "Array"), (adapter.params, "dict"), (lorax.Spec({}), "Spec")):
        with pytest.raises(TypeError, match=rf"the adapter is a \w*{kind}\w*\. It comes from lorax\.init"):
            lorax.adapt(plain)(PARAMS, wrong, X)
        with pytest.raises(TypeError, match=rf"the adapter is a \w*{kind}\w*\."):
            lorax.explain(plain, PARAMS, wrong, X)


def test_no_adapter_is_the_function_itself() -> None:
    assert_identical(lorax.adapt(plain)(PARAMS, None, X), plain(PARAMS, X))


def test_init_names_swapped_arguments() -> None:
    sites, spec = lorax.trace(plain, PARAMS, X), lorax.Spec({"w": lorax.LoRA(rank=2)})
    with pytest.raises(TypeError, match=r"the spec is a dict, expected a lorax\.Spec"):
        lorax.init(KEY, {"w": lorax.LoRA(rank=2)}, sites, PARAMS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the spec is a Sites"):
        lorax.init(KEY, sites, spec, PARAMS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected sites, as lorax.trace returns them, and got a str"):
        lorax.init(KEY, spec, PARAMS, PARAMS)  # type: ignore[arg-type]


def test_values_of_several_adapters_are_for_vmap() -> None:
    adapter = adapter_for(plain, PARAMS, X)
    both = jax.tree.map(lambda x: jnp.stack([x, -x]), adapter.params)
    with pytest.raises(ValueError, match=r"w: the adapter's 'a' has shape \(2, 6, 2\).*vmap"):
        lorax.adapt(plain)(PARAMS, adapter.replace(params=both), X)
    one = lambda values, x: lorax.adapt(plain)(PARAMS, adapter.replace(params=values), x)
    got = jax.vmap(one, (0, None))(both, X)
    assert_close(got[1], one(jax.tree.map(lambda x: -x, adapter.params), X))


def test_complex_weights_are_said_to_be_complex() -> None:
    params = {"w": jnp.ones((6, 5), jnp.complex64)}
    sites = lorax.trace(lambda p, x: x @ p["w"], params, X)
    with pytest.raises(ValueError, match="complex64 is not floating point"):
        lorax.init(KEY, lorax.Spec({".*": lorax.LoRA(rank=2)}), sites, params)


# Some of the sites, and what is said of each.


def test_a_spec_over_some_of_the_sites() -> None:
    fn = lambda p, ids: jnp.tanh(p["table"][ids]) @ p["w"]
    params, ids = {"table": normal(1, 9, 6), "w": normal(2, 6, 5)}, jnp.array([1, 4])
    sites, spec = lorax.trace(fn, params, ids), lorax.Spec({".*": lorax.LoRA(rank=2)})
    some = lorax.init(KEY, spec, [s for s in sites if s.kind == "linear"], params)
    assert set(some.params) == {"w"}
    assert_identical(some.params["w"], lorax.init(KEY, spec, sites, params).params["w"])


def test_explain_tells_a_leaf_trained_as_it_is_from_one_not_read() -> None:
    spec = lorax.Spec({"b": lorax.Full(), "w": lorax.LoRA(rank=2)})
    adapter = lorax.init(KEY, spec, lorax.trace(plain, PARAMS, X), PARAMS)
    assert {r.path: (r.how, r.reason) for r in lorax.explain(plain, PARAMS, adapter, X)} == {
        "b": ("factored", "trained as it is"),
        "w": ("factored", "linear"),
    }
    (_, row) = lorax.explain(lambda p, x: x + 1, PARAMS, adapter, X)
    assert (row.how, row.reason) == ("factored", "not read by this call")


# Names of modules and lines.


def test_profiles_name_the_modules_that_products_stand_in() -> None:
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))

    def fn(p: Any, x: Any) -> Any:
        with jax.named_scope("first"):
            x = layer(p["first"], x)
        with jax.named_scope("saved"):
            x = jax.checkpoint(layer)(p["saved"], x)
        with jax.named_scope("stack"):
            return lax.scan(lambda c, w: (layer(w, c), None), x, p["stack"])[0]

    params = {"first": normal(1, 6, 6), "saved": normal(2, 6, 6), "stack": normal(3, 2, 6, 6)}
    adapter = adapter_for(fn, params, X)
    text = jax.jit(lorax.adapt(fn)).lower(params, adapter, X).compile().as_text()
    products = re.findall(r'op_name="[^"]*?/(\w+)/[^"]*dot_general"', text)
    assert products and set(products) == set(params)


def test_an_error_in_a_product_names_the_functions_own_line() -> None:
    """`jax.debug_nans` finds the product after the function was traced."""

    def projection(p: Any, x: Any) -> Any:
        return plain(p, x)

    adapter = adapter_for(projection, PARAMS, X)
    with jax.debug_nans(True), pytest.raises(FloatingPointError) as raised:
        lorax.adapt(projection)(PARAMS, adapter, jnp.inf * jnp.sign(X))
    cause = raised.value.__cause__
    assert cause is not None
    assert "projection" in [frame.f_code.co_name for frame, _ in traceback.walk_tb(cause.__traceback__)]


# Eager calls.


def test_an_eager_call_lets_go_of_activations() -> None:
    """Counted from inside the call, after many residual layers; the last reader of some is no product."""
    x, alive = normal(3, 3, 5, 7), []

    def count(y: Any) -> Any:
        alive.append(sum(a.size == y.size for a in jax.live_arrays()))
        return y

    def fn(p: Any, x: Any) -> Any:
        for w in p:
            x = x + jnp.tanh(x @ w)
        return jax.pure_callback(count, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    params = [normal(i, 7, 7) for i in range(12)]
    adapter = adapter_for(fn, params, x)
    jax.block_until_ready(fn(params, x))
    jax.block_until_ready(lorax.adapt(fn)(params, adapter, x))
    plain, adapted = alive
    assert adapted <= plain + 3
