"""Stacks of adapters: each member trains as if alone, whatever it differs in, and comes back as it was."""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import lorax
from tests.agreement import FAST_COMPILE, assert_close, assert_identical, equations, normal, randomised

ROOT = Path(__file__).parents[1]
STEPS = 50
F64_TOL, F32_LOSS_TOL = 1e-9, 1e-3

V, D, H, K, L, T = 7, 5, 2, 3, 2, 6
# Every row twice, with other labels: no loss comes near zero, where its float32 round-off would be most of it.
TOKENS = jnp.asarray([[0, 6, 3, 1, 5, 2], [1, 1, 5, 4, 2, 0]] * 2, jnp.int32)
WANTED = jnp.asarray([[1, 2, 0, 1, 2, 0], [0, 0, 1, 2, 1, 1], [1, 2, 0, 2, 0, 0], [0, 0, 1, 2, 0, 1]], jnp.int32)
PARAMS = {
    "embed": normal(1, V, D),
    "place": normal(2, T, D),
    "layers": {"up": normal(3, L, D, H, K), "down": normal(4, L, H, K, D), "bias": normal(5, L, D)},
    "head": normal(6, D, 3),
}


def model(p: Any, tokens: Any) -> Any:
    """Tables, a scanned stack with several axes a side, biases and a head."""
    x = p["embed"][tokens] + p["place"][jnp.arange(T)]

    def layer(x: Any, w: Any) -> Any:
        hidden = jnp.tanh(jnp.einsum("btd,dhk->bthk", x, w["up"]))
        hidden += jnp.mean(hidden, axis=1, keepdims=True)  # later positions see the first ones
        return x + jnp.einsum("bthk,hkd->btd", hidden, w["down"]) + w["bias"], None

    return lax.scan(layer, x, p["layers"])[0] @ p["head"]


SITES = lorax.trace(model, PARAMS, TOKENS)

# Of each method three settings that one program evaluates.
TRIPLES: dict[str, Sequence[lorax.Method]] = {
    "LoRA": (
        lorax.LoRA(rank=1, alpha=3, dropout=0.3),
        lorax.LoRA(rank=4, rank_stabilized=True, initializer="gaussian"),
        lorax.LoRA(rank=2, initializer="pissa", dropout=0.1),
    ),
    "LoRA with a bias": [lorax.LoRA(rank=r, alpha=2, bias=True) for r in (1, 3, 2)],
    "DoRA": (lorax.DoRA(rank=1, dropout=0.2), lorax.DoRA(rank=3, alpha=4), lorax.DoRA(rank=2, initializer="pissa")),
    "AdaLoRA": (
        lorax.AdaLoRA(rank=3, target_rank=2, dropout=0.1),
        lorax.AdaLoRA(rank=4, alpha=2),
        lorax.AdaLoRA(rank=2, target_rank=1, initial_std=0.1),
    ),
    "LoRAFA": (lorax.LoRAFA(rank=1, dropout=0.2), lorax.LoRAFA(rank=4), lorax.LoRAFA(rank=2, initializer="olora")),
    "VeRA": (lorax.VeRA(rank=3, dropout=0.1), lorax.VeRA(rank=8, projection_seed=1), lorax.VeRA(rank=5, d_initial=0.3)),
    "LoHa": (lorax.LoHa(rank=1), lorax.LoHa(rank=3, alpha=1, dropout=0.2), lorax.LoHa(rank=2)),
    "LoKr": (lorax.LoKr(rank=1), lorax.LoKr(rank=3, alpha=1, dropout=0.2), lorax.LoKr(rank=2)),
    "IA3": [lorax.IA3()] * 3,
    "IA3 of inputs": [lorax.IA3(on="input")] * 3,
    "Full": [lorax.Full()] * 3,
    "Bottleneck": [lorax.Bottleneck(rank=r) for r in (1, 4, 2)],
    "Prompt": (lorax.Prompt(length=1), lorax.Prompt(length=3, tokens=(1, 2, 4)), lorax.Prompt(length=2)),
    "Prefix": [lorax.Prefix(length=n) for n in (1, 3, 2)],
    "TrainableTokens": [lorax.TrainableTokens(tokens=(5, 1))] * 3,
}
QUICK = {"LoRA", "DoRA", "AdaLoRA", "IA3", "Prefix"}  # zeros, marks and masks of each kind; the others are slow tests
RATES, DECAYS = (1e-3, 1e-2, 3e-3), (0.0, 0.1, 0.03)


