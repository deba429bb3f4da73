"""The adapted function under JAX's transformations, and as a function of anything but arrays."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorax
from tests.agreement import F32_TOL, adapter_for, assert_agrees, assert_close, equations, normal, randomised, run

SECOND_TOL = 2e-4  # second derivatives, relative to the largest
X_BxD = normal(9, 3, 4)
PARAMS = {"up": normal(1, 4, 6), "down": normal(2, 6, 4), "layers": normal(3, 2, 4, 4), "bias": normal(4, 4)}


def fn(p: Any, x: Any) -> Any:
    x = jnp.tanh(x @ p["up"]) @ p["down"] + p["bias"]
    return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["layers"])[0]


ADAPTER = adapter_for(fn, PARAMS, X_BxD)
fast = lambda t, x=X_BxD: lorax.adapt(fn)(PARAMS, ADAPTER.replace(params=t), x)
slow = lambda t, x=X_BxD: fn(lorax.merge(PARAMS, ADAPTER.replace(params=t)), x)
TANGENT = randomised(ADAPTER.replace(params=jax.tree.map(jnp.zeros_like, ADAPTER.params)), 5).params


def both(transform: Any, *args: Any, tol: float = F32_TOL) -> None:
    """A transformation of the adapted function equals that of the merged one."""
    got, want = run(lambda *xs: (transform(fast)(*xs), transform(slow)(*xs)), *args)
    assert_close(got, want, tol)
    assert any(np.any(np.asarray(x)) for x in jax.tree.leaves(want))


total = lambda f: lambda t, x=X_BxD: jnp.sum(jnp.sin(f(t, x)))


def test_jit_equals_eager() -> None:
    assert_close(jax.jit(fast)(ADAPTER.params), fast(ADAPTER.params))
    both(lambda f: f, ADAPTER.params)


def test_gradients() -> None:
    both(lambda f: jax.value_and_grad(total(f), argnums=(0, 1)), ADAPTER.params, X_BxD)


def test_forward_mode() -> None:
    both(lambda f: lambda t, dt: jax.jvp(f, (t,), (dt,)), ADAPTER.params, TANGENT)


def test_linearize_and_its_transpose() -> None:
    both(lambda f: lambda t, dt: jax.linear_transpose(jax.linearize(f, t)[1], dt)(f(t)), ADAPTER.params, TANGENT)


def test_jacobians_forward_and_reverse() -> None:
    pick = lambda f: lambda b: f({**ADAPTER.params, "up": {**ADAPTER.params["up"], "b": b}})
    b = ADAPTER.params["up"]["b"]
    both(lambda f: jax.jacfwd(pick(f)), b)
    both(lambda f: jax.jacrev(pick(f)), b)
    got = run(lambda b: (jax.jacfwd(pick(fast))(b), jax.jacrev(pick(fast))(b)), b)
    assert_close(*got)


@pytest.mark.parametrize("order", ["hessian", "reverse over reverse", "forward over reverse", "reverse over forward"])
def test_second_order(order: str) -> None:
    pick = lambda f: lambda b: total(f)({**ADAPTER.params, "layers": {**ADAPTER.params["layers"], "b": b}})
    b = ADAPTER.params["layers"]["b"]
    db = TANGENT["layers"]["b"]
    transform = {
        "hessian": lambda f: lambda b, db: jax.hessian(pick(f))(b),
        "reverse over reverse": lambda f: jax.grad(lambda b, db: jnp.vdot(jax.grad(pick(f))(b), db)),
        "forward over reverse": lambda f: lambda b, db: jax.jvp(jax.grad(pick(f)), (b,), (db,))[1],
        "reverse over forward": lambda f: jax.grad(lambda b, db: jax.jvp(pick(f), (b,), (db,))[1]),
    }[order]
    both(transform, b, db, tol=SECOND_TOL)


def test_derivatives_agree_with_finite_differences() -> None:
    """A check that does not go through `merge`."""
    step = 1e-2
    along = lambda s: total(fast)(jax.tree.map(lambda x, dx: x + s * dx, ADAPTER.params, TANGENT))
    (value, slope), plus, minus = run(lambda: (jax.jvp(along, (0.0,), (1.0,)), along(step), along(-step)))
    np.testing.assert_allclose((plus - minus) / (2 * step), slope, rtol=2e-2)
    assert value != 0


def test_vmap_over_data_is_a_batch() -> None:
    both(lambda f: lambda t, x: jax.vmap(f, (None, 0))(t, x), ADAPTER.params, X_BxD)
    assert_close(run(jax.vmap(fast, (None, 0)), ADAPTER.params, X_BxD), run(fast, ADAPTER.params, X_BxD))


def test_vmap_over_adapters_and_over_pairs() -> None:
    members = [randomised(ADAPTER, seed) for seed in (1, 2, 3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    grads = jax.grad(total(fast))
    for in_axes, inputs in (((0, None), lambda i: X_BxD), ((0, 0), lambda i: X_BxD[i])):
        mapped = run(jax.vmap(grads, in_axes), stacked.params, X_BxD)
        loop = [run(grads, m.params, inputs(i)) for i, m in enumerate(members)]
        assert_close(mapped, jax.tree.map(lambda *x: jnp.stack(x), *loop))


def test_vmap_over_scales() -> None:
    """A sweep over alpha is a vmap over the adapter's state."""
    scales = jnp.array([0.0, 1.0, 4.0])
    scaled = lambda s: jax.tree.map(lambda x: s * x, ADAPTER.state)
    sweep = jax.vmap(lambda s: lorax.adapt(fn)(PARAMS, ADAPTER.replace(state=scaled(s)), X_BxD))
    outs = run(sweep, scales)
    assert_close(outs[0], fn(PARAMS, X_BxD))
    assert_close(outs[1], fast(ADAPTER.params))
    assert_close(outs[2], fn(lorax.merge(PARAMS, ADAPTER.replace(state=scaled(4.0))), X_BxD))


