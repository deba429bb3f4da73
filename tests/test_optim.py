"""LoRA+'s rates, and optimiser state in host memory; AdaLoRA has a file of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import lorax
from lorax import optim
from lorax.checkpoint import TrainCheckpoints
from lorax.methods.adalora import AdaLoRA
from tests.agreement import assert_close, assert_identical, normal, randomised, run

ROOT = Path(__file__).parents[1]
PARAMS = {"table": normal(1, 7, 6), "layers": normal(2, 3, 6, 6), "head": normal(3, 6, 4), "bias": jnp.zeros(4)}
IDS, Y = jnp.asarray([1, 4, 4, 6, 0]), normal(4, 5, 4)
SPEC = lorax.Spec({"table|layers": lorax.LoRA(rank=2), "head": lorax.LoRA(rank=3, bias=True), "bias": lorax.Full()})


def fn(params: Any, ids: Any) -> Any:
    x = lax.scan(lambda c, w: (jnp.tanh(c @ w), None), params["table"][ids], params["layers"])[0]
    return x @ params["head"] + params["bias"]


SITES = lorax.trace(fn, PARAMS, IDS)


def make(spec: lorax.Spec = SPEC) -> Any:
    return lorax.init(jax.random.key(0), spec, SITES, PARAMS)


def gradient(adapter: Any, trained: Any) -> Any:
    """The gradient of a loss of the adapter's trained values."""
    loss = lambda p: jnp.mean((lorax.adapt(fn)(PARAMS, adapter.replace(params=p), IDS) - Y) ** 2)
    return jax.grad(loss)(trained)


def train(tx: Any, adapter: Any, steps: int, state: Any = None, **options: Any) -> tuple[Any, Any]:
    """Compiled steps."""

    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(gradient(adapter, params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = adapter.params, tx.init(adapter.params) if state is None else state
    step = jax.jit(step, **options)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


# LoRA+.


def test_rates_of_every_group_exactly() -> None:
    adapter = make()
    ones = jax.tree.map(jnp.ones_like, adapter.params)
    tx = optim.lora_plus(adapter, 0.25, ratio=8, embedding_learning_rate=0.5, base=optax.sgd)
    updates, _ = run(tx.update, ones, tx.init(adapter.params), adapter.params)
    rates = {path: {n: float(-x.reshape(-1)[0]) for n, x in arrays.items()} for path, arrays in updates.items()}
    assert rates == {
        "table": {"a": 0.5, "b": 0.5},
        "layers": {"a": 0.25, "b": 2.0},
        "head": {"a": 0.25, "b": 2.0, "bias": 2.0},
        "bias": {"value": 0.25},
    }
    assert all(np.all(x == x.reshape(-1)[0]) for x in jax.tree.leaves(updates))


def test_embeddings_have_the_plain_rate_unless_one_is_given() -> None:
    assert optim.lora_plus_groups(make())["table"] == {"a": "embedding", "b": "embedding"}
    adapter = make()
    tx = optim.lora_plus(adapter, 0.25, ratio=8, base=optax.sgd)
    updates, _ = tx.update(adapter.params, tx.init(adapter.params), adapter.params)
    assert_identical(updates["table"], jax.tree.map(lambda x: -0.25 * x, adapter.params["table"]))


def test_a_ratio_of_one_is_the_plain_optimiser() -> None:
    adapter = randomised(make())
    g = run(gradient, adapter, adapter.params)
    both = [optim.lora_plus(adapter, 1e-2, ratio=1, weight_decay=0.1), optax.adamw(1e-2, weight_decay=0.1)]
    plus, plain = (run(tx.update, g, tx.init(adapter.params), adapter.params)[0] for tx in both)
    assert_close(plus, plain, 1e-6)


def test_against_an_adam_of_two_rates_written_out() -> None:
    """Five steps of AdamW with decoupled decay, in float64, from the same gradients."""
    adapter = randomised(make(lorax.Spec({"layers|head": lorax.LoRA(rank=2)})))
    schedule = lambda step: 0.01 / (1 + step)
    tx = optim.lora_plus(adapter, schedule, ratio=16, weight_decay=0.3)
    params, state = adapter.params, tx.init(adapter.params)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    zeros = jax.tree.map(np.zeros_like, exact)
    first, second = zeros, zeros
    for t in range(1, 6):
        g = run(gradient, adapter, params)
        updates, state = run(tx.update, g, state, params)
        params = optax.apply_updates(params, updates)
        g = jax.tree.map(lambda x: np.asarray(x, np.float64), g)
        first = jax.tree.map(lambda m, x: 0.9 * m + 0.1 * x, first, g)
        second = jax.tree.map(lambda v, x: 0.999 * v + 0.001 * x * x, second, g)
        for path in exact:
            for name, rate in (("a", schedule(t - 1)), ("b", 16 * schedule(t - 1))):
                m, v = first[path][name] / (1 - 0.9**t), second[path][name] / (1 - 0.999**t)
                step = m / (np.sqrt(v) + 1e-8) + 0.3 * exact[path][name]
                exact[path][name] = exact[path][name] - rate * step
    assert_close(params, jax.tree.map(np.float32, exact), 1e-5)


def test_rates_may_be_arrays_and_schedules_for_embeddings() -> None:
    adapter = make()
    ones = jax.tree.map(jnp.ones_like, adapter.params)

    def updates(rate: Any) -> Any:
        tx = optim.lora_plus(adapter, rate, ratio=2, embedding_learning_rate=lambda step: 0.125, base=optax.sgd)
        return tx.update(ones, tx.init(adapter.params), adapter.params)[0]

    got = run(updates, jnp.float32(0.5))
    assert {float(x) for x in got["head"]["b"].reshape(-1)} == {-1.0}
    assert {float(x) for x in got["table"]["a"].reshape(-1)} == {-0.125}


@pytest.mark.parametrize("ratio", [0.5, -1, float("nan")])
def test_a_ratio_below_one_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"lora_plus: ratio is {ratio!r}")):
        optim.lora_plus(make(), 1e-2, ratio=ratio)


