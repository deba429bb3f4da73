"""AdaLoRA: the weight, its budget update held against PEFT's, and the refusal of training without one."""

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from safetensors.numpy import load_file

import lorax
from experiments import models
from lorax import optim
from lorax.checkpoint import TrainCheckpoints
from lorax.methods.adalora import AdaLoRA
from lorax.optim.budget import Budget
from lorax.optim.triplets import best, triplets
from tests.agreement import (
    FAST_COMPILE,
    adapter_for,
    assert_agrees,
    assert_changes_nothing,
    assert_close,
    assert_identical,
    equations,
    how,
    normal,
    randomised,
    run,
)

EXACT = 1e-6
GOLDEN_LOSS = 1e-3
GOLDEN_LOGITS = 1e-4
GOLDEN_FACTORS = 1e-3  # after 24 Adam steps, whose sign is that of gradients near zero
GOLDEN = Path(__file__).parent / "golden"

# A stack of three layers and a head: seven weights with the triplets of one budget.
D = 6
PARAMS = {"layers": normal(1, 3, D, D), "head": normal(2, D, 4), "bias": jnp.zeros(4)}
X, Y = normal(3, 5, D), normal(4, 5, 4)
SPEC = lorax.Spec({"layers|head": AdaLoRA(rank=4, target_rank=2, alpha=8), "bias": lorax.Full()})


def fn(params: Any, x: Any) -> Any:
    x = lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, params["layers"])[0]
    return x @ params["head"] + params["bias"]


SITES = lorax.trace(fn, PARAMS, X)


def make(spec: lorax.Spec = SPEC, seed: int = 0) -> Any:
    return lorax.init(jax.random.key(seed), spec, SITES, PARAMS)


def loss(adapter: Any, trained: Any) -> Any:
    return jnp.mean((lorax.adapt(fn)(PARAMS, adapter.replace(params=trained), X) - Y) ** 2)


def train(tx: Any, adapter: Any, steps: int, state: Any = None) -> tuple[Any, Any, list[Any]]:
    """Compiled steps; the adapter, the optimiser's state and after each step the live ranks."""

    def update(params: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(functools.partial(loss, adapter))(params), state, params)
        params = optax.apply_updates(params, updates)
        return params, state, optim.live_ranks(adapter.replace(params=params))

    params, seen = adapter.params, []
    state = tx.init(params) if state is None else state
    step = jax.jit(update).lower(params, state).compile(FAST_COMPILE)
    for _ in range(steps):
        params, state, live = step(params, state)
        seen.append(jax.device_get(live))
    return adapter.replace(params=params), state, seen


def total(live: Any) -> int:
    return sum(int(np.sum(x)) for x in live.values())


# The weight.


def test_the_weight_in_closed_form() -> None:
    adapter = randomised(make())
    merged = lorax.merge(PARAMS, adapter)
    a_LxIxR, e_LxR, b_LxRxO = (np.asarray(adapter.params["layers"][n], np.float64) for n in ("a", "e", "b"))
    delta = np.einsum("lir,lr,lro->lio", a_LxIxR, e_LxR, b_LxRxO) * 8 / (4 + 1e-5)
    np.testing.assert_allclose(merged["layers"], PARAMS["layers"] + delta, atol=1e-5)
    assert float(adapter.state["head"]["scale"]) == pytest.approx(8 / (4 + 1e-5), rel=EXACT)
    assert AdaLoRA(rank=4).scaling == pytest.approx(4 / (4 + 1e-5), rel=1e-12)


def test_the_start_is_an_exact_no_op_with_normal_factors() -> None:
    adapter = make()
    assert_changes_nothing(fn, PARAMS, adapter, X)
    assert_identical(lorax.merge(PARAMS, adapter), PARAMS)
    wide = lambda p, x: x @ p["w"]
    params = {"w": jnp.zeros((400, 300))}
    sites = lorax.trace(wide, params, jnp.ones((1, 400)))
    arrays = lorax.init(jax.random.key(0), lorax.Spec({"w": AdaLoRA(rank=8)}), sites, params).params["w"]
    assert not np.any(arrays["e"])
    assert float(arrays["updates"]) == 0
    for name in ("a", "b"):
        assert np.std(arrays[name]) == pytest.approx(0.02, rel=0.05)
    assert not np.allclose(arrays["a"][:300].T, arrays["b"])