def at(paths: Sequence[str], method: lorax.Method, seed: int, dtype: Any) -> lorax.Adapter:
    """A new adapter of some leaves."""
    has_dtype = any(f.name == "dtype" for f in dataclasses.fields(method))  # type: ignore[arg-type]
    method = dataclasses.replace(method, dtype=dtype) if has_dtype else method
    spec = lorax.Spec({re.escape(path): method for path in paths})
    return lorax.init(jax.random.key(seed), spec, SITES, jax.tree.map(lambda x: x.astype(dtype), PARAMS))


def members(name: str, dtype: Any = "float32") -> list[lorax.Adapter]:
    """Three adapters: of every other leaf, of the others, and of all that the method can adapt."""
    able = [s.path for s in SITES if not TRIPLES[name][0].refuses(s) and (s.is_adaptable or name == "Full")]
    chosen = (able[::2], able[1::2] or able, able)
    return [at(paths, m, 10 + i, dtype) for i, (paths, m) in enumerate(zip(chosen, TRIPLES[name], strict=True))]


def optimiser(adapter: lorax.Adapter, learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
    """Clipping by the norm of all gradients, Adam, decay; AdaLoRA's budget where it has to be."""
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(learning_rate, weight_decay=weight_decay))
    if any(isinstance(m, lorax.AdaLoRA) for m in adapter.methods.values()):
        return lorax.optim.adalora(tx, adapter, total_steps=STEPS, warmup_steps=5, final_steps=10, interval=3)
    return tx


def loss(trained: Any, adapter: lorax.Adapter, params: Any, key: Any) -> Any:
    logits = lorax.adapt(model)(params, adapter.replace(params=trained), TOKENS, rng=key)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, 3:], WANTED[:, 3:]).mean()


def train_alone(adapter: lorax.Adapter, params: Any, seed: int, rate: float, decay: float) -> Any:
    """Fifty steps; the losses and what they leave."""
    tx = optimiser(adapter, rate, decay)
    keys = jax.random.split(jax.random.key(seed), STEPS)

    def step(carry: Any, key: Any) -> Any:
        trained, state = carry
        value, grads = jax.value_and_grad(loss)(trained, adapter, params, key)
        updates, state = tx.update(grads, state, trained)
        return (optax.apply_updates(trained, updates), state), value

    run = lambda p: lax.scan(step, (p, tx.init(p)), keys)
    (trained, _), losses = jax.jit(run, compiler_options=FAST_COMPILE)(adapter.params)
    return adapter.replace(params=trained), losses


def train_together(stack: lorax.Adapter, params: Any, seeds: Sequence[int], rates: Any, decays: Any) -> Any:
    """The same with all members in one program."""
    tx = lorax.optim.stacked(optimiser, stack, learning_rate=rates, weight_decay=decays)
    keys = jnp.stack([jax.random.split(jax.random.key(seed), STEPS) for seed in seeds], axis=1)

    def step(carry: Any, keys: Any) -> Any:
        trained, state = carry
        values, grads = jax.vmap(jax.value_and_grad(loss), (0, 0, None, 0))(trained, stack, params, keys)
        updates, state = tx.update(grads, state, trained, value=values)
        return (optax.apply_updates(trained, updates), state), values

    run = lambda p: lax.scan(step, (p, tx.init(p)), keys)
    (trained, state), losses = jax.jit(run, compiler_options=FAST_COMPILE)(stack.params)
    return stack.replace(params=trained), losses, state


