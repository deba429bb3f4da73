"""Control flow around adapted weights: scan, while, cond, remat, custom derivatives, and outputs nobody reads."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import lorax
from tests.agreement import F32_TOL, adapter_for, assert_agrees, assert_close, equations, how, normal

L, D = 3, 4
X_BxD = normal(9, 2, D)


def check(fn: Callable[..., Any], params: Any, *args: Any, expected: Any = "factored", **kwargs: Any) -> Any:
    """Values and gradients are right, and each site is evaluated as expected."""
    adapter = adapter_for(fn, params, *args, **kwargs)
    found = how(fn, params, adapter, *args)
    assert found == (dict.fromkeys(found, expected) if isinstance(expected, str) else expected)
    assert_agrees(fn, params, adapter, *args)
    return adapter


def layer(x: Any, w: Any) -> tuple[Any, None]:
    return jnp.tanh(x @ w), None


# Scan.


@pytest.mark.parametrize("unroll", [1, 2, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_scanned_stack(reverse: bool, unroll: Any) -> None:
    fn = lambda p, x: lax.scan(layer, x, p["w"], reverse=reverse, unroll=unroll)[0]
    adapter = check(fn, {"w": normal(1, L, D, D)}, X_BxD)
    assert {n: x.shape for n, x in adapter.params["w"].items()} == {"a": (L, D, 2), "b": (L, 2, D)}


@pytest.mark.parametrize("axis", [1, 2])
def test_a_stack_on_another_axis(axis: int) -> None:
    """The leaf keeps its stacked axis where it is; the function moves it in front of the scan."""
    fn = lambda p, x: lax.scan(layer, x, jnp.moveaxis(p["w"], axis, 0))[0]
    shape = [D, D]
    shape.insert(axis, L)
    params = {"w": normal(1, *shape)}
    site = lorax.trace(fn, params, X_BxD)["w"]
    assert site.stack == (axis,)
    assert site.fan_in == (0,)
    adapter = check(fn, params, X_BxD)
    assert adapter.params["w"]["a"].shape == (L, D, 2)


def test_a_scan_by_hand() -> None:
    """Two linear layers: `x·(W₀+ΔW₀)·(W₁+ΔW₁)` with each layer's own factors."""
    fn = lambda p, x: lax.scan(lambda c, w: (c @ w, None), x, p["w"])[0]
    params = {"w": normal(1, 2, D, D)}
    adapter = adapter_for(fn, params, X_BxD)
    a, b = adapter.params["w"]["a"], adapter.params["w"]["b"]
    want = X_BxD @ (params["w"][0] + 1.5 * a[0] @ b[0]) @ (params["w"][1] + 1.5 * a[1] @ b[1])
    assert_close(lorax.adapt(fn)(params, adapter, X_BxD), want)


def test_nested_scans() -> None:
    outer = lambda x, w: (lax.scan(layer, x, w)[0], None)
    fn = lambda p, x: lax.scan(outer, x, p["w"])[0]
    adapter = check(fn, {"w": normal(1, 2, L, D, D)}, X_BxD)
    assert adapter.params["w"]["a"].shape == (2, L, D, 2)


def test_a_weight_shared_by_all_steps() -> None:
    fn = lambda p, xs: lax.scan(lambda c, x: (jnp.tanh(c @ p["w"] + x), c @ p["o"]), jnp.zeros(D), xs)
    check(fn, {"w": normal(1, D, D), "o": normal(2, D, 3)}, normal(3, 5, D))


def test_a_carried_weight_that_is_handed_on_stays_factored() -> None:
    def fn(p: Any, xs: Any) -> Any:
        step = lambda carry, x: ((carry[0], jnp.tanh(carry[1] @ carry[0] + x)), None)
        (w, y), _ = lax.scan(step, (p["w"], jnp.zeros(D)), xs)
        return y @ w.T

    check(fn, {"w": normal(1, D, D)}, normal(3, 5, D))


def test_a_carried_weight_that_changes_is_built() -> None:
    def fn(p: Any, xs: Any) -> Any:
        step = lambda carry, x: ((carry[1], carry[0], x @ carry[0] + carry[2]), None)
        y = lax.scan(step, (p["v"], p["w"], jnp.zeros(D)), xs)[0][2]
        return y @ p["v"] @ p["w"]

    params = {"w": normal(1, D, D), "v": normal(2, D, D)}
    adapter = check(fn, params, normal(3, 5, D), expected="materialised")
    assert set(adapter.params) == {"w", "v"}