def test_settings_have_working_defaults() -> None:
    assert AdaLoRA(rank=2).budget == 1
    assert AdaLoRA(rank=1).budget == 1
    assert AdaLoRA(rank=12).budget == 8
    assert AdaLoRA(rank=4, target_rank=4).budget == 4
    assert hash(AdaLoRA(rank=2)) == hash(AdaLoRA(rank=2, dtype=jnp.float32))


@pytest.mark.parametrize(
    ("settings", "needle"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.0}, "rank is 2.0"),
        ({"rank": 4, "target_rank": 5}, "target_rank is 5"),
        ({"target_rank": 0}, "target_rank is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dtype": "int32"}, "dtype is 'int32'"),
        ({"initial_std": 0.0}, "initial_std is 0.0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], needle: str) -> None:
    with pytest.raises(ValueError, match=re.escape(needle)):
        AdaLoRA(**settings)


ROUTES = jnp.asarray([2, 0, 3], jnp.int32)
KINDS = {
    "linear": (lambda p, x: x @ p["w"], (6, 5), normal(2, 3, 6)),
    "transposed": (lambda p, x: x @ p["w"].T, (5, 6), normal(2, 3, 6)),
    "heads": (lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"]), (6, 2, 3), normal(2, 3, 6)),
    "heads in": (lambda p, x: jnp.einsum("bhk,hkd->bd", x, p["w"]), (2, 3, 6), normal(2, 3, 2, 3)),
    "experts": (lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"]), (3, 6, 5), normal(2, 3, 2, 6)),
    "grouped": (lambda p, x: lax.ragged_dot(x, p["w"], ROUTES), (3, 6, 4), normal(2, 5, 6)),
    "embedding": (lambda p, ids: p["w"][ids], (7, 6), jnp.asarray([1, 1, 5])),
    "tied": (lambda p, ids: jnp.tanh(p["w"][ids]) @ p["w"].T, (7, 6), jnp.asarray([1, 1, 5])),
    "both ways": (lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, (6, 5), normal(2, 3, 6)),
    "scanned": (lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0], (3, 6, 6), normal(2, 3, 6)),
    "conv": (
        lambda p, x: lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        (3, 3, 2, 4),
        normal(2, 1, 5, 5, 2),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_site_agrees_with_the_merged_weight(kind: str) -> None:
    model, shape, x = KINDS[kind]
    params = {"w": normal(1, *shape)}
    adapter = adapter_for(model, params, x, method=AdaLoRA(rank=2, alpha=3))
    assert how(model, params, adapter, x) == {"w": "factored"}
    assert_agrees(model, params, adapter, x)


@pytest.mark.parametrize("kind", ["linear", "transposed", "both ways", "tied"])
def test_e_meets_rows_of_the_rank_and_no_outer_product(kind: str) -> None:
    """Whichever factor an activation of 3 rows meets first, no array is as large as rows × rank × the other side."""
    model, shape, x = KINDS[kind]
    params = {"w": normal(1, *shape)}
    adapter = adapter_for(model, params, x, method=AdaLoRA(rank=13))
    jaxpr = jax.make_jaxpr(lorax.adapt(model))(params, adapter, x)
    shapes = [out.aval.shape for eqn in equations(jaxpr) for out in eqn.outvars]
    assert (3, 13) in shapes
    assert max(np.prod(s) for s in shapes) < 3 * 13 * min(shape)


def test_bfloat16_factors_and_dropout() -> None:
    method = AdaLoRA(rank=2, dropout=0.5, dtype="bfloat16")
    adapter = randomised(make(lorax.Spec({"head": method})))
    assert {n: x.dtype.name for n, x in adapter.params["head"].items()} == {
        "a": "bfloat16",
        "e": "bfloat16",
        "b": "bfloat16",
        "updates": "float32",
    }
    still = lorax.adapt(fn)(PARAMS, adapter, X)
    assert not np.allclose(lorax.adapt(fn)(PARAMS, adapter, X, rng=jax.random.key(0)), still)


def test_unmerge_undoes_merge() -> None:
    adapter = randomised(make(lorax.Spec({"layers|head": AdaLoRA(rank=2)})))
    assert_close(lorax.unmerge(lorax.merge(PARAMS, adapter), adapter), PARAMS, 1e-5)


# The golden run.

QUERY, VALUE = "layers/attn/query/kernel", "layers/attn/value/kernel"
MODULES = [(0, "q_proj", QUERY), (0, "v_proj", VALUE), (1, "q_proj", QUERY), (1, "v_proj", VALUE)]


def peft_factors(tensors: dict[str, Any], layer: int, module: str) -> dict[str, Any]:
    key = f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_"
    return {"a": tensors[key + "A"].T, "e": tensors[key + "E"][:, 0], "b": tensors[key + "B"].T}


def golden_run() -> tuple[Any, Any, Any, Any]:
    """The model, its adapter as PEFT starts it, the loss and the optimiser."""
    model = models.load(GOLDEN / "peft/base")
    ids = jnp.asarray(np.load(GOLDEN / "peft/train/qv_r8/golden.npz")["input_ids"])
    sites = lorax.trace(model.apply, model.params, ids)
    spec = lorax.Spec({"layers/attn/(query|value)/kernel": AdaLoRA(rank=6, target_rank=3, alpha=8)})
    adapter = lorax.init(jax.random.key(0), spec, sites, model.params)
    tensors = load_file(GOLDEN / "adalora/init.safetensors")
    start = {}
    for path in (QUERY, VALUE):
        layers = [peft_factors(tensors, layer, module) for layer, module, p in MODULES if p == path]
        stacked = {n: np.stack([x[n] for x in layers]) for n in ("a", "e", "b")}
        shapes = adapter.params[path]
        start[path] = {n: jnp.asarray(x).reshape(shapes[n].shape) for n, x in stacked.items()}
        start[path]["updates"] = shapes["updates"]

    def task(trained: Any) -> Any:
        logits = lorax.adapt(model.apply)(model.params, adapter.replace(params=trained), ids)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()

    tx = optim.adalora(optax.adam(2e-2), adapter, total_steps=24, warmup_steps=4, final_steps=6, interval=2)
    return model, adapter.replace(params=start), task, tx


@pytest.mark.slow
def test_the_golden_run() -> None:
    model, adapter, task, tx = golden_run()
    golden = np.load(GOLDEN / "adalora/golden.npz")

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, gradient = jax.value_and_grad(task)(params)
        value += 0.5 * optim.orthogonality(adapter.replace(params=params))
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    params, state, losses, live = adapter.params, tx.init(adapter.params), [], []
    for _ in range(24):
        params, state, value = step(params, state)
        ranks = optim.live_ranks(adapter.replace(params=params))
        losses.append(float(value))
        live.append([int(ranks[path][layer]) for layer, _, path in MODULES])
    np.testing.assert_allclose(losses, golden["losses"], rtol=0, atol=GOLDEN_LOSS)
    np.testing.assert_array_equal(live, golden["live_ranks"])

    final = load_file(GOLDEN / "adalora/final.safetensors")
    for layer, module, path in MODULES:
        mine, want = (
            {n: np.asarray(params[path][n][layer]) for n in ("a", "e", "b")},
            peft_factors(final, layer, module),
        )
        is_live = mine["e"] != 0
        got = {"a": mine["a"][:, is_live], "e": mine["e"][is_live], "b": mine["b"].reshape(6, -1)[is_live]}
        for name in ("a", "e", "b"):
            np.testing.assert_allclose(got[name], want[name], atol=GOLDEN_FACTORS, err_msg=f"{path} {layer} {name}")
    ids = jnp.asarray(np.load(GOLDEN / "peft/inputs.npz")["input_ids"])
    logits = lorax.adapt(model.apply)(model.params, adapter.replace(params=params), ids)
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=GOLDEN_LOGITS)


# The budget.


def test_the_budget_by_hand() -> None:
    budget = Budget(initial=24, target=12, total_steps=24, warmup_steps=4, final_steps=6, interval=2)
    want = [24] * 4 + [21, 19, 17, 16, 15, 14, 13, 12, 12] + [12] * 11
    assert [int(budget.at(step)) for step in range(1, 25)] == want
    assert [step for step in range(1, 30) if bool(budget.is_due(step))] == [6, 8, 10, 12, 14, 16, 18]
    never_between = Budget(initial=8, target=4, total_steps=10, interval=100)
    assert [step for step in range(1, 30) if bool(never_between.is_due(step))] == [10]


@pytest.mark.parametrize("steps", [7, 97, 1000])
def test_the_budget_is_that_of_float64(steps: int) -> None:
    """In float32 the cube is now and then below a whole number that it is on in float64, and so in PEFT."""
    budget = Budget(initial=17 * steps, target=steps, total_steps=steps)
    want = [int(16 * steps * (1 - k / steps) ** 3 + steps) for k in range(1, steps + 1)]
    np.testing.assert_array_equal(budget.at(jnp.arange(1, steps + 1)), want)


def test_the_best_triplets_of_all_sites_are_kept() -> None:
    found = triplets(make())
    assert [t.path for t in found] == ["head", "layers"]
    scores = [jnp.asarray([5.0, 0, 9, 1]), jnp.asarray([[2.0, 8, 0, 0], [0, 0, 0, 0], [7, 3, 4, 6]])]
    kept = best(found, scores, 5)
    np.testing.assert_array_equal(kept["head"], [True, False, True, False])
    np.testing.assert_array_equal(
        kept["layers"], [[False, True, False, False], [False] * 4, [True, False, False, True]]
    )
    assert sum(int(x.sum()) for x in best(found, [jnp.zeros(4), jnp.zeros((3, 4))], 5).values()) == 5, "a draw"
    assert bool(jax.tree.reduce(jnp.logical_and, jax.tree.map(jnp.all, best(found, scores, 16))))


def test_budgets_are_met_exactly_and_pruned_triplets_are_exact_zeros() -> None:
    adapter = make()
    tx = optim.adalora(optax.adam(3e-2), adapter, total_steps=20, warmup_steps=3, final_steps=4, interval=3)
    budget = Budget(initial=16, target=8, total_steps=20, warmup_steps=3, final_steps=4, interval=3)
    trained, state, live = train(tx, adapter, 24)
    for step, ranks in enumerate(live, 1):
        if bool(budget.is_due(step)) or step > 16:
            assert total(ranks) == int(budget.at(step)), step
        elif step <= 3:
            assert total(ranks) == 16
    assert total(live[-1]) == 8
    revived = [s for s in range(1, 16) if total(live[s]) > total(live[s - 1])]
    assert revived, "a pruned triplet can come back between choices"
    assert float(trained.params["head"]["updates"]) == float(trained.params["layers"]["updates"]) == 24
    assert int(state.step) == 24
    for before, after in zip(live[15:], live[16:], strict=False):
        assert_identical(before, after)


def test_equal_budgets_keep_everything() -> None:
    adapter = make(lorax.Spec({"layers|head": AdaLoRA(rank=4, target_rank=4)}))
    tx = optim.adalora(optax.adam(3e-2), adapter, total_steps=6)
    assert {total(ranks) for ranks in train(tx, adapter, 8)[2]} == {16}


def as_float32(arrays: dict[str, Any]) -> dict[str, Any]:
    return {n: x.astype(np.float32) for n, x in arrays.items()}


def test_importance_by_hand() -> None:
    """Three steps of SGD on a linear weight written out; the last choice is made with the scores of the step before."""
    model = lambda p, x: x @ p["w"]
    params, x = {"w": normal(1, 4, 3)}, normal(2, 5, 4)
    spec = lorax.Spec({"w": AdaLoRA(rank=3, target_rank=1)})
    adapter = lorax.init(jax.random.key(0), spec, lorax.trace(model, params, x), params)
    tx = optim.adalora(optax.sgd(0.1), adapter, total_steps=3, beta1=0.7, beta2=0.6, orthogonal_weight=0.0)
    gradient = jax.grad(lambda p: jnp.sum(jnp.sin(lorax.adapt(model)(params, adapter.replace(params=p), x))))
    values, state = adapter.params, tx.init(adapter.params)
    want = {n: np.asarray(v, np.float64) for n, v in values["w"].items()}
    mean = {n: np.zeros(want[n].shape) for n in "aeb"}
    spread = {n: np.zeros(want[n].shape) for n in "aeb"}
    for step in (1, 2, 3):
        exact = run(gradient, values)
        g = jax.tree.map(lambda x: np.asarray(x, np.float64), exact["w"])
        updates, state = run(tx.update, exact, state, values)
        values = optax.apply_updates(values, updates)
        for n in "aeb":
            want[n] = want[n] - 0.1 * g[n]
            if step == 3:
                continue
            importance = np.abs(want[n] * g[n])
            mean[n] = 0.7 * mean[n] + 0.3 * importance
            spread[n] = 0.6 * spread[n] + 0.4 * np.abs(importance - mean[n])
        s = {n: mean[n] * spread[n] for n in "aeb"}
        score = s["e"] + s["a"].mean(0) + s["b"].mean(1)
        want["e"] = np.where(np.argsort(np.argsort(-score)) < 1, want["e"], 0)
        np.testing.assert_array_equal(values["w"]["e"] == 0, want["e"] == 0)
        assert_close(jax.device_get(state.sensitivity["w"]), as_float32(mean), 1e-5)
        assert_close(jax.device_get(state.uncertainty["w"]), as_float32(spread), 1e-5)


# The regulariser.


def test_orthogonality_by_hand() -> None:
    adapter = randomised(make())
    norms = []
    for path in ("head", "layers"):
        a, b = (np.asarray(adapter.params[path][n], np.float64) for n in ("a", "b"))
        for a_IxR, b_RxO in zip(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), strict=True):
            norms += [np.linalg.norm(a_IxR.T @ a_IxR - np.eye(4)), np.linalg.norm(b_RxO @ b_RxO.T - np.eye(4))]
    assert len(norms) == 8
    assert float(optim.orthogonality(adapter)) == pytest.approx(np.mean(norms), rel=1e-5)


def test_orthonormal_factors_have_no_penalty_and_no_nan() -> None:
    model = lambda p, x: x @ p["w"]
    params, x = {"w": normal(1, 4, 4)}, normal(2, 5, 4)
    spec = lorax.Spec({"w": AdaLoRA(rank=4)})
    adapter = lorax.init(jax.random.key(0), spec, lorax.trace(model, params, x), params)
    eye = {"a": jnp.eye(4), "b": jnp.eye(4)}
    adapter = adapter.replace(params={"w": {**adapter.params["w"], **eye}})
    assert float(optim.orthogonality(adapter)) == 0
    tx = optim.adalora(optax.sgd(1.0), adapter, total_steps=3)
    nothing = jax.tree.map(jnp.zeros_like, adapter.params)
    updates, _ = run(tx.update, nothing, tx.init(adapter.params), adapter.params)
    for name in ("a", "b"):
        assert not np.any(updates["w"][name])


def test_the_gradient_of_the_regulariser_is_added() -> None:
    adapter = randomised(make())
    tx = optim.adalora(optax.sgd(1.0), adapter, total_steps=9, warmup_steps=2, orthogonal_weight=0.3)
    gradient = run(jax.grad(functools.partial(loss, adapter)), adapter.params)
    updates, _ = run(tx.update, gradient, tx.init(adapter.params), adapter.params)
    whole = lambda p: loss(adapter, p) + 0.3 * optim.orthogonality(adapter.replace(params=p))
    want = jax.tree.map(jnp.negative, run(jax.grad(whole), adapter.params))
    for path in ("head", "layers"):
        want[path]["updates"] = jnp.ones(())
    assert_close(updates, want, 1e-5)


# The transformation.


def test_other_sites_are_trained_by_the_inner_optimiser_alone() -> None:
    adapter = make()
    inner = optax.adam(1e-2)
    tx = optim.adalora(inner, adapter, total_steps=9)
    gradient = jax.tree.map(jnp.ones_like, adapter.params)
    updates, _ = run(tx.update, gradient, tx.init(adapter.params), adapter.params)
    plain, _ = run(inner.update, gradient, inner.init(adapter.params), adapter.params)
    assert_identical(updates["bias"], plain["bias"])


@pytest.mark.slow
def test_jit_scan_and_plain_calls_give_the_same() -> None:
    adapter = make()
    tx = optim.adalora(optax.adam(3e-2), adapter, total_steps=8, warmup_steps=1, interval=2)

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        updates, state = tx.update(jax.grad(functools.partial(loss, adapter))(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (adapter.params, tx.init(adapter.params))
    scanned = run(lambda c: lax.scan(step, c, None, length=8)[0], start)
    looped = train(tx, adapter, 8)[:2]
    assert_close(scanned[0], looped[0].params, 1e-4)
    assert_close(step(start, None)[0][0], train(tx, adapter, 1)[0].params, 1e-4)
    assert_identical(
        jax.tree.map(lambda x: x != 0, scanned[0]["layers"]["e"]),
        jax.tree.map(lambda x: x != 0, looped[0].params["layers"]["e"]),
    )


@pytest.mark.slow
def test_several_adapters_train_side_by_side() -> None:
    adapters = [make(seed=s) for s in range(3)]
    tx = optim.adalora(optax.adam(3e-2), adapters[0], total_steps=6, interval=2)

    def one(params: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            updates, state = tx.update(jax.grad(functools.partial(loss, adapters[0]))(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return lax.scan(step, (params, tx.init(params)), None, length=6)[0][0]

    together = run(jax.vmap(one), jax.tree.map(lambda *xs: jnp.stack(xs), *(a.params for a in adapters)))
    for i, adapter in enumerate(adapters):
        alone = train(tx, adapter, 6)[0].params
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), alone, 1e-4)
        assert int(np.sum(together["head"]["e"][i] != 0) + np.sum(together["layers"]["e"][i] != 0)) == 8


def test_training_learns_with_a_reported_budget() -> None:
    adapter = make()
    tx = optim.adalora(optax.adam(3e-2), adapter, total_steps=40, warmup_steps=5, final_steps=10, orthogonal_weight=0.1)
    trained, _, live = train(tx, adapter, 40)
    assert float(loss(adapter, trained.params)) < 0.5 * float(loss(adapter, adapter.params))
    assert total(live[-1]) == 8
    assert np.isfinite(lorax.merge(PARAMS, trained)["head"]).all()


def test_resuming_is_exact_to_the_bit(tmp_path: Path) -> None:
    adapter = make()
    tx = optim.adalora(optax.adamw(3e-2), adapter, total_steps=12, warmup_steps=2, final_steps=2, interval=2)
    whole, whole_state, _ = train(tx, adapter, 12)
    half, state, _ = train(tx, adapter, 7)
    checkpoints = TrainCheckpoints(tmp_path / "run")
    checkpoints.save(7, half, opt_state=state, base=PARAMS)
    checkpoints.close()
    like = jax.eval_shape(tx.init, adapter.params)
    again = TrainCheckpoints(tmp_path / "run").restore(base=PARAMS, opt_state_like=like)
    assert_identical(again.opt_state, state)
    other = optim.adalora(optax.adamw(3e-2), again.adapter, total_steps=12, warmup_steps=2, final_steps=2, interval=2)
    resumed, resumed_state, _ = train(other, again.adapter, 5, again.opt_state)
    assert_identical(resumed.params, whole.params)
    assert_identical(resumed_state, whole_state)


def test_layers_of_scale_zero_have_no_part_in_the_budget() -> None:
    adapter = make()
    scale = jnp.asarray([2.0, 0.0, 2.0])
    adapter = adapter.replace(state={**adapter.state, "layers": {"scale": scale}})
    bare = jax.tree.map(lambda x: x.at[1].set(0) if x.ndim else x, adapter.params["layers"])
    adapter = adapter.replace(params={**adapter.params, "layers": bare})
    tx = optim.adalora(optax.adam(3e-2), adapter, total_steps=6)
    trained, _, live = train(tx, adapter, 6)
    assert total(live[-1]) == 3 * 2, "three weights of target rank 2"
    assert not np.any(trained.params["layers"]["e"][1])
    one = lorax.Spec({"head": AdaLoRA(rank=4, target_rank=2)})
    head = make(one).replace(params={"head": adapter.params["head"]})
    both = 2 * float(optim.orthogonality(head)) + sum(
        float(np.linalg.norm(f(x) - np.eye(4)))
        for layer in (0, 2)
        for x, f in (
            (np.asarray(bare["a"][layer]), lambda a: a.T @ a),
            (np.asarray(bare["b"][layer]), lambda b: b @ b.T),
        )
    )
    assert float(optim.orthogonality(adapter)) == pytest.approx(both / 6, rel=1e-5)


def test_an_abstract_adapter_will_do() -> None:
    adapter = make()
    shapes = jax.eval_shape(lambda: make())
    tx = optim.adalora(optax.adam(3e-2), shapes, total_steps=4)
    assert total(train(tx, adapter, 4)[2][-1]) == 8


@pytest.mark.parametrize(
    ("settings", "needle"),
    [
        ({"total_steps": 0}, "total_steps is 0"),
        ({"total_steps": 9.0}, "total_steps is 9.0"),
        ({"total_steps": 9, "interval": 0}, "interval is 0"),
        ({"total_steps": 9, "warmup_steps": 5, "final_steps": 4}, "warmup_steps is 5 and final_steps 4"),
        ({"total_steps": 9, "beta1": 1.0}, "beta1 is 1.0"),
        ({"total_steps": 9, "beta2": 0.0}, "beta2 is 0.0"),
        ({"total_steps": 9, "orthogonal_weight": -1.0}, "orthogonal_weight is -1.0"),
    ],
)
def test_wrong_schedules_are_refused(settings: dict[str, Any], needle: str) -> None:
    with pytest.raises(ValueError, match=re.escape(needle)):
        optim.adalora(optax.adam(1e-2), make(), **settings)


def test_misuse_is_explained() -> None:
    plain = make(lorax.Spec({"head": lorax.LoRA(rank=2)}))
    with pytest.raises(ValueError, match="no site of the adapter has AdaLoRA; it has LoRA"):
        optim.adalora(optax.adam(1e-2), plain, total_steps=9)
    adapter = make()
    tx = optim.adalora(optax.adam(1e-2), adapter, total_steps=9)
    state = tx.init(adapter.params)
    with pytest.raises(ValueError, match=re.escape("tx.update(grads, state, params)")):
        tx.update(adapter.params, state)
    with pytest.raises(ValueError, match="init needs params shaped like adapter.params"):
        tx.init((PARAMS, adapter))


# Training without the budget update.


def trained_by_adam(adapter: Any) -> Any:
    tx = optax.adam(1e-2)
    gradient = run(jax.grad(functools.partial(loss, adapter)), adapter.params)
    updates, _ = run(tx.update, gradient, tx.init(adapter.params), adapter.params)
    return adapter.replace(params=optax.apply_updates(adapter.params, updates))


@pytest.mark.parametrize("path", ["head", "layers"])
def test_an_adapter_trained_by_another_optimiser_is_refused(path: str) -> None:
    adapter = trained_by_adam(make(lorax.Spec({path: AdaLoRA(rank=2)})))
    assert np.any(adapter.params[path]["e"])
    assert float(adapter.params[path]["updates"]) == 0
    for use in (lambda: lorax.adapt(fn)(PARAMS, adapter, X), lambda: lorax.merge(PARAMS, adapter)):
        with pytest.raises(ValueError, match=path + r": .*lorax\.optim\.adalora\(inner, adapter, total_steps"):
            use()


@pytest.mark.parametrize("inner", [optax.adam(1e-2), optax.sgd(0.1, momentum=0.9), optax.adamw(1e-2), optax.lion(1e-3)])
def test_under_jit_the_loss_of_the_second_step_is_nan(inner: Any) -> None:
    adapter = make()
    step = jax.jit(jax.value_and_grad(functools.partial(loss, adapter)))
    params, state, losses = adapter.params, inner.init(adapter.params), []
    for _ in range(2):
        value, gradient = step(params)
        losses.append(float(value))
        updates, state = inner.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    assert np.isfinite(losses[0])
    assert np.isnan(losses[1])


def test_the_refusal_is_no_part_of_the_function() -> None:
    """Any count but zero will do, `updates` has no gradient, and a stack's or member's count is its own."""
    adapter = randomised(make())
    gradient = run(jax.grad(functools.partial(loss, adapter)), adapter.params)
    assert float(gradient["head"]["updates"]) == 0
    assert np.any(gradient["head"]["e"])
    bad = trained_by_adam(make())
    pair = jax.tree.map(lambda *xs: jnp.stack(xs), adapter.params, bad.params)
    losses = jax.vmap(functools.partial(loss, adapter))(pair)
    np.testing.assert_array_equal(np.isnan(losses), [False, True])