def test_one_large_product_for_the_base_under_vmap() -> None:
    """`x·W` of all adapters is one product with an unbatched W."""
    plain = lambda p, x: x @ p["up"]
    adapter = adapter_for(plain, PARAMS, X_BxD)
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 5), adapter)
    jaxpr = jax.make_jaxpr(jax.vmap(lambda a: lorax.adapt(plain)(PARAMS, a, X_BxD)))(stacked)
    shapes = [v.aval.shape for e in equations(jaxpr) if e.primitive is lax.dot_general_p for v in e.invars]
    assert (4, 6) in shapes
    assert (5, 4, 6) not in shapes


def test_checkpoint_around_the_adapted_function() -> None:
    both(lambda f: jax.grad(total(jax.checkpoint(f))), ADAPTER.params)


def test_scan_around_the_adapted_function() -> None:
    many = normal(8, 3, 3, 4)
    both(lambda f: lambda t: lax.scan(lambda c, x: (c + f(t, x), jnp.sum(f(t, c))), X_BxD, many), ADAPTER.params)


def test_training_inside_a_scan() -> None:
    def train(f: Any) -> Any:
        def step(t: Any, x: Any) -> Any:
            value, grads = jax.value_and_grad(total(f))(t, x)
            return jax.tree.map(lambda p, g: p - 0.1 * g, t, grads), value

        return lambda t: lax.scan(step, t, normal(8, 4, 3, 4))

    both(train, ADAPTER.params, tol=SECOND_TOL)


def test_while_and_cond_around_the_adapted_function() -> None:
    loop = lambda f: lambda t: lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, f(t, s[1])), (0, X_BxD))[1]
    both(loop, ADAPTER.params)
    both(lambda f: lambda t: lax.cond(jnp.sum(X_BxD) < 1e3, f, lambda t, x: x, t, X_BxD), ADAPTER.params)


def test_adapting_an_adapted_function() -> None:
    """The inner function's first argument is the params, its second an adapter: adapting twice adds both updates."""
    first = adapter_for(fn, PARAMS, X_BxD, seed=1)
    second = adapter_for(fn, PARAMS, X_BxD, method=lorax.LoRA(rank=1), only="up|layers", seed=2)
    twice = lambda p, a, b, x: lorax.adapt(lorax.adapt(fn))(p, b, a, x)
    merged = lambda p, a, b, x: fn(lorax.merge(lorax.merge(p, b), a), x)
    got, want = run(
        lambda a, b: [jax.value_and_grad(lambda p: jnp.sum(jnp.sin(f(*p, X_BxD))), allow_int=True)((PARAMS, a, b))
                      for f in (twice, merged)],
        first, second,
    )  # fmt: skip
    assert_close(got, want, 5 * F32_TOL)


def test_an_adapter_of_an_adapters_factors() -> None:
    """The adapted function is a function of its adapter's params, which are leaves like any others."""
    of_factors = lambda t, x: fast(t, x)
    sites = lorax.trace(of_factors, ADAPTER.params, X_BxD)
    assert {s.path for s in sites if s.is_adaptable} == {f"{p}/{n}" for p in ADAPTER.params for n in "ab"}
    outer = adapter_for(of_factors, ADAPTER.params, X_BxD, method=lorax.LoRA(rank=1))
    assert_agrees(of_factors, ADAPTER.params, outer, X_BxD)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, functools.partial(jax.jit, donate_argnums=1)])
