"""Products with adapted weights: dot_general on any axes and either side, convolutions, ragged products."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st
from jax import lax

import lorax
from tests.agreement import (
    BF16_TOL,
    F32_TOL,
    FAST_COMPILE,
    adapter_for,
    assert_agrees,
    assert_close,
    equations,
    how,
    normal,
    run,
    value_and_grads,
)

PHASES = (Phase.explicit, Phase.generate)  # examples are small already, and shrinking compiles hundreds
SCALE = 1.5  # alpha 3, rank 2
LETTERS = "abcdefgh"


@st.composite
def einsums(draw: Any) -> tuple[str, dict[str, int], int]:
    """A sum of products, the letters' sizes, and the position of the weight."""
    names = iter(LETTERS)
    take = lambda least, most: [next(names) for _ in range(draw(st.integers(least, most)))]
    contracted, free, stacked, x_free = take(1, 2), take(1, 2), take(0, 1), take(0, 2)
    order = lambda *parts: "".join(draw(st.permutations([a for part in parts for a in part])))
    w, x, out = order(contracted, free, stacked), order(contracted, stacked, x_free), order(free, stacked, x_free)
    side = draw(st.integers(0, 1))
    sizes = {a: draw(st.integers(1, 4)) for a in w + x}
    return f"{w},{x}->{out}" if side == 0 else f"{x},{w}->{out}", sizes, side


def operands(sums: str, sizes: dict[str, int], side: int) -> tuple[str, str, str, Any, Any]:
    left, right, out = sums.replace("->", ",").split(",")
    w, x = (left, right) if side == 0 else (right, left)
    return w, x, out, normal(1, *(sizes[a] for a in w)), normal(2, *(sizes[a] for a in x))


@settings(max_examples=14, deadline=None, derandomize=True, phases=PHASES)
@given(einsums())
def test_any_einsum_agrees_and_is_factored(drawn: tuple[str, dict[str, int], int]) -> None:
    sums, _, side = drawn
    w, x, _, kernel, activation = operands(*drawn)
    fn = lambda p, x: jnp.einsum(sums, *((p["w"], x) if side == 0 else (x, p["w"])))
    params = {"w": kernel}
    site = lorax.trace(fn, params, activation)["w"]
    note(f"{drawn} {site}")
    assert site.kind == "linear"
    adapter = adapter_for(fn, params, activation)
    assert how(fn, params, adapter, activation) == {"w": "factored"}
    assert_agrees(fn, params, adapter, activation)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True, phases=PHASES)
@given(einsums())
def test_any_einsum_finds_its_axes_and_its_value_by_hand(drawn: tuple[str, dict[str, int], int]) -> None:
    """`y = x·W + s·x·A·B` written out with numpy, from the letters alone."""
    sums, sizes, side = drawn
    w, x, out, kernel, activation = operands(*drawn)
    fn = lambda p, x: jnp.einsum(sums, *((p["w"], x) if side == 0 else (x, p["w"])))
    letters = lambda axes: "".join(w[i] for i in axes)
    site = lorax.trace(fn, {"w": kernel}, activation)["w"]
    note(f"{drawn} {site}")
    real = {a for a in w if sizes[a] > 1}  # an axis of size one may be squeezed away before the product
    assert set(letters(site.fan_in)) & real == {a for a in w if a in x and a not in out} & real
    assert set(letters(site.fan_out)) & real == {a for a in w if a not in x} & real
    assert set(letters(site.stack)) & real == {a for a in w if a in x and a in out} & real
    adapter = adapter_for(fn, {"w": kernel}, activation)
    a, b = (np.asarray(adapter.params["w"][n]) for n in "ab")
    stack, fan_in, fan_out = (letters(axes) for axes in (site.stack, site.fan_in, site.fan_out))
    delta = np.einsum(f"{stack}{fan_in}Z,{stack}Z{fan_out}->{w}", a, b)
    merged = np.asarray(kernel) + SCALE * delta
    want = np.einsum(sums, *((merged, activation) if side == 0 else (activation, merged)))
    args = ({"w": kernel}, adapter, activation)
    got = jax.jit(lorax.adapt(fn)).lower(*args).compile(FAST_COMPILE)(*args)
    assert_close(got, want.astype(np.float32))