def test_outputs_of_each_step_and_other_scanned_leaves() -> None:
    def step(x: Any, leaves: Any) -> Any:
        x = jnp.tanh(x @ leaves["w"] + leaves["b"])
        return x, {"norm": jnp.sum(x**2), "x": x}

    fn = lambda p, x: lax.scan(step, x, p)
    check(fn, {"w": normal(1, L, D, D), "b": normal(2, L, D)}, X_BxD)


def test_a_scan_of_no_step() -> None:
    fn = lambda p, x: (lax.scan(layer, x, p["w"])[0], x @ p["o"])
    check(fn, {"w": normal(1, 0, D, D), "o": normal(2, D, D)}, X_BxD, only="o")


def test_associative_scan_and_map_over_inputs() -> None:
    fn = lambda p, xs: (lax.map(lambda x: x @ p["w"], xs), lax.associative_scan(jnp.add, xs @ p["w"]))
    check(fn, {"w": normal(1, D, D)}, normal(2, 5, D))


# While and cond.


def test_while_with_a_weight_in_its_condition_and_body() -> None:
    def fn(p: Any, x: Any) -> Any:
        cond = lambda s: (s[0] < 4) & (jnp.sum(s[1] @ p["w"]) < 1e3)
        return lax.while_loop(cond, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"] @ p["o"])), (0, x))[1]

    params = {"w": normal(1, D, 5), "o": normal(2, 5, D)}
    adapter = adapter_for(fn, params, X_BxD)
    assert set(how(fn, params, adapter, X_BxD).values()) == {"factored"}
    assert_close(lorax.adapt(fn)(params, adapter, X_BxD), fn(lorax.merge(params, adapter), X_BxD))


def test_fori_loop_over_layers_has_reverse_mode() -> None:
    fn = lambda p, x: lax.fori_loop(0, L, lambda i, x: jnp.tanh(x @ p["w"][i]), x)
    adapter = check(fn, {"w": normal(1, L, D, D)}, X_BxD)
    assert adapter.params["w"]["a"].shape == (L, D, 2)


def test_a_while_loop_under_vmap_ends_for_each_member_by_itself() -> None:
    """What vmap makes of one has a condition a member."""

    def one(p: Any, x: Any) -> Any:
        cond = lambda s: (s[0] < 4) & (jnp.sum(s[1] @ p["w"]) < 1.0)
        return lax.while_loop(cond, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"] @ p["o"])), (0, x))

    fn = lambda p, x: jax.vmap(lambda x: one(p, x))(x)
    params, x = {"w": normal(1, D, 5), "o": normal(2, 5, D)}, normal(9, 6, D, scale=1.0)
    adapter = adapter_for(fn, params, x)
    assert set(how(fn, params, adapter, x).values()) == {"factored"}
    merged = lorax.merge(params, adapter)
    counts, want = jnp.stack([one(merged, row)[0] for row in x]), jnp.stack([one(merged, row)[1] for row in x])
    assert len(set(counts.tolist())) > 2, counts
    for got in (lorax.adapt(fn)(params, adapter, x), jax.vmap(lambda x: lorax.adapt(one)(params, adapter, x))(x)):
        assert got[0].tolist() == counts.tolist()
        assert_close(got[1], want)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_switch_with_weights_of_its_branches(index: int) -> None:
    def fn(p: Any, x: Any, i: Any) -> Any:
        return lax.switch(i, [lambda x: x @ p["w"], lambda x: jnp.sin(x @ p["v"].T), lambda x: x], x)

    params = {"w": normal(1, D, D), "v": normal(2, D, D)}
    adapter = adapter_for(fn, params, X_BxD, jnp.int32(1))
    assert how(fn, params, adapter, X_BxD, jnp.int32(1)) == {"w": "factored", "v": "factored"}
    run = lambda f: jax.value_and_grad(lambda t: jnp.sum(jnp.sin(f(t))))(adapter.params)
    index = jnp.int32(index)
    got = run(lambda t: lorax.adapt(fn)(params, adapter.replace(params=t), X_BxD, index))
    want = run(lambda t: fn(lorax.merge(params, adapter.replace(params=t)), X_BxD, index))
    assert_close(got, want)


def test_cond_that_returns_a_weight() -> None:
    def fn(p: Any, x: Any, flag: Any) -> Any:
        return x @ lax.cond(flag, lambda: p["w"], lambda: p["v"] * 2.0)

    params = {"w": normal(1, D, D), "v": normal(2, D, D)}
    for flag in (True, False):
        adapter = adapter_for(fn, params, X_BxD, jnp.array(flag))
        assert set(adapter.params) == {"w", "v"}
        assert_agrees(fn, params, adapter, X_BxD, jnp.array(flag))


# Rematerialisation.


def count(fn: Any, primitive: Any, *args: Any) -> int:
    return sum(e.primitive is primitive for e in equations(jax.make_jaxpr(fn)(*args)))


@pytest.mark.parametrize("policy", ["nothing_saveable", "everything_saveable", "dots_saveable"])
def test_remat_keeps_its_policy(policy: str) -> None:
    block = lambda p, x: jnp.sin(jnp.sin(x @ p["w"]) @ p["v"])
    fn = jax.checkpoint(block, policy=getattr(jax.checkpoint_policies, policy))
    params = {"w": normal(1, D, 6), "v": normal(2, 6, D)}
    adapter = check(fn, params, X_BxD)

    def dots(f: Any) -> int:
        loss = lambda t: jnp.sum(lorax.adapt(f)(params, adapter.replace(params=t), X_BxD))
        return count(jax.grad(loss), lax.dot_general_p, adapter.params)

    recomputed = dots(fn) - dots(block)
    if policy == "nothing_saveable":
        assert recomputed > 0
    else:
        assert recomputed == 0


def test_remat_by_names_saves_what_is_named_and_no_more() -> None:
    block = lambda p, x: jnp.sin(checkpoint_name(jnp.sin(x @ p["w"]), "hidden") @ p["v"])
    policies = [jax.checkpoint_policies.save_only_these_names(name) for name in ("hidden", "other")]
    params = {"w": normal(1, D, 6), "v": normal(2, 6, D)}
    adapter = adapter_for(block, params, X_BxD)
    sines = []
    for policy in policies:
        fn = jax.checkpoint(block, policy=policy)
        loss = lambda t, fn=fn: jnp.sum(lorax.adapt(fn)(params, adapter.replace(params=t), X_BxD))
        sines.append(count(jax.grad(loss), lax.sin_p, adapter.params))
        assert_agrees(fn, params, adapter, X_BxD)
    assert sines[0] < sines[1]


def test_remat_inside_scan_inside_remat() -> None:
    step = jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_saveable)
    fn = jax.checkpoint(lambda p, x: lax.scan(step, x, p["w"])[0])
    check(fn, {"w": normal(1, L, D, D)}, X_BxD)


def test_remat_with_prevent_cse_off_keeps_it() -> None:
    fn = jax.checkpoint(lambda p, x: jnp.sin(x @ p["w"]), prevent_cse=False)
    params = {"w": normal(1, D, D)}
    adapter = check(fn, params, X_BxD)
    found = [e for e in equations(jax.make_jaxpr(lorax.adapt(fn))(params, adapter, X_BxD)) if "prevent_cse" in e.params]
    assert [e.params["prevent_cse"] for e in found] == [False]


# Custom derivatives.


@jax.custom_jvp
def halved(w: Any, x: Any) -> Any:
    return x @ w


@halved.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (w, x), (dw, dx) = primals, tangents
    return x @ w, 0.5 * (x @ dw) + 3.0 * (dx @ w)


@jax.custom_vjp
def clipped(w: Any, x: Any) -> Any:
    return x @ w


def _clipped_forward(w: Any, x: Any) -> Any:
    return x @ w, (w, x)


def _clipped_backward(kept: Any, dy: Any) -> Any:
    w, x = kept
    return jnp.clip(x.T @ dy, -0.1, 0.1), 3.0 * (dy @ w.T)


clipped.defvjp(_clipped_forward, _clipped_backward)


@pytest.mark.parametrize(("product", "expected"), [(halved, "factored"), (clipped, "materialised")])
def test_the_authors_derivative_of_a_weight_is_kept(product: Any, expected: str) -> None:
    params = {"w": normal(1, D, D)}
    fn = lambda p, x: jnp.sin(product(p["w"], x))
    adapter = check(fn, params, X_BxD, expected=expected)
    grads = [
        jax.grad(lambda t, f=f: jnp.sum(lorax.adapt(f)(params, adapter.replace(params=t), X_BxD)))(adapter.params)
        for f in (fn, lambda p, x: jnp.sin(x @ p["w"]))
    ]
    assert not np.allclose(grads[0]["w"]["b"], grads[1]["w"]["b"], atol=100 * F32_TOL), "the derivative is no other one"


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, jax.jit])
def test_the_authors_derivative_in_a_scanned_layer(wrap: Any) -> None:
    @jax.custom_vjp
    def squared(x: Any) -> Any:
        return x * jnp.abs(x)

    squared.defvjp(lambda x: (squared(x), x), lambda x, dy: (dy * 7.0,))
    fn = lambda p, x: lax.scan(wrap(lambda c, w: (squared(c @ w), None)), x, p["w"])[0]
    check(fn, {"w": normal(1, L, D, D)}, X_BxD)


