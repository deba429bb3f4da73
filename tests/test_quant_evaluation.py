"""Quantised bases in the evaluator: what they mean, and that no dequantised weight outlives its use."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorax
from tests.agreement import (
    F32_TOL,
    abstract,
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
from tests.contract import FORMS, METHODS, PAIRS, UNMERGEABLE, refusal
from tests.test_every_method import BUILT, INPUTS, MIXED, PARAMS, mixed, spec

TOL = 1e-5
FORMATS = {
    "NF4": lorax.NF4(block=4),
    "NF4, single": lorax.NF4(block=4, double=False),
    "FP4": lorax.FP4(block=4),
    "Int8": lorax.Int8(),
    "Int4": lorax.Int4(block=4, symmetric=False),
}

SITES = lorax.trace(mixed, PARAMS, INPUTS)


@functools.cache
def bases(name: str) -> tuple[Any, Any]:
    """The mixed function's parameters with every weight quantised, and what they stand for."""
    quantised = lorax.quantize(PARAMS, {".*/w": FORMATS[name]}, sites=SITES)
    return quantised, lorax.dequantize(quantised)


def test_sites_are_found_as_on_a_plain_base() -> None:
    for format in FORMATS:
        assert list(lorax.trace(mixed, bases(format)[0], INPUTS)) == list(SITES)


@pytest.mark.parametrize("format", FORMATS)
def test_a_function_of_a_quantised_base_is_that_of_what_it_stands_for(format: str) -> None:
    """Also where no adapter reaches a weight."""
    names = ("heads in", "nested scan")
    fn = lambda p, x: [FORMS[n].fn(p[n], x[n]) for n in names]
    params, x = ({n: getattr(FORMS[n], field) for n in names} for field in ("params", "x"))
    sites = lorax.trace(fn, params, x)
    quantised = lorax.quantize(params, {".*/w": FORMATS[format]}, sites=sites)
    plain = lorax.dequantize(quantised)
    rules = lorax.Spec({"heads in/w": lorax.LoRA(rank=2)})
    adapter = randomised(lorax.init(jax.random.key(0), rules, sites, plain))
    call = lambda p, a, x: lorax.adapt(fn)(p, a, x)
    got, want, other = run(
        lambda q, p, r, a, x: [call(b, a, x) for b in (q, p, r)], quantised, plain, params, adapter, x
    )
    assert_close(got, want, TOL)
    assert not np.allclose(got[0], other[0], atol=1e-4), "the format changes something"


def test_a_quantised_base_runs_without_an_adapter() -> None:
    form = FORMS["nested scan"]
    small = lorax.quantize(form.params, {"w": FORMATS["NF4"]}, sites=lorax.trace(form.fn, form.params, form.x))
    got = run(lambda params, x: lorax.adapt(form.fn)(params, None, x), small, form.x)
    assert_close(got, run(form.fn, lorax.dequantize(small), form.x), TOL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [
        (f, m)
        for f, m in PAIRS
        if not refusal(f, m) and not (m in UNMERGEABLE and f in ("ragged", "cut before the product", "custom jvp"))
    ],
)
def test_every_kind_of_site_is_the_same_on_a_quantised_base(name: str, method: str) -> None:
    form = FORMS[name]
    sites = lorax.trace(form.fn, form.params, form.x)
    quantised = lorax.quantize(form.params, {"w": FORMATS["NF4"]}, sites=sites)
    plain = lorax.dequantize(quantised)

    def everything(params: Any, x: Any) -> Any:
        start = lorax.init(jax.random.key(0), lorax.Spec({"w": METHODS[method]}), sites, params)
        drawn = randomised(lorax.init(jax.random.key(0), lorax.Spec({"w": METHODS[method]}), sites, plain))
        merged = lorax.merge(params, drawn) if METHODS[method].is_mergeable else ()
        adapted = lambda a, x: lorax.adapt(form.fn)(params, a, x)
        used = value_and_grads(adapted, drawn, x) if form.is_reversible else adapted(drawn, x)
        return (start.params, start.state), (used, merged)

    tol = 4e-2 if "bfloat16" in name + method else TOL
    (start, got), (from_plain, want) = run(everything, quantised, form.x), run(everything, plain, form.x)
    assert_close(got, want, 5 * tol)
    assert_close(start, from_plain, 1e-2)  # singular vectors carry round-off on, divided by the gaps between values


