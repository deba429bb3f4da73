"""VeRA: shared random projections, stored once a shape; two trained vectors a layer."""

import re
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import lorax
from lorax.methods import vera
from lorax.methods.vera import VeRA
from tests.agreement import abstract, assert_agrees, assert_close, assert_identical, how, normal, randomised, run

D, F, L, H, K = 6, 10, 3, 2, 4


def fn(p: Any, x: Any) -> Any:
    """Two layers of one shape, a stack of it, and other shapes."""
    x = jnp.tanh(x @ p["one"]) + x @ p["two"]
    x = lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["stack"])[0]
    q = jnp.einsum("bd,dhk->bhk", x, p["query"])
    return (x @ p["up"]) @ p["down"] + jnp.einsum("bhk,hkd->bd", q, p["out"])


SHAPES = {
    "one": (D, D),
    "two": (D, D),
    "stack": (L, D, D),
    "query": (D, H, K),
    "out": (H, K, D),
    "up": (D, F),
    "down": (F, D),
}
PARAMS = {name: normal(i, *shape) for i, (name, shape) in enumerate(SHAPES.items())}
X = normal(9, 4, D)
SITES = lorax.trace(fn, PARAMS, X)


def made(sites: Any = SITES, only: str = ".*", seed: int = 0, **settings: Any) -> Any:
    return lorax.init(jax.random.key(seed), lorax.Spec({only: VeRA(**{"rank": 5, **settings})}), sites, PARAMS)


def test_by_hand() -> None:
    """`h = W₀·x + Λ_b·B·Λ_d·A·x`."""
    adapter = randomised(made())
    arrays = adapter.arrays("up")
    d, b, a_IxR, b_RxO = (arrays[n] for n in ("d", "b", "shared_a", "shared_b"))
    want = PARAMS["up"] + (a_IxR * d) @ b_RxO * b
    assert_close(lorax.merge(PARAMS, adapter)["up"], want)
    dense = lambda p, x: x @ p["up"]
    alone = adapter.replace(
        params={"up": adapter.params["up"]},
        state={n: adapter.state[n] for n in ("up", adapter.plan.shared["up"])},
        plan=lorax.init(jax.random.key(0), lorax.Spec({"up": VeRA(rank=5)}), SITES, PARAMS).plan,
    )
    assert_close(lorax.adapt(dense)(PARAMS, alone, X), X @ PARAMS["up"] + ((X @ a_IxR) * d) @ b_RxO * b)


def test_the_vectors_and_the_parameter_count() -> None:
    adapter = made()
    shapes = {p: {n: v.shape for n, v in arrays.items()} for p, arrays in adapter.params.items()}
    assert shapes["one"] == {"d": (5,), "b": (D,)}
    assert shapes["stack"] == {"d": (L, 5), "b": (L, D)}
    assert shapes["query"] == {"d": (5,), "b": (H, K)}
    stacked = sum(x.size for x in jax.tree.leaves(adapter.params["stack"]))
    assert stacked == L * (D + 5)
    assert all(np.all(v["d"] == np.float32(0.1)) and not np.any(v["b"]) for v in adapter.params.values())
    assert np.all(made(d_initial=0.5).params["up"]["d"] == 0.5)


def test_projections_are_held_once_a_shape() -> None:
    adapter = made()
    shared = adapter.plan.shared
    assert set(shared) == set(SHAPES)
    assert shared["one"] == shared["two"] == shared["stack"]
    assert len(set(shared.values())) == 5
    assert not set(shared.values()) & set(SHAPES)
    assert all(not adapter.state[path] for path in SHAPES)
    numbers = sum(x.size for x in jax.tree.leaves(adapter.state))
    assert numbers == 5 * (2 * D + 2 * (D + F) + 2 * (D + H * K))
    for name in ("shared_a", "shared_b"):
        assert adapter.arrays("one")[name] is adapter.arrays("stack")[name]
    assert adapter.arrays("query")["shared_b"].shape == (5, H, K)
    assert adapter.arrays("out")["shared_a"].shape == (H, K, 5)