marked = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TRIPLES]


@pytest.mark.filterwarnings("ignore:the rank is above")
@pytest.mark.parametrize("name", marked)
def test_each_member_trains_as_if_alone(name: str) -> None:
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype("float64"), PARAMS)
        alone = members(name, "float64")
        trained, losses, state = train_together(lorax.stack(alone), params, range(3), RATES, DECAYS)
        assert losses.dtype == jnp.float64 and not state.diverged.any()
        for i, (start, end) in enumerate(zip(alone, lorax.unstack(trained), strict=True)):
            wanted, its_losses = train_alone(start, params, i, RATES[i], DECAYS[i])
            assert np.ptp(its_losses) > 1e-3, "nothing was learned: the check is void"
            np.testing.assert_allclose(losses[:, i], its_losses, rtol=F64_TOL)
            assert_close(end, wanted, F64_TOL, f"member {i}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the rank is above")
@pytest.mark.parametrize("name", TRIPLES)
def test_losses_in_single_precision(name: str) -> None:
    alone = members(name)
    _, losses, _ = train_together(lorax.stack(alone), PARAMS, range(3), RATES, DECAYS)
    for i, start in enumerate(alone):
        _, its_losses = train_alone(start, PARAMS, i, RATES[i], DECAYS[i])
        np.testing.assert_allclose(losses[:, i], its_losses, rtol=F32_LOSS_TOL)


@pytest.mark.filterwarnings("ignore:the rank is above")
@pytest.mark.parametrize("name", TRIPLES)
def test_unstacking_gives_back_what_was_stacked(name: str) -> None:
    alone = [randomised(a, seed=i) for i, a in enumerate(members(name))]
    for back, start in zip(lorax.unstack(lorax.stack(alone)), alone, strict=True):
        assert_identical(back, start)
    assert_identical(lorax.select(lorax.stack(alone), -1), alone[-1])


def lora_pair() -> list[lorax.Adapter]:
    """Two adapters with a leaf in common, all of their arrays random."""
    first = at(["head", "layers/up"], lorax.LoRA(rank=1, alpha=3), 0, "float32")
    return [randomised(first, 1), randomised(at(["head", "embed"], lorax.LoRA(rank=3), 1, "float32"), 2)]


def test_the_stack_has_the_largest_rank_and_all_targets() -> None:
    stack = lorax.stack(lora_pair())
    assert list(stack.methods) == ["head", "layers/up", "embed"]
    assert stack.params["head"]["a"].shape == (2, D, 3)
    assert not stack.params["head"]["a"][0, :, 1:].any() and stack.params["head"]["a"][1].all()
    assert not stack.params["embed"]["b"][0].any()
    assert stack.state["head"]["scale"].tolist() == [3.0, 1.0]
    assert stack.state["embed"]["is_present"].tolist() == [False, True]
    assert "is_present" not in stack.state["head"]


def test_merged_weights_of_a_stack() -> None:
    pair = lora_pair()
    merged = jax.vmap(lorax.merge, (None, 0))(PARAMS, lorax.stack(pair))
    for i, adapter in enumerate(pair):
        assert_close(jax.tree.map(lambda x, i=i: x[i], merged), lorax.merge(PARAMS, adapter))


def test_an_adapter_an_example() -> None:
    pair = lora_pair()
    ids = jnp.asarray([1, 0, 1])
    tokens = jnp.stack([TOKENS[0], TOKENS[1], TOKENS[1]])[:, None]

    @jax.jit
    def answers(stack: lorax.Adapter, ids: Any, tokens: Any) -> Any:
        return jax.vmap(lorax.adapt(model), (None, 0, 0))(PARAMS, lorax.select(stack, ids), tokens)

    got = answers(lorax.stack(pair), ids, tokens)
    for i, example, one in zip(ids, tokens, got, strict=True):
        assert_close(one, lorax.adapt(model)(PARAMS, pair[int(i)], example))


