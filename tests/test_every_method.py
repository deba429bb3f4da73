"""One contract for every method: what an adapter starts as, means, counts, refuses, and survives.

The default tests take several kinds of sites in one program; the slow ones take every kind with every method alone.
"""

import dataclasses
import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from tests.agreement import (
    BF16_TOL,
    F32_TOL,
    FAST_COMPILE,
    abstract,
    assert_agrees,
    assert_close,
    assert_identical,
    normal,
    randomised,
    run,
    value_and_grads,
)
from tests.contract import (
    DRAWS_NOTHING,
    FORMS,
    IRREVERSIBLE,
    METHODS,
    ON_TABLES,
    PAIRS,
    READ_OFF_THE_WEIGHT,
    TABLES,
    UNMERGEABLE,
    D,
    moved,
    refusal,
    shapes_of,
    started,
)

ROOT = Path(__file__).parents[1]
EXACT = 1e-6
SVD_TOL = 1e-4  # of factors that are singular vectors, and of their product subtracted from itself
QUANTISED_TOL = 1e-5

# Compiled by the slow tests alone: like another method but for a setting, or with a file of tests of their own.
VARIANTS = {"LoRA, bfloat16", "rsLoRA", "OLoRA", "orthogonal LoRA", "DoRA of PiSSA"}
ELSEWHERE = {"LoRA", "AdaLoRA", "LoRAFA", "VeRA"}
marked = lambda names: [pytest.param(m, marks=pytest.mark.slow if m in VARIANTS | ELSEWHERE else ()) for m in names]

START_AT_THE_BASE = {*READ_OFF_THE_WEIGHT, "DoRA", "Full", "Prompt", "TrainableTokens"}

every_method = pytest.mark.parametrize("method", METHODS)
compiled_method = pytest.mark.parametrize("method", marked(METHODS), scope="module")
compiled_mergeable = pytest.mark.parametrize(
    "method", marked(m for m in METHODS if m not in UNMERGEABLE), scope="module"
)

# One function with many kinds of sites, so that a method needs one program.
MIXED = ("conv grouped and dilated", "tied embedding", "ragged", "scan with remat")
PARAMS = {name: FORMS[name].params for name in MIXED}
INPUTS = {name: FORMS[name].x for name in MIXED}


def mixed(p: Any, x: Any) -> Any:
    """All of them, side by side."""
    return {name: FORMS[name].fn(p[name], x[name]) for name in MIXED}


SITES = lorax.trace(mixed, PARAMS, INPUTS)


@functools.cache
def spec(method: str) -> lorax.Spec:
    """The method wherever it can be used in the mixed function."""
    return lorax.Spec({f"({name})/w": METHODS[method] for name in MIXED if refusal(name, method) is None})


def build(method: str, params: Any = PARAMS, key: Any = None) -> Any:
    """The adapter as `init` makes it."""
    return lorax.init(jax.random.key(0) if key is None else key, spec(method), SITES, params)


@functools.cache
def initial(method: str, seed: int = 0) -> Any:
    """The same, compiled: many small draws are quicker as one program."""
    return started_program(method)(PARAMS, jax.random.key(seed))


@functools.cache
def started_program(method: str) -> Any:
    return jax.jit(functools.partial(build, method), compiler_options=FAST_COMPILE)


@functools.cache
def trained(method: str) -> Any:
    """An adapter whose trained arrays have all moved."""
    return randomised(initial(method), scale=0.2)


@functools.cache
def adapted_program(method: str) -> Any:
    """The adapted function with its gradients: `program(params, adapter, inputs)`."""
    adapted = lambda params: lambda a, x: lorax.adapt(mixed)(params, a, x)
    return jax.jit(lambda p, a, x: value_and_grads(adapted(p), a, x), compiler_options=FAST_COMPILE)


@functools.cache
def plain_program() -> Any:
    return jax.jit(mixed, compiler_options=FAST_COMPILE)


def tolerance(name: str, method: str) -> float:
    """What a form's arithmetic leaves."""
    return BF16_TOL if "bfloat16" in name + method else F32_TOL


# What it starts as.