@pytest.mark.slow
def test_lora_plus_within_adalora_and_offload() -> None:
    adapter = make(lorax.Spec({"layers|head": AdaLoRA(rank=3, target_rank=1), "bias": lorax.Full()}))
    inner = optim.lora_plus(adapter, 1e-2, ratio=4)
    tx = optim.adalora(inner, adapter, total_steps=4)
    params, _ = train(tx, adapter, 4)
    assert sum(int(np.sum(x)) for x in optim.live_ranks(adapter.replace(params=params)).values()) == 4
    off, state = train(optim.offload(tx), adapter, 4)
    assert kinds(state) == {"pinned_host"}
    assert_identical(off, params)


# State in host memory.


def kinds(tree: Any) -> set[Any]:
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


OPTIMISERS = {
    "adamw": optax.adamw(1e-2),
    "scheduled": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(optax.linear_schedule(1e-2, 0, 9))),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "stateless": optax.sgd(0.1),
    "factored": optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "random": optax.chain(optax.add_noise(1e-3, 0.5, jax.random.key(0)), optax.adam(1e-2)),
    "masked": optax.masked(optax.adam(1e-2), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "accumulated": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMISERS)
def test_state_lives_on_the_host_and_the_numbers_are_the_same(name: str) -> None:
    adapter = randomised(make())
    want, want_state = train(OPTIMISERS[name], adapter, 3)
    tx = optim.offload(OPTIMISERS[name])
    start = tx.init(adapter.params)
    got, state = train(tx, adapter, 3, start)
    held = set() if name == "stateless" else {"pinned_host"}
    assert kinds(start) == kinds(state) == held
    assert kinds(got) == {"device"}
    assert_identical(got, want)
    assert_identical(jax.device_get(state), jax.device_get(want_state))