@pytest.mark.parametrize("name", ["LoRA", "VeRA"])  # with ranks of their own, with arrays in common
def test_members_in_another_order_stay_who_they_are(name: str, tmp_path: Path) -> None:
    first, second, *_ = (randomised(adapter, i) for i, adapter in enumerate(members(name)))
    turned = lorax.select(lorax.stack([first, second]), np.asarray([1, 0]))
    lorax.save(tmp_path / name, turned, base=PARAMS)
    for stack in (turned, lorax.restore(tmp_path / name, base=PARAMS)):
        assert stack.plan == turned.plan
        answers = [lorax.adapt(model)(PARAMS, one, TOKENS) for one in lorax.unstack(stack)]
        wanted = [lorax.adapt(model)(PARAMS, alone, TOKENS) for alone in (second, first)]
        assert_close(answers, wanted)
        assert not np.allclose(*answers, atol=0.1)
    with pytest.raises(ValueError, match="number 0 is a stack itself"):
        lorax.stack([turned])
    assert len(lorax.unstack(lorax.select(turned, np.asarray([0, 0, 1])))) == 3


def test_a_traced_index_swaps_without_compiling_anew() -> None:
    pair = lora_pair()
    stack = lorax.stack(pair)
    traces = []

    @jax.jit
    def answer(index: Any) -> Any:
        traces.append(index)
        return lorax.adapt(model)(PARAMS, lorax.select(stack, index), TOKENS)

    for i, adapter in enumerate(pair):
        assert_close(answer(jnp.asarray(i)), lorax.adapt(model)(PARAMS, adapter, TOKENS))
    assert len(traces) == 1


def test_settings_change_without_compiling_anew() -> None:
    pair = [at(["head"], lorax.LoRA(rank=2, alpha=1, dropout=rate), 0, "float32") for rate in (0.1, 0.2)]
    stack = lorax.stack([randomised(a, 1) for a in pair])
    assert_close(stack.state["head"]["dropout"], jnp.asarray([0.1, 0.2]))
    traces = []

    @jax.jit
    def step(stack: lorax.Adapter, state: Any) -> Any:
        traces.append(1)
        grads = jax.vmap(jax.grad(loss), (0, 0, None, None))(stack.params, stack, PARAMS, jax.random.key(0))
        return tx.update(grads, state, stack.params)[0]

    tx = lorax.optim.stacked(optimiser, stack, learning_rate=1.0, weight_decay=0.0)
    state = tx.init(stack.params)
    first = step(stack, state)
    faster = {**state.settings, "learning_rate": jnp.asarray([1.0, 2.0])}
    twice = step(stack, state._replace(settings=faster))
    assert_close(twice["head"]["b"], first["head"]["b"] * jnp.asarray([1.0, 2.0])[:, None, None])
    decayed = step(stack, state._replace(settings={**state.settings, "weight_decay": jnp.asarray([0.0, 0.5])}))
    assert_close(decayed["head"]["a"][0], first["head"]["a"][0])
    assert_close(decayed["head"]["a"][1], first["head"]["a"][1] - 0.5 * stack.params["head"]["a"][1], 1e-4)
    for name, values in (("scale", [0.5, 5.0]), ("dropout", [0.1, 0.9])):
        other = step(stack.replace(state={"head": stack.state["head"] | {name: jnp.asarray(values)}}), state)
        assert_close(other["head"]["b"][0], first["head"]["b"][0])
        assert not np.allclose(other["head"]["b"][1], first["head"]["b"][1]), name
    assert len(traces) == 1