def test_a_function_that_is_wrapped_already(wrap: Any) -> None:
    wrapped = wrap(fn)
    got = lorax.adapt(wrapped)(PARAMS, ADAPTER, jnp.array(X_BxD))
    assert_close(got, slow(ADAPTER.params))
    assert [s.path for s in lorax.trace(wrapped, PARAMS, X_BxD) if s.is_adaptable] == ["down", "layers", "up"]
    assert {r.how for r in lorax.explain(wrapped, PARAMS, ADAPTER, X_BxD)} == {"factored"}


def test_static_arguments_of_an_inner_jit() -> None:
    inner = jax.jit(
        lambda p, x, how, *, power: getattr(jnp, how)(x @ p["up"]) ** power, static_argnames=("how", "power")
    )
    got = lorax.adapt(inner)(
        PARAMS, adapter := adapter_for(inner, PARAMS, X_BxD, "tanh", power=2), X_BxD, "tanh", power=2
    )
    assert_close(got, inner(lorax.merge(PARAMS, adapter), X_BxD, "tanh", power=2))


# What is no array.


def described(p: Any, x: Any, scale: float = 1.0, *, mode: str = "tanh", extra: Any = None, layers: int = 2) -> Any:
    for _ in range(layers):
        x = getattr(jnp, mode)(x @ p["up"] * scale) @ p["down"]
    x = x if extra is None else x + extra["shift"]
    return {"y": x, "mode": mode, "shape": x.shape, "none": None, "many": [x, layers, "text"]}


def test_python_arguments_and_outputs_pass_through() -> None:
    adapter = adapter_for(lambda p, x: described(p, x)["y"], PARAMS, X_BxD)
    args, kwargs = (X_BxD, 0.5), {"mode": "sin", "extra": {"shift": jnp.ones(4), "note": "kept"}, "layers": 3}
    got = lorax.adapt(described)(PARAMS, adapter, *args, **kwargs)
    want = described(lorax.merge(PARAMS, adapter), *args, **kwargs)
    assert {k: v for k, v in got.items() if k not in ("y", "many")} == {
        "mode": "sin", "shape": (3, 4), "none": None,
    }  # fmt: skip
    assert got["many"][1:] == [3, "text"]
    assert_close([got["y"], got["many"][0]], [want["y"], want["many"][0]])
    sites = lorax.trace(described, PARAMS, *args, **kwargs)
    assert [s.path for s in sites if s.is_adaptable] == ["down", "up"]
    assert {r.how for r in lorax.explain(described, PARAMS, adapter, *args, **kwargs)} == {"factored"}


def test_numpy_arguments_and_numbers_keep_their_types() -> None:
    adapter = adapter_for(lambda p, x: x @ p["up"], PARAMS, X_BxD)
    weak = lambda p, x, s: x.astype(jnp.bfloat16) * s @ p["up"].astype(jnp.bfloat16)
    got = lorax.adapt(weak)(PARAMS, adapter, np.asarray(X_BxD), 2.0)
    want = jax.jit(weak, static_argnums=2)(PARAMS, np.asarray(X_BxD), 2.0)  # NumPy itself would promote
    assert got.dtype == want.dtype == jnp.bfloat16


def test_integer_and_boolean_outputs_and_arguments() -> None:
    heads = lambda p, ids, mask: (jnp.argmax(p["up"][ids] @ p["down"], -1), jnp.where(mask, ids, 0), mask)
    ids, mask = jnp.array([0, 3, 1]), jnp.array([True, False, True])
    adapter = adapter_for(heads, PARAMS, ids, mask)
    got, want = lorax.adapt(heads)(PARAMS, adapter, ids, mask), heads(lorax.merge(PARAMS, adapter), ids, mask)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_keys_as_arguments_and_the_functions_own_rng() -> None:
    noisy = lambda p, x, key: x @ p["up"] + jax.random.normal(key, (6,)) + jax.random.uniform(jax.random.key(0), (6,))
    for key in (jax.random.key(3), jax.random.PRNGKey(3)):
        adapter = adapter_for(noisy, PARAMS, X_BxD, key)
        got = lorax.adapt(noisy)(PARAMS, adapter, X_BxD, key)
        assert_close(got, noisy(lorax.merge(PARAMS, adapter), X_BxD, key))


def test_errors_of_the_function_come_through() -> None:
    def broken(p: Any, x: Any) -> Any:
        raise LookupError("no such layer")

    with pytest.raises(LookupError, match="no such layer"):
        lorax.adapt(broken)(PARAMS, ADAPTER, X_BxD)
    with pytest.raises(TypeError):
        lorax.adapt(fn)(PARAMS, ADAPTER)


def test_the_name_and_docstring_stay() -> None:
    def documented(p: Any, x: Any) -> Any:
        """Say what it does."""
        return x @ p["up"]

    assert lorax.adapt(documented).__name__ == "documented"
    assert lorax.adapt(documented).__doc__ == "Say what it does."