def test_one_pair_of_factors_serves_both_orientations() -> None:
    fn = lambda p, x, y: (x @ p["w"], y @ p["w"].T, jnp.einsum("io,ti->ot", p["w"], x))
    params, args = {"w": normal(1, 4, 6)}, (normal(2, 3, 4), normal(3, 5, 6))
    site = lorax.trace(fn, params, *args)["w"]
    assert (site.fan_in, site.fan_out) == ((0,), (1,))
    assert {(u.contracted, u.free) for u in site.uses} == {((0,), (1,)), ((1,), (0,))}
    adapter = adapter_for(fn, params, *args)
    assert {n: x.shape for n, x in adapter.params["w"].items()} == {"a": (4, 2), "b": (2, 6)}
    assert how(fn, params, adapter, *args) == {"w": "factored"}
    assert_agrees(fn, params, adapter, *args)


@pytest.mark.parametrize(
    "second",
    ["bk,dhk->bdh", "bh,dhk->bdk", "bhk,dhk->bd", "bd,dhk->bhk", "bdk,dhk->bkh", "bdk,dhk->bh"],
)
def test_a_second_use_may_contract_other_axes(second: str) -> None:
    """A kernel `(d, heads, k)` that is first used as a query kernel, then otherwise."""
    sizes = {"b": 3, "d": 4, "h": 2, "k": 5}
    x_shape = [sizes[a] for a in second.split(",")[0]]
    fn = lambda p, x, y: (jnp.einsum("bd,dhk->bhk", x, p["w"]), jnp.einsum(second, y, p["w"]))
    params, args = {"w": normal(1, 4, 2, 5)}, (normal(2, 3, 4), normal(3, *x_shape))
    assert lorax.trace(fn, params, *args)["w"].fan_in == (0,)
    adapter = adapter_for(fn, params, *args)
    assert how(fn, params, adapter, *args) == {"w": "factored"}
    assert_agrees(fn, params, adapter, *args)


def test_a_weight_times_itself_is_materialised() -> None:
    fn = lambda p, x: x @ (p["w"] @ p["w"].T)
    params, x = {"w": normal(1, 4, 6)}, normal(2, 3, 4)
    adapter = adapter_for(fn, params, x)
    (row,) = lorax.explain(fn, params, adapter, x)
    assert (row.how, row.reason) == ("materialised", "a product of two parameters")
    assert_agrees(fn, params, adapter, x)


def dots(fn: Any, *args: Any) -> list[Any]:
    return [e for e in equations(jax.make_jaxpr(fn)(*args)) if e.primitive is lax.dot_general_p]


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    "precision", [lax.Precision.HIGHEST, (lax.Precision.HIGH, lax.Precision.DEFAULT), "BF16_BF16_F32_X3"]
)
def test_precision_is_kept(precision: Any, side: int) -> None:
    fn = lambda p, x: lax.dot(*((p["w"], x) if side == 0 else (x, p["w"])), precision=precision)
    params, x = {"w": normal(1, 4, 4)}, normal(2, 4, 4)
    adapter = adapter_for(fn, params, x)
    (plain,) = dots(fn, params, x)
    base, *thin = dots(lorax.adapt(fn), params, adapter, x)
    assert base.params == plain.params
    assert len(thin) == 2
    wanted = plain.params["precision"]
    if isinstance(wanted, tuple):  # the thin products have the activation on the left
        assert [t.params["precision"] for t in thin] == 2 * [wanted if side == 1 else wanted[::-1]]
    else:
        assert [t.params["precision"] for t in thin] == 2 * [wanted]