@compiled_method
def test_a_new_adapter_changes_nothing(method: str) -> None:
    if method == "Prefix":
        pytest.skip("starts at random vectors: tests/test_outputs.py")
    before = jax.tree.map(np.array, PARAMS)
    adapter = initial(method)
    inputs = dict(INPUTS)
    if method == "Prompt":  # a batch that begins with the prompt's own tokens
        first = adapter.state["tied embedding/w"]["tokens"]
        inputs["tied embedding"] = inputs["tied embedding"].at[:, : first.size].set(first)
    got, _ = adapted_program(method)(PARAMS, adapter, inputs)
    # Not to the bit: XLA fuses what follows the products in other ways. The merged weight is, see below.
    assert_close(got, plain_program()(PARAMS, inputs), SVD_TOL if method in READ_OFF_THE_WEIGHT else EXACT)
    assert_identical(PARAMS, before)


@compiled_mergeable
def test_merging_a_new_adapter_gives_the_base(method: str) -> None:
    merged = run(lorax.merge, PARAMS, initial(method))
    if method in READ_OFF_THE_WEIGHT:
        assert_close(merged, PARAMS, SVD_TOL)
    else:
        assert_identical(merged, PARAMS)


@compiled_method
def test_init_is_pure_and_works_on_shapes(method: str) -> None:
    shapes = jax.eval_shape(functools.partial(build, method), abstract(PARAMS))
    assert abstract(initial(method)) == shapes
    assert shapes.plan == initial(method).plan
    if method not in ON_TABLES:
        return
    assert set(shapes.params) == {"tied embedding/w"}


@compiled_method
def test_seeds_differ_where_anything_is_drawn(method: str) -> None:
    one, other = initial(method), initial(method, seed=1)
    changed = any(np.any(np.asarray(x != y)) for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True))
    assert changed == (method not in DRAWS_NOTHING)


# How many numbers it trains.


def cut(n: int) -> tuple[int, int]:
    """The two numbers that LoKr cuts a side into."""
    small = max(m for m in range(1, math.isqrt(n) + 1) if n % m == 0)
    return small, n // small


def kronecker(s: int, i: int, o: int, r: int) -> int:
    (m_in, n_in), (m_out, n_out) = cut(i), cut(o)
    return s * (m_in * m_out + r * (n_in + n_out))


NUMBERS = {
    "LoRA with a bias": lambda s, i, o: s * (2 * (i + o) + o),
    "DoRA": lambda s, i, o: s * (2 * (i + o) + o),
    "DoRA of PiSSA": lambda s, i, o: s * (2 * (i + o) + o),
    "AdaLoRA": lambda s, i, o: s * (3 * (i + o) + 3) + 1,
    "LoRAFA": lambda s, i, o: s * 2 * o,
    "VeRA": lambda s, i, o: s * (5 + o),
    "LoHa": lambda s, i, o: s * 4 * (i + o),
    "LoKr": lambda s, i, o: kronecker(s, i, o, 2),
    "IA3": lambda s, i, o: s * o,
    "IA3 of inputs": lambda s, i, o: s * i,
    "Full": lambda s, i, o: s * i * o,
    "Bottleneck": lambda s, i, o: s * (3 * 2 * o + 3 + o),
    "Prompt": lambda s, i, o: 2 * D,
    "Prefix": lambda s, i, o: s * 2 * o,
    "TrainableTokens": lambda s, i, o: 2 * D,
}


@every_method
def test_the_number_of_trained_numbers_in_closed_form(method: str) -> None:
    count = NUMBERS.get(method, lambda s, i, o: s * 2 * (i + o))
    for name in FORMS:
        if refusal(name, method) is None:
            adapter = shapes_of(name, method)
            assert sum(x.size for x in jax.tree.leaves(adapter.params)) == count(*FORMS[name].sizes), name


# How it is evaluated, and what it refuses.

# A dense weight is built for these, and for no other: a change of the list is worth a line in the release notes.
BUILT = {
    ("LoKr", "cut before the product"): "an axis that is cut does not split further",
    ("LoKr", "conv"): "a convolution has no part of a channel axis",
    ("LoKr", "conv grouped and dilated"): "likewise",
    ("LoKr", "ragged"): "three factors, of which two span the fan-in",
    ("IA3 of inputs", "conv"): "a gain a tap is no gain of the input",
    ("IA3 of inputs", "conv grouped and dilated"): "likewise",
}
# A method that acts on the output of a product has no meaning where the function reads the weight itself.
NO_OUTPUT = ("cut before the product", "custom jvp")


