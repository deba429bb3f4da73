"""What a scan over rescaled weights keeps for its backward pass: the products, instead of what follows from them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorax
from lorax.interpret import residuals
from tests.agreement import F32_TOL, adapter_for, assert_close, equations, normal, run, value_and_grads

LAYERS, ROWS, WIDTH = 5, 96, 32
PARAMS = {
    "up": normal(1, LAYERS, WIDTH, 3 * WIDTH, scale=0.2),
    "down": normal(2, LAYERS, 3 * WIDTH, WIDTH, scale=0.2),
    "scale": 1 + normal(3, LAYERS, WIDTH, scale=0.1),
}
X = normal(4, ROWS, WIDTH)


def layer(x: Any, p: Any) -> tuple[Any, None]:
    """Normalisation, a product, elementwise operations that need their input, a product, the residual stream."""
    h = x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * p["scale"]
    h = h @ p["up"]
    h = jnp.tanh(h) * jax.nn.relu(h[:, ::-1]) * h
    return x + h @ p["down"], None


def scanned(step: Any) -> Any:
    return lambda p, x: lax.scan(step, x, p)[0]


def unrolled(p: Any, x: Any) -> Any:
    for i in range(LAYERS):
        x, _ = layer(x, jax.tree.map(lambda leaf, i=i: leaf[i], p))
    return x


def gradient(fn: Any, method: lorax.Method, params: Any = PARAMS, rng: Any = None) -> Any:
    """A gradient step, traced."""
    adapter = adapter_for(fn, PARAMS, X, method=method, only="up|down")
    loss = lambda t, p, x: jnp.sum(jnp.sin(lorax.adapt(fn)(p, adapter.replace(params=t), x, rng=rng)))
    return jax.jit(jax.grad(loss)).trace(adapter.params, params, X)


def kept(traced: Any) -> list[tuple[int, ...]]:
    """Shapes of what a scan's forward pass stacks for each row of a layer's activations."""
    forward = next(e for e in equations(traced.jaxpr) if e.primitive.name == "scan")
    return sorted(v.aval.shape[1:] for v in forward.outvars if v.aval.ndim == 3 and v.aval.shape[1] == ROWS)


def temporaries(traced: Any) -> int:
    return traced.lower().compile().memory_analysis().temp_size_in_bytes


def test_a_scan_keeps_products_and_what_is_dear() -> None:
    rank, hidden, width = (ROWS, 2), (ROWS, 3 * WIDTH), (ROWS, WIDTH)
    got = kept(gradient(scanned(layer), lorax.DoRA(rank=2)))
    # Both products, x·A of both, tanh of the hidden units, where they are positive, and the carry.
    assert [s for s in got if s[1] > 1] == sorted([width, width, hidden, hidden, hidden, rank, rank])


@pytest.mark.parametrize("stored", [None, lorax.NF4(block=32)], ids=["float32", "nf4"])
def test_the_step_takes_no_more_memory_than_loras(stored: Any) -> None:
    fn = scanned(layer)
    sites = lorax.trace(fn, PARAMS, X)
    params = lorax.quantize(PARAMS, {"up|down": stored}, sites=sites) if stored else PARAMS
    dora, lora = (temporaries(gradient(fn, method(rank=2), params)) for method in (lorax.DoRA, lorax.LoRA))
    assert dora <= 1.05 * lora


@pytest.mark.parametrize("method", [lorax.DoRA(rank=2), lorax.DoRA(rank=2, initializer="pissa")], ids=["dora", "pissa"])
def test_value_and_gradients_are_those_of_a_loop(method: lorax.Method) -> None:
    adapter = adapter_for(scanned(layer), PARAMS, X, method=method, only="up|down")
    forms = [lorax.adapt(scanned(layer)), lambda p, a, x: unrolled(lorax.merge(p, a), x)]
    got, want = run(lambda a, x: [value_and_grads(lambda a, x, f=f: f(PARAMS, a, x), a, x) for f in forms], adapter, X)
    assert_close(got, want, 20 * F32_TOL)


@pytest.mark.slow
def test_forward_mode_second_derivatives_and_vmap_agree_with_the_backward_pass() -> None:
    adapter = adapter_for(scanned(layer), PARAMS, X, method=lorax.DoRA(rank=2, dropout=0.5), only="up|down")
    tangent = jax.tree.map(jnp.cos, adapter.params)
    dot = lambda a, b: sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

    def everything(params: Any) -> Any:
        def total(t: Any, x: Any = X) -> Any:
            out = lorax.adapt(scanned(layer))(PARAMS, adapter.replace(params=t), x, rng=jax.random.key(3))
            return jnp.sum(jnp.sin(out))

        grad = jax.grad(total)
        forward, backward = jax.jvp(total, (params,), (tangent,))[1], dot(grad(params), tangent)
        twice = jax.jvp(grad, (params,), (tangent,))[1], jax.grad(lambda t: dot(grad(t), tangent))(params)
        many = jax.vmap(jax.grad(total, argnums=1), (None, 0))(params, jnp.stack([X, 2 * X]))[0]
        return (forward, *twice[:1], many), (backward, *twice[1:], jax.grad(total, argnums=1)(params, X))

    got, want = run(everything, adapter.params)
    assert_close(got, want, 50 * F32_TOL)


def frozen_sum(x: Any, p: Any) -> tuple[Any, None]:
    """Products without a gain, of which the model as it is needs only the sum, or only a part."""
    h = sum(jnp.roll(x, i, 0) @ p["down"].T for i in range(4)) ** 2
    wide = (x @ p["up"])[:, :WIDTH]
    return x + jnp.sin(wide) * jnp.mean(h, -1, keepdims=True) + x @ p["square"], None


def test_of_products_without_a_gain_no_more_is_kept_than_without_dora() -> None:
    params = {**PARAMS, "square": normal(5, LAYERS, WIDTH, WIDTH, scale=0.2)}

    def step(method: lorax.Method) -> Any:
        adapter = adapter_for(scanned(frozen_sum), params, X, method=method, only="square")
        run = lambda t, p, x: jnp.sum(lorax.adapt(scanned(frozen_sum))(p, adapter.replace(params=t), x))
        return kept(jax.jit(jax.grad(run)).trace(adapter.params, params, X))

    assert step(lorax.DoRA(rank=2)) == sorted([*step(lorax.LoRA(rank=2)), (ROWS, WIDTH)]), "its own product"


def test_complex_numbers_are_left_alone() -> None:
    """JAX 0.10 to 0.12 fail to round a complex residual of `jax.checkpoint`."""

    def mixing(x: Any, p: Any) -> tuple[Any, None]:
        return layer(jnp.square(x + 0.1 * jnp.fft.fft(x).real), p)[0], None

    adapter = adapter_for(scanned(mixing), PARAMS, X, method=lorax.DoRA(rank=2), only="up|down")
    forms = [lorax.adapt(scanned(mixing)), lambda p, a, x: scanned(mixing)(lorax.merge(p, a), x)]
    got, want = run(lambda a, x: [jax.grad(lambda x, f=f: jnp.sum(f(PARAMS, a, x)))(x) for f in forms], adapter, X)
    assert_close(got, want, 1e-3)


@pytest.mark.parametrize("policy", ["nothing_saveable", "everything_saveable", "dots_saveable"])
def test_a_layer_that_says_what_it_keeps_is_left_alone(policy: str) -> None:
    policy = getattr(jax.checkpoint_policies, policy)
    traced = gradient(scanned(jax.checkpoint(layer, policy=policy)), lorax.DoRA(rank=2))
    policies = {e.params["policy"] for e in equations(traced.jaxpr) if e.primitive.name in ("checkpoint", "remat2")}
    assert policies == {policy}
    if policy is jax.checkpoint_policies.nothing_saveable:
        assert kept(traced) == [(ROWS, WIDTH)], "the carry alone"


def test_of_other_methods_nothing_is_computed_again() -> None:
    for method in (lorax.LoRA(rank=2), lorax.LoRA(rank=2, initializer="pissa"), lorax.LoHa(rank=2)):
        traced = gradient(scanned(layer), method)
        assert not [e for e in equations(traced.jaxpr) if e.primitive.name in ("checkpoint", "remat2")], method


def test_effects_of_a_layer_run_once() -> None:
    seen: list[float] = []

    def told(x: Any, p: Any) -> tuple[Any, None]:
        jax.debug.callback(lambda v: seen.append(float(v)), p["scale"][0], ordered=True)
        return layer(x, p)

    traced = gradient(scanned(told), lorax.DoRA(rank=2))
    adapter = adapter_for(scanned(layer), PARAMS, X, method=lorax.DoRA(rank=2), only="up|down")
    traced.lower().compile()(adapter.params, PARAMS, X)
    jax.effects_barrier()
    np.testing.assert_allclose(seen, PARAMS["scale"][:, 0])


def test_a_call_is_as_dear_as_what_is_inside() -> None:
    def keeps(fn: Any) -> bool:
        eqn = next(e for e in equations(jax.make_jaxpr(fn)(X)) if e.primitive.name == "custom_jvp_call")
        return residuals.keeps(eqn.primitive, *(v.aval for v in eqn.invars), **eqn.params)

    dear = jax.custom_jvp(lambda x: jnp.exp(x) + 1)
    dear.defjvps(lambda t, out, x: t * (out - 1))
    assert not keeps(jax.nn.relu)
    assert keeps(dear)
