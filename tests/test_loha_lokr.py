"""LoHa and LoKr against their definitions: Hadamard and Kronecker products, written with the weight built."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from tests.agreement import assert_agrees, assert_close, equations, how, normal, randomised, run
from tests.contract import FORMS, moved

SCALE = 1.5
CHECKED = ("transposed", "heads in", "heads out", "conv grouped and dilated", "embedding", "experts", "nested scan")


def as_matrices(site: lorax.Site, w: Any) -> np.ndarray:
    """The leaf as S matrices of I × O."""
    return np.asarray(w).transpose(site.axes("SIO")).reshape([site.size(s) for s in "SIO"])


def updates(name: str, method: str) -> tuple[np.ndarray, dict[str, np.ndarray], lorax.Site]:
    """What is added to the weight as matrices, the arrays, and the site."""
    form, adapter = FORMS[name], moved(name, method)
    site = adapter.sites["w"]
    merged = run(lorax.merge, form.params, adapter)["w"]
    difference = as_matrices(site, merged) - as_matrices(site, form.params["w"])
    return difference, {n: np.asarray(x) for n, x in adapter.params["w"].items()}, site


@pytest.mark.parametrize("name", CHECKED)
def test_loha_is_a_hadamard_product_of_two_low_rank_updates(name: str) -> None:
    got, arrays, site = updates(name, "LoHa")
    s, i, o = (site.size(side) for side in "SIO")
    product = lambda n: arrays[f"a{n}"].reshape(s, i, 2) @ arrays[f"b{n}"].reshape(s, 2, o)
    np.testing.assert_allclose(got, SCALE * product(1) * product(2), atol=1e-5)
    assert {n: x.ndim for n, x in arrays.items()}.keys() == {"a1", "b1", "a2", "b2"}


@pytest.mark.parametrize("name", CHECKED)
def test_lokr_is_a_kronecker_product_with_a_low_rank_matrix(name: str) -> None:
    got, arrays, site = updates(name, "LoKr")
    s, i, o = (site.size(side) for side in "SIO")
    a, b = arrays["a"].reshape(s, -1, 2), arrays["b"].reshape(s, 2, -1)
    c = arrays["c"].reshape(s, i // a.shape[1], o // b.shape[2])
    assert c.size > s, "a Kronecker product with a number is no test"
    want = np.stack([np.kron(c[n], a[n] @ b[n]) for n in range(s)])
    np.testing.assert_allclose(got, SCALE * want, atol=1e-5)


dense = lambda p, x: x @ p["w"]


def made(method: lorax.Method, shape: tuple[int, int] = (24, 20)) -> tuple[Any, Any, Any]:
    params, x = {"w": normal(1, *shape)}, normal(2, 3, shape[0])
    return params, x, lorax.init(jax.random.key(0), lorax.Spec({"w": method}), lorax.trace(dense, params, x), params)


def test_loha_starts_as_in_peft() -> None:
    _, _, adapter = made(lorax.LoHa(rank=8), (400, 300))
    arrays = adapter.params["w"]
    assert not np.any(arrays["b2"])
    for name, std in (("a1", 1.0), ("b1", 1.0), ("a2", 0.1)):
        np.testing.assert_allclose(np.std(arrays[name]), std, rtol=0.05)


@pytest.mark.parametrize(
    ("factor", "shape", "small"),
    [
        (-1, (24, 20), (4, 4)),
        (-1, (36, 7), (6, 1)),
        (2, (24, 20), (2, 2)),
        (3, (24, 20), (3, 2)),
        (100, (24, 20), (24, 20)),
        (1, (24, 20), (1, 1)),
    ],
)
def test_lokr_cuts_each_side_by_its_factor(factor: int, shape: tuple[int, int], small: tuple[int, int]) -> None:
    params, x, adapter = made(lorax.LoKr(rank=2, factor=factor), shape)
    arrays = adapter.params["w"]
    assert not np.any(arrays["c"])
    assert arrays["c"].size == small[0] * small[1]
    assert arrays["a"].size == 2 * shape[0] // small[0]
    assert arrays["b"].size == 2 * shape[1] // small[1]
    adapter = randomised(adapter)
    c, a, b = (np.asarray(adapter.params["w"][n]) for n in "cab")
    want = np.kron(c.reshape(small), a.reshape(-1, 2) @ b.reshape(2, -1))
    assert_close(lorax.adapt(dense)(params, adapter, x), x @ (params["w"] + want))
    assert how(dense, params, adapter, x) == {"w": "factored"}


def test_no_operation_makes_a_weight() -> None:
    for method in (lorax.LoHa(rank=2), lorax.LoKr(rank=2)):
        params, x, adapter = made(method)
        loss = lambda t, p, a, x: jnp.sum(lorax.adapt(dense)(p, a.replace(params=t), x) ** 2)
        jaxpr = jax.make_jaxpr(jax.grad(loss))(adapter.params, params, adapter, x)
        shapes = {tuple(v.aval.shape) for e in equations(jaxpr) for v in e.outvars}
        assert not shapes & {(24, 20), (20, 24), (4, 6, 4, 5)}, method
        dense_jaxpr = jax.make_jaxpr(lorax.merge)(params, adapter)
        assert (24, 20) in {tuple(v.aval.shape) for e in equations(dense_jaxpr) for v in e.outvars}


@pytest.mark.parametrize("method", [lorax.LoHa(rank=2, alpha=3), lorax.LoKr(rank=2, alpha=3)])
def test_a_weight_of_several_uses_and_layouts(method: lorax.Method) -> None:
    """Cast, transposed and read twice; of LoKr parts of axes go through all of it."""

    def fn(p: Any, x: Any) -> Any:
        w = p["w"].astype(jnp.float32) * 1.0
        return jnp.tanh(x @ w) @ w.T + jnp.einsum("bi,io->b", x, p["w"])[:, None]

    params, x = {"w": normal(1, 6, 4)}, normal(2, 3, 6)
    adapter = lorax.init(jax.random.key(0), lorax.Spec({"w": method}), lorax.trace(fn, params, x), params)
    assert_agrees(fn, params, randomised(adapter), x)


@pytest.mark.parametrize(
    ("make", "needle"),
    [
        (lambda: lorax.LoKr(factor=0), "LoKr: factor is 0"),
        (lambda: lorax.LoKr(factor=-2), "LoKr: factor is -2"),
        (lambda: lorax.LoKr(rank=0), "LoKr: rank is 0"),
        (lambda: lorax.LoHa(rank=0), "LoHa: rank is 0"),
        (lambda: lorax.LoHa(dropout=1.0), "LoHa: dropout is 1.0"),
    ],
)
def test_wrong_settings_are_refused(make: Any, needle: str) -> None:
    with pytest.raises(ValueError, match=re.escape(needle)):
        make()