def test_what_is_built_on_a_plain_base_is_built_on_a_quantised_one() -> None:
    """And nothing else: quantisation costs no factored use."""
    for method in ("LoRA", "DoRA", "LoKr", "IA3 of inputs", "LoHa"):
        for name, form in FORMS.items():
            sites = lorax.trace(form.fn, form.params, form.x)
            rules = lorax.Spec({"w": METHODS[method]})
            shapes = lorax.quantize(abstract(form.params), {"w": FORMATS["NF4"]}, sites=sites)
            adapter = jax.eval_shape(lambda p, r=rules, s=sites: lorax.init(jax.random.key(0), r, s, p), shapes)
            wanted = "materialised" if (method, name) in BUILT else "factored"
            assert how(form.fn, shapes, adapter, form.x) == {"w": wanted}, (method, name)


LAYOUTS = {
    "cast": lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32),
    "transposed and reversed": lambda w, x: x @ w.T[::-1].T,
    "joined axes": lambda w, x: jnp.einsum("bi,ihk->bhk", x, w.reshape(8, 2, 4)),
    "scaled": lambda w, x: x @ (w * 0.5),
    "scaled by outputs": lambda w, x: x @ (w * jnp.arange(1.0, 9.0)),
    "negated": lambda w, x: x @ -w,
    "sliced": lambda w, x: x[:, :4] @ w[:4] + x[:, 4:] @ w[4:],
    "joined with itself": lambda w, x: x @ jnp.concatenate([w, w], 1),
    "stacked": lambda w, x: jnp.einsum("bi,nio->bno", x, jnp.stack([w, 2 * w])),
    "normalised": lambda w, x: x @ (w / jnp.linalg.norm(w, axis=0)),
    "read twice": lambda w, x: jnp.tanh(x @ w) @ w.T,
    "a barrier": lambda w, x: x @ lax.optimization_barrier(w),
    "returned": lambda w, x: (x @ w, w),
    "a row": lambda w, x: w[jnp.asarray([1, 3])] + x[:2],
    "shifted": lambda w, x: x @ jnp.roll(w, 1, axis=0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_function_does_to_a_weight_is_done_to_what_it_stands_for(layout: str) -> None:
    params = {"w": normal(1, 8, 8), "v": normal(2, 8, 8)}
    x = normal(3, 3, 8)
    fn = lambda p, x: (LAYOUTS[layout](p["w"], x), LAYOUTS[layout](p["v"], x))
    sites = lorax.trace(fn, params, x)
    quantised = lorax.quantize(params, {".*": FORMATS["NF4, single"]}, sites=sites)
    plain = lorax.dequantize(quantised)
    adapter = randomised(run(lambda: lorax.init(jax.random.key(0), lorax.Spec({"w": METHODS["LoRA"]}), sites, plain)))

    def both(q: Any, p: Any, a: Any, x: Any) -> Any:
        return [value_and_grads(lambda a, x, b=b: lorax.adapt(fn)(b, a, x), a, x) for b in (q, p)]

    assert_close(*run(both, quantised, plain, adapter, x), 5 * TOL)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_base_computes_in_its_dtype(dtype: str) -> None:
    params, x = {"w": normal(1, 64, 8, dtype=dtype)}, normal(2, 3, 64, dtype=dtype)
    fn = lambda p, x: x @ p["w"]
    quantised = lorax.quantize(params, {"w": lorax.NF4()})
    adapter = randomised(
        lorax.init(jax.random.key(0), lorax.Spec({"w": METHODS["LoRA"]}), lorax.trace(fn, params, x), params)
    )
    got, want = (lorax.adapt(fn)(p, adapter, x) for p in (quantised, lorax.dequantize(quantised)))
    assert got.dtype == want.dtype == jnp.dtype(dtype)
    assert_close(got, want, 1e-3)
    assert lorax.merge(quantised, adapter)["w"].dtype == jnp.dtype(dtype)


def test_merging_into_a_quantised_base_says_what_quantising_again_loses() -> None:
    quantised, _ = bases("NF4")
    adapter = randomised(run(lambda: lorax.init(jax.random.key(0), spec("LoRA"), SITES, quantised)), scale=0.1)
    whole = lorax.merge(quantised, adapter)
    again, errors = lorax.merge_quantized(quantised, adapter)
    assert set(errors) == set(adapter.params)
    assert jax.tree.structure(again) == jax.tree.structure(quantised)
    for name in MIXED:
        w, made = np.asarray(whole[name]["w"]), np.asarray(again[name]["w"].dequantize())
        assert errors[f"{name}/w"] == pytest.approx(np.linalg.norm(made - w) / np.linalg.norm(w), rel=1e-4)
        assert 0 < errors[f"{name}/w"] < 0.2
    with pytest.raises(ValueError, match=re.escape(f"{', '.join(adapter.params)}: a quantised weight has lost")):
        lorax.unmerge(again, adapter)


def test_saved_beside_a_quantised_base_and_restored(tmp_path: Any) -> None:
    quantised, plain = bases("NF4")
    adapter = randomised(run(lambda: lorax.init(jax.random.key(0), spec("DoRA"), SITES, quantised)), scale=0.1)
    lorax.save(tmp_path / "adapter", adapter, base=quantised)
    assert_identical(lorax.restore(tmp_path / "adapter", base=quantised), adapter)
    with pytest.raises(ValueError, match="w"):
        lorax.restore(tmp_path / "adapter", base=lorax.quantize(plain, {".*/w": lorax.Int8()}, sites=SITES))


def test_transformations_of_a_quantised_base() -> None:
    """vmap over adapters, jvp and a checkpoint around it."""
    form = FORMS["scan with remat"]
    sites = lorax.trace(form.fn, form.params, form.x)
    quantised = lorax.quantize(form.params, {"w": FORMATS["NF4"]}, sites=sites)
    adapter = randomised(
        run(lambda: lorax.init(jax.random.key(0), lorax.Spec({"w": METHODS["DoRA"]}), sites, quantised))
    )
    stacked = jax.tree.map(lambda x: jnp.stack([0.5 * x, x]), adapter.params)

    def everything(params: Any, stacked: Any) -> Any:
        value = lambda t: lorax.adapt(form.fn)(params, adapter.replace(params=t), form.x)[0]
        total = lambda t: jnp.sum(jnp.sin(value(t)))
        one = jax.tree.map(lambda x: x[1], stacked)
        tangent = jax.tree.map(jnp.cos, one)
        return jax.vmap(value)(stacked), jax.jvp(total, (one,), (tangent,))[1], jax.grad(jax.checkpoint(total))(one)

    got, want = (run(everything, p, stacked) for p in (quantised, lorax.dequantize(quantised)))
    assert_close(got, want, 5 * TOL)


# Memory: a scanned decoder of which no activation has the shape of a weight.

LAYERS, WIDTH, HIDDEN, BATCH, LENGTH = 6, 64, 192, 2, 24
STACK = {"qkv": (LAYERS, WIDTH, 3 * WIDTH), "out": (LAYERS, WIDTH, WIDTH), "up": (LAYERS, WIDTH, HIDDEN),
         "gate": (LAYERS, WIDTH, HIDDEN), "down": (LAYERS, HIDDEN, WIDTH)}  # fmt: skip
LARGEST = 4 * WIDTH * HIDDEN  # bytes of the largest site's weight, of one layer


def decoder(remat: bool, joined: bool = False) -> Any:
    def up_and_gate(x: Any, p: Any) -> Any:
        if joined:  # one product of two weights side by side
            return jnp.split(x @ jnp.concatenate([p["up"], p["gate"]], 1), 2, axis=-1)
        return x @ p["up"], x @ p["gate"]

    def layer(x: Any, p: Any) -> tuple[Any, None]:
        q, k, v = jnp.split(x @ p["qkv"], 3, axis=-1)
        weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k))
        x = x + jnp.einsum("bts,bsd->btd", weights, v) @ p["out"]
        up, gate = up_and_gate(x, p)
        return x + (jax.nn.silu(gate) * up) @ p["down"], None

    return lambda p, x: lax.scan(jax.checkpoint(layer) if remat else layer, x, p)[0]