def test_static_arguments_of_custom_derivatives() -> None:
    product = jax.custom_vjp(lambda how, w, x: x @ w if how == "right" else w @ x, nondiff_argnums=(0,))
    product.defvjp(
        lambda how, w, x: (product(how, w, x), (w, x)), lambda how, kept, dy: (2.0 * kept[1].T @ dy, dy @ kept[0].T)
    )
    check(lambda p, x: product("right", p["w"], x), {"w": normal(1, D, D)}, X_BxD, expected="materialised")


# Outputs that nobody reads.


def passing_on(kind: str) -> Callable[..., Any]:
    """A function whose inner construct also returns its weights, which the outside drops."""
    body = lambda c, w: (jnp.tanh(c @ w), {"weights": w, "turned": w.T, "flat": w.reshape(-1)})
    if kind == "scan":
        return lambda p, x: lax.scan(body, x, p["w"])[0]
    if kind == "remat in scan":
        return lambda p, x: lax.scan(jax.checkpoint(body), x, p["w"])[0]
    wrap = {
        "jit": jax.jit,
        "remat": jax.checkpoint,
        "cond": lambda f: lambda c, w: lax.cond(c[0, 0] > -10, f, lambda c, w: (c, body(c, w)[1]), c, w),
    }[kind]
    return lambda p, x: wrap(body)(wrap(body)(x, p["w"][0])[0], p["w"][1])[0]