@every_method
def test_explain_says_factored_but_for_a_list(method: str) -> None:
    for name, form in FORMS.items():
        if refusal(name, method) or (method in UNMERGEABLE and name in NO_OUTPUT):
            continue
        adapter = shapes_of(name, method)
        (row,) = lorax.explain(form.fn, form.params, adapter, form.x)
        assert row.path == "w"
        assert row.how == ("materialised" if (method, name) in BUILT else "factored"), (name, row)
        assert row.reason


@every_method
def test_refusals_have_a_reason(method: str) -> None:
    refused = {name: why for name in FORMS if (why := refusal(name, method))}
    if method in ON_TABLES:
        assert set(refused) == set(FORMS) - TABLES
        needle = "looked up"
    elif method == "Prefix":
        assert set(refused) == {"conv", "conv grouped and dilated", "embedding", "ragged"}
        needle = "no positions"
    elif method in ("Bottleneck", "LoRA with a bias"):
        assert set(refused) == {"ragged"}
        needle = "belong to several experts"
    else:
        assert not refused
        return
    assert all(needle in why for why in refused.values()), refused
    with pytest.raises(ValueError, match=re.escape(type(METHODS[method]).__name__)) as error:
        started("ragged", method)
    assert refused["ragged"] in str(error.value)


@pytest.mark.parametrize("name", NO_OUTPUT)
@pytest.mark.parametrize("method", [m for m in METHODS if m in UNMERGEABLE and m not in ON_TABLES])
def test_an_output_of_a_weight_that_is_read_itself_is_refused_with_the_path(method: str, name: str) -> None:
    form, adapter = FORMS[name], shapes_of(name, method)
    with pytest.raises(ValueError, match=r"^w: .*acts on the output of a product.*reads the weight itself"):
        jax.eval_shape(lorax.adapt(form.fn), form.params, adapter, form.x)


# What it means.


@compiled_mergeable
def test_it_agrees_with_its_merged_weight(method: str) -> None:
    before = jax.tree.map(np.array, PARAMS)
    through_merge = lambda a, x: value_and_grads(lambda a, x: mixed(lorax.merge(PARAMS, a), x), a, x)
    adapter, tol = trained(method), tolerance("", method)
    (got, got_grads) = adapted_program(method)(PARAMS, adapter, INPUTS)
    (want, want_grads) = run(through_merge, adapter, INPUTS)
    assert_close(got, want, tol)
    assert_close(got_grads, want_grads, 5 * tol)
    for path, grads in want_grads[0].items():
        assert all(np.any(x) for n, x in grads.items() if n != "updates"), (path, "no gradient: the check is void")
    assert_identical(PARAMS, before)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [(f, m) for f, m in PAIRS if m not in UNMERGEABLE and not refusal(f, m)])
def test_every_kind_of_site_agrees_with_the_merged_weight(name: str, method: str) -> None:
    form, adapter, tol = FORMS[name], moved(name, method), tolerance(name, method)
    start = started(name, method)
    got, want = run(lambda p, a, x: (lorax.adapt(form.fn)(p, a, x), form.fn(p, x)), form.params, start, form.x)
    subtracted = method in READ_OFF_THE_WEIGHT
    assert_close(got, want, tol if subtracted and "bfloat16" in name else SVD_TOL if subtracted else EXACT)
    if form.is_reversible:
        assert_agrees(form.fn, form.params, adapter, form.x, tol=tol)
        return
    both = lambda p, a, x: (lorax.adapt(form.fn)(p, a, x), form.fn(lorax.merge(p, a), x))
    assert_close(*run(both, form.params, adapter, form.x), tol)


