"""LoftQ and QPiSSA: by hand, against the algorithm on bitsandbytes' quantiser, on every layout, and what is refused."""

import re
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from safetensors.numpy import load_file

import lorax
from lorax.loftq import loftq
from lorax.methods.dora import DoRA
from lorax.methods.initializers import matrices
from lorax.methods.lorafa import LoRAFA
from lorax.methods.vera import VeRA
from lorax.quant import NF4, Int4, Int8, dequantize, is_quantized, quantize
from tests.agreement import abstract, assert_close, assert_identical, normal

EXACT = 1e-5
BASE = load_file(Path(__file__).parent / "golden" / "peft" / "base" / "model.safetensors")
SMALL = NF4(block=8)


def dense(p: Any, x: Any) -> Any:
    return x @ p["w"]


def started(fn: Any, params: Any, *args: Any, method: Any = None, only: str = ".*") -> Any:
    sites = lorax.trace(fn, params, *args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # ranks above a weight's smaller side
        return lorax.init(jax.random.key(0), lorax.Spec({only: method or lorax.LoRA(rank=2, alpha=3)}), sites, params)


def linear(w: Any, rules: Any, iterations: int, **settings: Any) -> tuple[Any, Any]:
    """The quantised params and the adapter of one linear site with weight `w` [in, out]."""
    params = {"w": jnp.asarray(w)}
    adapter = started(dense, params, jnp.ones((1, w.shape[0])), method=lorax.LoRA(**settings))
    return loftq(params, adapter, {"w": rules}, iterations=iterations)


def near(qparams: Any, adapter: Any) -> Any:
    """The weights that a quantised base and its adapter stand for."""
    return lorax.merge(dequantize(qparams), adapter)


def norms(sites: Any, got: Any, want: Any) -> np.ndarray:
    """The distance of each layer of the one site."""
    (site,) = sites
    return np.linalg.norm(np.asarray(matrices(site, got["w"]) - matrices(site, want["w"])), axis=(1, 2))


# By hand.


def test_one_iteration_by_hand() -> None:
    """Blocks of two along the inputs, steps of absmax/7: (7, 3.4) is stored as (7, 3), and (7, 1) as it is.

    What is left, 0.4 at input 1 and output 0, has rank 1: with s = 3, A·B is a third of it.
    """
    w_IxO = jnp.array([[7.0, 7.0], [3.4, 1.0]])
    qparams, adapter = linear(w_IxO, Int4(block=2), 1, rank=1, alpha=3)
    np.testing.assert_allclose(qparams["w"].dequantize(), [[7, 7], [3, 1]], rtol=EXACT)
    product = adapter.params["w"]["a"] @ adapter.params["w"]["b"]
    np.testing.assert_allclose(product, [[0, 0], [0.4 / 3, 0]], atol=EXACT)
    np.testing.assert_allclose(near(qparams, adapter)["w"], w_IxO, rtol=EXACT)


def test_one_iteration_of_pissa_by_hand() -> None:
    """The leading triplet of diag(14, 3.3), which is of rank 1, goes into the factors: A·B is 14/s, s = 2."""
    w_IxO = jnp.diag(jnp.array([14.0, 3.3]))
    qparams, adapter = linear(w_IxO, Int4(block=2), 1, rank=1, alpha=2, initializer="pissa")
    assert set(adapter.state["w"]) == {"scale"}, "nothing is subtracted: the base is the residual"
    np.testing.assert_allclose(qparams["w"].dequantize(), np.diag([0, 3.3]), atol=EXACT)
    np.testing.assert_allclose(adapter.params["w"]["a"] @ adapter.params["w"]["b"], np.diag([7, 0]), atol=EXACT)


# Against Li et al.'s and Meng et al.'s algorithms written down with bitsandbytes 0.50.2's NF4 (block 64, no double
# quantisation) and torch's SVD, on a weight of the tiny model, rank 8, alpha = rank: ‖W − Q − A·B‖ by iteration.

PLAIN = 1.21331
LOFTQ = [1.03685, 0.95881, 0.9256, 0.91112, 0.90135]
QPISSA = [1.03974, 0.92824, 0.87991, 0.85572, 0.83954]
FLIPS = 2e-3  # a weight on the bound of two codes goes either way, and later iterations follow


@pytest.mark.parametrize(("initializer", "want"), [("uniform", LOFTQ), ("pissa", QPISSA)])
@pytest.mark.parametrize("alpha", [8, 20])
def test_errors_equal_the_algorithm_on_bitsandbytes(initializer: str, want: list[float], alpha: float) -> None:
    w_IxO = BASE["model.layers.0.mlp.gate_proj.weight"].T
    stored = quantize({"w": w_IxO}, {"w": NF4(double=False)})
    np.testing.assert_allclose(np.linalg.norm(stored["w"].dequantize() - w_IxO), PLAIN, rtol=EXACT)
    for iterations, error in enumerate(want, 1):
        settings = {"rank": 8, "alpha": alpha, "initializer": initializer}
        merged = near(*linear(w_IxO, NF4(double=False), iterations, **settings))["w"]
        np.testing.assert_allclose(np.linalg.norm(merged - w_IxO), error, rtol=FLIPS)


# Every layout.

CASES = {
    "kernel": (dense, (16, 24), (2, 16)),
    "transposed": (lambda p, x: x @ p["w"].T, (24, 16), (2, 16)),
    "query": (lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"]), (16, 2, 12), (2, 16)),
    "out": (lambda p, x: jnp.einsum("bhk,hkd->bd", x, p["w"]), (2, 12, 16), (2, 2, 12)),
    "stack": (lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0], (3, 16, 16), (2, 16)),
    "experts": (lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"]), (3, 16, 24), (3, 2, 16)),
    "inner stack": (lambda p, x: jnp.einsum("bi,ieo->ebo", x, p["w"]), (16, 3, 24), (2, 16)),
    "conv": (lambda p, x: lax.conv(x, p["w"], (1,), "SAME"), (24, 8, 3), (2, 8, 6)),
    "embedding": (lambda p, ids: p["w"][ids], (24, 16), "ids"),
    "tied": (lambda p, ids: p["w"][ids] @ p["w"].T, (24, 16), "ids"),
    "odd": (dense, (13, 11), (2, 13)),
}


@pytest.mark.slow
@pytest.mark.parametrize("initializer", ["uniform", "pissa"])
@pytest.mark.parametrize("name", CASES)
def test_in_every_layout_and_layer_the_error_falls(name: str, initializer: str) -> None:
    fn, w, x = CASES[name]
    params, x = {"w": normal(1, *w)}, jnp.array([[0, 6, 3]]) if x == "ids" else normal(2, *x)
    sites = lorax.trace(fn, params, x)
    adapter = started(fn, params, x, method=lorax.LoRA(rank=3, alpha=5, initializer=initializer))
    stored = quantize(params, {"w": SMALL}, sites=sites)
    results = [loftq(params, adapter, {"w": SMALL}, iterations=n) for n in (1, 5)]
    assert all(jax.tree.structure(qparams) == jax.tree.structure(stored) for qparams, _ in results), "the site's layout"
    plain, once, often = (norms(sites, x, params) for x in (dequantize(stored), *(near(*r) for r in results)))
    assert np.all(once < plain)
    assert np.all(often < once)


@pytest.mark.slow
def test_every_layer_is_fitted_by_itself() -> None:
    fn = lambda p, x: lax.scan(lambda c, w: (c, c @ w), x, p["w"])
    w_LxIxO = normal(1, 3, 16, 24) * jnp.array([1.0, 3.0, 0.1])[:, None, None]
    params = {"w": w_LxIxO}
    adapter = started(fn, params, jnp.ones((1, 16)), method=lorax.LoRA(rank=3, alpha=5))
    got = near(*loftq(params, adapter, {"w": SMALL}, iterations=1))["w"]
    for layer in range(3):
        assert_close(got[layer], near(*linear(w_LxIxO[layer], SMALL, 1, rank=3, alpha=5))["w"], 1e-4)


def test_a_scaling_for_each_layer() -> None:
    fn = lambda p, x: lax.scan(lambda c, w: (c, c @ w), x, p["w"])
    params = {"w": normal(1, 2, 16, 24)}
    adapter = started(fn, params, jnp.ones((1, 16)), method=lorax.LoRA(rank=3))
    scaled = adapter.replace(state={"w": {"scale": jnp.array([0.5, 4.0])}})
    merged = [near(*loftq(params, a, {"w": SMALL}, iterations=2))["w"] for a in (adapter, scaled)]
    assert_close(*merged, 1e-4)


@pytest.mark.parametrize("format", [NF4(), NF4(double=False), Int4(), Int8()])
def test_every_format(format: Any) -> None:
    w = normal(1, 64, 128)
    qparams, adapter = linear(w, format, 3, rank=8)
    assert qparams["w"].format == format
    plain = quantize({"w": w}, {"w": format})["w"]
    assert jax.tree.structure(qparams["w"]) == jax.tree.structure(plain)
    errors = [float(jnp.linalg.norm(x - w)) for x in (near(qparams, adapter)["w"], plain.dequantize())]
    assert errors[0] < 0.9 * errors[1]


# Methods, dtypes, and what else is in the params.


def model(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"]) @ p["down"]["kernel"] @ p["head"]["kernel"]


MODEL = {
    "up": {"kernel": normal(1, 16, 32), "bias": normal(2, 32)},
    "down": {"kernel": normal(3, 32, 16)},
    "head": {"kernel": normal(4, 16, 8)},
}
X = normal(9, 5, 16)
METHODS = {
    "LoRA": lorax.LoRA(rank=4, alpha=6),
    "rsLoRA": lorax.LoRA(rank=4, alpha=6, rank_stabilized=True),
    "PiSSA": lorax.LoRA(rank=4, alpha=6, initializer="pissa"),
    "OLoRA": lorax.LoRA(rank=4, alpha=6, initializer="olora"),
    "LoRAFA": LoRAFA(rank=4, alpha=6),
    "LoRAFA, PiSSA": LoRAFA(rank=4, alpha=6, initializer="pissa"),
    "DoRA": DoRA(rank=4, alpha=6),
    "DoRA, PiSSA": DoRA(rank=4, alpha=6, initializer="pissa"),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_function_of_the_pair_is_nearer_than_that_of_the_quantised_base(name: str) -> None:
    rules = {"(up|down)/kernel": SMALL}
    adapter = started(model, MODEL, X, method=METHODS[name], only="(up|down)/kernel")
    qparams, fitted = loftq(MODEL, adapter, rules)
    assert is_quantized(qparams["up"]["kernel"])
    assert_identical((qparams["up"]["bias"], qparams["head"]), (MODEL["up"]["bias"], MODEL["head"]))
    assert {n for arrays in fitted.state.values() for n in arrays}.isdisjoint({"a0", "b0"})
    assert jax.tree.structure(fitted.params) == jax.tree.structure(adapter.params)
    plain = dequantize(quantize(MODEL, rules))
    want = model(MODEL, X)
    error = lambda out: float(jnp.linalg.norm(out - want))
    assert error(lorax.adapt(model)(dequantize(qparams), fitted, X)) < 0.8 * error(model(plain, X))


def test_under_dora_the_magnitude_stays_and_the_norm_is_that_of_the_quantised_base() -> None:
    adapter = started(dense, {"w": normal(1, 16, 32)}, X, method=DoRA(rank=4))
    qparams, fitted = loftq({"w": normal(1, 16, 32)}, adapter, {"w": SMALL})
    assert_identical(fitted.params["w"]["magnitude"], adapter.params["w"]["magnitude"])
    want = jnp.sum(qparams["w"].dequantize() ** 2, axis=0)
    assert_close(fitted.state["w"]["squared_norm"], want, EXACT)
    assert not np.allclose(want, adapter.state["w"]["squared_norm"], rtol=1e-4)


def test_the_quantised_base_runs_adapted() -> None:
    adapter = started(model, MODEL, X, only="(up|down)/kernel")
    qparams, fitted = loftq(MODEL, adapter, {".*kernel": SMALL})
    assert_close(lorax.adapt(model)(qparams, fitted, X), lorax.adapt(model)(dequantize(qparams), fitted, X), EXACT)


@pytest.mark.parametrize("with_sites", [True, False])
def test_selected_leaves_without_an_adapter_are_quantised_as_they_are(with_sites: bool) -> None:
    sites = lorax.trace(model, MODEL, X) if with_sites else None
    adapter = started(model, MODEL, X, only="up/kernel")
    rules = {"head/.*": None, ".*kernel": SMALL}
    qparams, _ = loftq(MODEL, adapter, rules, sites=sites)
    assert_identical(qparams["down"], quantize(MODEL, rules)["down"])
    assert_identical(qparams["head"], MODEL["head"])
    assert not np.array_equal(qparams["up"]["kernel"].codes, quantize(MODEL, rules)["up"]["kernel"].codes)


def test_adapted_leaves_that_are_not_selected_keep_their_start() -> None:
    method = lorax.LoRA(rank=2, initializer="pissa")
    adapter = started(model, MODEL, X, method=method, only="(up|down)/kernel")
    _, fitted = loftq(MODEL, adapter, {"up/kernel": SMALL})
    assert_identical(fitted.arrays("down/kernel"), adapter.arrays("down/kernel"))
    assert set(fitted.state["up/kernel"]) == {"scale"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_bases_and_factors(dtype: str) -> None:
    w = normal(1, 64, 128).astype(dtype)
    qparams, adapter = linear(w, NF4(), 3, rank=16, dtype=dtype)
    assert qparams["w"].dtype == adapter.params["w"]["a"].dtype == jnp.dtype(dtype)
    wide, a, b = (jnp.asarray(x, jnp.float32) for x in (w, *(adapter.params["w"][n] for n in "ab")))
    error = jnp.linalg.norm(qparams["w"].dequantize().astype(jnp.float32) + a @ b - wide)
    plain = jnp.linalg.norm(quantize({"w": w}, {"w": NF4()})["w"].dequantize().astype(jnp.float32) - wide)
    assert error < 0.8 * plain


def test_a_rank_above_the_smaller_side() -> None:
    w = normal(1, 4, 24)
    qparams, adapter = linear(w, Int4(block=4), 1, rank=6)
    assert_close(near(qparams, adapter)["w"], w, EXACT)
    assert not np.any(adapter.params["w"]["a"][:, 4:])


def test_numpy_jit_and_shapes() -> None:
    w = np.asarray(normal(1, 16, 24))
    adapter = started(dense, {"w": w}, jnp.ones((1, 16)))
    build = lambda params, adapter: loftq(params, adapter, {"w": SMALL})
    eager = build({"w": w}, adapter)
    traced = jax.jit(build)({"w": w}, adapter)
    assert_close(near(*traced)["w"], near(*eager)["w"], 1e-3)
    assert jax.tree.structure(traced) == jax.tree.structure(eager)
    assert jax.eval_shape(build, {"w": w}, adapter)[1] == abstract(eager[1])


def test_nothing_that_is_given_is_changed() -> None:
    params = jax.tree.map(lambda x: x.copy(), MODEL)
    adapter = started(model, params, X, method=lorax.LoRA(rank=2, initializer="pissa"), only="up/kernel")
    before = jax.tree.map(lambda x: np.asarray(x).copy(), adapter)
    loftq(params, adapter, {"up/kernel": SMALL})
    assert_identical(params, MODEL)
    assert_identical(adapter.params, before.params)
    assert_identical(adapter.state, before.state)


def test_saved_and_restored(tmp_path: Path) -> None:
    """The adapter belongs to the quantised base's weights."""
    adapter = started(model, MODEL, X, method=lorax.LoRA(rank=2, initializer="pissa"), only="up/kernel")
    qparams, fitted = loftq(MODEL, adapter, {"up/kernel": SMALL})
    base = dequantize(qparams)
    lorax.save(tmp_path / "adapter", fitted, base=base)
    assert_identical(lorax.restore(tmp_path / "adapter", base=base), fitted)


@pytest.mark.parametrize(
    ("method", "rules", "settings", "needle"),
    [
        (None, {"up/.*": SMALL}, {"iterations": 0}, "iterations is 0"),
        (None, {"up/.*": SMALL}, {"iterations": 2.5}, "iterations is 2.5"),
        (
            None,
            {"down/.*": SMALL},
            {},
            "the rules select no leaf that the adapter adapts (up/kernel): use lorax.quantize",
        ),
        (None, {"up/kernal": SMALL}, {}, "Nearest paths"),
        (VeRA(rank=2), {"up/.*": SMALL}, {}, "no pair of factors to fit at up/kernel (VeRA)"),
        (lorax.Full(), {"up/.*": SMALL}, {}, "no pair of factors to fit at up/kernel (Full)"),
        (lorax.LoRA(rank=2, alpha=0), {"up/.*": SMALL}, {}, "up/kernel: loftq divides by the scaling, which is 0.0"),
    ],
)
def test_what_cannot_be_done_is_refused(method: Any, rules: Any, settings: dict[str, Any], needle: str) -> None:
    adapter = started(model, MODEL, X, method=method, only="up/kernel")
    with pytest.raises(ValueError, match=re.escape(needle)):
        loftq(MODEL, adapter, rules, **settings)


def test_params_of_another_model_are_refused() -> None:
    adapter = started(model, MODEL, X, only="up/kernel")
    with pytest.raises(ValueError, match=re.escape("up/kernel: the params have shape (16, 8)")):
        loftq({**MODEL, "up": {"kernel": normal(1, 16, 8)}}, adapter, {"up/.*": SMALL})
