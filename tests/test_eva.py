"""EVA: components of inputs by hand, ranks against PEFT's, and the adapter they make."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from safetensors.numpy import load_file

import lorax
from lorax.eva import centred, components, redistribute, start
from lorax.methods.lorafa import LoRAFA
from tests.agreement import assert_agrees, assert_close, assert_identical, normal, randomised

EXACT = 1e-5
GOLDEN = load_file(Path(__file__).parent / "golden" / "inits" / "eva.safetensors")


def scatter_of(x: Any) -> jax.Array:
    """The scatter of rows, of shape (*S, rows, I)."""
    return centred(jnp.einsum("...ni,...nj->...ij", x, x), x.sum(-2), x.shape[-2])


# By hand.


def test_the_scatter_adds_up_over_batches() -> None:
    x = normal(1, 3, 20, 5) + 2
    parts = [x[:, :7], x[:, 7:]]
    sums = [sum(np.einsum("lni,lnj->lij", p, p) for p in parts), sum(p.sum(1) for p in parts)]
    want = np.stack([19 * np.cov(layer.T) for layer in np.asarray(x)])
    assert_close(centred(*map(jnp.asarray, sums), 20), want.astype(np.float32), EXACT)
    assert_close(scatter_of(x), want.astype(np.float32), EXACT)


def test_components_of_a_known_spread() -> None:
    """Four points of variance 9 along (3, 4)/5 and 1 across it, about a mean that is far away."""
    along, across = np.array([0.6, 0.8]), np.array([-0.8, 0.6])
    x = jnp.asarray([100, -50] + np.array([[3], [-3], [3], [-3]]) * along + np.array([[1], [1], [-1], [-1]]) * across)
    directions, shares, values = components(scatter_of(x), 2)
    np.testing.assert_allclose(shares, [0.9, 0.1], atol=1e-4)
    np.testing.assert_allclose(values, [36, 4], atol=1e-2)
    np.testing.assert_allclose(np.abs(directions.T @ np.stack([along, across], 1)), np.eye(2), atol=1e-2)


def test_components_are_those_of_each_layer_and_no_more_than_there_are() -> None:
    x = normal(1, 3, 20, 5)
    directions, shares, _ = components(scatter_of(x), 9)
    assert directions.shape == (3, 5, 5)
    np.testing.assert_allclose(shares.sum(-1), 1, rtol=EXACT)
    assert np.all(np.diff(shares, axis=-1) <= 0)
    for layer in range(3):
        alone, its_shares, _ = components(scatter_of(x[layer]), 2)
        np.testing.assert_allclose(shares[layer, :2], its_shares, rtol=1e-4)
        np.testing.assert_allclose(np.abs(np.sum(alone * directions[layer, :, :2], 0)), 1, atol=1e-4)


def test_inputs_that_never_vary_explain_nothing() -> None:
    _, shares, _ = components(jnp.zeros((3, 3)), 2)
    assert not np.any(shares)


def test_the_budget_goes_to_the_largest_shares() -> None:
    shares = {
        "a": np.array([0.5, 0.3, 0.1]),
        "stack": np.array([[0.9, 0.05, 0.01], [0.35, 0.34, 0.2]]),
        "none": np.array([0.02, 0.01]),
    }
    ranks = redistribute(shares, 6)
    assert {path: r.tolist() for path, r in ranks.items()} == {"a": 2, "stack": [1, 3], "none": 0}
    assert sum(int(r.sum()) for r in redistribute(shares, 100).values()) == 11, "all there are"
    tied = redistribute({"one": np.array([0.5, 0.5]), "two": np.array([0.5, 0.5])}, 3)
    assert {path: r.tolist() for path, r in tied.items()} == {"one": 2, "two": 1}


# Against PEFT.

MODULES = [f"{layer}.{name}_proj" for layer in (0, 1) for name in "qvo"] + ["0.gate_proj", "1.gate_proj"]
KERNELS = {module: normal(i, 64, 8) for i, module in enumerate(MODULES)}


def one_of_each(p: Any, x: Any) -> Any:
    return sum(x @ w for w in p.values())


def peft_case(**settings: Any) -> Any:
    sites = lorax.trace(one_of_each, KERNELS, jnp.ones((1, 64)))
    spec = lorax.Spec({".*": lorax.LoRA(rank=4, alpha=8)})
    adapter = lorax.init(jax.random.key(0), spec, sites, KERNELS)
    inputs = {m: GOLDEN[f"inputs/{m.replace('v_', 'q_')}"] for m in MODULES}
    return start(adapter, {m: scatter_of(jnp.asarray(x)) for m, x in inputs.items()}, rho=2.0, **settings)


def test_ranks_and_directions_equal_peft() -> None:
    adapter = peft_case()
    for module in MODULES:
        want_RxI = GOLDEN[f"plain/{module}"]
        a_IxR = np.asarray(adapter.params[module]["a"])
        assert a_IxR.shape == want_RxI.T.shape, module
        np.testing.assert_allclose(np.abs(np.sum(a_IxR * want_RxI.T, 0)), 1, atol=1e-2)
        np.testing.assert_allclose(np.linalg.norm(a_IxR, axis=0), 1, rtol=EXACT)
    assert sum(m.rank for m in adapter.methods.values()) == 4 * len(MODULES)
    assert {float(s["scale"]) for s in adapter.state.values()} == {2.0}


def test_whitened_directions_equal_peft() -> None:
    """PEFT saw the batch over and over, which makes all its singular values larger by one factor.

    Where modules share their inputs it divides once for each of them (0.21.2), so that these are left out.
    """
    adapter = peft_case(whiten=True)
    for module in [m for m in MODULES if "q_" not in m and "v_" not in m]:
        want, got = (np.linalg.norm(x, axis=0) for x in (GOLDEN[f"white/{module}"].T, adapter.params[module]["a"]))
        np.testing.assert_allclose(want / want[0], got / got[0], rtol=2e-2)
        assert got[-1] > 1.05 * got[0], "less variance, larger columns"


# The adapter.


def model(p: Any, x: Any) -> Any:
    x = lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["stack"])[0]
    return jnp.einsum("bhk,hkd->bd", x.reshape(-1, 2, 3), p["out"]) @ p["head"]


PARAMS = {"stack": normal(1, 3, 6, 6), "out": normal(2, 2, 3, 5), "head": normal(3, 5, 4)}
X = normal(9, 7, 6)
SITES = lorax.trace(model, PARAMS, X)


def spread(seed: int, *widths: float) -> jax.Array:
    """The scatter of inputs with these spreads along the axes."""
    return scatter_of(normal(seed, 400, len(widths)) * jnp.asarray(widths))


SCATTERS = {
    "stack": jnp.stack([spread(1, 9, 0.1, 0.1, 0.1, 0.1, 0.1), spread(2, 5, 5, 5, 5, 0, 0), spread(3, *[1] * 6)]),
    "out": spread(4, 3, 3, 0.1, 0.1, 0.1, 0.1),
}


def made(method: Any = None, scatters: Any = None, **settings: Any) -> Any:
    adapter = lorax.init(jax.random.key(0), lorax.Spec({".*": method or lorax.LoRA(rank=2, alpha=6)}), SITES, PARAMS)
    return start(adapter, SCATTERS if scatters is None else scatters, **settings)


@pytest.mark.parametrize("method", [None, LoRAFA(rank=2, alpha=6), lorax.DoRA(rank=2, alpha=6)])
def test_it_starts_as_no_change_and_trains(method: Any) -> None:
    adapter = made(method)
    assert_close(lorax.adapt(model)(PARAMS, adapter, X), model(PARAMS, X), EXACT)
    assert_close(lorax.merge(PARAMS, adapter), PARAMS, EXACT)
    assert_agrees(model, PARAMS, randomised(adapter), X)


def test_layers_of_a_stack_differ_in_rank_and_the_rest_stays_zero() -> None:
    adapter = made()
    a_LxIxR = np.asarray(adapter.params["stack"]["a"])
    ranks = np.any(a_LxIxR, axis=1).sum(-1)
    assert ranks.tolist() == [1, 4, 1]
    assert adapter.methods["stack"].rank == 4
    assert adapter.params["out"]["a"].shape == (2, 3, 2)
    for layer, rank in enumerate(ranks):
        np.testing.assert_allclose(
            a_LxIxR[layer].T @ a_LxIxR[layer], np.diag([1] * rank + [0] * (4 - rank)), atol=EXACT
        )
    moved = adapter.replace(params=jax.tree.map(lambda x: x, adapter.params))
    loss = lambda p: jnp.sum(jnp.sin(lorax.adapt(model)(PARAMS, moved.replace(params=p), X)))
    grads = jax.grad(loss)(moved.params)["stack"]
    is_padding = ~np.any(a_LxIxR, axis=1)
    assert not np.any(np.asarray(grads["b"])[is_padding])
    assert np.all(np.any(np.asarray(grads["b"])[~is_padding], axis=-1))


def test_rho_of_one_gives_every_layer_its_rank() -> None:
    adapter = made(rho=1)
    assert np.any(np.asarray(adapter.params["stack"]["a"]), axis=1).sum(-1).tolist() == [2, 2, 2]
    assert adapter.methods == made(rho=1.0).methods
    assert adapter.methods["stack"] == lorax.LoRA(rank=2, alpha=6.0)


@pytest.mark.parametrize(
    ("stabilised", "adjusts", "want"),
    [
        (False, True, [3, 3, 3]),
        (False, False, [6, 1.5, 6]),
        (True, True, [3, 6, 3]),  # α·(r'/r)/√r' with α = 6, r = 2 and r' = 1, 4, 1
        (True, False, [6, 3, 6]),
    ],
)
def test_scalings(stabilised: bool, adjusts: bool, want: list[float]) -> None:
    adapter = made(lorax.LoRA(rank=2, alpha=6, rank_stabilized=stabilised), adjusts_scale=adjusts)
    scale = np.asarray(adapter.state["stack"]["scale"])
    assert scale.shape == (() if len(set(want)) == 1 else (3,))
    np.testing.assert_allclose(np.broadcast_to(scale, 3), want, rtol=1e-6)
    assert adapter.methods["stack"].scaling == pytest.approx(want[1]), "that of the widest layer"


def test_sites_without_inputs_keep_their_start() -> None:
    before = lorax.init(jax.random.key(0), lorax.Spec({".*": lorax.LoRA(rank=2, alpha=6)}), SITES, PARAMS)
    after = made()
    assert_identical(after.arrays("head"), before.arrays("head"))
    assert after.methods["head"] == before.methods["head"]


def test_a_site_that_gets_no_rank_is_left_out() -> None:
    flat = {**SCATTERS, "out": jnp.eye(6)}
    adapter = made(scatters={**flat, "stack": jnp.stack([spread(i, 9, 9, 0, 0, 0, 0) for i in range(3)])}, rho=3)
    assert "out" in adapter.params  # 8 ranks for 6 large shares: two are left
    little = {**flat, "stack": jnp.stack([spread(i, 9, 9, 9, 0, 0, 0) for i in range(3)])}
    adapter = made(scatters=little, rho=3)
    assert set(adapter.params) == set(adapter.state) == set(adapter.methods) == {"stack", "head"}
    assert_close(lorax.adapt(model)(PARAMS, adapter, X), model(PARAMS, X), EXACT)


def test_saved_and_restored(tmp_path: Path) -> None:
    adapter = randomised(made())
    lorax.save(tmp_path / "adapter", adapter, base=PARAMS)
    back = lorax.restore(tmp_path / "adapter", base=PARAMS)
    assert back.plan == adapter.plan
    assert_identical(back, adapter)


@pytest.mark.parametrize(
    ("method", "scatters", "settings", "needle"),
    [
        (None, SCATTERS, {"rho": 0.5}, "rho is 0.5"),
        (None, {}, {}, "eva: got no inputs for any of"),
        (None, {"tail": jnp.eye(3)}, {}, "tail: there are inputs, and no adapter of this leaf"),
        (None, {"head": jnp.eye(4)}, {}, "head: the scatter of the inputs has shape (4, 4), expected (5, 5)"),
        (None, {"stack": jnp.eye(6)}, {}, "stack: the scatter of the inputs has shape (6, 6), expected (3, 6, 6)"),
        (lorax.LoRA(rank=2, initializer="pissa"), {"head": jnp.eye(5)}, {}, "head: EVA starts from B = 0"),
        (lorax.Full(), {"head": jnp.eye(5)}, {}, "head: EVA starts from B = 0"),
    ],
)
def test_what_cannot_be_done_is_refused(method: Any, scatters: Any, settings: dict[str, Any], needle: str) -> None:
    with pytest.raises(ValueError, match=re.escape(needle)):
        made(method, scatters, **settings)