def training_step(method: lorax.Method, remat: bool, is_quantised: bool, joined: bool = False) -> Any:
    """A gradient step, traced from shapes alone."""
    shape = lambda *s: jax.ShapeDtypeStruct(s, "float32")
    params, x = {n: shape(*s) for n, s in STACK.items()}, shape(BATCH, LENGTH, WIDTH)
    fn = decoder(remat, joined)
    sites = lorax.trace(fn, params, x)
    if is_quantised:
        params = lorax.quantize(params, {".*": lorax.NF4()}, sites=sites)
    adapter = jax.eval_shape(lambda p: lorax.init(jax.random.key(0), lorax.Spec({".*": method}), sites, p), params)
    loss = lambda t, rest, p, x: jnp.sum(lorax.adapt(fn, strict=True)(p, rest.replace(params=t), x) ** 2)
    return jax.jit(jax.value_and_grad(loss)).trace(adapter.params, adapter.replace(params=None), params, x)


def stacked_weights(text: str) -> set[str]:
    """Shapes of floating point arrays in a program as large as a whole stack of some weight."""
    sizes = {int(np.prod(s)) for s in STACK.values()}
    shapes = re.findall(r"(?:f|bf)(?:16|32|64)\[([\d,]+)\]", text)
    has_layers = lambda dims: int(dims.split(",")[0]) == LAYERS
    return {s for s in shapes if int(np.prod([int(n) for n in s.split(",")])) in sizes and has_layers(s)}