def test_a_member_that_diverges_stops_and_leaves_the_others_alone() -> None:
    params = PARAMS
    alone = [at(["head"], lorax.LoRA(rank=2), seed, "float32") for seed in range(3)]
    rates, decays = (1e-2, 1e-2, 1e-2), (0.0, 0.0, 0.0)
    healthy, losses, _ = train_together(lorax.stack(alone), params, range(3), rates, decays)

    # From the eleventh step on the gradient of the second member is infinite.
    tx = lorax.optim.stacked(optimiser, lorax.stack(alone), learning_rate=rates, weight_decay=decays)
    stack, keys = lorax.stack(alone), jnp.stack([jax.random.split(jax.random.key(s), STEPS) for s in range(3)], axis=1)

    def step(carry: Any, inputs: Any) -> Any:
        trained, state = carry
        keys, number = inputs
        values, grads = jax.vmap(jax.value_and_grad(loss), (0, 0, None, 0))(trained, stack, params, keys)
        broken = jnp.where((number >= 10) & (jnp.arange(3) == 1), jnp.inf, 1.0)
        grads = jax.tree.map(lambda g: g * broken.reshape(3, *(1,) * (g.ndim - 1)), grads)
        updates, state = tx.update(grads, state, trained, value=values)
        moved = optax.apply_updates(trained, updates)
        return (moved, state), (values, state.diverged, moved["head"]["b"])

    start = (stack.params, tx.init(stack.params))
    (trained, state), (values, diverged, course) = jax.jit(lambda c: lax.scan(step, c, (keys, jnp.arange(STEPS))))(
        start
    )
    assert state.diverged.tolist() == [False, True, False]
    assert diverged[:, 1].tolist() == [False] * 10 + [True] * (STEPS - 10)
    for i in (0, 2):
        assert_close(values[:, i], losses[:, i])
        assert_close(
            jax.tree.map(lambda x, i=i: x[i], trained), jax.tree.map(lambda x, i=i: x[i], healthy.params), 1e-4
        )
    assert_identical(course[9:, 1], jnp.broadcast_to(course[9, 1], course[9:, 1].shape))
    assert np.isfinite(course).all()


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_loss_or_a_setting_that_is_not_finite_stops_a_member(value: Any) -> None:
    stack = lorax.stack(lora_pair())
    tx = lorax.optim.stacked(lambda adapter, rate: optax.sgd(rate), stack, rate=[0.1, 0.1])
    ones = jax.tree.map(jnp.ones_like, stack.params)
    updates, state = tx.update(ones, tx.init(stack.params), stack.params, value=jnp.asarray([1.0, value]))
    assert state.diverged.tolist() == [False, True]
    assert not any(x[1].any() for x in jax.tree.leaves(updates)) and updates["head"]["a"][0].all()
    again, state = tx.update(ones, state, stack.params, value=jnp.ones(2))
    assert state.diverged.tolist() == [False, True] and not again["head"]["a"][1].any()
    state = tx.init(stack.params)._replace(settings={"rate": jnp.asarray([value, 0.1])})
    updates, state = tx.update(ones, state, stack.params)
    assert state.diverged.tolist() == [True, False] and not updates["head"]["a"][0].any()


@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
def test_one_number_that_is_not_finite_is_seen_in_whichever_array_it_is(value: Any) -> None:
    names = [f"w{i:02}" for i in range(11)]
    params = {name: jnp.eye(3 if i < 9 else 5, 3) for i, name in enumerate(names)}
    fn = lambda p, x: sum((x[:, : w.shape[0]] @ w).sum() for w in p.values())
    sites = lorax.trace(fn, params, jnp.ones((2, 5)))
    make = lambda i: lorax.init(jax.random.key(i), lorax.Spec({r"w..": lorax.LoRA(rank=2)}), sites, params)
    stack = lorax.stack([make(0), make(1)])
    tx = lorax.optim.stacked(lambda adapter, rate: optax.sgd(rate), stack, rate=0.1)
    ones = jax.tree.map(jnp.ones_like, stack.params)

    @jax.jit
    def diverged(grads: Any) -> Any:
        return tx.update(grads, tx.init(stack.params), stack.params)[1].diverged

    assert diverged(ones).tolist() == [False, False]
    for name in names:
        for factor in ("a", "b"):
            spoilt = {**ones, name: {**ones[name], factor: ones[name][factor].at[1, -1, -1].set(value)}}
            assert diverged(spoilt).tolist() == [False, True], (name, factor)