@pytest.mark.parametrize("kind", ["scan", "remat in scan", "jit", "remat", "cond"])
def test_outputs_that_nobody_reads_build_nothing(kind: str) -> None:
    fn = passing_on(kind)
    params = {"w": normal(1, L, D, D)}
    adapter = adapter_for(fn, params, X_BxD)
    assert how(fn, params, adapter, X_BxD) == {"w": "factored"}
    jaxpr = jax.make_jaxpr(lorax.adapt(fn, strict=True))(params, adapter, X_BxD)
    products = [e for e in equations(jaxpr) if e.primitive is lax.dot_general_p]
    assert products
    assert not [e for e in products if e.outvars[0].aval.shape == (D, D)]
    assert_agrees(fn, params, adapter, X_BxD)


def test_a_weight_that_is_returned_is_the_merged_one() -> None:
    fn = lambda p, x: (x @ p["w"], p["w"], jax.jit(lambda w: w.T)(p["w"]))
    params = {"w": normal(1, D, 5)}
    adapter = check(fn, params, X_BxD, expected="materialised")
    _, merged, turned = lorax.adapt(fn)(params, adapter, X_BxD)
    assert_close(merged, lorax.merge(params, adapter)["w"])
    assert_close(turned, lorax.merge(params, adapter)["w"].T)


def test_a_whole_computation_that_nobody_reads_is_not_run() -> None:
    def fn(p: Any, x: Any) -> Any:
        jnp.linalg.svd(p["w"])
        lax.scan(lambda c, w: (jnp.sort(w), None), jnp.zeros((D, D)), p["v"])
        return x @ p["w"] @ p["v"][0]

    params = {"w": normal(1, D, D), "v": normal(2, L, D, D)}
    adapter = adapter_for(fn, params, X_BxD)
    assert how(fn, params, adapter, X_BxD) == {"w": "factored", "v": "factored"}
    assert not [
        e for e in equations(jax.make_jaxpr(lorax.adapt(fn))(params, adapter, X_BxD)) if e.primitive is lax.sort_p
    ]


def test_effects_in_dead_computations_happen() -> None:
    seen: list[float] = []

    def fn(p: Any, x: Any) -> Any:
        jax.debug.callback(lambda total: seen.append(float(total)), jnp.sum(p["w"]))
        return x @ p["w"]

    params = {"w": normal(1, D, D)}
    adapter = adapter_for(fn, params, X_BxD)
    lorax.adapt(fn)(params, adapter, X_BxD)
    jax.effects_barrier()
    assert_close(np.float32(seen), np.float32([np.sum(lorax.merge(params, adapter)["w"])]))


def test_named_calls_and_inner_jit_keep_output_shardings() -> None:
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    inner = jax.jit(lambda w, x: x @ w, out_shardings=where)
    fn = lambda p, x: jax.named_call(inner, name="projection")(p["w"], x)
    params = {"w": normal(1, D, D)}
    adapter = check(fn, params, X_BxD)
    found = equations(jax.make_jaxpr(lorax.adapt(fn))(params, adapter, X_BxD))
    constraints = [e for e in found if e.primitive is lax.sharding_constraint_p]
    assert [e.params["sharding"] for e in constraints] == [where]
