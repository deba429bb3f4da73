"""Adapted functions, merged weights and whole leaves, called in every way."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from tests.zoo import leaves_by_path
from tests.zoo.dense import TOL, X_BxI, count_numbers, disturbed, make
from tests.zoo.entry import normal

# Merging.


def test_unmerge_restores_the_base() -> None:
    _, params, _, adapter = make()
    back = lorax.unmerge(lorax.merge(params, adapter), adapter)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), back, params)


def test_full_cannot_be_unmerged_and_says_so() -> None:
    _, params, _, adapter = make(lorax.Full())
    with pytest.raises(ValueError, match="Full") as error:
        lorax.unmerge(lorax.merge(params, adapter), adapter)
    assert "head/kernel" in str(error.value)


# `Full`: biases, norms, whole leaves.


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [(".*bias", 7 + 7 + 3), ("norm/scale", 5), (".*", 5 + 35 + 7 + 35 + 7 + 21 + 3), ("head/.*", 21 + 3)],
)
def test_bitfit_norm_tuning_head_and_full_fine_tuning_are_specs(pattern: str, numbers: int) -> None:
    fn, params, args, adapter = make(lorax.Full(), pattern)
    assert count_numbers(adapter.params) == numbers
    assert all(set(arrays) == {"value"} for arrays in adapter.params.values())
    run = lambda f: jax.value_and_grad(lambda p: jnp.sum(jnp.sin(f(params, adapter.replace(params=p), *args))))(
        adapter.params
    )
    fast, merged = run(lorax.adapt(fn)), run(lambda p, a, x: fn(lorax.merge(p, a), x))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=TOL), fast, merged)
    assert all(np.any(np.asarray(g)) for g in jax.tree.leaves(fast[1]))
    lorax.adapt(fn, strict=True)(params, adapter, *args)


def test_full_starts_at_the_base_and_equals_ordinary_fine_tuning() -> None:
    fn, params, args, adapter = make(lorax.Full(), ".*", random=False)
    np.testing.assert_array_equal(lorax.adapt(fn)(params, adapter, *args), fn(params, *args))
    grad = jax.grad(lambda p: jnp.sum(fn(p, *args) ** 2))(params)
    mine = jax.grad(lambda p: jnp.sum(lorax.adapt(fn)(params, adapter.replace(params=p), *args) ** 2))(adapter.params)
    for path, value in leaves_by_path(grad).items():
        np.testing.assert_allclose(mine[path]["value"], value, atol=TOL)


def test_full_refuses_what_has_no_gradient() -> None:
    fn = lambda p, x: (x @ p["w"])[:, p["order"]]
    params = {"w": normal(2, 5, 5), "order": jnp.arange(5)}
    sites = lorax.trace(fn, params, X_BxI)
    with pytest.raises(ValueError, match="order"):
        lorax.init(jax.random.key(0), lorax.Spec({"order": lorax.Full()}), sites, params)
    adapter = lorax.init(jax.random.key(0), lorax.Spec({".*": lorax.Full()}), sites, params)
    assert set(adapter.params) == {"w"}


# Calling.


def test_keyword_arguments_and_python_values_reach_the_function() -> None:
    def fn(p, x, *, train=False, scale=None, mode="plain"):
        y = x @ p["w"]
        if train:
            y = y + 1
        if mode == "named":
            return {"y": y, "mode": mode}
        return y if scale is None else y * scale

    params = {"w": normal(2, 5, 5)}
    adapter = disturbed(
        lorax.init(jax.random.key(0), lorax.Spec({"w": lorax.LoRA(rank=2)}), lorax.trace(fn, params, X_BxI), params)
    )
    merged, adapted = lorax.merge(params, adapter), lorax.adapt(fn)
    for kwargs in ({}, {"train": True}, {"scale": jnp.float32(3)}, {"scale": 2.5}):
        np.testing.assert_allclose(adapted(params, adapter, X_BxI, **kwargs), fn(merged, X_BxI, **kwargs), atol=TOL)
    out = adapted(params, adapter, X_BxI, mode="named")
    assert out["mode"] == "named"
    np.testing.assert_allclose(out["y"], X_BxI @ merged["w"], atol=TOL)


def test_outputs_keep_their_containers() -> None:
    @flax.struct.dataclass
    class Output:
        y: jax.Array
        note: str = flax.struct.field(pytree_node=False)

    fn = lambda p, x: Output(x @ p["w"], "kept")
    params = {"w": normal(2, 5, 5)}
    adapter = lorax.init(
        jax.random.key(0), lorax.Spec({"w": lorax.LoRA(rank=2)}), lorax.trace(fn, params, X_BxI), params
    )
    out = lorax.adapt(fn)(params, adapter, X_BxI)
    assert isinstance(out, Output)
    assert out.note == "kept"


def test_effects_happen_once() -> None:
    seen = []

    def fn(p, x):
        y = x @ p["w"]
        jax.debug.callback(lambda total: seen.append(float(total)), y.sum())
        return y

    params = {"w": normal(2, 5, 5)}
    adapter = disturbed(
        lorax.init(jax.random.key(0), lorax.Spec({"w": lorax.LoRA(rank=2)}), lorax.trace(fn, params, X_BxI), params)
    )
    assert not seen, "trace ran the function"
    y = jax.jit(lorax.adapt(fn))(params, adapter, X_BxI)
    jax.effects_barrier()
    np.testing.assert_allclose(seen, [float(y.sum())], rtol=1e-5)


def test_adapted_functions_compose() -> None:
    """Adapted twice, inside a scan, under checkpoint, and with the gradient with respect to the input."""
    fn, params, args, inner = make(pattern="first/kernel")
    _, _, _, outer = make(lorax.LoRA(rank=1), pattern="head/kernel|first/kernel")
    both = lorax.adapt(lorax.adapt(fn))(params, outer, inner, *args)
    np.testing.assert_allclose(both, fn(lorax.merge(lorax.merge(params, outer), inner), *args), atol=TOL)

    merged = lorax.merge(params, outer)
    loss = lambda f: jax.grad(lambda x: jnp.sum(jnp.sin(jax.checkpoint(f)(x))))(*args)
    np.testing.assert_allclose(
        loss(lambda x: lorax.adapt(fn)(params, outer, x)), loss(lambda x: fn(merged, x)), atol=TOL
    )

    steps = jax.lax.scan(lambda c, x: (c, lorax.adapt(fn)(params, outer, x)), None, jnp.stack([*args, *args]))[1]
    np.testing.assert_allclose(steps[1], fn(merged, *args), atol=TOL)


def test_dropout_needs_a_key_and_is_unbiased() -> None:
    fn, params, args, adapter = make(lorax.LoRA(rank=2, dropout=0.5), "head/kernel")
    off = lorax.adapt(fn)(params, adapter, *args)
    np.testing.assert_allclose(off, fn(lorax.merge(params, adapter), *args), atol=TOL)
    run = jax.jit(jax.vmap(lambda key: lorax.adapt(fn)(params, adapter, *args, rng=key)))
    many = run(jax.random.split(jax.random.key(0), 4096))
    spread = jnp.std(many, axis=0)
    assert float(jnp.min(spread)) > 1e-3
    np.testing.assert_array_less(jnp.abs(many.mean(0) - off), 6 * spread / 4096**0.5)
    np.testing.assert_array_equal(run(jax.random.key(3)[None]), run(jax.random.key(3)[None]))


def test_batches_of_no_example() -> None:
    fn, params, _, adapter = make()
    assert lorax.adapt(fn)(params, adapter, X_BxI[:0]).shape == (0, 3)


def test_any_callable_is_accepted() -> None:
    fn, params, args, adapter = make()

    class Model:
        def __call__(self, p, x):
            return fn(p, x)

        def method(self, p, x):
            return fn(p, x)

    want = lorax.adapt(fn)(params, adapter, *args)
    for other in (Model(), Model().method, functools.partial(fn), jax.jit(fn), lambda p, x: jax.jit(fn)(p, x)):
        np.testing.assert_allclose(lorax.adapt(other)(params, adapter, *args), want, atol=TOL)


def test_vmap_over_the_base() -> None:
    """An ensemble of bases under one adapter, and one adapter for each base."""
    fn, params, args, adapter = make()
    bases = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    for axes, adapters in (
        ((0, None, None), adapter),
        ((0, 0, None), jax.tree.map(lambda x: jnp.stack([x, x]), adapter)),
    ):
        out = jax.vmap(lorax.adapt(fn), in_axes=axes)(bases, adapters, *args)
        for i in range(2):
            one = jax.tree.map(lambda x, i=i: x[i], bases)
            np.testing.assert_allclose(out[i], fn(lorax.merge(one, adapter), *args), atol=TOL)


def test_gradient_with_respect_to_base_and_input() -> None:
    """The base is frozen by not being differentiated; its gradient is right where somebody asks for it."""
    fn, params, args, adapter = make()
    run = lambda f: jax.grad(lambda p, x: jnp.sum(jnp.sin(f(p, adapter, x))), argnums=(0, 1))(params, *args)
    got, want = run(lorax.adapt(fn)), run(lambda p, a, x: fn(lorax.merge(p, a), x))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=TOL), got, want)


def test_adapter_survives_flattening_and_donation() -> None:
    fn, params, args, adapter = make()
    leaves, tree = jax.tree.flatten(adapter)
    assert tree.unflatten(leaves).plan == adapter.plan
    assert hash(tree) == hash(jax.tree.structure(tree.unflatten(leaves)))
    want = lorax.adapt(fn)(params, adapter, *args)
    step = jax.jit(lambda a: (lorax.adapt(fn)(params, a, *args), jax.tree.map(lambda x: x + 1, a)), donate_argnums=0)
    copied = jax.tree.map(jnp.copy, adapter)
    out, new = step(copied)
    np.testing.assert_allclose(out, want, atol=TOL)
    assert jax.tree.structure(new) == jax.tree.structure(adapter)
