"""DoRA against a plain implementation: the magnitude, the norm without gradient or weight, and its cost."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorax
from experiments.bench.decoder import Shape, decoder, init_params, loss
from tests.agreement import (
    BF16_TOL,
    F32_TOL,
    adapter_for,
    assert_close,
    assert_identical,
    equations,
    how,
    normal,
    randomised,
    run,
    value_and_grads,
)
from tests.contract import FORMS, D, F, X, moved, started

DORA = lorax.DoRA(rank=2, alpha=3)
FLOPS_OVER_LORA, MEMORY_OVER_LORA = 1.10, 1.05
dense = lambda p, x: x @ p["w"]
PARAMS = {"w": normal(1, D, F)}


def reference(site: lorax.Site, w: Any, arrays: Any, scale: float = 1.5, stopped: bool = True) -> Any:
    """`m · (W + s·A·B) / ‖W + s·A·B‖`, one matrix after another, with the weight built."""
    order = site.axes("SIO")
    size = [site.size(side) for side in "SIO"]
    rank = arrays["a"].shape[-1]
    w_SxIxO = w.transpose(order).reshape(size)
    product = lambda a, b: a.reshape(size[0], size[1], rank) @ b.reshape(size[0], rank, size[2])
    whole = w_SxIxO + scale * product(arrays["a"], arrays["b"])
    if "a0" in arrays:
        whole = whole - scale * product(arrays["a0"], arrays["b0"])
    norm = jnp.sqrt(jnp.sum(whole**2, axis=1, keepdims=True))
    norm = lax.stop_gradient(norm) if stopped else norm
    made = arrays["magnitude"].reshape(size[0], 1, size[2]) * whole / norm
    return made.reshape(site.dims("SIO")).transpose([order.index(a) for a in range(len(order))])


def by_reference(name: str, adapter: Any, stopped: bool = True) -> Any:
    """The form of the reference's weight, a function of the adapter and the input."""
    form, site = FORMS[name], adapter.sites["w"]
    weight = lambda a: reference(site, form.params["w"], a.arrays("w"), stopped=stopped)
    return lambda a, x: form.fn({**form.params, "w": weight(a)}, x)


CHECKED = ("linear", "heads in", "conv grouped and dilated", "tied embedding", "ragged", "experts", "nested scan")


@pytest.mark.parametrize("name", CHECKED)
def test_it_is_the_plain_implementation_in_value_and_gradient(name: str) -> None:
    form, adapter = FORMS[name], moved(name, "DoRA")
    adapted = lambda a, x: lorax.adapt(form.fn)(form.params, a, x)
    forms = [lambda a, x, f=f: value_and_grads(f, a, x) for f in (adapted, by_reference(name, adapter))]
    got, want = run(lambda a, x: [f(a, x) for f in forms], adapter, form.x)
    assert_close(got[0], want[0])
    assert_close(got[1], want[1], 5 * F32_TOL)
    assert how(form.fn, form.params, adapter, form.x) == {"w": "factored"}


def test_of_pissa_it_has_the_initial_product_subtracted() -> None:
    form, adapter = FORMS["nested scan"], randomised(run(lambda: started("nested scan", "DoRA of PiSSA")), scale=0.1)
    assert set(adapter.state["w"]) == {"scale", "a0", "b0", "squared_norm"}
    adapted = lambda a, x: lorax.adapt(form.fn)(form.params, a, x)
    got, want = run(lambda a, x: (adapted(a, x), by_reference("nested scan", a)(a, x)), adapter, form.x)
    assert_close(got, want, 5 * F32_TOL)


def test_the_norm_has_no_gradient() -> None:
    """With one, the update along the weight itself would have none: the factors' gradients differ a lot."""
    adapter, x = moved("linear", "DoRA"), FORMS["linear"].x
    grads = {}
    for stopped in (True, False):
        form = by_reference("linear", adapter, stopped)
        grads[stopped] = run(lambda a, x, form=form: value_and_grads(form, a, x), adapter, x)[1][0]["w"]
    adapted = lambda a, x: lorax.adapt(FORMS["linear"].fn)(FORMS["linear"].params, a, x)
    got = run(lambda a, x: value_and_grads(adapted, a, x), adapter, x)[1][0]["w"]
    for name in ("a", "b"):
        assert_close(got[name], grads[True][name], 5 * F32_TOL)
        size = np.abs(grads[True][name]).max()
        assert np.abs(got[name] - grads[False][name]).max() > 0.05 * size, "the two semantics are told apart"
    assert_close(got["magnitude"], grads[False]["magnitude"], 5 * F32_TOL)


@pytest.mark.parametrize("name", ["linear", "heads in", "scan", "embedding"])
def test_the_magnitude_starts_at_the_norm_of_each_output(name: str) -> None:
    form, adapter = FORMS[name], run(lambda: started(name, "DoRA"))
    site = adapter.sites["w"]
    w_SxIxO = np.asarray(form.params["w"]).transpose(site.axes("SIO")).reshape([site.size(s) for s in "SIO"])
    want = np.sqrt((w_SxIxO**2).sum(1)).reshape(site.dims("SO"))
    np.testing.assert_allclose(adapter.params["w"]["magnitude"], want, rtol=1e-6)
    np.testing.assert_allclose(adapter.state["w"]["squared_norm"], want**2, rtol=1e-6)
    plain = run(lambda: started(name, "LoRA"))
    assert_identical([adapter.params["w"][n] for n in "ab"], [plain.params["w"][n] for n in "ab"])


