"""LoRA's arrays, initial values, scaling and dropout; a method registered from outside the package."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorax
from lorax.methods.base import METHODS
from tests.agreement import (
    BF16_TOL,
    F32_TOL,
    adapter_for,
    assert_agrees,
    assert_changes_nothing,
    assert_close,
    assert_identical,
    how,
    normal,
    run,
    value_and_grads,
)

EXACT = 1e-6
SIGMAS = 6.0  # of a mean's own spread: a test that fails once in a billion keys, and the keys are fixed


def made(shape: tuple[int, ...] = (64, 48), method: Any = None, stacked: bool = False) -> tuple[Any, Any, Any]:
    """An adapter as `init` makes it, its function and params."""
    if stacked:
        fn = lambda p, x: lax.scan(lambda c, w: (c, c @ w), x, p["w"])
    else:
        fn = lambda p, x: x @ p["w"]
    params = {"w": normal(1, *shape)}
    x = jnp.ones((2, shape[-2]))
    sites = lorax.trace(fn, params, x)
    return fn, params, lorax.init(jax.random.key(0), lorax.Spec({"w": method or lorax.LoRA(rank=4)}), sites, params)


# Shapes and initial values.


@pytest.mark.parametrize(
    ("sums", "x", "w", "a", "b"),
    [
        ("bi,io->bo", (2, 6), (6, 5), (6, 3), (3, 5)),
        ("bi,oi->bo", (2, 6), (5, 6), (6, 3), (3, 5)),
        ("bd,dhk->bhk", (2, 6), (6, 4, 5), (6, 3), (3, 4, 5)),
        ("bhk,hkd->bd", (2, 4, 5), (4, 5, 6), (4, 5, 3), (3, 6)),
        ("bd,nhdk->nbhk", (2, 6), (3, 4, 6, 5), (6, 3), (3, 3, 4, 5)),
        ("ebi,eio->ebo", (4, 2, 6), (4, 6, 5), (4, 6, 3), (4, 3, 5)),
    ],
)
def test_factors_have_stacked_fan_in_and_fan_out_axes(sums: str, x: Any, w: Any, a: Any, b: Any) -> None:
    fn = lambda p, x: jnp.einsum(sums, x, p["w"])
    adapter = adapter_for(fn, {"w": jnp.ones(w)}, jnp.ones(x), method=lorax.LoRA(rank=3))
    assert {n: v.shape for n, v in adapter.params["w"].items()} == {"a": a, "b": b}


def test_uniform_is_peft_kaiming_with_a_bound_of_one_over_root_fan_in() -> None:
    _, _, adapter = made((256, 8), lorax.LoRA(rank=8))
    a_IxR = np.asarray(adapter.params["w"]["a"])
    bound = 1 / math.sqrt(256)
    assert np.abs(a_IxR).max() <= bound
    assert np.abs(a_IxR).max() > 0.99 * bound
    assert abs(a_IxR.mean()) < SIGMAS * bound / math.sqrt(3 * a_IxR.size)
    np.testing.assert_allclose(a_IxR.std(), bound / math.sqrt(3), rtol=0.05)


def test_the_fan_in_of_a_stack_is_that_of_one_layer() -> None:
    _, _, adapter = made((5, 64, 8), lorax.LoRA(rank=8), stacked=True)
    assert 0.99 / 8 < np.abs(adapter.params["w"]["a"]).max() <= 1 / 8


def test_normal_has_a_standard_deviation_of_one_over_rank() -> None:
    _, _, adapter = made((512, 16), lorax.LoRA(rank=8, initializer="normal"))
    a_IxR = np.asarray(adapter.params["w"]["a"])
    np.testing.assert_allclose(a_IxR.std(), 1 / 8, rtol=0.05)
    assert np.abs(a_IxR).max() > 2.5 / 8, "normal numbers have no such bound"


def test_orthogonal_has_orthonormal_columns_in_each_layer() -> None:
    _, _, adapter = made((3, 32, 8), lorax.LoRA(rank=4, initializer="orthogonal"), stacked=True)
    a_LxIxR = np.asarray(adapter.params["w"]["a"])
    np.testing.assert_allclose(np.einsum("lir,lis->lrs", a_LxIxR, a_LxIxR), np.stack([np.eye(4)] * 3), atol=1e-5)
    assert not np.allclose(a_LxIxR[0], a_LxIxR[1])


def test_an_embedding_starts_with_zero_rows_and_a_normal_b() -> None:
    fn = lambda p, ids: p["table"][ids]
    params, ids = {"table": normal(1, 50, 400)}, jnp.arange(3)
    sites = lorax.trace(fn, params, ids)
    adapter = lorax.init(jax.random.key(0), lorax.Spec({"table": lorax.LoRA(rank=4)}), sites, params)
    assert not np.any(adapter.params["table"]["a"])
    np.testing.assert_allclose(np.std(adapter.params["table"]["b"]), 1, rtol=0.1)
    assert_changes_nothing(fn, params, adapter, ids)


@pytest.mark.parametrize("initializer", ["uniform", "normal", "orthogonal"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_any_start_changes_nothing(initializer: str, dtype: str) -> None:
    fn, params, adapter = made((16, 8), lorax.LoRA(rank=2, initializer=initializer, dtype=dtype))
    assert {x.dtype for x in adapter.params["w"].values()} == {jnp.dtype(dtype)}
    assert np.any(np.asarray(adapter.params["w"]["a"], np.float32))
    x = normal(2, 3, 16)
    assert_changes_nothing(fn, params, adapter, x)
    assert_identical(lorax.merge(params, adapter), params)


# Scaling.


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("alpha", [None, 0.5, 16, 0])
@pytest.mark.parametrize("stabilised", [False, True])
def test_scaling_in_closed_form(rank: int, alpha: float | None, stabilised: bool) -> None:
    method = lorax.LoRA(rank=rank, alpha=alpha, rank_stabilized=stabilised)
    numerator = rank if alpha is None else alpha
    want = numerator / math.sqrt(rank) if stabilised else numerator / rank
    assert method.scaling == pytest.approx(want)
    _, _, adapter = made((16, 16), method)
    assert adapter.state["w"]["scale"].dtype == jnp.float32
    assert adapter.state["w"]["scale"].shape == ()
    np.testing.assert_allclose(adapter.state["w"]["scale"], want, rtol=EXACT)


def test_rank_and_alpha_differ_by_pattern() -> None:
    fn = lambda p, x: x @ p["first"] @ p["second"]
    params, x = {"first": normal(1, 8, 6), "second": normal(2, 6, 5)}, normal(3, 2, 8)
    spec = lorax.Spec({"first": lorax.LoRA(rank=4, alpha=8), "second": lorax.LoRA(rank=1, alpha=3)})
    adapter = lorax.init(jax.random.key(0), spec, lorax.trace(fn, params, x), params)
    assert {p: a["a"].shape for p, a in adapter.params.items()} == {"first": (8, 4), "second": (6, 1)}
    assert {p: float(a["scale"]) for p, a in adapter.state.items()} == {"first": 2.0, "second": 3.0}


@pytest.mark.parametrize(
    ("settings", "needle"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": -1}, "rank is -1"),
        ({"rank": 2.0}, "rank is 2.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"initializer": "guassian"}, "initializer is 'guassian'"),
        ({"dtype": "int32"}, "dtype is 'int32'"),
        ({"dtype": None}, "dtype is None"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": "x"}, "alpha is 'x'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], needle: str) -> None:
    with pytest.raises(ValueError, match=re.escape(needle)):
        lorax.LoRA(**settings)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (lorax.AdaLoRA, {"target_rank": 2.0}),
        (lorax.Bottleneck, {"rank": 0}),
        (lorax.Prefix, {"length": 0}),
        (lorax.Prompt, {"length": True}),
        (lorax.VeRA, {"dropout": 1}),
        (lorax.IA3, {"dtype": "int8"}),
        (lorax.Full, {"dtype": "float23"}),
    ],
)
def test_every_method_refuses_wrong_settings(method: type[lorax.Method], settings: dict[str, Any]) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=re.escape(f"{method.__name__}: {name} is {value!r}; it has to be")):
        method(**settings)


# Dropout.

RATE = 0.5


def dropping(fn: Any, params: Any, *args: Any) -> tuple[Any, Any]:
    """The adapted function with a key, and an adapter with dropout."""
    adapter = adapter_for(fn, params, *args, method=lorax.LoRA(rank=2, alpha=3, dropout=RATE))
    return lambda adapter, key, *xs: lorax.adapt(fn)(params, adapter, *xs, rng=key), adapter


def test_dropout_is_off_without_a_key() -> None:
    fn = lambda p, x: x @ p["w"]
    params, x = {"w": normal(1, 6, 5)}, normal(2, 3, 6)
    drop, adapter = dropping(fn, params, x)
    assert_agrees(fn, params, adapter, x)
    assert not np.allclose(drop(adapter, jax.random.key(0), x), lorax.adapt(fn)(params, adapter, x), atol=F32_TOL)


def test_a_rate_of_zero_needs_no_key() -> None:
    fn = lambda p, x: x @ p["w"]
    params, x = {"w": normal(1, 6, 5)}, normal(2, 3, 6)
    adapter = adapter_for(fn, params, x)
    with_key = lorax.adapt(fn)(params, adapter, x, rng=jax.random.key(0))
    assert_identical(with_key, lorax.adapt(fn)(params, adapter, x))


def test_dropout_acts_on_what_enters_a_and_on_nothing_else() -> None:
    """With A = B = 1 (I×I), the update of each row is `x/(1-rate)` where kept: read the mask off the result."""
    fn = lambda p, x: x @ p["w"]
    n, rows = 16, 200
    params, x = {"w": jnp.zeros((n, n))}, jnp.ones((rows, n))
    sites = lorax.trace(fn, params, x)
    spec = lorax.Spec({"w": lorax.LoRA(rank=n, dropout=0.25)})
    adapter = lorax.init(jax.random.key(0), spec, sites, params)
    adapter = adapter.replace(params={"w": {"a": jnp.eye(n), "b": jnp.eye(n)}})
    y = np.asarray(lorax.adapt(fn)(params, adapter, x, rng=jax.random.key(1)))
    np.testing.assert_allclose(np.unique(y.round(5)), [0, round(1 / 0.75, 5)], atol=1e-4)
    kept = np.mean(y > 0)
    assert abs(kept - 0.75) < SIGMAS * math.sqrt(0.25 * 0.75 / y.size)


def test_the_mean_over_keys_is_the_result_without_dropout() -> None:
    fn = lambda p, x: lax.scan(lambda c, w: (c, c @ w), x, p["w"])[1]
    params, x = {"w": normal(1, 2, 6, 5)}, normal(2, 3, 6)
    drop, adapter = dropping(fn, params, x)
    many = jax.jit(jax.vmap(drop, in_axes=(None, 0, None)))(adapter, jax.random.split(jax.random.key(0), 1024), x)
    want = lorax.adapt(fn)(params, adapter, x)
    spread = np.std(many, axis=0) / math.sqrt(1024)
    assert np.all(spread > 0)
    assert np.max(np.abs(np.mean(many, axis=0) - want) / spread) < SIGMAS


def test_the_key_decides() -> None:
    fn = lambda p, x: x @ p["w"]
    params, x = {"w": normal(1, 6, 5)}, normal(2, 3, 6)
    drop, adapter = dropping(fn, params, x)
    one, again, other = (drop(adapter, jax.random.key(i), x) for i in (0, 0, 1))
    assert_identical(one, again)
    assert not np.allclose(one, other, atol=F32_TOL)
    assert_identical(drop(adapter, jax.random.key_data(jax.random.key(0)), x), one)


def distinct(outs: Any) -> bool:
    """Whether no two of the leading entries are equal."""
    outs = np.asarray(outs)
    return all(not np.allclose(outs[i], outs[j], atol=F32_TOL) for i in range(len(outs)) for j in range(i))


def alike(adapter: Any) -> Any:
    """The same numbers at every site, and in every layer of a stack."""
    rng = np.random.default_rng(0)
    some = {"a": rng.normal(size=(6, 2)), "b": rng.normal(size=(2, 6))}
    fill = lambda name, x: jnp.broadcast_to(jnp.asarray(some[name], x.dtype), x.shape)
    return adapter.replace(params={p: {n: fill(n, x) for n, x in v.items()} for p, v in adapter.params.items()})


BODIES = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "cond": lambda f: lambda x, w: lax.cond(x[0, 0] > -1e3, f, lambda x, w: x, x, w),
}


@pytest.mark.parametrize("wrap", BODIES)
def test_dropout_differs_between_sites_and_uses(wrap: str) -> None:
    dense = BODIES[wrap](lambda x, w: x @ w)
    fn = lambda p, x: jnp.stack([dense(x, p["u"]), dense(x, p["v"]), dense(x, p["v"])])
    params, x = {n: normal(1, 6, 6) for n in "uv"}, normal(2, 3, 6)
    drop, adapter = dropping(fn, params, x)
    adapter = alike(adapter)
    plain, dropped = run(lambda a, key: (lorax.adapt(fn)(params, a, x), drop(a, key, x)), adapter, jax.random.key(0))
    assert not distinct(plain)
    assert distinct(dropped)


@pytest.mark.parametrize("wrap", BODIES)
def test_dropout_differs_between_steps_of_a_scan(wrap: str) -> None:
    dense = BODIES[wrap](lambda x, w: x @ w)
    fn = lambda p, x: lax.scan(lambda c, w: (c, dense(c, w)), x, p["w"])[1]
    params, x = {"w": jnp.broadcast_to(normal(1, 6, 6), (3, 6, 6))}, normal(2, 3, 6)
    drop, adapter = dropping(fn, params, x)
    adapter = alike(adapter)
    plain, dropped = run(lambda a, key: (lorax.adapt(fn)(params, a, x), drop(a, key, x)), adapter, jax.random.key(0))
    assert not distinct(plain)
    assert distinct(dropped)


def test_dropout_differs_between_turns_of_a_while_loop() -> None:
    def fn(p: Any, x: Any) -> Any:
        body = lambda s: (s[0] + 1, s[1].at[s[0]].set(x @ p["w"]))
        return lax.while_loop(lambda s: s[0] < 3, body, (0, jnp.zeros((3, *x.shape))))[1]

    params, x = {"w": normal(1, 6, 6)}, normal(2, 3, 6)
    drop, adapter = dropping(fn, params, x)
    assert distinct(drop(adapter, jax.random.key(0), x))


def linear_in_b(wrap: str, kind: str) -> tuple[Any, Any, Any]:
    dense = BODIES[wrap](lambda x, w: x @ w)
    params, x = {"w": jnp.broadcast_to(normal(1, 6, 6), (2, 6, 6))}, normal(2, 3, 6)
    if kind == "scan":
        return lambda p, x: lax.scan(lambda c, w: (c, dense(c, w)), x, p["w"])[1], params, x
    return lambda p, x: dense(x, p["w"][0]) + dense(x, p["w"][1]), params, x


@pytest.mark.parametrize("kind", ["scan", "unrolled"])
@pytest.mark.parametrize("wrap", BODIES)
def test_the_backward_pass_drops_what_the_forward_pass_dropped(wrap: str, kind: str) -> None:
    """The output is linear in B at a given mask: `f(B) - f(0) = ⟨∂f/∂B, B⟩`, if both passes draw the same mask."""
    fn, params, x = linear_in_b(wrap, kind)
    drop, adapter = dropping(fn, params, x)
    a, b = adapter.params["w"]["a"], adapter.params["w"]["b"]
    total = lambda b: jnp.sum(drop(adapter.replace(params={"w": {"a": a, "b": b}}), jax.random.key(3), x) * jnp.cos(x))
    (value, grad), at_zero = run(lambda b: (jax.value_and_grad(total)(b), total(0 * b)), b)
    np.testing.assert_allclose(value - at_zero, jnp.vdot(grad, b), rtol=1e-4)


def test_an_embedding_has_no_dropout() -> None:
    fn = lambda p, ids: p["table"][ids]
    params, ids = {"table": normal(1, 7, 4)}, jnp.array([0, 6, 3])
    drop, adapter = dropping(fn, params, ids)
    assert_identical(drop(adapter, jax.random.key(0), ids), lorax.adapt(fn)(params, adapter, ids))


def test_a_weight_that_is_built_has_no_dropout() -> None:
    fn = lambda p, x: x @ jnp.tanh(p["w"])
    params, x = {"w": normal(1, 6, 5)}, normal(2, 3, 6)
    drop, adapter = dropping(fn, params, x)
    assert how(fn, params, adapter, x) == {"w": "materialised"}
    assert_close(drop(adapter, jax.random.key(0), x), lorax.adapt(fn)(params, adapter, x), EXACT)


@pytest.mark.parametrize("kind", ["conv", "ragged"])
def test_convolutions_and_ragged_products_have_dropout(kind: str) -> None:
    if kind == "conv":
        fn = lambda p, x: lax.conv(x, p["w"], (1,), "SAME")
        params, x = {"w": normal(1, 5, 4, 3)}, normal(2, 2, 4, 6)
    else:
        fn = lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([2, 1], jnp.int32))
        params, x = {"w": normal(1, 2, 4, 5)}, normal(2, 3, 4)
    drop, adapter = dropping(fn, params, x)
    keys = jax.random.split(jax.random.key(0), 1024)
    many = jax.jit(lambda keys: lax.map(lambda key: drop(adapter, key, x), keys))(keys)  # ragged_dot has no vmap here
    spread = np.std(many, axis=0) / math.sqrt(len(keys))
    assert np.max(spread) > 1e-3
    error = np.abs(np.mean(many, axis=0) - lorax.adapt(fn)(params, adapter, x))
    assert np.all(error < SIGMAS * spread + 1e-4)


def test_dropout_of_a_bfloat16_model_keeps_its_dtype() -> None:
    fn = lambda p, x: x @ p["w"]
    params, x = {"w": normal(1, 6, 5, dtype=jnp.bfloat16)}, normal(2, 3, 6, dtype=jnp.bfloat16)
    drop, adapter = dropping(fn, params, x)
    assert drop(adapter, jax.random.key(0), x).dtype == jnp.bfloat16


# A method from outside the package.


@lorax.register
class GainedLoRA(lorax.Method):
    """`g∘W + A·B` with a gain for each output and B frozen."""

    rank: int = 2
    start: float = 1.0

    arrays = {"gain": "SO", "a": "SIR", "b": "SRO"}

    def init(self, key: jax.Array, site: lorax.Site, base: Any) -> Any:
        trained = {
            "gain": jnp.full(site.dims("SO"), self.start),
            "a": jnp.zeros(site.dims("SIR", R=self.rank)),
        }
        return trained, {"b": jax.random.normal(key, site.dims("SRO", R=self.rank))}

    def weight(self, w: Any, *, gain: Any, a: Any, b: Any) -> Any:
        return w * gain + a @ b


@lorax.register
class InputScale(lorax.Method):
    """`(1 + l)∘W` along the inputs, with an offset of each output."""

    arrays = {"scale": "SI", "offset": "SO"}

    def init(self, key: jax.Array, site: lorax.Site, base: Any) -> Any:
        return {"scale": jnp.ones(site.dims("SI")), "offset": jnp.zeros(site.dims("SO"))}, {}

    def weight(self, w: Any, *, scale: Any, offset: Any) -> Any:
        return w * scale + offset


@lorax.register
class ThreeFactors(lorax.Method):
    """`W + A·C·B` with a square core, factors of the stack shared by all layers."""

    arrays = {"a": "IR", "core": "SRT", "b": "TO"}

    def init(self, key: jax.Array, site: lorax.Site, base: Any) -> Any:
        a, b = (jax.random.normal(k, s) for k, s in zip(jax.random.split(key), self.sizes(site), strict=True))
        return {"core": jnp.zeros(site.dims("SRT", R=3, T=2))}, {"a": a, "b": b}

    def sizes(self, site: lorax.Site) -> Any:
        return site.dims("IR", R=3), site.dims("TO", T=2)

    def weight(self, w: Any, *, a: Any, core: Any, b: Any) -> Any:
        return w + 0.5 * (a @ core @ b)


@lorax.register
class GainsOnBothSides(lorax.Method):
    """`i∘W∘o` with a gain for each input and each output."""

    arrays = {"into": "SI", "out": "SO"}

    def init(self, key: jax.Array, site: lorax.Site, base: Any) -> Any:
        return {"into": jnp.ones(site.dims("SI")), "out": jnp.ones(site.dims("SO"))}, {}

    def weight(self, w: Any, *, into: Any, out: Any) -> Any:
        return into * w * out


@lorax.register
class Hadamard(lorax.Method):
    """`W + W∘(A·B)`, as in HiRA: a term that holds the base too."""

    arrays = {"a": "SIR", "b": "SRO"}

    def init(self, key: jax.Array, site: lorax.Site, base: Any) -> Any:
        trained = {"a": jnp.zeros(site.dims("SIR", R=2))}
        return trained, {"b": jax.random.normal(key, site.dims("SRO", R=2))}

    def weight(self, w: Any, *, a: Any, b: Any) -> Any:
        return w + w * (a @ b)


@lorax.register
class GainOfWeights(lorax.Method):
    """`W∘(A·B)`: a gain as large as the weight."""

    arrays = {"a": "SIR", "b": "SRO"}

    def init(self, key: jax.Array, site: lorax.Site, base: Any) -> Any:
        dims = [site.dims(side, R=2) for side in ("SIR", "SRO")]
        return {"a": jnp.full(dims[0], 0.5), "b": jnp.ones(dims[1])}, {}

    def weight(self, w: Any, *, a: Any, b: Any) -> Any:
        return w * (a @ b)


@lorax.register
class GainOfFactors(lorax.Method):
    """`o∘(W∘i)` with the gain of the outputs `o = Σ cᵣ·dᵣ` itself a product, and applied to the sum."""

    arrays = {"c": "SRO", "d": "R", "into": "SI"}

    def init(self, key: jax.Array, site: lorax.Site, base: Any) -> Any:
        ones = jnp.ones(site.dims("SRO", R=2))
        return {"c": ones, "d": jnp.full(2, 0.5), "into": jnp.ones(site.dims("SI"))}, {}

    def weight(self, w: Any, *, c: Any, d: Any, into: Any) -> Any:
        return (w * into).rescaled(c @ d)


OWN = [
    *(GainedLoRA(rank=3), InputScale(), ThreeFactors(), GainsOnBothSides()),
    *(Hadamard(), GainOfWeights(), GainOfFactors()),
]


def several(p: Any, ids: Any) -> Any:
    """A table that is tied, a stack, heads, a convolution and a vector of outputs."""
    x = p["table"][ids]
    x = lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None)), x, p["stack"])[0]
    q = jnp.einsum("btd,dhk->bthk", x, p["query"])
    x = x + jnp.einsum("bthk,hkd->btd", jnp.tanh(q), p["out"])
    x = x + lax.conv_general_dilated(x, p["conv"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
    left, right = jnp.split(p["fused"].T, 2, axis=1)
    return x @ p["table"].T, x @ left, x @ right


PARAMS = {
    "table": normal(1, 7, 4),
    "stack": normal(2, 3, 4, 4),
    "query": normal(3, 4, 2, 3),
    "out": normal(4, 2, 3, 4),
    "conv": normal(5, 3, 4, 4),
    "fused": normal(6, 6, 4),
}
IDS = jnp.array([[0, 6, 3], [1, 1, 5]])


@pytest.mark.parametrize("method", OWN, ids=lambda m: type(m).__name__)
def test_a_method_from_outside_agrees_with_its_merged_weight(method: Any) -> None:
    adapter = adapter_for(several, PARAMS, IDS, method=method)
    assert set(adapter.params) == set(PARAMS)
    assert_agrees(several, PARAMS, adapter, IDS)


@pytest.mark.parametrize("method", OWN, ids=lambda m: type(m).__name__)
def test_a_method_from_outside_is_saved_merged_and_unmerged(method: Any, tmp_path: Any) -> None:
    sites = lorax.trace(several, PARAMS, IDS)
    spec = lorax.Spec({".*": method})
    adapter = run(lambda: lorax.init(jax.random.key(0), spec, sites, PARAMS))
    assert_close(*run(lambda a: (lorax.adapt(several)(PARAMS, a, IDS), several(PARAMS, IDS)), adapter), EXACT)
    rng = np.random.default_rng(0)
    adapter = adapter.replace(
        params=jax.tree.map(lambda x: x + jnp.asarray(0.2 * rng.uniform(-1, 1, x.shape), x.dtype), adapter.params)
    )
    merged = run(lorax.merge, PARAMS, adapter)
    assert not np.allclose(merged["out"], PARAMS["out"], atol=1e-3)
    assert_close(run(lorax.unmerge, merged, adapter), PARAMS)
    lorax.save(tmp_path / "adapter", adapter, base=PARAMS)
    back = lorax.restore(tmp_path / "adapter", base=PARAMS)
    assert back.plan == adapter.plan
    assert_identical(back, adapter)


def test_a_method_without_a_merged_weight_says_so() -> None:
    @lorax.register
    class Unmerged(lorax.Method):
        arrays = {"gain": "O"}

        def init(self, key: Any, site: Any, base: Any) -> Any:
            return {"gain": jnp.ones(site.dims("O"))}, {}

    try:
        _, params, adapter = made(method=Unmerged())
        for move in (lorax.merge, lorax.unmerge):
            with pytest.raises(ValueError, match="Unmerged has no merged weight, at w:"):
                move(params, adapter)
    finally:
        del METHODS["Unmerged"]


def test_a_gain_by_hand() -> None:
    fn = lambda p, x: x @ p["w"]
    params, x = {"w": normal(1, 6, 5)}, normal(2, 3, 6)
    adapter = adapter_for(fn, params, x, method=GainedLoRA(rank=3))
    gain, a, b = adapter.params["w"]["gain"], adapter.params["w"]["a"], adapter.state["w"]["b"]
    assert_close(lorax.adapt(fn)(params, adapter, x), (x @ params["w"]) * gain + x @ a @ b)
    assert how(fn, params, adapter, x) == {"w": "factored"}


def test_gains_on_both_sides_by_hand() -> None:
    fn = lambda p, x: x @ p["w"]
    params, x = {"w": normal(1, 6, 5)}, normal(2, 3, 6)
    adapter = adapter_for(fn, params, x, method=GainsOnBothSides())
    into, out = adapter.params["w"]["into"], adapter.params["w"]["out"]
    assert_close(lorax.adapt(fn)(params, adapter, x), ((x * into) @ params["w"]) * out)
    assert how(fn, params, adapter, x) == {"w": "factored"}


def joined(p: Any, x: Any) -> Any:
    """Side by side, below each other, stacked and scanned."""
    y = x @ jnp.concatenate([p["q"], p["k"], p["frozen"]], 1) @ jnp.concatenate([p["v"], p["q"].T, p["frozen"].T])
    return lax.scan(lambda y, w: (jnp.tanh(y @ w), None), y, jnp.stack([p["k"], p["frozen"], p["v"]]))[0]


@pytest.mark.parametrize("stored", ["float32", "NF4"])
@pytest.mark.parametrize("method", OWN, ids=lambda m: type(m).__name__)
def test_a_method_from_outside_on_joined_and_quantised_weights(method: Any, stored: str) -> None:
    params = {name: normal(i, 4, 4) for i, name in enumerate(("q", "k", "v", "frozen"))}
    x = normal(5, 3, 4)
    sites = lorax.trace(joined, params, x)
    base = lorax.quantize(params, {"[qv]": lorax.NF4()}, sites=sites) if stored == "NF4" else params
    adapter = adapter_for(joined, params, x, method=method, only="[qkv]")
    plain = lorax.dequantize(base)
    got = run(lambda a, x: value_and_grads(lambda a, x: lorax.adapt(joined)(base, a, x), a, x), adapter, x)
    want = run(lambda a, x: value_and_grads(lambda a, x: joined(lorax.merge(plain, a), x), a, x), adapter, x)
    assert_close(got, want, 5 * F32_TOL)


@pytest.mark.parametrize("method", [Hadamard(), GainOfWeights(), GainOfFactors()], ids=lambda m: type(m).__name__)
def test_factors_that_multiply_the_base_by_hand(method: Any) -> None:
    fn = lambda p, x: x @ p["w"]
    params, x = {"w": normal(1, 6, 5)}, normal(2, 3, 6)
    adapter = adapter_for(fn, params, x, method=method)
    own = {name: np.asarray(value) for name, value in adapter.arrays("w").items()}
    w = np.asarray(params["w"])
    if isinstance(method, GainOfFactors):
        whole = w * own["into"][:, None] * (own["c"] * own["d"][:, None]).sum(0)
    else:
        whole = w * (own["a"] @ own["b"] + isinstance(method, Hadamard))
    assert not np.allclose(whole, w, atol=1e-2)
    assert_close(lorax.adapt(fn)(params, adapter, x), np.asarray(x) @ whole)
    assert_close(lorax.merge(params, adapter)["w"], whole)


@pytest.mark.parametrize("method", OWN, ids=lambda m: type(m).__name__)
def test_a_method_from_outside_in_bfloat16(method: Any) -> None:
    fn = lambda p, x: x @ p["w"]
    params, x = {"w": normal(1, 8, 5, dtype=jnp.bfloat16)}, normal(2, 3, 8, dtype=jnp.bfloat16)
    adapter = adapter_for(fn, params, x, method=method)
    assert_agrees(fn, params, adapter, x, tol=2 * BF16_TOL)


def test_a_name_is_taken_once() -> None:
    class LoRA(lorax.Method):
        arrays = {"a": "SIR"}

    with pytest.raises(ValueError, match="LoRA is registered already by lorax"):
        lorax.register(LoRA)
    assert METHODS["LoRA"] is lorax.LoRA


def test_defining_a_method_again_replaces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook cell that is run twice."""
    monkeypatch.setitem(METHODS, "GainedLoRA", GainedLoRA)

    def cell() -> Any:
        made = type("GainedLoRA", (lorax.Method,), {"__module__": __name__, "arrays": {"a": "SIR"}})
        return lorax.register(made)

    again = cell()
    assert METHODS["GainedLoRA"] is again


