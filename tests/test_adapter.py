"""The adapter as a pytree: partitions for optax, spec order, what errors say, and init under jit and eval_shape."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lorax
from tests.agreement import abstract, assert_close, assert_identical, normal, randomised, run

X_BxD = normal(9, 3, 4)
PARAMS = {
    "layers": [
        {"attn": {"query": {"kernel": normal(1, 4, 2, 3)}, "out": {"kernel": normal(2, 2, 3, 4)}}, "norm": jnp.ones(4)},
        {"attn": {"query": {"kernel": normal(3, 4, 2, 3)}, "out": {"kernel": normal(4, 2, 3, 4)}}, "norm": jnp.ones(4)},
    ],
    "head": {"kernel": normal(5, 4, 5), "bias": normal(6, 5)},
}


def fn(params: Any, x_BxD: Any) -> Any:
    for layer in params["layers"]:
        q = jnp.einsum("bd,dhk->bhk", x_BxD * layer["norm"], layer["attn"]["query"]["kernel"])
        x_BxD = x_BxD + jnp.einsum("bhk,hkd->bd", jnp.tanh(q), layer["attn"]["out"]["kernel"])
    return x_BxD @ params["head"]["kernel"] + params["head"]["bias"]


SITES = lorax.trace(fn, PARAMS, X_BxD)
QUERY, OUT = r"layers/\d+/attn/query/kernel", r"layers/\d+/attn/out/kernel"
SPEC = lorax.Spec({QUERY: lorax.LoRA(rank=2), "head/.*": lorax.Full()})
TARGETS = {"layers/0/attn/query/kernel", "layers/1/attn/query/kernel", "head/kernel", "head/bias"}


def make(spec: lorax.Spec = SPEC, random: bool = True) -> Any:
    adapter = lorax.init(jax.random.key(0), spec, SITES, PARAMS)
    return randomised(adapter) if random else adapter


# The pytree.


def test_an_adapter_is_a_pytree_of_its_arrays() -> None:
    adapter = make()
    assert set(adapter.params) == TARGETS
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(adapter)}
    assert ".params['head/kernel']['value']" in names
    assert len(names) == 2 * 2 + 2 + 2, "two factors, a scale for each LoRA, and two values"
    doubled = jax.tree.map(lambda x: 2 * x, adapter)
    assert doubled.plan == adapter.plan
    assert jax.tree.structure(doubled) == jax.tree.structure(make(random=False))


def test_views_of_an_adapter() -> None:
    adapter = make()
    assert {s.path for s in adapter.sites} == TARGETS
    assert adapter.methods["head/bias"] == lorax.Full()
    assert adapter.methods["layers/0/attn/query/kernel"] == lorax.LoRA(rank=2)
    assert adapter.spec == SPEC
    assert set(adapter.arrays("layers/0/attn/query/kernel")) == {"a", "b", "scale"}
    new = jax.tree.map(jnp.zeros_like, adapter.params)
    assert adapter.replace(params=new).params is new
    assert adapter.replace(params=new).state is adapter.state


def test_sites_print_as_a_table_and_are_found_by_path() -> None:
    lines = str(SITES).splitlines()
    assert lines[0].split() == ["path", "kind", "shape", "dtype", "fan-in", "fan-out", "stack", "uses"]
    assert len(lines) == 1 + len(SITES) == 1 + 8
    assert SITES["head/kernel"].fan_in == (0,)
    assert "head/kernel" in SITES
    with pytest.raises(KeyError, match="head/kernel"):
        SITES["head/kernal"]


# Partitions.


def test_split_and_join_are_inverse_and_share_no_leaf() -> None:
    adapter = make()
    frozen, trainable = lorax.split(PARAMS, adapter)
    assert trainable is adapter.params
    ids = [{id(x) for x in jax.tree.leaves(part)} for part in (frozen, trainable)]
    assert not ids[0] & ids[1]
    assert ids[0] | ids[1] == {id(x) for x in jax.tree.leaves((PARAMS, adapter))}
    params, back = lorax.join(frozen, trainable)
    assert_identical((params, back), (PARAMS, adapter))
    assert back.plan == adapter.plan
    loss = lambda t: jnp.sum(lorax.adapt(fn)(*lorax.join(frozen, t), X_BxD) ** 2)
    assert_close(
        run(jax.grad(loss), trainable),
        run(jax.grad(lambda t: jnp.sum(lorax.adapt(fn)(PARAMS, adapter.replace(params=t), X_BxD) ** 2)), trainable),
    )


def test_mask_marks_what_is_trained() -> None:
    adapter = make()
    mask = lorax.mask(PARAMS, adapter)
    assert jax.tree.structure(mask) == jax.tree.structure((PARAMS, adapter))
    assert not any(jax.tree.leaves(mask[0]))
    assert all(jax.tree.leaves(mask[1].params))
    assert not any(jax.tree.leaves(mask[1].state))
    assert {type(x) for x in jax.tree.leaves(mask)} == {bool}
    assert jax.tree.structure(lorax.mask(abstract(PARAMS), abstract(adapter))) == jax.tree.structure(mask)


def test_labels_name_every_trained_array() -> None:
    adapter = make()
    labels = lorax.labels(adapter)
    assert jax.tree.structure(labels) == jax.tree.structure(adapter.params)
    assert labels["layers/0/attn/query/kernel"] == {"a": "a", "b": "b"}
    assert labels["head/bias"] == {"value": "value"}


def gradients(adapter: Any) -> Any:
    loss = lambda t: jnp.sum(jnp.sin(lorax.adapt(fn)(PARAMS, adapter.replace(params=t), X_BxD)))
    return run(jax.grad(loss), adapter.params)


@pytest.mark.parametrize("combine", [optax.multi_transform, optax.partition])
def test_labels_give_each_factor_its_own_transformation(combine: Any) -> None:
    """LoRA+: another learning rate for B; the head at a third, A frozen."""
    adapter = make()
    rates = {"b": optax.sgd(0.4), "value": optax.sgd(0.1), "a": optax.set_to_zero()}
    tx = combine(rates, lorax.labels(adapter))
    grads = gradients(adapter)
    updates, _ = tx.update(grads, tx.init(adapter.params), adapter.params)
    for path, arrays in updates.items():
        for name, update in arrays.items():
            rate = {"a": 0.0, "b": 0.4, "value": 0.1}[name]
            np.testing.assert_allclose(update, -rate * grads[path][name], rtol=1e-6)


def steps(tx: optax.GradientTransformation, tree: Any, loss: Any, count: int = 3) -> Any:
    def three(tree: Any) -> Any:
        state = tx.init(tree)
        for _ in range(count):
            updates, state = tx.update(jax.grad(loss)(tree), state, tree)
            tree = optax.apply_updates(tree, updates)
        return tree, state

    return run(three, tree)


CHAIN = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=1e-2))


def test_one_tree_for_all_trains_as_the_trainable_partition_alone() -> None:
    """`masked` on the trained part and zero on the rest: clipping sees the trained gradients only."""
    adapter = make()
    alone, _ = steps(
        CHAIN, adapter.params, lambda t: jnp.sum(lorax.adapt(fn)(PARAMS, adapter.replace(params=t), X_BxD) ** 2)
    )
    pair = (PARAMS, adapter)
    mask = lorax.mask(*pair)
    frozen = jax.tree.map(lambda m: not m, mask)
    tx = optax.chain(optax.masked(CHAIN, mask), optax.masked(optax.set_to_zero(), frozen))
    (params, together), state = steps(tx, pair, lambda t: jnp.sum(lorax.adapt(fn)(*t, X_BxD) ** 2))
    assert_identical(params, PARAMS)
    assert_identical(together.state, adapter.state)
    assert_close(together.params, alone)
    sizes = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert sizes == 2 * sum(x.size for x in jax.tree.leaves(adapter.params)), "moments of frozen leaves"


@pytest.mark.skipif(not hasattr(optax, "freeze"), reason="optax.freeze is newer than this optax")
def test_freeze_with_the_mask_turned_round() -> None:
    pair = (PARAMS, make())
    frozen = jax.tree.map(lambda m: not m, lorax.mask(*pair))
    tx = optax.chain(optax.freeze(frozen), optax.sgd(1e-2))
    (params, adapter), _ = steps(tx, pair, lambda t: jnp.sum(lorax.adapt(fn)(*t, X_BxD) ** 2))
    assert_identical(params, PARAMS)
    assert_identical(adapter.state, pair[1].state)
    assert all(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (adapter.params, pair[1].params)), strict=True))


def test_accumulated_gradients_and_schedules() -> None:
    adapter = make()
    tx = optax.MultiSteps(optax.adamw(optax.warmup_cosine_decay_schedule(0, 1e-2, 2, 10)), every_k_schedule=2)
    trained, state = steps(
        tx, adapter.params, lambda t: jnp.sum(lorax.adapt(fn)(PARAMS, adapter.replace(params=t), X_BxD) ** 2), 4
    )
    assert int(state.gradient_step) == 2
    assert jax.tree.structure(trained) == jax.tree.structure(adapter.params)


# The spec.


def test_the_order_of_patterns_decides() -> None:
    wide, narrow = lorax.LoRA(rank=2), lorax.LoRA(rank=1)
    last = lorax.Spec({"layers/1/.*query.*": narrow, ".*query.*": wide}).resolve(SITES)
    assert last == {"layers/0/attn/query/kernel": wide, "layers/1/attn/query/kernel": narrow}
    assert list(last) == [p for p in SITES.paths if p in last], "in the order of the sites"


def test_pairs_are_as_good_as_a_dict() -> None:
    rules = {QUERY: lorax.LoRA(rank=2), OUT: None}
    assert lorax.Spec(list(rules.items())) == lorax.Spec(rules)


def test_none_freezes() -> None:
    spec = lorax.Spec({"layers/0/.*": None, ".*kernel": lorax.LoRA(rank=2)})
    assert set(spec.resolve(SITES)) == {
        "layers/1/attn/query/kernel",
        "layers/1/attn/out/kernel",
        "head/kernel",
    }
    later = lorax.Spec({QUERY: lorax.LoRA(rank=2), ".*kernel": None})
    assert set(later.resolve(SITES)) == {"layers/0/attn/query/kernel", "layers/1/attn/query/kernel"}


def message(rules: Any, sites: Any = SITES) -> str:
    with pytest.raises(ValueError) as error:
        lorax.init(jax.random.key(0), lorax.Spec(rules), sites, PARAMS)
    return str(error.value)


@pytest.mark.parametrize(
    ("rules", "needles"),
    [
        # A typing error: the pattern and the nearest paths.
        ({"head/kernal": lorax.LoRA()}, ["'head/kernal'", "LoRA", "none of 8 paths", "re.fullmatch", "head/kernel"]),
        # What it matches cannot be adapted: the path, its shape, the reason, and what to do.
        ({"head/bias": lorax.LoRA()}, ["'head/bias'", "LoRA cannot adapt", "(5,)", "no use contracts", "lorax.Full()"]),
        # An earlier pattern has them all: which one, and what to do.
        (
            {"head/.*": lorax.Full(), "head/kernel": lorax.LoRA(rank=2)},
            ["'head/kernel' with LoRA", "head/kernel has 'head/.*'", "Put it further up"],
        ),
        ({QUERY: lorax.LoRA(rank=2), "tail/.*": None}, ["'tail/.*'", "no method", "Nearest paths"]),
        ({QUERY: None}, ["no method: nothing would be trained"]),
        ({}, ["no method: nothing would be trained"]),
    ],
)
def test_a_spec_that_selects_nothing_says_what_and_what_to_do(rules: Any, needles: list[str]) -> None:
    text = message(rules)
    assert all(needle in text for needle in needles), text


@pytest.mark.parametrize(
    ("rules", "needles"),
    [
        ({"(": lorax.LoRA()}, ["'('", "not a regular expression"]),
        ({"head/.*": "lora"}, ["'head/.*'", "'lora'", "lorax.LoRA(rank=8)"]),
        ({"head/.*": lorax.LoRA}, ["'head/.*'", "expected a method such as"]),
    ],
)
def test_a_spec_that_is_none_says_so_at_once(rules: Any, needles: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        lorax.Spec(rules)
    assert all(needle in str(error.value) for needle in needles), str(error.value)


def other_params(path: str, leaf: Any) -> Any:
    keyed, tree = jax.tree_util.tree_flatten_with_path(PARAMS)
    name = lambda keys: "/".join(str(getattr(k, "key", getattr(k, "idx", None))) for k in keys)
    return tree.unflatten([leaf if name(keys) == path else x for keys, x in keyed])


CALLS = {
    "adapt": lambda params, adapter: lorax.adapt(fn)(params, adapter, X_BxD),
    "explain": lambda params, adapter: lorax.explain(fn, params, adapter, X_BxD),
    "merge": lorax.merge,
    "unmerge": lorax.unmerge,
}


@pytest.mark.parametrize("call", CALLS)
def test_params_of_other_shapes_say_path_got_wanted_and_remedy(call: str) -> None:
    adapter = make(lorax.Spec({QUERY: lorax.LoRA(rank=2)}))
    other = other_params("layers/1/attn/query/kernel", jnp.ones((4, 2, 5)))
    with pytest.raises(ValueError) as error:
        CALLS[call](other, adapter)
    for needle in ("layers/1/attn/query/kernel", "(4, 2, 5)", "(4, 2, 3)", "make a new adapter"):
        assert needle in str(error.value), str(error.value)


@pytest.mark.parametrize("call", CALLS)
def test_params_of_other_paths_say_path_and_nearest(call: str) -> None:
    adapter = make(lorax.Spec({QUERY: lorax.LoRA(rank=2)}))
    other = {**PARAMS, "layers": PARAMS["layers"][:1]}
    with pytest.raises(ValueError) as error:
        CALLS[call](other, adapter)
    for needle in ("layers/1/attn/query/kernel", "no such leaf", "layers/0/attn/query/kernel", "another model"):
        assert needle in str(error.value), str(error.value)


# init under transformations.


def test_init_under_jit_with_output_shardings() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    where = NamedSharding(mesh, P())
    build = lambda key, params: lorax.init(key, SPEC, SITES, params)
    shape = jax.eval_shape(build, jax.random.key(0), PARAMS)
    wanted = jax.tree.map(lambda _: where, shape)
    made = jax.jit(build, out_shardings=wanted)(jax.random.key(0), PARAMS)
    assert {x.sharding for x in jax.tree.leaves(made)} == {where}
    assert made.plan == shape.plan == make().plan
    assert_close(made, make(random=False), 1e-6)


def test_init_of_abstract_params_with_shapes_of_its_own() -> None:
    sites = lorax.trace(fn, abstract(PARAMS), abstract(X_BxD))
    assert list(sites) == list(SITES)
    adapter = jax.eval_shape(lambda p: lorax.init(jax.random.key(0), SPEC, sites, p), abstract(PARAMS))
    assert abstract(make()).params == adapter.params
    rows = lorax.explain(fn, abstract(PARAMS), adapter, abstract(X_BxD))
    assert {r.path: r.how for r in rows} == dict.fromkeys(TARGETS, "factored")
    frozen_only = lorax.Spec({QUERY: lorax.LoRA(rank=2)})  # LoRA looks at no value of the base
    real = lorax.init(jax.random.key(0), frozen_only, sites, abstract(PARAMS))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(real))


def test_init_under_vmap_makes_many_adapters() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    many = jax.vmap(lambda key: lorax.init(key, SPEC, SITES, PARAMS))(keys)
    one = lorax.init(keys[1], SPEC, SITES, PARAMS)
    assert_close(jax.tree.map(lambda x: x[1], many), one, 1e-6)


def test_init_of_raw_and_typed_keys_agrees() -> None:
    typed = lorax.init(jax.random.key(7), SPEC, SITES, PARAMS)
    raw = lorax.init(jax.random.PRNGKey(7), SPEC, SITES, PARAMS)
    assert_identical(typed, raw)


def test_full_copies_and_does_not_alias() -> None:
    """A donated adapter must not take the base with it."""
    adapter = make(lorax.Spec({"head/.*": lorax.Full()}), random=False)
    jax.jit(lambda a: jax.tree.map(lambda x: x + 1, a), donate_argnums=0)(adapter)
    assert not any(x.is_deleted() for x in jax.tree.leaves(PARAMS))
    np.testing.assert_array_equal(PARAMS["head"]["bias"], normal(6, 5))


def test_full_in_another_dtype() -> None:
    adapter = make(lorax.Spec({"head/.*": lorax.Full(dtype="bfloat16")}), random=False)
    assert {x.dtype for x in jax.tree.leaves(adapter.params)} == {jnp.dtype("bfloat16")}
    assert lorax.adapt(fn)(PARAMS, adapter, X_BxD).dtype == jnp.float32
    assert lorax.merge(PARAMS, adapter)["head"]["kernel"].dtype == jnp.float32


def test_warnings_name_the_sites_of_too_high_a_rank() -> None:
    with pytest.warns(UserWarning, match=re.escape("head/kernel (4, 5)")):
        make(lorax.Spec({"head/kernel": lorax.LoRA(rank=5)}))
