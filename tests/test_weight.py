"""Adapted weights as sums of labelled products: numbers by hand, and random chains of layout operations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st
from jax import lax

import lorax
from lorax.interpret.contraction import absorb, contraction, dense
from lorax.interpret.weight import Expression, Factor, Term, leaf_weight, rebuild
from tests.agreement import BF16_TOL, adapter_for, assert_agrees, equations, how, normal
from tests.layout_chains import Chain, chains

EXACT = 1e-6
PHASES = (Phase.explicit, Phase.generate)  # examples are small already, and shrinking compiles hundreds
CHAIN_TOL = 5e-5  # up to six roundings in another order

W = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
A = jnp.array([[1.0], [2.0]])
B = jnp.array([[3.0, 4.0, 5.0]])
AB = jnp.array([[3.0, 4.0, 5.0], [6.0, 8.0, 10.0]])


def one(array: Any, *axes: Any) -> Expression:
    return Expression((Term((Factor(jnp.asarray(array), axes),)),))


w, a, b = one(W, 0, 1), one(A, 0, "R"), one(B, "R", 1)


@pytest.mark.parametrize(
    ("expression", "want"),
    [
        (w, W),
        (w + a @ b, W + AB),
        (w + 0.5 * (a @ b), W + 0.5 * AB),
        (w + a * one(0.5) @ b, W + 0.5 * AB),
        (w - a @ b, W - AB),
        (w + -(a @ b), W - AB),
        (w * one([10.0, 20.0], 0), W * jnp.array([[10.0], [20.0]])),
        (w * one([1.0, 2.0, 3.0], 1), W * jnp.array([1.0, 2.0, 3.0])),
        ((w + a @ b) * one([1.0, 2.0, 3.0], 1), (W + AB) * jnp.array([1.0, 2.0, 3.0])),
        (w + one([1.0, 2.0, 3.0], 1), W + jnp.array([1.0, 2.0, 3.0])),
        (w + one(2.0), W + 2.0),
        (a @ b + w, W + AB),
        (w + a @ one([[2.0]], "R", "T") @ one(B, "T", 1), W + 2 * AB),
        (w + one(A @ jnp.ones((1, 2)), 0, "Q") @ one([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]], "Q", 1),
         W + jnp.array([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0]])),
        (w * one(3.0) + one(W, 0, 1), 4 * W),
        (w + one(W.T, 1, 0), 2 * W),
    ],
)  # fmt: skip
def test_dense_is_the_sum_of_products(expression: Expression, want: jax.Array) -> None:
    np.testing.assert_allclose(dense(leaf_weight("w", W, expression)), want, rtol=EXACT)


def test_a_weight_without_its_base_is_refused() -> None:
    with pytest.raises(ValueError, match="layers/0/kernel"):
        leaf_weight("layers/0/kernel", W, a @ b)


def test_stacked_factors_are_multiplied_layer_by_layer() -> None:
    a_SxIxR, b_SxRxO = normal(1, 3, 4, 2), normal(2, 3, 2, 5)
    base = normal(3, 3, 4, 5)
    expression = one(base, 0, 1, 2) + one(a_SxIxR, 0, 1, "R") @ one(b_SxRxO, 0, "R", 2)
    want = jnp.stack([base[i] + a_SxIxR[i] @ b_SxRxO[i] for i in range(3)])
    np.testing.assert_allclose(dense(leaf_weight("w", base, expression)), want, atol=EXACT)


def test_dense_rounds_to_the_bases_dtype_once() -> None:
    base = normal(1, 16, 8, dtype=jnp.bfloat16)
    a_IxR, b_RxO = normal(2, 16, 2), normal(3, 2, 8)
    got = dense(leaf_weight("w", base, one(base, 0, 1) + one(a_IxR, 0, "R") @ one(b_RxO, "R", 1)))
    delta = np.asarray(a_IxR, np.float64) @ np.asarray(b_RxO, np.float64)
    want = jnp.asarray(np.asarray(base, np.float64) + delta, jnp.float32).astype(jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_a_plain_weight_is_its_base() -> None:
    weight = leaf_weight("w", W, w)
    assert weight.is_plain
    assert dense(weight) is weight.base
    assert not leaf_weight("w", W, w + a @ b).is_plain


def test_rebuild_replaces_arrays_in_order() -> None:
    weight = leaf_weight("w", W, w + 0.5 * (a @ b))
    assert len(weight.partial_factors()) == 3
    twice = rebuild(weight, 2 * W, [Factor(2 * f.array, f.axes) for f in weight.partial_factors()])
    np.testing.assert_allclose(dense(twice), 2 * W + 8 * 0.5 * AB, rtol=EXACT)


def test_absorb_sums_contracted_labels_and_keeps_others_side_by_side() -> None:
    x_TxSxI, f_SxIxR = normal(1, 5, 3, 4), normal(2, 3, 4, 2)
    labels = [("x", 0), 0, 1]
    out, axes = absorb(x_TxSxI, labels, [Factor(f_SxIxR, (0, 1, "R")), Factor(jnp.ones(2), ("R",))], {1})
    assert axes == (0, ("x", 0))
    np.testing.assert_allclose(out, jnp.einsum("tsi,sir->st", x_TxSxI, f_SxIxR), atol=EXACT)
    out, axes = absorb(x_TxSxI, labels, [Factor(f_SxIxR, (0, 1, 2))], {0, 1})
    assert axes == (("x", 0), 2)
    np.testing.assert_allclose(out, jnp.einsum("tsi,sir->tr", x_TxSxI, f_SxIxR), atol=EXACT)


def test_absorbing_a_scale_broadcasts_along_its_labels() -> None:
    x_TxSxI, scale_IxS = normal(1, 5, 3, 4), normal(2, 4, 3)
    out, axes = absorb(x_TxSxI, [("x", 0), 0, 1], [Factor(scale_IxS, (1, 0))], ())
    assert axes == (("x", 0), 0, 1)
    np.testing.assert_allclose(out, x_TxSxI * scale_IxS.T, atol=EXACT)


def test_a_bond_is_summed_when_its_last_factor_is_met() -> None:
    steps, rest = contraction((("x", 0), 0), (("R", 1), ("R",), (0, "R")), frozenset({0}))
    assert [s.factor for s in steps] == [2, 0, 1], "the factor with the contracted axis is met first"
    assert [s.out_axes for s in steps] == [(("x", 0), "R"), ("R", ("x", 0), 1), (("x", 0), 1)]
    assert not rest


def test_absorb_sums_axes_along_which_no_factor_varies() -> None:
    x_TxI = normal(1, 5, 2)
    out, axes = absorb(x_TxI, [("x", 0), 0], [Factor(jnp.array([1.0, 2.0, 3.0]), (1,))], {0})
    assert axes == (("x", 0), 1)
    np.testing.assert_allclose(out, jnp.sum(x_TxI, 1)[:, None] * jnp.array([1.0, 2.0, 3.0]), atol=EXACT)


def test_absorb_never_multiplies_two_factors() -> None:
    x_TxI, a_IxR, b_RxO = normal(1, 7, 11), normal(2, 11, 3), normal(3, 3, 13)
    for order in (
        [Factor(a_IxR, (0, "R")), Factor(b_RxO, ("R", 1))],
        [Factor(b_RxO, ("R", 1)), Factor(a_IxR, (0, "R"))],
    ):
        run = lambda x, order=order: absorb(x, [("x", 0), 0], order, {0})[0]
        np.testing.assert_allclose(run(x_TxI), x_TxI @ a_IxR @ b_RxO, atol=1e-5)
        shapes = [e.outvars[0].aval.shape for e in equations(jax.make_jaxpr(run)(x_TxI))]
        assert shapes == [(7, 3), (7, 13)]


def step(chain: Chain, weight_first: bool) -> tuple[Any, Any, Any]:
    """A function that puts its weight through the chain and multiplies it with an activation."""
    sums, x_shape = chain.einsum(weight_first)

    def fn(params: Any, x: Any) -> Any:
        pair = (chain(params["w"]), x) if weight_first else (x, chain(params["w"]))
        return jnp.einsum(sums, *pair)

    return fn, {"w": normal(1, *chain.leaf)}, normal(2, *x_shape)


@settings(max_examples=16, deadline=None, derandomize=True, phases=PHASES)
@given(chains(), st.booleans())
def test_layout_chains_agree_with_the_merged_weight(chain: Chain, weight_first: bool) -> None:
    fn, params, x = step(chain, weight_first)
    site = lorax.trace(fn, params, x)["w"]
    note(f"{chain} {site.fan_in} {site.fan_out}")
    if not site.is_adaptable:  # nothing of fan-in or fan-out is left
        return
    adapter = adapter_for(fn, params, x)
    if chain.restricts:
        assert how(fn, params, adapter, x) == {"w": "factored"}
    assert_agrees(fn, params, adapter, x, tol=BF16_TOL if chain.is_rounded else CHAIN_TOL)


@settings(max_examples=40, deadline=None, derandomize=True, phases=PHASES)
@given(chains(most=9), st.booleans())
def test_layout_chains_keep_their_factors(chain: Chain, weight_first: bool) -> None:
    """Longer chains, traced only: the sides are found, and `strict` accepts what `explain` calls factored."""
    fn, params, x = step(chain, weight_first)
    site = lorax.trace(fn, params, x)["w"]
    note(f"{chain} {site}")
    sides = {side: {i for i, s in enumerate(chain.leaf_sides) if s == side} for side in "IOS"}
    if site.is_adaptable and chain.restricts:
        assert set(site.fan_in) <= sides["I"]
        assert set(site.fan_out) <= sides["O"]
        adapter = adapter_for(fn, params, x)
        assert how(fn, params, adapter, x) == {"w": "factored"}
        jax.eval_shape(lorax.adapt(fn, strict=True), params, adapter, x)


def test_pieces_joined_in_another_order_are_factored() -> None:
    def fn(p: Any, x: Any) -> Any:
        q, k, v = jnp.split(p["w"], [3, 5], axis=1)
        return x @ jnp.concatenate([v, q, k], axis=1)

    params, x = {"w": normal(1, 4, 8)}, normal(2, 5, 4)
    adapter = adapter_for(fn, params, x)
    assert how(fn, params, adapter, x) == {"w": "factored"}
    assert_agrees(fn, params, adapter, x)


SCALED = {  # and whether each stays factored when weights are joined along what leaves, and along what enters
    "LoRA": (lorax.LoRA(rank=2), True, True),
    "DoRA": (lorax.DoRA(rank=2), True, False),
    "IA3": (lorax.IA3(on="output"), True, False),
    "IA3 of inputs": (lorax.IA3(on="input"), False, True),
}
WORDS = {True: "factored", False: "materialised"}


def leaves_side_by_side(p: Any, x: Any) -> Any:
    joined = jnp.concatenate([p["q"], p["k"].T, p["frozen"]], axis=1)
    return x @ joined, jnp.einsum("ti,oei->eto", x, jnp.stack([p["q"].T, p["k"]], axis=1))


def leaves_below_each_other(p: Any, x: Any) -> Any:
    return jnp.tile(x, 4)[:, :14] @ jnp.concatenate([p["frozen"].T, p["q"].T, p["k"]])


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("where", [leaves_side_by_side, leaves_below_each_other])
def test_several_leaves_joined(name: str, where: Any) -> None:
    """A gain stays one where it varies along what is joined; elsewhere it would be as large as the weight."""
    method, *is_factored = SCALED[name]
    params = {"q": normal(1, 4, 6), "k": normal(2, 6, 4), "frozen": normal(3, 4, 2)}
    x = normal(4, 5, 4)
    adapter = adapter_for(where, params, x, only="[qk]", method=method)
    word = WORDS[is_factored[where is leaves_below_each_other]]
    assert how(where, params, adapter, x) == {"q": word, "k": word}
    assert_agrees(where, params, adapter, x)


@pytest.mark.parametrize("name", SCALED)
def test_layers_of_their_own_leaves_stacked_for_a_scan_are_factored(name: str) -> None:
    def fn(p: Any, x: Any) -> Any:
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.stack([p["q"], p["frozen"], p["k"].T]))[0]

    params = {"q": normal(1, 4, 4), "k": normal(2, 4, 4), "frozen": normal(3, 4, 4)}
    x = normal(4, 5, 4)
    adapter = adapter_for(fn, params, x, only="[qk]", method=SCALED[name][0])
    assert how(fn, params, adapter, x) == {"q": "factored", "k": "factored"}
    assert_agrees(fn, params, adapter, x)


def test_a_join_of_both_sides_is_materialised_and_says_by_what() -> None:
    fn = lambda p, x: x @ jnp.sort(p["w"].reshape(-1)).reshape(4, 6) + x @ p["w"]
    params, x = {"w": normal(1, 4, 6)}, normal(2, 5, 4)
    adapter = adapter_for(fn, params, x)
    (row,) = lorax.explain(fn, params, adapter, x)
    assert (row.path, row.how) == ("w", "materialised")
    assert "reshape" in row.reason
    assert_agrees(fn, params, adapter, x)