def test_a_registered_method_is_a_frozen_dataclass() -> None:
    assert [f.name for f in dataclasses.fields(GainedLoRA)] == ["rank", "start"]
    assert GainedLoRA(rank=3) == GainedLoRA(rank=3, start=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        GainedLoRA().rank = 3
    with pytest.raises(TypeError):
        GainedLoRA(3)


def test_a_method_may_refuse_sites() -> None:
    @lorax.register
    class OnlySquare(lorax.Method):
        arrays = {"shift": "W"}

        def refuses(self, site: lorax.Site) -> str | None:
            return super().refuses(site) or (None if len(set(site.shape)) == 1 else "it is not square")

        def init(self, key: jax.Array, site: lorax.Site, base: Any) -> Any:
            return {"shift": jnp.zeros(site.shape)}, {}

        def weight(self, w: Any, *, shift: Any) -> Any:
            return w + shift

    fn = lambda p, x: x @ p["square"] @ p["wide"]
    params, x = {"square": normal(1, 4, 4), "wide": normal(2, 4, 6)}, normal(3, 2, 4)
    sites = lorax.trace(fn, params, x)
    adapter = lorax.init(jax.random.key(0), lorax.Spec({".*": OnlySquare()}), sites, params)
    assert set(adapter.params) == {"square"}
    with pytest.raises(ValueError, match="wide.*it is not square"):
        lorax.init(jax.random.key(0), lorax.Spec({"wide": OnlySquare()}), sites, params)
    del METHODS["OnlySquare"]