def test_a_magnitude_scales_the_output_and_no_bias() -> None:
    fn = lambda p, x: x @ p["w"] + p["bias"]
    params = {**PARAMS, "bias": normal(3, F)}
    adapter = lorax.init(jax.random.key(0), lorax.Spec({"w": DORA}), lorax.trace(fn, params, X), params)
    double = {"w": {**adapter.params["w"], "magnitude": 2 * adapter.params["w"]["magnitude"]}}
    got = lorax.adapt(fn)(params, adapter.replace(params=double), X)
    assert_close(got, 2 * (X @ PARAMS["w"]) + params["bias"])


def test_an_output_of_norm_zero_has_no_gain_and_finite_gradients() -> None:
    params = {"w": PARAMS["w"].at[:, 2].set(0)}
    adapter = adapter_for(dense, params, X, method=DORA)
    assert adapter.state["w"]["squared_norm"][2] == 0
    loss = lambda p: jnp.sum(jnp.sin(lorax.adapt(dense)(params, adapter.replace(params=p), X)))
    value, grads = run(jax.value_and_grad(loss), adapter.params)
    assert np.isfinite(value)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    assert grads["w"]["magnitude"][2] == 0
    arrays = adapter.arrays("w")
    column = (params["w"] + 1.5 * arrays["a"] @ arrays["b"])[:, 2]
    assert_close(lorax.adapt(dense)(params, adapter, X)[..., 2], X @ column)


def test_a_layer_of_a_stack_that_is_not_adapted_is_the_base_exactly() -> None:
    """Zeros in its factors and its squared norm: the gain is one, whatever its magnitude says."""
    fn = lambda p, x: lax.scan(lambda c, w: (c, c @ w), x, p["w"])[1]
    params = {"w": normal(1, 3, D, D)}
    adapter = adapter_for(fn, params, X, method=DORA)
    clear = lambda tree: {n: x.at[1].set(0) if x.ndim else x for n, x in tree["w"].items()}
    adapter = adapter.replace(params={"w": clear(adapter.params)}, state={"w": clear(adapter.state)})
    got, want = run(lambda a: (lorax.adapt(fn)(params, a, X), fn(params, X)), adapter)
    assert_identical(got[1], want[1])
    assert not np.allclose(got[0], want[0], atol=1e-3)


def test_dropout_acts_on_what_enters_a_alone() -> None:
    """The base product keeps all of its inputs: with B at zero, and thus no update, dropout changes nothing."""
    adapter = run(lambda: started("linear", "DoRA"))
    method = lorax.DoRA(rank=2, alpha=3, dropout=0.5)
    made = lorax.init(jax.random.key(0), lorax.Spec({"w": method}), adapter.sites, FORMS["linear"].params)
    form = FORMS["linear"]
    call = lambda a, key=None: lorax.adapt(form.fn)(form.params, a, form.x, rng=key)
    assert_close(call(made, jax.random.key(0)), call(made), 1e-6)
    assert not np.allclose(call(randomised(made), jax.random.key(0)), call(randomised(made)), atol=1e-3)


def test_a_bfloat16_base_has_a_float32_norm() -> None:
    params, x = {"w": normal(1, 64, F, dtype=jnp.bfloat16)}, normal(2, 4, 64, dtype=jnp.bfloat16)
    adapter = adapter_for(dense, params, x, method=DORA)
    assert adapter.state["w"]["squared_norm"].dtype == jnp.float32
    wide = jnp.sum(jnp.square(params["w"].astype(jnp.float32)), 0)
    np.testing.assert_allclose(adapter.state["w"]["squared_norm"], wide, rtol=1e-5)
    got = lorax.adapt(dense)(params, adapter, x)
    assert got.dtype == jnp.bfloat16
    whole = reference(adapter.sites["w"], params["w"].astype(jnp.float32), adapter.arrays("w"))
    assert_close(got.astype(jnp.float32), x.astype(jnp.float32) @ whole, BF16_TOL)


# Cost.

SMALL = Shape(layers=3, d_model=96, heads=4, kv_heads=2, d_ff=160, vocabulary=224)
KERNELS = r"(layers/\d+/\w+|head)/kernel"
MODEL = decoder(SMALL)


def step(method: lorax.Method) -> Any:
    """A gradient step of the decoder, traced from shapes."""
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), SMALL))
    tokens = jax.ShapeDtypeStruct((4, 128), jnp.int32)
    sites, spec = lorax.trace(MODEL, params, tokens), lorax.Spec({KERNELS: method})
    adapter = jax.eval_shape(lambda p: lorax.init(jax.random.key(0), spec, sites, p), params)
    run = lambda t, rest, p, x: jax.value_and_grad(
        lambda t: loss(lorax.adapt(MODEL, strict=True)(p, rest.replace(params=t), x), x)
    )(t)
    return jax.jit(run).trace(adapter.params, adapter.replace(params=None), params, tokens)