def test_projections_are_drawn_once_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw = vera._kaiming
    monkeypatch.setattr(vera, "_kaiming", lambda key, shape, inputs: drawn.append(shape) or draw(key, shape, inputs))
    made()
    assert len(drawn) == 2 * 5


def test_projections_depend_on_their_seed_rank_and_shape_alone() -> None:
    one = made().arrays("one")
    for other in (made(seed=7), made(only="two|one"), made(d_initial=0.3)):
        assert_identical([other.arrays("one")[n] for n in ("shared_a", "shared_b")], [one["shared_a"], one["shared_b"]])
    assert not np.allclose(made(projection_seed=1).arrays("one")["shared_a"], one["shared_a"])
    assert_identical(made(dtype="bfloat16").arrays("one")["shared_a"], one["shared_a"].astype(jnp.bfloat16))


def test_projections_are_kaiming_uniform() -> None:
    p = {"w": jnp.zeros((600, 400))}
    sites = lorax.trace(lambda p, x: x @ p["w"], p, jnp.ones((1, 600)))
    arrays = lorax.init(jax.random.key(0), lorax.Spec({"w": VeRA(rank=64)}), sites, p).arrays("w")
    for name, fan in (("shared_a", 600), ("shared_b", 64)):
        x, bound = np.asarray(arrays[name]), np.sqrt(6 / fan)
        assert 0.99 * bound < np.abs(x).max() <= bound
        np.testing.assert_allclose(x.std(), np.sqrt(2 / fan), rtol=0.02)
        assert abs(x.mean()) < 0.02 * bound


def test_it_starts_as_no_change_and_agrees_with_its_merged_weight() -> None:
    adapter = made()
    assert_identical(lorax.merge(PARAMS, adapter), PARAMS)
    assert_close(run(lorax.adapt(fn), PARAMS, adapter, X), run(fn, PARAMS, X), 1e-6)
    moved = randomised(adapter)
    assert_agrees(fn, PARAMS, moved, X)
    assert set(how(fn, PARAMS, moved, X).values()) == {"factored"}
    assert_close(lorax.unmerge(lorax.merge(PARAMS, moved), moved), PARAMS)


OTHERS = {
    "conv": (lambda p, x: lax.conv(x, p["w"], (1,), "SAME"), (5, 4, 3), normal(2, 2, 4, 6)),
    "experts": (lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"]), (4, 6, 5), normal(2, 4, 2, 6)),
    "grouped": (
        lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([2, 1], jnp.int32)),
        (2, 6, 5),
        normal(2, 3, 6),
    ),
    "embedding": (lambda p, ids: p["w"][ids], (7, 4), jnp.array([[0, 6, 3]])),
    "tied": (lambda p, ids: p["w"][ids] @ p["w"].T, (7, 4), jnp.array([[0, 6, 3]])),
}


@pytest.mark.parametrize("name", OTHERS)
def test_on_other_kinds_of_sites(name: str) -> None:
    f, shape, x = OTHERS[name]
    params = {"w": normal(1, *shape)}
    sites = lorax.trace(f, params, x)
    adapter = randomised(lorax.init(jax.random.key(0), lorax.Spec({"w": VeRA(rank=3)}), sites, params))
    assert_agrees(f, params, adapter, x)


def test_a_table_and_a_matrix_of_one_shape_have_their_own() -> None:
    """A row that is looked up is a fan-in of 1, so that its projection is larger."""
    f = lambda p, ids: p["table"][ids] @ p["w"]
    params, ids = {"table": normal(1, 6, 6), "w": normal(2, 6, 6)}, jnp.array([0, 5])
    adapter = lorax.init(jax.random.key(0), lorax.Spec({".*": VeRA(rank=4)}), lorax.trace(f, params, ids), params)
    table, matrix = (np.asarray(adapter.arrays(p)["shared_a"]) for p in ("table", "w"))
    np.testing.assert_allclose(table, np.sqrt(6) * matrix, rtol=1e-6)


