"""What an adapter promises: initial values, dtypes, an untouched base, no constants, no compilation."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from tests.zoo.dense import TOL, X_BxI, count_numbers, disturbed, make, model
from tests.zoo.entry import normal

# Initial values, scaling, dtypes.


def test_b_is_zero_at_first_and_a_is_not() -> None:
    _, _, _, adapter = make(random=False)
    for arrays in adapter.params.values():
        assert not np.any(arrays["b"])
        assert np.all(np.std(np.asarray(arrays["a"]), axis=0) > 0)


@pytest.mark.parametrize(
    ("method", "scaling"),
    [
        (lorax.LoRA(rank=2, alpha=8), 4.0),
        (lorax.LoRA(rank=2, alpha=1), 0.5),
        (lorax.LoRA(rank=2), 1.0),
        (lorax.LoRA(rank=2, alpha=3, rank_stabilized=True), 3 / 2**0.5),
    ],
)
def test_alpha_is_respected(method: Any, scaling: float) -> None:
    fn, params, args, adapter = make(method, "head/kernel")
    arrays = adapter.params["head/kernel"]
    np.testing.assert_allclose(adapter.state["head/kernel"]["scale"], scaling, rtol=TOL)
    delta = lorax.merge(params, adapter)["head"]["kernel"] - params["head"]["kernel"]
    np.testing.assert_allclose(delta, scaling * arrays["a"] @ arrays["b"], atol=TOL)
    assert np.max(np.abs(delta)) > 100 * TOL


def test_sites_of_one_shape_draw_different_numbers() -> None:
    _, _, _, adapter = make(random=False)
    a = [np.asarray(adapter.params[f"{name}/kernel"]["a"]) for name in ("first", "second")]
    assert a[0].shape == a[1].shape
    assert not np.any(a[0] == a[1])


def test_layers_of_a_stack_draw_different_numbers() -> None:
    fn = lambda p, x: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]
    params = {"w": normal(2, 3, 5, 5)}
    adapter = lorax.init(
        jax.random.key(0), lorax.Spec({"w": lorax.LoRA(rank=2)}), lorax.trace(fn, params, X_BxI), params
    )
    a_LxIxR = np.asarray(adapter.params["w"]["a"])
    assert not np.any(a_LxIxR[0] == a_LxIxR[1])
    assert not np.any(a_LxIxR[1] == a_LxIxR[2])


def test_another_site_changes_no_draw() -> None:
    _, _, _, one = make(pattern="second/kernel", random=False)
    _, _, _, many = make(random=False)
    np.testing.assert_array_equal(one.params["second/kernel"]["a"], many.params["second/kernel"]["a"])


def test_the_key_decides_the_draw() -> None:
    fn, params, args = model()
    sites, spec = lorax.trace(fn, params, *args), lorax.Spec({".*kernel": lorax.LoRA(rank=2)})
    draws = [lorax.init(jax.random.key(i), spec, sites, params).params["first/kernel"]["a"] for i in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.any(np.asarray(draws[0]) == np.asarray(draws[2]))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_factors_are_float32_unless_asked_and_outputs_keep_their_dtype(dtype: str | None) -> None:
    fn, params, args = model()
    params, args = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, args))
    method = lorax.LoRA(rank=2) if dtype is None else lorax.LoRA(rank=2, dtype=dtype)
    adapter = lorax.init(jax.random.key(0), lorax.Spec({".*kernel": method}), lorax.trace(fn, params, *args), params)
    assert {x.dtype for x in jax.tree.leaves(adapter.params)} == {jnp.dtype(dtype or "float32")}
    assert lorax.adapt(fn)(params, adapter, *args).dtype == fn(params, *args).dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(lorax.merge(params, adapter))} == {jnp.dtype("bfloat16")}
    grad = jax.grad(lambda p: lorax.adapt(fn)(params, adapter.replace(params=p), *args).sum().astype(jnp.float32))(
        adapter.params
    )
    assert jax.tree.map(lambda g: g.dtype, grad) == jax.tree.map(lambda p: p.dtype, adapter.params)


def test_init_works_under_jit_and_eval_shape() -> None:
    fn, params, args, eager = make(random=False)
    sites, spec = lorax.trace(fn, params, *args), lorax.Spec({".*kernel": lorax.LoRA(rank=2)})
    build = lambda key, params: lorax.init(key, spec, sites, params)
    jitted = jax.jit(build)(jax.random.key(0), params)
    abstract = jax.eval_shape(build, jax.random.key(0), jax.eval_shape(lambda: params))
    assert jax.tree.structure(jitted) == jax.tree.structure(eager) == jax.tree.structure(abstract)
    for x, y, z in zip(*map(jax.tree.leaves, (jitted, eager, abstract)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
        assert (z.shape, z.dtype) == (y.shape, y.dtype)


# The base.


def test_the_base_is_never_changed() -> None:
    fn, params, args, adapter = make()
    before = jax.tree.map(np.array, params)
    ids = [id(x) for x in jax.tree.leaves(params)]
    merged = lorax.merge(params, adapter)
    lorax.unmerge(merged, adapter)
    jax.grad(lambda p: lorax.adapt(fn)(params, adapter.replace(params=p), *args).sum())(adapter.params)
    assert [id(x) for x in jax.tree.leaves(params)] == ids
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))


def test_numpy_base_is_never_changed() -> None:
    fn, params, args, adapter = make()
    base = jax.tree.map(np.array, params)
    for x in jax.tree.leaves(base):
        x.flags.writeable = False
    np.testing.assert_allclose(lorax.adapt(fn)(base, adapter, *args), fn(lorax.merge(base, adapter), *args), atol=TOL)


def test_frozen_weights_are_no_constants_of_the_program() -> None:
    fn = lambda p, x: jnp.tanh(x @ p["first"]) @ p["second"]
    params = {"first": normal(2, 64, 96), "second": normal(3, 96, 32)}
    x = normal(1, 4, 64)
    adapter = lorax.init(jax.random.key(0), lorax.Spec({".*": lorax.LoRA(rank=2)}), lorax.trace(fn, params, x), params)

    def step(params, adapter, x):
        return jax.value_and_grad(lambda p: jnp.sum(lorax.adapt(fn)(params, adapter.replace(params=p), x) ** 2))(
            adapter.params
        )

    def largest_constant(step, *args):
        closed = jax.make_jaxpr(step)(*args)
        held = max((np.size(c) for c in closed.consts), default=0)
        text = jax.jit(step).lower(*args).compile().as_text()
        written = [
            np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\[([\d,]+)\][^=\n]* constant\(", text)
        ]
        return max([held, *map(int, written)])

    assert largest_constant(step, params, adapter, x) < 64
    # A closure over the base does make it a constant: the check is able to fail.
    assert largest_constant(lambda adapter, x: step(params, adapter, x), adapter, x) >= 64 * 96


def test_no_gradient_and_no_moment_for_a_frozen_leaf() -> None:
    fn, params, args, adapter = make()
    frozen, trainable = lorax.split(params, adapter)
    state = optax.adamw(1e-3).init(trainable)
    assert count_numbers(state) == 2 * count_numbers(trainable) + 1
    assert count_numbers(trainable) == 2 * (5 + 7 + 5 + 7 + 7 + 3)
    base_shapes = {x.shape for x in jax.tree.leaves(params)}
    assert not base_shapes & {x.shape for x in jax.tree.leaves(state) if x.ndim}


def test_frozen_leaves_keep_their_bits_in_one_train_state() -> None:
    fn, params, args, adapter = make()
    tree = (params, adapter)
    trained = lorax.mask(*tree)
    frozen = jax.tree.map(lambda m: not m, trained)
    tx = optax.chain(optax.masked(optax.adamw(1e-2), trained), optax.masked(optax.set_to_zero(), frozen))
    grads = jax.grad(lambda t: jnp.sum(lorax.adapt(fn)(*t, *args) ** 2))(tree)
    updates, state = tx.update(grads, tx.init(tree), tree)
    new_params, new_adapter = optax.apply_updates(tree, updates)
    jax.tree.map(np.testing.assert_array_equal, (new_params, new_adapter.state), (params, adapter.state))
    assert all(
        np.all(np.asarray(x != y))
        for x, y in zip(*map(jax.tree.leaves, (new_adapter.params, adapter.params)), strict=True)
    )
    # Two moments a trained number, and one count.
    assert count_numbers(state) == 2 * count_numbers(adapter.params) + 1


# What does not compile again, and what is called how often.


def test_another_alpha_or_other_values_compile_nothing() -> None:
    fn, params, args, adapter = make(lorax.LoRA(rank=2, alpha=4))
    traces = []

    @jax.jit
    def step(params, adapter, x):
        traces.append(1)
        return lorax.adapt(fn)(params, adapter, x)

    first = step(params, adapter, *args)
    doubled = adapter.replace(state=jax.tree.map(lambda s: 2 * s, adapter.state))
    second = step(params, doubled, *args)
    step(params, disturbed(adapter), *args)
    assert len(traces) == 1
    assert step._cache_size() == 1
    np.testing.assert_allclose(second, fn(lorax.merge(params, doubled), *args), atol=TOL)
    assert not np.allclose(first, second, atol=1e-3)


def test_adapters_made_alike_share_a_compilation() -> None:
    fn, params, args, _ = make()
    step = jax.jit(lambda params, adapter, x: lorax.adapt(fn)(params, adapter, x))
    for seed in range(2):
        sites = lorax.trace(fn, params, *args)
        step(
            params, lorax.init(jax.random.key(seed), lorax.Spec({".*kernel": lorax.LoRA(rank=2)}), sites, params), *args
        )
    assert step._cache_size() == 1