@pytest.mark.parametrize("out_dtype", [jnp.float32, None])
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("w_dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_are_those_of_the_plain_function(w_dtype: Any, x_dtype: Any, out_dtype: Any) -> None:
    contract = (((1,), (0,)), ((), ()))
    fn = lambda p, x: lax.dot_general(x, p["w"], contract, preferred_element_type=out_dtype)
    params, x = {"w": normal(1, 8, 6, dtype=w_dtype)}, normal(2, 3, 8, dtype=x_dtype)
    adapter = adapter_for(fn, params, x)
    assert {a.dtype for a in adapter.params["w"].values()} == {jnp.dtype("float32")}
    base = dots(lorax.adapt(fn), params, adapter, x)[0]
    assert base.params["preferred_element_type"] == dots(fn, params, x)[0].params["preferred_element_type"]
    is_exact = w_dtype == x_dtype == jnp.float32
    assert_agrees(fn, params, adapter, x, tol=F32_TOL if is_exact else BF16_TOL)


def test_a_weight_cast_to_bfloat16_is_multiplied_in_bfloat16() -> None:
    """What the function casts its weight to is what the thin products are computed in."""
    fn = lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)
    params, x = {"w": normal(1, 8, 6)}, normal(2, 3, 8)
    adapter = adapter_for(fn, params, x)
    found = dots(lorax.adapt(fn), params, adapter, x)
    assert [[v.aval.dtype for v in (*e.invars, *e.outvars)] for e in found] == 3 * [3 * [jnp.bfloat16]]
    assert_agrees(fn, params, adapter, x, tol=BF16_TOL)


def test_a_float8_weight_is_multiplied_in_bfloat16_at_least() -> None:
    fn = lambda p, x: x @ p["w"].astype(x.dtype)
    params, x = {"w": normal(1, 8, 6).astype(jnp.float8_e4m3fn)}, normal(2, 3, 8, dtype=jnp.bfloat16)
    adapter = adapter_for(fn, params, x)
    assert how(fn, params, adapter, x) == {"w": "factored"}
    a, b = (np.asarray(adapter.params["w"][n]) for n in "ab")
    want = np.asarray(x, np.float32) @ (np.asarray(params["w"], np.float32) + SCALE * a @ b)
    got = lorax.adapt(fn)(params, adapter, x)
    assert got.dtype == jnp.bfloat16
    assert_close(got.astype(jnp.float32), want, BF16_TOL)