def test_the_base_is_multiplied_once_for_all_members() -> None:
    many = lorax.stack([at(["layers/up", "head"], lorax.LoRA(rank=1 + i % 2), i, "float32") for i in range(8)])
    run = lambda p, s: jax.vmap(jax.value_and_grad(loss), (0, 0, None, None))(s.params, s, p, None)
    jaxpr = jax.make_jaxpr(run)(PARAMS, many)
    with_members = [PARAMS["head"].shape, PARAMS["layers"]["up"].shape[1:]]
    products = [e for e in equations(jaxpr.jaxpr) if str(e.primitive) == "dot_general"]
    of_the_base = [e for e in products if any(v.aval.shape in with_members for v in e.invars)]
    assert len(of_the_base) >= 3  # forward in both, backward through the head
    for shape in with_members:  # nowhere is a weight repeated for each member
        assert not any(v.aval.shape[-len(shape) :] == shape and 8 in v.aval.shape for e in products for v in e.invars)


def test_a_stack_of_a_quantised_base() -> None:
    params = {"w": normal(1, 64, 128), "head": normal(2, 128, 3)}
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["head"]
    x = normal(3, 4, 64)
    quantised = lorax.quantize(params, {"w": lorax.NF4(block=64)})
    sites = lorax.trace(fn, quantised, x)
    specs = [lorax.Spec({"w": lorax.DoRA(rank=2)}), lorax.Spec({"head|w": lorax.DoRA(rank=4)})]
    pair = [randomised(lorax.init(jax.random.key(i), s, sites, quantised), i) for i, s in enumerate(specs)]
    got = jax.vmap(lorax.adapt(fn), (None, 0, None))(quantised, lorax.stack(pair), x)
    assert_close(got, jnp.stack([lorax.adapt(fn)(quantised, a, x) for a in pair]))


def test_adapters_that_vmap_made() -> None:
    spec = lorax.Spec({"head": lorax.LoRA(rank=2)})
    build = lambda key: lorax.init(key, spec, SITES, PARAMS)
    keys = jax.random.split(jax.random.key(0), 3)
    many = jax.vmap(build)(keys)
    for one, key in zip(lorax.unstack(many), keys, strict=True):
        assert_close(one, build(key))
    with pytest.raises(ValueError, match="no axis of members"):
        lorax.unstack(build(keys[0]))


def test_a_stack_is_saved_and_restored(tmp_path: Path) -> None:
    for name in ("VeRA", "AdaLoRA"):  # with arrays in common, and with masks
        stack = lorax.stack(members(name))
        lorax.save(tmp_path / name, stack, base=PARAMS)
        back = lorax.restore(tmp_path / name, base=PARAMS)
        assert_identical(back, stack)
        assert_identical(lorax.select(back, 1), lorax.select(stack, 1))


@lorax.register
class Normalised(lorax.Method):
    """A method from outside that knows nothing of stacks, and that zeros would make NaN."""

    strength: float = 1.0

    arrays = {"gain": "SO"}

    def init(self, key: Any, site: Any, base: Any) -> Any:
        return {"gain": jnp.full(site.dims("SO"), 2.0)}, {}

    def weight(self, w: Any, *, gain: Any) -> Any:
        return w * gain

    def derive(self, site: Any, base: Any, arrays: Any) -> Any:
        gain = arrays["gain"]
        return {"gain": gain / jnp.linalg.norm(gain) * gain.size**0.5}