@pytest.mark.slow
def test_uncompiled_compiled_and_scanned_steps_keep_it_there() -> None:
    adapter = randomised(make())
    tx = optim.offload(optax.adam(1e-2))
    g = run(gradient, adapter, adapter.params)
    state = tx.init(adapter.params)
    updates, eager = tx.update(g, state, adapter.params)
    assert kinds(eager) == {"pinned_host"}
    assert kinds(updates) == {"device"}
    compiled = jax.jit(tx.init)(adapter.params)
    assert kinds(compiled) == {"pinned_host"}
    assert_identical(jax.device_get(compiled), jax.device_get(state))

    def step(state: Any, _: Any) -> Any:
        updates, state = tx.update(g, state, adapter.params)
        return state, updates

    scanned, all_updates = jax.jit(lambda s: lax.scan(step, s, None, length=3))(state)
    assert kinds(scanned) == {"pinned_host"}
    assert_close(jax.tree.map(lambda x: x[0], all_updates), updates, 1e-6)


def test_a_step_may_donate_the_state_with_the_params() -> None:
    adapter = randomised(make())
    tx = optim.offload(optax.adam(1e-2))
    want, _ = train(optax.adam(1e-2), adapter, 3)
    start = jax.tree.map(jnp.copy, adapter)
    first = tx.init(start.params)
    got, state = train(tx, start, 3, first, donate_argnums=(0, 1))
    assert kinds(state) == {"pinned_host"}
    assert all(x.is_deleted() for x in jax.tree.leaves(first[0].mu)), "the old state's memory was given back"
    assert_identical(got, want)


def test_no_moment_exists_for_a_frozen_leaf() -> None:
    adapter = make(lorax.Spec({"head": lorax.LoRA(rank=3)}))
    trained = sorted(x.shape for x in jax.tree.leaves(adapter.params))
    for tx in (optim.offload(optax.adam(1e-2)), optim.lora_plus(adapter, 1e-2), optax.adam(1e-2)):
        moments = sorted(x.shape for x in jax.tree.leaves(tx.init(adapter.params)) if x.ndim)
        assert moments == sorted([*trained, *trained])
    ada = make(lorax.Spec({"head": AdaLoRA(rank=3)}))
    trained = sorted(x.shape for x in jax.tree.leaves(ada.params) if x.ndim)
    state = optim.adalora(optax.adam(1e-2), ada, total_steps=9).init(ada.params)
    is_kept = [(3,)]
    assert sorted(x.shape for x in jax.tree.leaves(state) if x.ndim) == sorted([*trained * 4, *is_kept])


def test_further_arguments_reach_the_inner_optimiser() -> None:
    scale = lambda updates, state, params=None, *, value: (jax.tree.map(lambda x: value * x, updates), state)
    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), scale)
    adapter = make(lorax.Spec({"head": AdaLoRA(rank=3)}))
    for tx in (optim.offload(inner), optim.adalora(inner, adapter, total_steps=9, orthogonal_weight=0.0)):
        updates, _ = tx.update(adapter.params, tx.init(adapter.params), adapter.params, value=-0.5)
        assert_identical(updates["head"]["a"], -0.5 * adapter.params["head"]["a"])


@pytest.mark.slow
def test_resuming_puts_the_state_back_on_the_host(tmp_path: Path) -> None:
    adapter = randomised(make())
    tx = optim.offload(optax.adam(1e-2))
    whole, _ = train(tx, adapter, 5)
    half, state = train(tx, adapter, 2)
    checkpoints = TrainCheckpoints(tmp_path / "run")
    checkpoints.save(2, adapter.replace(params=half), opt_state=state, base=PARAMS)
    checkpoints.close()
    again = TrainCheckpoints(tmp_path / "run").restore(base=PARAMS, opt_state_like=tx.init(half))
    assert kinds(again.opt_state) == {"pinned_host"}
    assert_identical(jax.device_get(again.opt_state), jax.device_get(state))
    assert_identical(train(tx, again.adapter, 3, again.opt_state)[0], whole)


# On a mesh.


@pytest.mark.parametrize(("check", "lines"), [("offload", 2), pytest.param("adalora", 2, marks=pytest.mark.slow)])
def test_on_eight_devices(check: str, lines: int) -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.eight_devices_optim", check]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | flags, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count("ok ") == lines, done.stdout