QUANTISED = {"LoRA with a bias", "DoRA", "LoKr", "IA3 of inputs", "Bottleneck", "Full", "TrainableTokens"}


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m in QUANTISED else pytest.mark.slow) for m in METHODS], scope="module"
)
def test_it_does_the_same_on_a_quantised_base(method: str) -> None:
    """Start, value and gradients; tests/test_quant_evaluation.py has the rest."""
    format = lorax.NF4(block=4) if list(METHODS).index(method) % 2 else lorax.Int8()
    quantised = lorax.quantize(PARAMS, {".*/w": format}, sites=SITES)
    before, plain = jax.tree.map(np.array, quantised), lorax.dequantize(quantised)
    if method in START_AT_THE_BASE:
        adapter = started_program(method)(quantised, jax.random.key(0))
        assert_close(adapter, started_program(method)(plain, jax.random.key(0)), SVD_TOL)
    got, want = (adapted_program(method)(params, trained(method), INPUTS) for params in (quantised, plain))
    tol = BF16_TOL if "bfloat16" in method else QUANTISED_TOL
    assert_close(got[0], want[0], tol)
    assert_close(got[1], want[1], 5 * tol)
    assert_identical(quantised, before)


@pytest.mark.parametrize("method", sorted(UNMERGEABLE))
def test_what_has_no_merged_weight_says_so(method: str) -> None:
    adapter = trained(method)
    assert not METHODS[method].is_mergeable
    paths = ", ".join(adapter.params)
    wanted = f"{type(METHODS[method]).__name__} has no merged weight, at {paths}: "
    for move in (lorax.merge, lorax.merge_quantized, lorax.unmerge):
        with pytest.raises(ValueError, match=re.escape(wanted)):
            move(PARAMS, adapter)


@compiled_mergeable
def test_unmerge_restores_the_base_or_is_refused(method: str) -> None:
    adapter = trained(method)
    merged = run(lorax.merge, PARAMS, adapter)
    for path in adapter.params:
        assert not np.allclose(merged[path.split("/")[0]]["w"], PARAMS[path.split("/")[0]]["w"], atol=1e-3), path
    if method in IRREVERSIBLE:
        with pytest.raises(ValueError, match=f"{type(METHODS[method]).__name__} cannot be unmerged, at .*/w: keep"):
            lorax.unmerge(merged, adapter)
    else:
        assert_close(run(lorax.unmerge, merged, adapter), PARAMS, 5 * F32_TOL)


# What it survives.


@compiled_method
def test_saved_and_restored(method: str, tmp_path: Path) -> None:
    adapter = trained(method)
    lorax.save(tmp_path / "adapter", adapter, base=PARAMS)
    back = lorax.restore(tmp_path / "adapter", base=PARAMS)
    assert back.plan == adapter.plan
    assert_identical(back, adapter)
    for path in adapter.params:  # with what sites share
        assert_identical(back.arrays(path), adapter.arrays(path))


@compiled_method
def test_partitions_and_labels(method: str) -> None:
    adapter = trained(method)
    frozen, trainable = lorax.split(PARAMS, adapter)
    assert trainable is adapter.params
    assert_identical(lorax.join(frozen, trainable), (PARAMS, adapter))
    params, marked = lorax.mask(PARAMS, adapter)
    assert jax.tree.structure((params, marked)) == jax.tree.structure((PARAMS, adapter))
    assert not any(jax.tree.leaves((params, marked.state)))
    assert all(jax.tree.leaves(marked.params))
    assert lorax.labels(adapter) == {path: {n: n for n in arrays} for path, arrays in adapter.params.items()}
    names = {name for arrays in adapter.params.values() for name in arrays}
    assert names <= set(METHODS[method].arrays)
    assert all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(adapter.params))


# Transformations, of a table and a stack.

SMALL = {"table": normal(1, 7, 6), "stack": normal(2, 2, 6, 6)}
IDS = jnp.asarray([[0, 6, 3, 1, 5], [1, 1, 5, 4, 2]], jnp.int32)


def small(p: Any, ids: Any) -> Any:
    layer = jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None))
    return jax.lax.scan(layer, p["table"][ids], p["stack"])[0]


def small_adapter(method: lorax.Method, params: Any = SMALL) -> Any:
    """A random adapter of all that the method can adapt."""
    sites = lorax.trace(small, params, IDS)
    return randomised(run(lambda: lorax.init(jax.random.key(0), lorax.Spec({".*": method}), sites, params)), scale=0.2)