def test_a_method_from_outside_that_some_members_lack() -> None:
    pair = [at(["head"], Normalised(), 0, "float32"), at(["head", "layers/up"], Normalised(), 0, "float32")]
    stack = lorax.stack([randomised(a, i) for i, a in enumerate(pair)])
    grads = jax.vmap(jax.grad(loss), (0, 0, None, None))(stack.params, stack, PARAMS, None)
    for i, one in enumerate(lorax.unstack(stack)):
        wanted = jax.grad(loss)(one.params, one, PARAMS, None)
        assert_close({p: jax.tree.map(lambda x, i=i: x[i], grads[p]) for p in wanted}, wanted)
    assert not grads["layers/up"]["gain"][0].any() and grads["layers/up"]["gain"][1].any()
    with pytest.raises(ValueError, match=r"head: Normalised with strength 1.0 and 2.0 cannot be members of one stack"):
        lorax.stack([pair[0], at(["head"], Normalised(strength=2.0), 0, "float32")])


def test_what_cannot_be_stacked() -> None:
    lora = lambda **settings: at(["head"], lorax.LoRA(**settings), 0, "float32")
    refused = {
        r"head: adapters 0 and 1 of the stack have LoRA and DoRA": [lora(), at(["head"], lorax.DoRA(), 0, "float32")],
        r"head: LoRA with bias True and False": [lora(bias=True), lora()],
        r"head: LoRA with dtype 'float32' and 'bfloat16'": [lora(), at(["head"], lorax.LoRA(), 0, "bfloat16")],
        r"factor -1 and 2": [at(["head"], lorax.LoKr(rank=1, factor=f), 0, "float32") for f in (-1, 2)],
        r"number 1 is a stack itself": [lora(), lorax.stack([lora()])],
        r"there is no adapter": [],
    }
    for message, adapters in refused.items():
        with pytest.raises(ValueError, match=message):
            lorax.stack(adapters)
    other = {**PARAMS, "head": normal(6, D, 4)}
    sites = lorax.trace(model, other, TOKENS)
    elsewhere = lorax.init(jax.random.key(0), lorax.Spec({"head": lorax.LoRA()}), sites, other)
    with pytest.raises(ValueError, match="head: adapters 0 and 1 of the stack were traced on different uses or shapes"):
        lorax.stack([lora(), elsewhere])
    with pytest.raises(TypeError, match="number 0 is a dict"):
        lorax.stack([{}])
    with pytest.raises(TypeError, match="there is one adapter alone; expected a list"):
        lorax.stack(lora())
    stack = lorax.stack([lora(), lora(rank=2)])
    with pytest.raises(TypeError, match="the index is a list, expected an int or an array"):
        lorax.select(stack, [0, 1])
    for index in (2, -3):
        with pytest.raises(ValueError, match="the stack has 2"):
            lorax.select(stack, index)
    with pytest.raises(ValueError, match="it is a part of a stack"):
        lorax.unstack(jax.tree.map(lambda x: x[:1], stack))
    with pytest.raises(ValueError, match=r"rate has shape \(3,\), expected one number or one for each of 2"):
        lorax.optim.stacked(lambda adapter, rate: optax.sgd(rate), stack, rate=[1, 2, 3])
    with pytest.raises(ValueError, match="no axis of members; lorax.stack makes a stack"):
        lorax.optim.stacked(lambda adapter, rate: optax.sgd(rate), lora(), rate=1.0)
    with pytest.raises(ValueError, match=r"use lorax\.optim\.stacked"):
        lorax.optim.adalora(optax.adam(1e-3), lorax.stack(members("AdaLoRA")), total_steps=9)
    with pytest.raises(ValueError, match="Values of several adapters are for jax.vmap"):
        lorax.adapt(model)(PARAMS, stack, TOKENS)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_members_on_devices_of_their_own(kind: str) -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.eight_devices_stack", kind]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | flags, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count("ok ") == 2, done.stdout