@pytest.mark.parametrize(
    ("method", "remat"),
    [
        pytest.param(lorax.LoRA(rank=4), True, id="LoRA, remat"),
        pytest.param(lorax.LoRA(rank=4), False, id="LoRA", marks=pytest.mark.slow),
        pytest.param(lorax.DoRA(rank=4), True, id="DoRA, remat", marks=pytest.mark.slow),
        pytest.param(lorax.DoRA(rank=4), False, id="DoRA"),
    ],
)
def test_no_more_than_a_site_is_held_dequantised(method: lorax.Method, remat: bool) -> None:
    """Beside what a float32 base takes there are at most two weights of the largest site, and never a stack."""
    traced = {q: training_step(method, remat, q) for q in (True, False)}
    compiled = {q: t.lower().compile() for q, t in traced.items()}
    memory = {q: c.memory_analysis().temp_size_in_bytes for q, c in compiled.items()}
    assert memory[True] <= memory[False] + 2 * LARGEST, (memory, LARGEST)
    assert not stacked_weights(compiled[True].as_text())
    assert stacked_weights(compiled[False].as_text()), "the search is able to fail"
    held = {q: c.memory_analysis().argument_size_in_bytes for q, c in compiled.items()}
    base = sum(4 * int(np.prod(s)) for s in STACK.values())
    assert held[False] - held[True] > 0.8 * base


@pytest.mark.parametrize("joined", [False, True], ids=["", "joined"])
@pytest.mark.parametrize("remat", [False, True], ids=["kept", "remat"])
def test_a_scan_saves_no_dequantised_weight_for_its_backward_pass(remat: bool, joined: bool) -> None:
    """What a scan stacks for later is an output of it: none is of a weight's size behind the layers' axis."""
    weights = {int(np.prod(s[1:])) for s in STACK.values()} | {2 * WIDTH * HIDDEN}
    for method in (lorax.LoRA(rank=4), lorax.DoRA(rank=4), lorax.VeRA(rank=4), lorax.LoHa(rank=2)):
        scans = [e for e in equations(training_step(method, remat, True, joined).jaxpr) if e.primitive.name == "scan"]
        assert scans
        saved = {int(np.prod(v.aval.shape[1:])) for e in scans for v in e.outvars}
        assert not saved & weights, method
    # A plain product of a dequantised weight keeps it: the search is able to fail.
    nodes = lorax.quantize({"w": jnp.ones((LAYERS, WIDTH, HIDDEN))}, {"w": lorax.NF4()})["w"]
    plain = lambda x: jnp.sum(lax.scan(lambda c, n: (c, jnp.tanh(c @ n.dequantize())), x, nodes)[1])
    jaxpr = jax.make_jaxpr(jax.grad(plain))(jnp.ones((2, WIDTH)))
    kept = {int(np.prod(v.aval.shape[1:])) for e in equations(jaxpr) if e.primitive.name == "scan" for v in e.outvars}
    assert WIDTH * HIDDEN in kept