@compiled_method
def test_transformations(method: str) -> None:
    """jvp, a gradient through a checkpoint, and vmap over adapters with one base, in one program."""
    adapter = small_adapter(METHODS[method])
    value = lambda t: lorax.adapt(small)(SMALL, adapter.replace(params=t), IDS)
    total = lambda t: jnp.sum(jnp.sin(value(t)).astype(jnp.float32))
    stacked = jax.tree.map(lambda x: jnp.stack([0.5 * x, x]), adapter.params)
    tangent = jax.tree.map(jnp.cos, adapter.params)

    def everything(t: Any, tangent: Any, stacked: Any) -> Any:
        with_value = lambda t: (total(t), value(t))
        grads, plain = jax.grad(jax.checkpoint(with_value), has_aux=True)(t)
        return plain, jax.vmap(value)(stacked), jax.jvp(total, (t,), (tangent,))[1], grads

    plain, mapped, forward, grads = run(everything, adapter.params, tangent, stacked)
    backward = sum(np.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (grads, tangent)), strict=True))
    np.testing.assert_allclose(forward, backward, rtol=1e-2 if "bfloat16" in method else 1e-3)
    assert abs(forward) > 1e-3
    assert_close(mapped[1], plain)
    assert not np.allclose(mapped[0], plain, atol=1e-3), "two adapters"


@compiled_method
def test_a_bfloat16_model_stays_one(method: str) -> None:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), SMALL)
    adapter = small_adapter(METHODS[method], params)
    if method not in ("Full", "TrainableTokens", "LoRA, bfloat16"):  # the first two keep the base's dtype
        assert {x.dtype for x in jax.tree.leaves(adapter.params)} == {jnp.dtype("float32")}
    shape = jax.eval_shape(lorax.adapt(small), params, adapter, IDS)
    assert shape == jax.eval_shape(small, params, IDS)
    assert shape.dtype == jnp.bfloat16
    if METHODS[method].is_mergeable:
        merged = jax.eval_shape(lorax.merge, params, adapter)
        assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}


WITH_DROPOUT = [m for m in METHODS if any(f.name == "dropout" for f in dataclasses.fields(METHODS[m]))]


@pytest.mark.parametrize("method", marked(WITH_DROPOUT))
def test_dropout_is_on_with_a_key_and_off_without(method: str) -> None:
    adapter = small_adapter(dataclasses.replace(METHODS[method], dropout=0.5))
    assert_identical(adapter.params, small_adapter(METHODS[method]).params)
    call = jax.jit(lambda a, key: lorax.adapt(small)(SMALL, a, IDS, rng=key), compiler_options=FAST_COMPILE)
    off, one, again, other = (call(adapter, k) for k in (None, *(jax.random.key(i) for i in (0, 0, 1))))
    assert_identical(one, again)
    for x, y in ((off, one), (off, other), (one, other)):
        assert not np.allclose(x, y, atol=1e-3)


def test_the_methods_with_dropout_are_these() -> None:
    assert set(METHODS) - set(WITH_DROPOUT) == {
        "IA3", "IA3 of inputs", "Full", "Bottleneck", "Prompt", "Prefix", "TrainableTokens",
    }  # fmt: skip


def test_different_methods_at_different_sites() -> None:
    rules = {
        "conv.*": METHODS["DoRA"],
        "tied.*/w": METHODS["TrainableTokens"],
        "tied.*": METHODS["Full"],
        "ragged/w": METHODS["VeRA"],
        "scan.*": METHODS["AdaLoRA"],
    }
    adapter = randomised(run(lambda: lorax.init(jax.random.key(0), lorax.Spec(rules), SITES, PARAMS)), scale=0.2)
    assert len({type(m) for m in adapter.methods.values()}) == len(rules)
    assert_agrees(mixed, PARAMS, adapter, INPUTS)


@pytest.mark.parametrize("kind", [pytest.param("auto", marks=pytest.mark.slow), "explicit"])
@pytest.mark.parametrize(("what", "lines"), [("mixed", 2), pytest.param("each", 8, marks=pytest.mark.slow)])
def test_on_eight_devices(kind: str, what: str, lines: int) -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}
    command = [sys.executable, "-m", "tests.eight_devices_methods", kind, what]
    env = os.environ | flags
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count("ok ") == lines, done.stdout
