"""How factors start: shapes in every layout, decompositions against hand and PEFT, no change to the function."""

import math
import os
import re
import subprocess
import sys
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
from lorax.methods.initializers import INITIALIZERS, find, leaf_of, matrices, principal
from tests.agreement import abstract, assert_agrees, assert_close, assert_identical, how, normal, run

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "inits"
BASE = load_file(ROOT / "tests" / "golden" / "peft" / "base" / "model.safetensors")
READ_OFF = ["pissa", "pissa_fast", "olora"]
DECOMPOSED = 1e-4  # float32 decompositions of two libraries, relative to the largest entry; gaps between values amplify
SAME = 1e-6  # (y + u) - u against y


def make(fn: Any, params: Any, *args: Any, only: str = ".*", **settings: Any) -> Any:
    """The adapter as `init` makes it."""
    settings.setdefault("rank", 2)
    sites = lorax.trace(fn, params, *args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # ranks above a weight's smaller side
        return lorax.init(jax.random.key(0), lorax.Spec({only: lorax.LoRA(**settings)}), sites, params)


def linear(w: Any, **settings: Any) -> Any:
    """The arrays of one linear site with weight `w` [in, out]."""
    fn = lambda p, x: x @ p["w"]
    return make(fn, {"w": w}, jnp.ones((1, w.shape[0])), **settings).arrays("w")


def product(arrays: Any) -> np.ndarray:
    """`s·A·B` of a linear site."""
    a, b = (np.asarray(arrays[n], np.float64) for n in "ab")
    return float(arrays["scale"]) * (a @ b)


# By hand.


def test_pissa_of_a_diagonal_by_hand() -> None:
    """With W = diag(5, 3, 1), rank 2 and s = 4 / 2 = 2: A·Aᵀ = Bᵀ·B = diag(5/2, 3/2, 0)."""
    arrays = linear(jnp.diag(jnp.array([1.0, 5.0, 3.0])), rank=2, alpha=4, initializer="pissa")
    a, b = np.asarray(arrays["a"]), np.asarray(arrays["b"])
    np.testing.assert_allclose(a @ a.T, np.diag([0, 2.5, 1.5]), atol=1e-6)
    np.testing.assert_allclose(b.T @ b, np.diag([0, 2.5, 1.5]), atol=1e-6)
    np.testing.assert_allclose(product(arrays), np.diag([0.0, 5, 3]), atol=1e-6)


def test_olora_by_hand() -> None:
    """Wᵀ = [[3, 1], [4, 2]] = Q·R with q₁ = (3, 4)/5 and r₁ = (5, 11/5): s·A·B is s times their outer product."""
    arrays = linear(jnp.array([[3.0, 4.0], [1.0, 2.0]]), rank=1, alpha=3, initializer="olora")
    np.testing.assert_allclose(product(arrays), 3 * np.outer([5, 2.2], [0.6, 0.8]), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(arrays["b"]), 1, rtol=1e-6)


@pytest.mark.parametrize("initializer", READ_OFF)
def test_what_is_subtracted_is_the_initial_product(initializer: str) -> None:
    arrays = linear(normal(1, 6, 5), initializer=initializer)
    assert set(arrays) == {"a", "b", "a0", "b0", "scale"}
    assert_identical((arrays["a0"], arrays["b0"]), (arrays["a"], arrays["b"]))
    assert np.abs(product(arrays)).max() > 0.1


# PEFT.


@pytest.mark.parametrize("module", [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"])
def test_pissa_equals_peft(module: str) -> None:
    want = load_file(GOLDEN / "pissa.safetensors")
    weight_OxI = BASE[f"{module}.weight"]
    delta_OxI = product(linear(jnp.asarray(weight_OxI.T), rank=4, alpha=10, initializer="pissa")).T
    assert_close(delta_OxI, want[f"{module}.scaled_BA"].astype(np.float64), DECOMPOSED)
    assert_close(weight_OxI - delta_OxI, want[f"{module}.residual_weight"].astype(np.float64), DECOMPOSED)


VARIANTS = load_file(GOLDEN / "variants.safetensors")


@pytest.mark.parametrize("case", VARIANTS)
def test_ranks_and_scalings_equal_peft(case: str) -> None:
    settings, module = case.split("/")
    name, rank, alpha = re.match(r"(\w+?)_r(\d+)_alpha(\d+)", settings).groups()
    stabilised = settings.endswith("rslora")
    method = {"rank": int(rank), "alpha": int(alpha), "rank_stabilized": stabilised, "initializer": name}
    assert_close(
        product(linear(jnp.asarray(BASE[f"{module}.weight"].T), **method)).T,
        VARIANTS[case].astype(np.float64),
        DECOMPOSED,
    )


# Every layout, and no change to the function.


def conv(p: Any, x: Any) -> Any:
    return lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))


CASES = {
    "kernel": (lambda p, x: x @ p["w"], (6, 5), (2, 6)),
    "transposed": (lambda p, x: x @ p["w"].T, (5, 6), (2, 6)),
    "wide": (lambda p, x: x @ p["w"], (3, 12), (2, 3)),
    "query": (lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"]), (6, 4, 5), (2, 6)),
    "out": (lambda p, x: jnp.einsum("bhk,hkd->bd", x, p["w"]), (4, 5, 6), (2, 4, 5)),
    "fused": (lambda p, x: jnp.einsum("bd,nhdk->nbhk", x, p["w"]), (3, 4, 6, 5), (2, 6)),
    "experts": (lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"]), (4, 6, 5), (4, 2, 6)),
    "stack": (lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0], (3, 6, 6), (2, 6)),
    "stack of heads": (
        lambda p, x: lax.scan(lambda c, w: (c, jnp.einsum("bd,hdk->bhk", c, w)), x, p["w"]),
        (3, 2, 6, 4),
        (2, 6),
    ),
    "conv": (conv, (3, 6, 5), (2, 7, 6)),
    "grouped": (lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([2, 1], jnp.int32)), (2, 6, 5), (3, 6)),
    "embedding": (lambda p, ids: p["w"][ids], (7, 4), "ids"),
    "tied": (lambda p, ids: p["w"][ids] @ p["w"].T, (7, 4), "ids"),
}


def case(name: str) -> tuple[Any, Any, Any]:
    fn, w, x = CASES[name]
    return fn, {"w": normal(1, *w)}, jnp.array([[0, 6, 3]]) if x == "ids" else normal(2, *x)


@pytest.mark.slow
@pytest.mark.parametrize("initializer", READ_OFF)
@pytest.mark.parametrize("name", CASES)
def test_in_every_layout_the_function_is_unchanged(name: str, initializer: str) -> None:
    fn, params, x = case(name)
    adapter = make(fn, params, x, initializer=initializer, alpha=3)
    assert np.abs(adapter.params["w"]["b"]).max() > 1e-2
    assert_close(lorax.merge(params, adapter), params, SAME)
    assert_close(lorax.adapt(fn)(params, adapter, x), fn(params, x), 4 * SAME)
    assert how(fn, params, adapter, x) == {"w": "factored"}


@pytest.mark.parametrize("name", CASES)
def test_in_every_layout_the_initial_product_is_the_best_of_its_rank(name: str) -> None:
    """Without what is subtracted the merged weight is W + W_r in every slice, so far from 2W as the tail of S."""
    fn, params, x = case(name)
    adapter = make(fn, params, x, initializer="pissa", alpha=3)
    (site,) = adapter.sites
    kept = {n: v for n, v in adapter.state["w"].items() if n == "scale"}
    both = lorax.merge(params, adapter.replace(state={"w": kept}))["w"]
    left = np.asarray(matrices(site, 2 * params["w"] - both))
    values = np.linalg.svd(np.asarray(matrices(site, params["w"])), compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(left, axis=(1, 2)), np.linalg.norm(values[:, 2:], axis=1), rtol=1e-4)
    assert np.all(np.linalg.svd(left, compute_uv=False)[:, 0] < 1.001 * values[:, 2])


@pytest.mark.parametrize("name", CASES)
def test_a_trained_one_agrees_with_its_merged_weight(name: str) -> None:
    fn, params, x = case(name)
    adapter = make(fn, params, x, initializer="pissa", alpha=3)
    noise = lambda v: v + normal(5, *v.shape)
    assert_agrees(fn, params, adapter.replace(params=jax.tree.map(noise, adapter.params)), x, tol=5e-5)


@pytest.mark.parametrize("name", CASES)
def test_matrices_are_undone(name: str) -> None:
    fn, params, x = case(name)
    (site,) = lorax.trace(fn, params, x)
    flat = matrices(site, params["w"])
    assert flat.shape == (site.size("S"), site.size("I"), site.size("O"))
    assert_identical(leaf_of(site, flat), params["w"])


@pytest.mark.parametrize("initializer", READ_OFF)
def test_every_layer_is_decomposed_by_itself(initializer: str) -> None:
    fn = lambda p, x: lax.scan(lambda c, w: (c, c @ w), x, p["w"])
    w_LxIxO = normal(1, 3, 20, 16) * jnp.array([1.0, 3.0, 0.1])[:, None, None]
    arrays = make(fn, {"w": w_LxIxO}, jnp.ones((1, 20)), rank=3, initializer=initializer).arrays("w")
    for layer in range(3):
        one = linear(w_LxIxO[layer], rank=3, initializer=initializer)
        got = np.asarray(arrays["a"][layer] @ arrays["b"][layer], np.float64)
        # a randomised decomposition draws other numbers for the layer alone
        assert_close(got, product(one), 2e-2 if initializer == "pissa_fast" else DECOMPOSED)


@pytest.mark.parametrize("initializer", READ_OFF)
@pytest.mark.parametrize("shape", [(6, 3), (3, 6)])
def test_a_rank_above_the_smaller_side_is_filled_with_zeros_that_stay(initializer: str, shape: Any) -> None:
    fn = lambda p, x: x @ p["w"]
    params, x = {"w": normal(1, *shape)}, normal(2, 4, shape[0])
    adapter = make(fn, params, x, rank=5, alpha=7, initializer=initializer)
    a, b = adapter.params["w"]["a"], adapter.params["w"]["b"]
    assert (a.shape, b.shape) == ((shape[0], 5), (5, shape[1]))
    assert not np.any(a[:, 3:])
    assert not np.any(b[3:])
    share = 7 / 5 if initializer == "olora" else 1  # its scaling is not divided out
    np.testing.assert_allclose(product(adapter.arrays("w")), share * params["w"], atol=1e-5)
    loss = lambda p: jnp.sum(jnp.sin(lorax.adapt(fn)(params, adapter.replace(params=p), x)))
    grads = jax.grad(loss)(adapter.params)["w"]
    assert np.any(grads["a"][:, :3])
    assert not np.any(grads["a"][:, 3:])
    assert not np.any(grads["b"][3:])


# Numbers.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("initializer", READ_OFF)
def test_narrow_bases_are_decomposed_in_float32(initializer: str, dtype: str) -> None:
    w = normal(1, 24, 16).astype(dtype)
    narrow, wide = (linear(x, rank=4, initializer=initializer) for x in (w, w.astype(jnp.float32)))
    assert narrow["a"].dtype == jnp.float32
    assert_identical(narrow, wide)


@pytest.mark.parametrize("initializer", READ_OFF)
def test_narrow_factors_change_nothing_either(initializer: str) -> None:
    """What is subtracted is the product of the rounded factors."""
    fn = lambda p, x: x @ p["w"]
    params, x = {"w": normal(1, 24, 16)}, normal(2, 3, 24)
    adapter = make(fn, params, x, dtype="bfloat16", initializer=initializer)
    assert adapter.params["w"]["a"].dtype == jnp.bfloat16
    assert_close(lorax.adapt(fn)(params, adapter, x), fn(params, x), SAME)


def decaying(rows: int, columns: int) -> jax.Array:
    """A matrix whose singular values are 1, 1/2, 1/4, …"""
    u, v = (jnp.linalg.qr(normal(i, n, min(rows, columns)))[0] for i, n in ((1, rows), (2, columns)))
    return (u * 0.5 ** jnp.arange(min(rows, columns))) @ v.T


def test_the_fast_decomposition_approaches_the_exact_one() -> None:
    w = decaying(96, 64)
    exact, fast = (product(linear(w, rank=4, initializer=n)) for n in ("pissa", "pissa_fast"))
    assert_close(fast, exact, DECOMPOSED)


@pytest.mark.parametrize("shape", [(96, 80), (80, 96)])
def test_more_power_iterations_come_nearer(shape: Any) -> None:
    """On a matrix of random numbers, whose singular values hardly decay."""
    w = normal(1, *shape)
    fn = lambda p, x: x @ p["w"]
    (site,) = lorax.trace(fn, {"w": w}, jnp.ones((1, shape[0])))
    best = np.linalg.norm(np.linalg.svd(w, compute_uv=False)[4:])

    def excess(iterations: int) -> float:
        a, b = find(f"pissa_niter_{iterations}")(jax.random.key(0), site, w, 4, 2.0)
        return float(np.linalg.norm(w - 2.0 * a @ b) / best - 1)

    errors = [excess(k) for k in (1, 4, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-3
    assert errors[2] < 1e-3
    assert errors[2] > -1e-5, "below the best there is"


def test_principal_factors_share_the_singular_values_evenly() -> None:
    a, b = principal(decaying(12, 8), 3, 0.5)
    np.testing.assert_allclose(a.T @ a, np.diag([2, 1, 0.5]), atol=1e-5)
    np.testing.assert_allclose(b @ b.T, np.diag([2, 1, 0.5]), atol=1e-5)


# Bases of every kind.


@jax.tree_util.register_pytree_node_class
class Halved:
    """A node that stands for twice its array, as a quantised leaf stands for what it dequantises to."""

    is_parameter_leaf = True

    def __init__(self, half: Any) -> None:
        self.half = half

    def dequantize(self) -> Any:
        return 2 * self.half

    def tree_flatten(self) -> Any:
        return (self.half,), None

    @classmethod
    def tree_unflatten(cls, _: Any, children: Any) -> Any:
        return cls(*children)


@pytest.mark.parametrize("initializer", READ_OFF)
def test_of_a_quantised_base_the_dequantised_value_is_decomposed(initializer: str) -> None:
    (site,) = lorax.trace(lambda p, x: x @ p["w"], {"w": jnp.ones((6, 5))}, jnp.ones((1, 6)))
    w = normal(1, 6, 5)
    start = lambda base: INITIALIZERS[initializer](jax.random.key(0), site, base, 2, 1.5)
    assert_identical(start(Halved(w / 2)), start(w))
    shapes = jax.eval_shape(start, Halved(w))
    inside = jax.eval_shape(lambda: start(abstract(Halved(w))))
    assert [x.shape for x in inside] == [x.shape for x in shapes] == [(6, 2), (2, 5)]


@pytest.mark.parametrize("initializer", READ_OFF)
def test_abstract_params_give_shapes_under_eval_shape_and_an_error_otherwise(initializer: str) -> None:
    fn, params, x = case("query")
    adapter = make(fn, params, x, initializer=initializer)
    spec, sites = adapter.spec, adapter.sites
    shapes = jax.eval_shape(lambda: lorax.init(jax.random.key(0), spec, sites, abstract(params)))
    assert shapes == abstract(adapter)
    assert jax.eval_shape(lambda p: lorax.init(jax.random.key(0), spec, sites, p), abstract(params)) == shapes
    with pytest.raises(ValueError, match=re.escape("w: these factors are read off the base's values")):
        lorax.init(jax.random.key(0), spec, sites, abstract(params))


@pytest.mark.parametrize("initializer", READ_OFF)
def test_under_jit_and_of_numpy_params(initializer: str) -> None:
    fn, params, x = case("stack")
    adapter = make(fn, params, x, initializer=initializer)
    build = lambda p: lorax.init(jax.random.key(0), adapter.spec, adapter.sites, p)
    assert_identical(build({"w": np.asarray(params["w"])}), adapter)
    jitted = run(build, params)
    both = [np.asarray(a.params["w"]["a"] @ a.params["w"]["b"]) for a in (jitted, adapter)]
    assert_close(*both, 2e-2 if initializer == "pissa_fast" else DECOMPOSED)
    assert_close(run(lorax.merge, params, jitted), params, SAME)


@pytest.mark.parametrize("initializer", READ_OFF)
def test_saved_and_restored_it_is_subtracted_once(initializer: str, tmp_path: Path) -> None:
    fn, params, x = case("kernel")
    before = np.asarray(params["w"]).copy()
    adapter = make(fn, params, x, initializer=initializer)
    noisy = adapter.replace(params=jax.tree.map(lambda v: v + normal(5, *v.shape), adapter.params))
    lorax.save(tmp_path / "adapter", noisy, base=params)
    back = lorax.restore(tmp_path / "adapter", base=params)
    assert_identical(back, noisy)
    assert_identical(lorax.adapt(fn)(params, back, x), lorax.adapt(fn)(params, noisy, x))
    np.testing.assert_array_equal(params["w"], before)
    assert_close(lorax.unmerge(lorax.merge(params, noisy), noisy), params)


def test_a_donated_adapter_has_no_array_twice() -> None:
    """What is subtracted outlives the factors that a training step overwrites."""
    fn, params, x = case("kernel")
    adapter = make(fn, params, x, initializer="pissa")
    jax.jit(lambda p: jax.tree.map(lambda v: v + 1, p), donate_argnums=0)(adapter.params)
    assert not any(v.is_deleted() for v in jax.tree.leaves(adapter.state))


@pytest.mark.parametrize("name", ["pissa", "pissa_fast"])
@pytest.mark.parametrize("alpha", [0, -1])
def test_pissa_needs_a_scaling_above_zero(name: str, alpha: float) -> None:
    with pytest.raises(ValueError, match="w: PiSSA divides by the scaling.*alpha above 0"):
        linear(normal(1, 6, 5), alpha=alpha, initializer=name)


@pytest.mark.parametrize("name", ["kaiming", "pissa_niter_", "pissa_niter_-1", "", None])
def test_a_name_that_is_none_lists_the_names(name: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"initializer is {name!r}; known are uniform, normal")):
        find(name)


def test_gaussian_is_another_name_for_normal() -> None:
    both = (linear(normal(1, 6, 5), initializer=name) for name in ("gaussian", "normal"))
    assert_identical(*both)


# rsLoRA.


@pytest.mark.parametrize(("stabilised", "slope"), [(True, 0.0), (False, -0.5)])
def test_the_first_gradient_of_b_over_the_rank(stabilised: bool, slope: float) -> None:
    """‖∂L/∂B‖ at initialisation is flat over r under α/√r, and falls as 1/√r under α/r (arXiv:2312.03732)."""
    fn = lambda p, x: x @ p["w"]
    params, x, want = {"w": normal(1, 256, 8)}, normal(2, 32, 256), normal(3, 32, 8)
    ranks = 4 ** np.arange(1, 6)

    def norm(rank: int) -> float:
        adapter = make(fn, params, x, rank=int(rank), alpha=16, rank_stabilized=stabilised)
        loss = lambda p: jnp.sum((lorax.adapt(fn)(params, adapter.replace(params=p), x) - want) ** 2)
        return float(jnp.linalg.norm(jax.grad(loss)(adapter.params)["w"]["b"]))

    norms = [norm(r) for r in ranks]
    fitted = np.polyfit(np.log(ranks), np.log(norms), 1)[0]
    assert abs(fitted - slope) < 0.05, norms
    ideal = norms[-1] * (ranks / ranks[-1]) ** slope
    assert np.all(np.abs(np.log(norms / ideal)) < math.log(1.5)), norms


# A mesh.


def _on_eight_devices() -> None:
    fn = lambda p, x: x @ p["w"]
    w = np.asarray(normal(1, 16, 24))
    plain = {n: linear(jnp.asarray(w), rank=4, initializer=n) for n in READ_OFF}
    kinds = jax.sharding.AxisType
    for kind in (kinds.Auto, kinds.Explicit):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
        place = lambda x, *spec, mesh=mesh: jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P(*spec)))
        params, x = {"w": place(w, None, ("data", "model"))}, place(np.ones((8, 16), np.float32))
        with jax.set_mesh(mesh):
            sites = lorax.trace(fn, params, x)
            for name in READ_OFF:
                spec = lorax.Spec({"w": lorax.LoRA(rank=4, initializer=name)})
                build = lambda p, spec=spec, sites=sites: lorax.init(jax.random.key(0), spec, sites, p)
                for adapter in (build(params), jax.jit(build)(params)):
                    assert_close(product(adapter.arrays("w")), product(plain[name]), 1e-4)
                    assert_close(np.asarray(lorax.merge(params, adapter)["w"]), w, SAME)
                    out = jax.jit(lorax.adapt(fn))(params, adapter, x)
                    assert_close(np.asarray(out), np.ones((8, 16), np.float32) @ w, 1e-5)
        print("ok", kind)


@pytest.mark.slow
def test_a_base_on_a_mesh_is_decomposed() -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.test_initializers"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | flags, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count("ok ") == 2, done.stdout


if __name__ == "__main__":
    _on_eight_devices()