@pytest.mark.slow
def test_the_step_costs_hardly_more_than_loras() -> None:
    dora, lora = (step(method(rank=8)).lower().compile() for method in (lorax.DoRA, lorax.LoRA))
    flops = lambda c: c.cost_analysis()["flops"]
    memory = lambda c: c.memory_analysis().temp_size_in_bytes
    assert flops(lora) < flops(dora) <= FLOPS_OVER_LORA * flops(lora)
    assert memory(dora) <= MEMORY_OVER_LORA * memory(lora)


LOOPS = {
    "scan": lambda p, x: lax.scan(lambda h, xt: (jnp.tanh(xt @ p["w"] + h),) * 2, x[0], x)[1],
    "scan that carries it": lambda p, x: lax.scan(
        lambda c, xt: ((c[0], jnp.tanh(xt @ c[0] + c[1])), None), (p["w"], x[0]), x
    )[0][1],
    "scan in a scan over layers": lambda p, x: lax.scan(
        lambda h, w: (lax.scan(lambda h, xt: (jnp.tanh(xt @ w + h), None), h, x)[0], None), x[0], p["w"]
    )[0],
    "while": lambda p, x: lax.while_loop(
        lambda s: (s[0] < 3) & (jnp.sum(s[1] @ p["w"]) < 1e3), lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"])), (0, x)
    )[1],
    "while over layers": lambda p, x: lax.while_loop(
        lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"][s[0]])), (0, x)
    )[1],
}


@pytest.mark.parametrize("stored", ["float32", "NF4"])
@pytest.mark.parametrize("loop", LOOPS)
def test_the_norm_of_what_all_steps_of_a_loop_read_is_taken_once(loop: str, stored: str) -> None:
    fn, x = LOOPS[loop], normal(2, 2, 64)
    params = {"w": normal(1, *(3,) * loop.endswith("layers"), 64, 64)}
    sites = lorax.trace(fn, params, x)
    base = lorax.quantize(params, {"w": lorax.NF4()}, sites=sites) if stored == "NF4" else params

    def steps(method: lorax.Method) -> list[int]:
        """How many products a step of each loop has that holds no other loop."""
        adapter = adapter_for(fn, params, x, method=method)
        assert_close(lorax.adapt(fn)(base, adapter, x), fn(lorax.merge(lorax.dequantize(base), adapter), x))
        found = equations(jax.make_jaxpr(lorax.adapt(fn))(base, adapter, x))
        loops = [e for e in found if e.primitive.name in ("scan", "while")]
        bodies = [[v for k, v in e.params.items() if k in ("jaxpr", "body_jaxpr", "cond_jaxpr")] for e in loops]
        inside = [[e.primitive.name for jaxpr in body for e in equations(jaxpr)] for body in bodies]
        return [names.count("dot_general") for names in inside if not {"scan", "while"} & set(names)]

    (of_lora,) = steps(lorax.LoRA(rank=2, alpha=3))
    assert of_lora >= 3
    *of_norms, of_dora = steps(DORA)
    assert of_dora == of_lora
    assert bool(of_norms) == (stored == "NF4" and loop == "while over layers"), "a quantised stack's, layer by layer"


def test_no_operation_makes_a_weight() -> None:
    """Neither for the norm nor for its product: nothing of a weight's shape is computed, transposed or not."""
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), SMALL))
    kernels = {x.shape[::way] for x in jax.tree.leaves(params["layers"]) if len(x.shape) == 2 for way in (1, -1)}
    found = lambda jaxpr: {e.primitive.name for e in equations(jaxpr) for v in e.outvars if v.aval.shape in kernels}
    assert found(step(lorax.DoRA(rank=8)).jaxpr) <= {"transpose"}, "of the base, for the backward product"
    adapter = adapter_for(dense, {"w": jnp.ones((96, 160))}, jnp.ones((2, 96)), method=DORA)
    merged = jax.make_jaxpr(lorax.merge)({"w": jnp.ones((96, 160))}, adapter)
    assert {"add", "mul"} <= found(merged), "the search is able to fail"


@pytest.mark.parametrize("name", ["linear", "heads in", "scan with remat", "tied embedding"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_adapter_changes_no_bit(name: str, dtype: str) -> None:
    """Compiled: XLA would multiply by the reciprocal of a root, which is not quite 1/‖W‖."""
    form = FORMS[name]
    rules, sites = lorax.Spec({"w": lorax.DoRA(rank=2, dtype=dtype)}), lorax.trace(form.fn, form.params, form.x)
    adapter = lorax.init(jax.random.key(0), rules, sites, form.params)
    assert_identical(jax.jit(lorax.adapt(form.fn))(form.params, adapter, form.x), jax.jit(form.fn)(form.params, form.x))
    assert_identical(jax.jit(lorax.merge)(form.params, adapter), form.params)