NARROW = jnp.float8_e4m3fn
NARROW_TOL = 8e-2  # float8_e4m3fn keeps 4 bits
METHODS = {"LoRA": lorax.LoRA(rank=2), "DoRA": lorax.DoRA(rank=2), "IA3": lorax.IA3(), "VeRA": lorax.VeRA(rank=2)}
INTO_FLOAT32 = {
    "cast": lambda p, x: x @ p["w"].astype(jnp.float32),
    "as it is": lambda p, x: lax.dot_general(
        x.astype(NARROW), p["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    ),
}


@pytest.mark.parametrize("use", INTO_FLOAT32)
@pytest.mark.parametrize("method", METHODS)
def test_methods_on_a_float8_weight(method: str, use: str) -> None:
    """Which JAX promotes with nothing: a merged weight is float8 again, and an adapted product is not."""
    fn = INTO_FLOAT32[use]
    params, x = {"w": normal(1, 8, 6).astype(NARROW)}, normal(2, 3, 8).astype(NARROW).astype(jnp.float32)
    adapter = adapter_for(fn, params, x, method=METHODS[method])
    assert how(fn, params, adapter, x) == {"w": "factored"}
    wide = {"w": params["w"].astype(jnp.float32)}
    want = run(lambda a: value_and_grads(lambda a, x: x @ lorax.merge(wide, a)["w"], a, x), adapter)
    got = run(lambda a: value_and_grads(lambda a, x: lorax.adapt(fn)(params, a, x), a, x), adapter)
    if use == "cast":  # the products of DoRA's norm are in bfloat16 there
        assert_close(got, want, BF16_TOL / 10 if method == "DoRA" else F32_TOL)
    else:  # as all thin products are here
        assert_close(got[0], want[0], BF16_TOL)
    merged = lorax.merge(params, adapter)["w"]
    assert merged.dtype == NARROW
    assert_close(merged.astype(jnp.float32), lorax.merge(wide, adapter)["w"], NARROW_TOL)
    if method != "DoRA":
        unmerged = lorax.unmerge({"w": merged}, adapter)["w"]
        assert unmerged.dtype == NARROW
        assert_close(unmerged.astype(jnp.float32), wide["w"], 2 * NARROW_TOL)


# Convolutions.


@st.composite
def convolutions(draw: Any) -> dict[str, Any]:
    """Parameters of `conv_general_dilated` and the shapes of its operands."""
    n = draw(st.integers(1, 2))
    spatial = "HW"[:n]
    order = lambda letters: "".join(draw(st.permutations(letters)))
    each = lambda least, most: [draw(st.integers(least, most)) for _ in range(n)]
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    in_per_group, out_per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = dict(zip(spatial, each(1, 3), strict=True))
    numbers = (order("NC" + spatial), order("OI" + spatial), order("NC" + spatial))
    lhs = {"N": 2, "C": groups * in_per_group, **dict(zip(spatial, each(5, 7), strict=True))}
    rhs = {"O": groups * out_per_group, "I": in_per_group, **sizes}
    pads = [(draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(n)]
    return {
        "x": tuple(lhs[a] for a in numbers[0]),
        "w": tuple(rhs[a] for a in numbers[1]),
        "window_strides": each(1, 2),
        "padding": draw(st.sampled_from(["SAME", "VALID", pads])),
        "lhs_dilation": each(1, 2),
        "rhs_dilation": each(1, 2),
        "dimension_numbers": numbers,
        "feature_group_count": groups,
    }


@settings(max_examples=10, deadline=None, derandomize=True, phases=PHASES)
@given(convolutions())
def test_any_convolution_agrees_and_is_factored(drawn: dict[str, Any]) -> None:
    settings = dict(drawn)
    params, x = {"w": normal(1, *settings.pop("w"))}, normal(2, *settings.pop("x"))
    if isinstance(settings["padding"], str):  # named paddings ignore lhs_dilation
        settings["lhs_dilation"] = [1] * len(settings["lhs_dilation"])
    fn = lambda p, x: lax.conv_general_dilated(x, p["w"], **settings)
    site = lorax.trace(fn, params, x)["w"]
    spec = settings["dimension_numbers"][1]
    note(f"{drawn} {site}")
    assert site.kind == "conv"
    assert {spec[a] for a in site.fan_out} == {"O"}
    assert {spec[a] for a in site.fan_in} == set(spec) - {"O"}
    adapter = adapter_for(fn, params, x)
    assert how(fn, params, adapter, x) == {"w": "factored"}
    assert_agrees(fn, params, adapter, x)


def test_a_pointwise_convolution_is_a_product_by_hand() -> None:
    fn = lambda p, x: lax.conv_general_dilated(x, p["w"], (1,), "VALID", dimension_numbers=("NHC", "HIO", "NHC"))
    params, x = {"w": normal(1, 1, 4, 6)}, normal(2, 2, 5, 4)
    adapter = adapter_for(fn, params, x)
    a_IxR, b_RxO = adapter.params["w"]["a"][0], adapter.params["w"]["b"]
    want = x @ params["w"][0] + SCALE * (x @ a_IxR) @ b_RxO
    assert_close(lorax.adapt(fn)(params, adapter, x), want)


def test_batch_groups_are_right_and_materialised() -> None:
    fn = lambda p, x: lax.conv_general_dilated(
        x, p["w"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), batch_group_count=2
    )
    params, x = {"w": normal(1, 3, 4, 6)}, normal(2, 4, 5, 4)
    adapter = adapter_for(fn, params, x)
    assert how(fn, params, adapter, x) == {"w": "materialised"}
    assert_agrees(fn, params, adapter, x)


def test_precision_and_dtype_of_a_convolution_are_kept() -> None:
    fn = lambda p, x: lax.conv(x, p["w"], (1, 1), "SAME", precision=lax.Precision.HIGHEST)
    params, x = {"w": normal(1, 6, 4, 3, 3, dtype=jnp.bfloat16)}, normal(2, 2, 4, 5, 5, dtype=jnp.bfloat16)
    adapter = adapter_for(fn, params, x)
    found = [
        e
        for e in equations(jax.make_jaxpr(lorax.adapt(fn))(params, adapter, x))
        if e.primitive is lax.conv_general_dilated_p
    ]
    assert len(found) == 2
    assert {e.params["precision"] for e in found} == {(lax.Precision.HIGHEST, lax.Precision.HIGHEST)}
    assert {e.outvars[0].aval.dtype for e in found} == {jnp.dtype("bfloat16")}
    assert_agrees(fn, params, adapter, x, tol=BF16_TOL)


# Products of groups of rows.


@pytest.mark.parametrize("sizes", [(3, 2, 4), (0, 9, 0), (2, 0, 3), (0, 0, 0)])
def test_ragged_dot_agrees_and_is_factored(sizes: tuple[int, ...]) -> None:
    """Also for empty groups and for rows that belong to none."""
    fn = lambda p, x, sizes: lax.ragged_dot(x, p["w"], sizes)
    params, args = {"w": normal(1, 3, 4, 6)}, (normal(2, 9, 4), jnp.array(sizes, jnp.int32))
    site = lorax.trace(fn, params, *args)["w"]
    assert (site.kind, site.stack, site.fan_in, site.fan_out) == ("grouped", (0,), (1,), (2,))
    adapter = adapter_for(fn, params, *args)
    assert how(fn, params, adapter, *args) == {"w": "factored"}
    a, b = adapter.params["w"]["a"], adapter.params["w"]["b"]
    merged = params["w"] + SCALE * jnp.einsum("gir,gro->gio", a, b)
    groups = np.repeat(np.arange(3), sizes)
    want = np.zeros((9, 6), np.float32)
    for row, g in enumerate(groups):
        want[row] = args[0][row] @ merged[g]
    assert_close(lorax.adapt(fn)(params, adapter, *args), want)
    if any(sizes):
        assert_agrees(fn, params, adapter, *args)


@pytest.mark.parametrize("layout", ["gkn", "gnk", "kgn", "nkg"])
def test_ragged_products_in_any_layout_of_the_weight(layout: str) -> None:
    shape = {"g": 3, "k": 4, "n": 6}
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (layout.index("k"),)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[layout.index("g")],
    )
    fn = lambda p, x, sizes: lax.ragged_dot_general(x, p["w"], sizes, numbers)
    params, args = {"w": normal(1, *(shape[a] for a in layout))}, (normal(2, 9, 4), jnp.array([3, 2, 4], jnp.int32))
    site = lorax.trace(fn, params, *args)["w"]
    assert (site.kind, [layout[a] for a in (*site.stack, *site.fan_in, *site.fan_out)]) == ("grouped", ["g", "k", "n"])
    adapter = adapter_for(fn, params, *args)
    assert how(fn, params, adapter, *args) == {"w": "factored"}
    assert_agrees(fn, params, adapter, *args)


def test_gains_of_joined_groups_along_both_sides_are_right_and_materialised() -> None:
    """Side by side, weights whose inputs are scaled have a gain for each input and each part of the outputs."""

    def fn(p: Any, x: Any) -> Any:
        shared = [jnp.broadcast_to(p[name], (3, 4, 6)) for name in "ab"]
        return lax.ragged_dot(x, jnp.concatenate(shared, 2), jnp.array([2, 0, 5]))

    params, x = {"a": normal(1, 4, 6), "b": normal(2, 4, 6)}, normal(3, 7, 4)
    for on, word in (("input", "materialised"), ("output", "factored")):
        adapter = adapter_for(fn, params, x, method=lorax.IA3(on=on))
        assert how(fn, params, adapter, x) == {"a": word, "b": word}
        assert_agrees(fn, params, adapter, x)


def test_ragged_dot_in_bfloat16_keeps_its_dtype() -> None:
    fn = lambda p, x, sizes: lax.ragged_dot(x, p["w"], sizes, preferred_element_type=jnp.float32)
    params = {"w": normal(1, 3, 4, 6, dtype=jnp.bfloat16)}
    args = (normal(2, 9, 4, dtype=jnp.bfloat16), jnp.array([3, 2, 4], jnp.int32))
    adapter = adapter_for(fn, params, *args)
    assert_agrees(fn, params, adapter, *args, tol=BF16_TOL)


def test_a_weight_as_the_rows_of_a_ragged_product_is_right() -> None:
    fn = lambda p, x, y, sizes: (lax.ragged_dot(p["w"], y, sizes), x @ p["w"])
    params = {"w": normal(1, 9, 4)}
    args = (normal(2, 5, 9), normal(3, 3, 4, 6), jnp.array([3, 2, 4], jnp.int32))
    assert_agrees(fn, params, adapter_for(fn, params, *args), *args)


# Rows that are looked up.


def test_an_embedding_by_hand() -> None:
    fn = lambda p, ids: p["table"][ids]
    params, ids = {"table": normal(1, 7, 4)}, jnp.array([[0, 6, 3], [3, 3, 1]])
    site = lorax.trace(fn, params, ids)["table"]
    assert (site.kind, site.fan_in, site.fan_out) == ("embedding", (0,), (1,))
    adapter = adapter_for(fn, params, ids)
    merged = params["table"] + SCALE * adapter.params["table"]["a"] @ adapter.params["table"]["b"]
    assert_close(lorax.adapt(fn)(params, adapter, ids), merged[ids])
    assert how(fn, params, adapter, ids) == {"table": "factored"}
    assert_agrees(fn, params, adapter, ids)


@pytest.mark.parametrize("mode", ["clip", "fill", "wrap"])
def test_rows_beyond_the_table_are_those_of_the_plain_function(mode: str) -> None:
    fn = lambda p, ids: jnp.take(p["table"], ids, axis=0, mode=mode, fill_value=3.0 if mode == "fill" else None)
    ids = jnp.array([0, 6, 7, 9, -1, -9])
    params = {"table": normal(1, 7, 4)}
    assert_agrees(fn, params, adapter_for(fn, params, ids), ids)


def test_columns_that_are_looked_up() -> None:
    fn = lambda p, ids: jnp.take(p["table"], ids, axis=1)
    params, ids = {"table": normal(1, 4, 7)}, jnp.array([0, 6, 3, 3])
    site = lorax.trace(fn, params, ids)["table"]
    assert (site.kind, site.fan_in, site.fan_out) == ("embedding", (1,), (0,))
    assert_agrees(fn, params, adapter_for(fn, params, ids), ids)


def test_one_table_a_batch_entry() -> None:
    fn = lambda p, ids: jax.vmap(lambda table, i: table[i])(p["table"], ids)
    params, ids = {"table": normal(1, 3, 7, 4)}, jnp.array([[0, 6], [3, 3], [5, 1]])
    adapter = adapter_for(fn, params, ids)
    assert adapter.params["table"]["a"].shape == (3, 7, 2)
    assert_agrees(fn, params, adapter, ids)