@pytest.mark.slow
def test_a_high_rank_is_no_mistake() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(rank=64)


# The adapter as a pytree.


@pytest.mark.slow
def test_partitions_and_transformations() -> None:
    adapter = randomised(made())
    frozen, trainable = lorax.split(PARAMS, adapter)
    assert trainable is adapter.params
    assert_identical(lorax.join(frozen, trainable), (PARAMS, adapter))
    mask = lorax.mask(PARAMS, adapter)
    assert jax.tree.structure(mask) == jax.tree.structure((PARAMS, adapter))
    assert not any(jax.tree.leaves(mask[1].state))
    assert lorax.labels(adapter)["one"] == {"d": "d", "b": "b"}
    build = lambda p: lorax.init(jax.random.key(0), adapter.spec, SITES, p)
    assert jax.eval_shape(build, abstract(PARAMS)) == abstract(adapter)
    assert_close(jax.jit(build)(PARAMS), made(), 1e-6)
    many = jax.vmap(lambda key: lorax.init(key, adapter.spec, SITES, PARAMS))(jax.random.split(jax.random.key(0), 2))
    assert_identical(jax.tree.map(lambda x: x[1], many), made())


def test_saved_and_restored_with_what_it_shares(tmp_path: Path) -> None:
    adapter = randomised(made())
    lorax.save(tmp_path / "adapter", adapter, base=PARAMS)
    back = lorax.restore(tmp_path / "adapter", base=PARAMS)
    assert back.plan == adapter.plan
    assert_identical(back, adapter)
    assert_identical(lorax.adapt(fn)(PARAMS, back, X), lorax.adapt(fn)(PARAMS, adapter, X))
    where = jax.tree.map(lambda x: jax.sharding.SingleDeviceSharding(jax.devices()[0]), adapter)
    assert_identical(lorax.restore(tmp_path / "adapter", base=PARAMS, shardings=where), adapter)


def test_beside_another_method() -> None:
    spec = lorax.Spec({"one|up": VeRA(rank=4), "down": lorax.LoRA(rank=2), "two": lorax.Full()})
    adapter = randomised(lorax.init(jax.random.key(0), spec, SITES, PARAMS))
    assert set(adapter.plan.shared) == {"one", "up"}
    assert_agrees(fn, PARAMS, adapter, X)


def test_training_moves_both_vectors_and_no_projection() -> None:
    adapter = made()
    target = run(fn, PARAMS, X) + normal(11, 4, D)
    loss = lambda p: jnp.mean((lorax.adapt(fn)(PARAMS, adapter.replace(params=p), X) - target) ** 2)
    tx = optax.adam(1e-2)

    @jax.jit
    def step(p: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(p)
        updates, state = tx.update(grads, state, p)
        return optax.apply_updates(p, updates), state, value

    p, state, losses = adapter.params, tx.init(adapter.params), []
    for _ in range(20):
        p, state, value = step(p, state)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]
    moved = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), p, adapter.params)
    assert all(jax.tree.leaves(moved)), moved


@pytest.mark.parametrize(
    ("settings", "needle"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.0}, "rank is 2.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"d_initial": 0.0}, "d_initial is 0.0"),
        ({"d_initial": float("nan")}, "d_initial is nan"),
        ({"projection_seed": 0.5}, "projection_seed is 0.5"),
        ({"dtype": "int32"}, "dtype is 'int32'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], needle: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"VeRA: {needle}")):
        VeRA(**settings)


@pytest.mark.slow
def test_dropout_acts_on_what_enters() -> None:
    adapter = randomised(made(dropout=0.5))
    with_key = lorax.adapt(fn)(PARAMS, adapter, X, rng=jax.random.key(0))
    assert not np.allclose(with_key, lorax.adapt(fn)(PARAMS, adapter, X), atol=1e-3)