LAYER_BY_LAYER = {
    "unstack": lambda p, x: functools.reduce(lambda x, w: jnp.tanh(x @ w), jnp.unstack(p["w"]), x),
    "unstack of one": lambda p, x: x @ jnp.unstack(p["w"][1:2])[0],
    "unstack of what was stacked": lambda p, x: x @ sum(jnp.unstack(jnp.stack([p["w"][0]]))),
    "split": lambda p, x: functools.reduce(lambda x, w: jnp.tanh(x @ w[0]), jnp.split(p["w"], 3), x),
    "split and scanned": lambda p, x: functools.reduce(
        lambda x, w: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], jnp.split(p["w"], [1]), x
    ),
}


@pytest.mark.parametrize("reading", LAYER_BY_LAYER)
@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_a_quantised_stack_is_taken_apart_as_it_is(method: str, reading: str) -> None:
    """Each layer is dequantised at its use, and the stack never."""
    fn, params, x = LAYER_BY_LAYER[reading], {"w": normal(1, 3, 64, 64)}, normal(2, 2, 64)
    sites = lorax.trace(fn, params, x)
    base = lorax.quantize(params, {"w": lorax.NF4()}, sites=sites)
    adapter = adapter_for(fn, params, x, method=METHODS[method])
    plain = lorax.dequantize(base)
    got = run(lambda a, x: value_and_grads(lambda a, x: lorax.adapt(fn)(base, a, x), a, x), adapter, x)
    want = run(lambda a, x: value_and_grads(lambda a, x: fn(lorax.merge(plain, a), x), a, x), adapter, x)
    assert_close(got, want, 5 * F32_TOL)
    assert_close(lorax.adapt(fn)(base, None, x), fn(plain, x))
    if method == "LoRA":  # DoRA's norm of a stack that is no scan's is taken of each layer in turn
        found = equations(jax.make_jaxpr(lorax.adapt(fn))(base, adapter, x))
        is_float = lambda v: jnp.issubdtype(v.aval.dtype, jnp.floating)
        made = {v.aval.shape for e in found for v in e.outvars if is_float(v)}
        assert (3, 64, 64) not in made and (2, 64, 64) not in made


def test_lorafas_saving_holds_on_a_quantised_base() -> None:
    """No input of a linear layer is kept for its backward pass, nor is its weight."""
    depth, rows, width = 10, 512, 128
    fn = lambda p, x: functools.reduce(lambda x, n: x @ p["w"][n] + p["b"], range(depth), x)
    shape = lambda *s: jax.ShapeDtypeStruct(s, "float32")
    params, x = {"w": [shape(width, width)] * depth, "b": shape(width)}, shape(rows, width)
    sites = lorax.trace(fn, params, x)
    quantised = lorax.quantize(params, {"w/.*": lorax.NF4()}, sites=sites)

    def temporaries(method: lorax.Method) -> int:
        rules = lorax.Spec({"w/.*": method})
        adapter = jax.eval_shape(lambda p: lorax.init(jax.random.key(0), rules, sites, p), quantised)
        loss = lambda t, rest, p, x: jnp.sum(lorax.adapt(fn)(p, rest.replace(params=t), x) ** 2)
        compiled = jax.jit(jax.grad(loss)).lower(adapter.params, adapter.replace(params=None), quantised, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    activation = 4 * rows * width
    lora, frozen = temporaries(lorax.LoRA(rank=4)), temporaries(lorax.LoRAFA(rank=4))
    assert lora > (depth - 1) * activation
    assert frozen < 7 * activation, "besides dequantised weights"
    assert lora - frozen > (depth - 7) * activation
