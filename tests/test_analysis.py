"""What adapters add to weights, against the merged weights and numbers worked out by hand."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorax
from experiments.bench.decoder import Shape, decoder, init_params, loss
from lorax import analysis
from tests.agreement import adapter_for, assert_close, equations, normal, randomised, run
from tests.contract import FORMS, METHODS, ON_TABLES, moved, refusal

ADDING = {
    n for n in METHODS if n.removesuffix(", bfloat16") in {"LoRA", "rsLoRA", "LoRA with a bias", "orthogonal LoRA"}
}
FACTORED = ADDING | {"PiSSA", "OLoRA", "AdaLoRA", "LoRAFA", "VeRA", "LoHa", "TrainableTokens"}
DENSE = {"DoRA", "DoRA of PiSSA", "LoKr", "IA3", "IA3 of inputs", "Full"}
WEIGHTLESS = {"Bottleneck", "Prompt", "Prefix"}
LAYOUTS = (
    "transposed",
    "heads in",
    "heads out",
    "conv grouped and dilated",
    "tied embedding",
    "experts",
    "nested scan",
)
PAIRS = [("linear", m) for m in METHODS if m not in ON_TABLES | WEIGHTLESS]
PAIRS += [("embedding", "TrainableTokens"), *((f, m) for f in LAYOUTS for m in ("LoRA", "LoHa", "DoRA"))]
XLA_TOL = 0.02  # XLA counts elementwise work too


def as_matrices(site: lorax.Site, leaf: Any) -> np.ndarray:
    """A leaf as S matrices of I × O."""
    return np.asarray(leaf).transpose(site.axes("SIO")).reshape([site.size(s) for s in "SIO"])


def what_merging_adds(form: str, method: str) -> np.ndarray:
    params, adapter = FORMS[form].params, moved(form, method)
    if METHODS[method].is_mergeable:
        merged = run(lorax.merge, params, adapter)["w"]
    else:  # a bias keeps it from merging, and the factors are those of LoRA
        merged = params["w"] + 1.5 * adapter.params["w"]["a"] @ adapter.params["w"]["b"]
    return as_matrices(adapter.sites["w"], merged) - as_matrices(adapter.sites["w"], params["w"])


def test_the_lists_have_every_method() -> None:
    assert set(METHODS) == FACTORED | DENSE | WEIGHTLESS


@pytest.mark.parametrize(("form", "method"), PAIRS)
def test_an_update_is_what_merging_adds(form: str, method: str) -> None:
    assert refusal(form, method) is None
    params, adapter = FORMS[form].params, moved(form, method)
    site, want = adapter.sites["w"], what_merging_adds(form, method)
    delta, pair = run(lambda p, a: (analysis.delta(p, a, "w"), analysis.factors(a, "w", p)), params, adapter)
    assert delta.shape == site.shape
    tolerance = 2e-2 if "bfloat16" in method else 1e-5
    np.testing.assert_allclose(as_matrices(site, delta), want, atol=tolerance)
    assert (pair is not None) == (method in FACTORED)
    if pair is not None:
        np.testing.assert_allclose(pair[0] @ pair[1], want, atol=tolerance)
        assert pair[0].shape[2] <= 5, "wider than LoHa's rank² and VeRA's 5"


def test_a_copy_beside_factors_is_no_sum_of_the_base_and_factors() -> None:
    @lorax.register
    class CopyAndFactors(lorax.Method):
        arrays = {"value": "W", "a": "SIR", "b": "SRO"}

        def init(self, key: Any, site: lorax.Site, base: Any) -> Any:
            a, b = jnp.ones(site.dims("SIR", R=1)), jnp.zeros(site.dims("SRO", R=1))
            return {"value": base, "a": a, "b": b}, {}

        def weight(self, w: Any, *, value: Any, a: Any, b: Any) -> Any:
            return value + a @ b

    fn, params, x = lambda p, x: x @ p["w"], {"w": normal(1, 4, 3)}, normal(2, 2, 4)
    adapter = adapter_for(fn, params, x, method=CopyAndFactors())
    assert analysis.factors(adapter, "w", params) is None
    assert_close(analysis.delta(params, adapter, "w"), lorax.merge(params, adapter)["w"] - params["w"])


@pytest.mark.parametrize(("form", "method"), [("linear", "LoRA"), ("nested scan", "PiSSA"), ("heads out", "DoRA")])
def test_the_singular_values_are_those_of_the_built_update(form: str, method: str) -> None:
    params, adapter = FORMS[form].params, moved(form, method)
    u, values, v = run(lambda p, a: analysis.svd(a, "w", p), params, adapter)
    want = what_merging_adds(form, method)
    np.testing.assert_allclose(values, np.linalg.svd(want, compute_uv=False)[:, : values.shape[1]], atol=1e-5)
    np.testing.assert_allclose(u * values[:, None] @ v.swapaxes(1, 2), want, atol=1e-5)
    for side in (u, v):
        np.testing.assert_allclose(
            side.swapaxes(1, 2) @ side, np.tile(np.eye(values.shape[1]), (len(u), 1, 1)), atol=1e-5
        )
    assert_close(run(analysis.spectra, adapter, params)["w"], values)
    for side, square in (("input", want @ want.swapaxes(1, 2)), ("output", want.swapaxes(1, 2) @ want)):
        columns = run(lambda p, a, side=side: analysis.directions(a, "w", side, p), params, adapter)
        np.testing.assert_allclose(columns @ columns.swapaxes(1, 2), square, atol=2e-4)


def test_an_update_with_factors_is_never_built() -> None:
    params, adapter = {"w": normal(1, 40, 50)}, None
    fn, x = lambda p, x: x @ p["w"], normal(2, 3, 40)
    adapter = adapter_for(fn, params, x)
    other = adapter_for(fn, params, x, method=lorax.AdaLoRA(rank=3))
    for of in (analysis.spectra, lambda a: analysis.cosine(a, a), lambda a: analysis.directions(a, "w")):
        shapes = {v.aval.shape for e in equations(jax.make_jaxpr(of)(adapter)) for v in e.outvars}
        assert not shapes & {(40, 50), (50, 40), (1, 40, 50), (1, 50, 40)}
    built = jax.make_jaxpr(lambda a: analysis.delta(params, a, "w"))(other)
    assert (1, 40, 50) in {v.aval.shape for e in equations(built) for v in e.outvars}, "the shapes tell"


def test_what_has_no_singular_values_is_left_out_and_said() -> None:
    fn = lambda p, x: jnp.tanh(x @ p["up"] + p["bias"]) @ p["down"]
    params, x = {"up": normal(1, 4, 6), "bias": normal(2, 6), "down": normal(3, 6, 4)}, normal(4, 2, 4)
    spec = lorax.Spec({"up": lorax.LoRA(rank=2), "bias": lorax.Full(), "down": lorax.Bottleneck(rank=2)})
    adapter = lorax.init(jax.random.key(0), spec, lorax.trace(fn, params, x), params)
    assert list(jax.eval_shape(analysis.spectra, adapter)) == ["up"]
    adapter = randomised(adapter)
    assert_close(analysis.delta(params, adapter, "bias"), adapter.params["bias"]["value"] - params["bias"])
    for path, needle in [
        ("bias", re.escape("bias: shape (6,) has no fan-in")),
        ("down", "Bottleneck has no merged weight"),
        ("dwon", "Nearest: down"),
    ]:
        with pytest.raises(ValueError, match=needle):
            analysis.svd(adapter, path)
    with pytest.raises(ValueError, match="DoRA needs the base"):
        analysis.spectra(moved("linear", "DoRA"))
    with pytest.raises(ValueError, match="IA3 is no product of two factors"):
        analysis.spectra(moved("linear", "IA3"))


def test_a_quantised_base_is_what_it_stands_for() -> None:
    params, adapter = FORMS["linear"].params, moved("linear", "DoRA")
    small = lorax.quantize(params, {"w": lorax.Int8()}, sites=adapter.sites)
    plain = lorax.dequantize(small)
    delta = lambda p, a: analysis.delta(p, a, "w")
    from_small, from_plain, from_full = (run(delta, p, adapter) for p in (small, plain, params))
    assert_close(from_small, from_plain)
    assert not np.allclose(from_full, from_plain, atol=1e-4)


def test_factors_that_are_split_over_a_mesh() -> None:
    """Types say so on a mesh with explicit axes, of one device too."""
    params, adapter = FORMS["nested scan"].params, moved("nested scan", "LoRA")
    of = lambda a: (analysis.spectra(a), analysis.cosine(a, a), analysis.o_lora_penalty([a], a))
    want = run(of, adapter)
    mesh = jax.make_mesh((1, 1), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    put = lambda x, *axes: jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, None, *axes)))
    a, b = adapter.params["w"]["a"], adapter.params["w"]["b"]
    split = adapter.replace(params={"w": {"a": put(a, "x", None), "b": put(b, None, "y")}})
    with jax.set_mesh(mesh):
        assert_close(of(split), want)
        base = {"w": put(params["w"], "x", "y")}
        assert_close(analysis.delta(base, split, "w"), run(lambda a: analysis.delta(params, a, "w"), adapter))


def test_ranks_of_a_spectrum() -> None:
    values = jnp.array([[4.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    entropy = 0.5 * np.log(2) + 2 * 0.25 * np.log(4)
    np.testing.assert_allclose(analysis.effective_rank(values), [np.exp(entropy), 0, 4], rtol=1e-6)
    np.testing.assert_allclose(analysis.stable_rank(values), [24 / 16, 0, 4], rtol=1e-6)


def test_similarity_of_subspaces() -> None:
    basis = jnp.linalg.qr(normal(1, 12, 12))[0]
    a = basis[:, :4] * jnp.array([9.0, 5.0, 2.0, 1.0])
    b = basis[:, jnp.array([1, 7, 0])] * jnp.array([9.0, 5.0, 2.0])
    grid = run(analysis.subspace_map, a, b)
    # b's directions are a's second, none, a's first
    want = [[0, 0, 1], [1, 1 / 2, 2 / 2], [1, 1 / 2, 2 / 3], [1, 1 / 2, 2 / 3]]
    np.testing.assert_allclose(grid, want, atol=1e-5)
    assert run(lambda a, b: analysis.subspace_similarity(a, b, 2, 3), a, b) == grid[1, 2]
    np.testing.assert_allclose(run(analysis.subspace_map, a, a), np.ones((4, 4)), atol=1e-5)
    stacked = run(analysis.subspace_map, jnp.stack([a, a]), jnp.stack([a[:, :3], b]))
    np.testing.assert_allclose(stacked[1], grid, atol=1e-6)
    with pytest.raises(ValueError, match="there are 4 and 3 directions"):
        analysis.subspace_similarity(a, b, 5, 1)
    with pytest.raises(ValueError, match="all but the last side"):
        analysis.subspace_map(a, b[:5])


def test_a_direction_without_a_singular_value_is_shared_with_nothing() -> None:
    a = jnp.eye(5)[:, :3] * jnp.array([2.0, 0.0, 0.0])
    others = jnp.stack([jnp.eye(5)[:, :1], jnp.eye(5)[:, 1:2], jnp.zeros((5, 1))])
    grid = run(analysis.subspace_map, jnp.stack([a] * 3), others)
    np.testing.assert_allclose(grid[..., 0], [[1, 1, 1], [0, 0, 0], [0, 0, 0]])


def test_random_subspaces_are_as_similar_as_the_docstring_says() -> None:
    drawn = normal(1, 2, 2000, 20, 5)
    mean = np.mean(run(analysis.subspace_map, drawn[0], drawn[1]), axis=0)
    i, j = np.mgrid[1:6, 1:6]
    np.testing.assert_allclose(mean, np.maximum(i, j) / 20, rtol=0.05)


def test_directions_do_not_depend_on_how_an_update_is_factored() -> None:
    adapter = moved("nested scan", "LoRA")
    a, b = adapter.params["w"]["a"], adapter.params["w"]["b"]
    mixing = jnp.array([[2.0, 1.0], [0.5, -1.0]])
    same = adapter.replace(params={"w": {"a": a @ mixing, "b": jnp.linalg.inv(mixing) @ b}})

    def compared(adapter: Any, same: Any, side: str) -> Any:
        grid = analysis.subspace_map(analysis.directions(adapter, "w", side), analysis.directions(same, "w", side))
        return grid, analysis.overlap(adapter, same, side)["w"]

    for side in ("input", "output"):
        grid, overlap = run(functools.partial(compared, side=side), adapter, same)
        np.testing.assert_allclose(grid, np.ones((4, 2, 2)), atol=1e-4)
        np.testing.assert_allclose(overlap, np.ones(4), atol=1e-4)
    factors_grid = run(analysis.subspace_map, a.reshape(4, 6, 2), same.params["w"]["a"].reshape(4, 6, 2))
    assert not np.allclose(factors_grid[:, 0, 0], 1, atol=1e-2), "the factors' own directions do"
    with pytest.raises(ValueError, match="side is 'outputs'"):
        analysis.directions(adapter, "w", "outputs")


def test_amplification_by_hand() -> None:
    """The update is about the second and third of the weight's directions, which have 0.5 and 0.25 of it."""
    params = {"w": jnp.diag(jnp.array([8.0, 0.5, 0.25]))}
    adapter = adapter_for(lambda p, x: x @ p["w"], params, normal(1, 2, 3), method=lorax.LoRA(rank=2))
    a = jnp.zeros((3, 2)).at[1, 0].set(3.0).at[2, 1].set(4.0)
    adapter = adapter.replace(params={"w": {"a": a, "b": jnp.eye(3)[1:]}})
    amplified = lambda p, a: [analysis.amplification(p, a, "w", rank) for rank in (None, 1)]
    np.testing.assert_allclose(run(amplified, params, adapter), [[5 / np.hypot(0.5, 0.25)], [5 / 0.25]], rtol=1e-6)
    nothing = adapter.replace(params=jax.tree.map(jnp.zeros_like, adapter.params))
    assert run(amplified, params, nothing) == [0, 0]
    with pytest.raises(ValueError, match="rank is 3, and the update has 2"):
        analysis.amplification(params, adapter, "w", rank=3)


def test_products_of_updates_are_those_of_the_built_ones() -> None:
    form = FORMS["nested scan"]
    a, b, dora = moved("nested scan", "LoRA"), moved("nested scan", "LoHa"), moved("nested scan", "DoRA")
    matrices = {id(x): what_merging_adds("nested scan", m) for x, m in ((a, "LoRA"), (b, "LoHa"), (dora, "DoRA"))}
    product = lambda x, y, p: analysis.inner_product(x, y, "w", p)
    for x, y in ((a, a), (a, b), (b, dora)):
        want = np.sum(matrices[id(x)] * matrices[id(y)], axis=(1, 2))
        np.testing.assert_allclose(run(product, x, y, form.params), want, rtol=1e-4, atol=1e-4)
    norm = lambda x: np.linalg.norm(matrices[id(x)], axis=(1, 2))
    each = np.sum(matrices[id(a)] * matrices[id(b)], axis=(1, 2)) / norm(a) / norm(b)
    np.testing.assert_allclose(run(analysis.cosines, a, b, form.params)["w"], each, atol=1e-4)
    whole = np.sum(matrices[id(a)] * matrices[id(b)]) / np.linalg.norm(norm(a)) / np.linalg.norm(norm(b))
    np.testing.assert_allclose(run(analysis.cosine, a, b, form.params), whole, atol=1e-4)
    with pytest.raises(ValueError, match="DoRA needs the base"):
        analysis.cosine(a, dora)


def test_a_weight_that_one_adapter_leaves_alone_counts_for_the_norm() -> None:
    fn, params, x = lambda p, x: x @ p["up"] @ p["down"], {"up": jnp.eye(3), "down": jnp.eye(3)}, normal(1, 2, 3)
    both, one = (adapter_for(fn, params, x, only=only) for only in (".*", "up"))
    ones = lambda adapter: adapter.replace(params=jax.tree.map(jnp.ones_like, adapter.params))
    assert jax.eval_shape(analysis.cosines, both, one).keys() == {"up"}
    np.testing.assert_allclose(run(analysis.cosine, ones(both), ones(one)), np.sqrt(0.5), rtol=1e-6)


def test_o_lora_penalty_and_its_gradient() -> None:
    before, new = (randomised(moved("heads in", "LoRA"), seed) for seed in (1, 2))
    flat = lambda adapter: np.asarray(adapter.params["w"]["a"]).reshape(8, 2)
    want = np.abs(flat(before).T @ flat(new))
    penalty = lambda p: analysis.o_lora_penalty([before, before], new.replace(params=p))
    value, grads = run(jax.value_and_grad(penalty), new.params)
    np.testing.assert_allclose(value, 2 * want.sum(), rtol=1e-5)
    slope = 2 * flat(before) @ np.sign(flat(before).T @ flat(new))
    np.testing.assert_allclose(grads["w"]["a"].reshape(8, 2), slope, rtol=1e-5)
    assert analysis.o_lora_penalty([], new) == 0
    with pytest.raises(ValueError, match="adapter 1 trains no factor 'a'"):
        analysis.o_lora_penalty([before, moved("heads in", "LoRAFA")], new)


# Budgets

SMALL = Shape(layers=2, d_model=256, heads=4, kv_heads=2, d_ff=512, vocabulary=512)
KERNELS = r"(layers/\d+/\w+|head)/kernel"
TOKENS = jax.ShapeDtypeStruct((2, 32), jnp.int32)


def small_params() -> Any:
    return jax.eval_shape(lambda: init_params(jax.random.key(0), SMALL))


def test_parameters_by_site() -> None:
    params = small_params()
    sites = lorax.trace(decoder(SMALL), params, TOKENS)
    spec = lorax.Spec({KERNELS: lorax.LoRA(rank=3)})
    made = jax.eval_shape(lambda p: lorax.init(jax.random.key(0), spec, sites, p), params)
    counts = analysis.parameters(made)
    assert counts == {path: 3 * (sites[path].size("I") + sites[path].size("O")) for path in counts}
    assert len(counts) == 2 * 7 + 1


@pytest.mark.parametrize("method", [lorax.LoRA, lorax.DoRA, lorax.VeRA, lorax.LoKr])
def test_the_largest_rank_within_a_budget(method: Any) -> None:
    sites = lorax.trace(decoder(SMALL), small_params(), TOKENS)
    make = lambda rank: lorax.Spec({r"layers/\d+/(query|value)/kernel": method(rank=rank)})

    def trained(rank: int) -> int:
        made = jax.eval_shape(lambda p: lorax.init(jax.random.key(0), make(rank), sites, p), small_params())
        return sum(analysis.parameters(made).values())

    for budget in (trained(1), trained(4) - 1, trained(4), trained(6), trained(9) + 1):
        rank = analysis.rank_for_budget(make, sites, budget)
        assert trained(rank) <= budget < trained(rank + 1)
    with pytest.raises(ValueError, match=f"rank 1 trains {trained(1):,} numbers, and the budget is {trained(1) - 1:,}"):
        analysis.rank_for_budget(make, sites, trained(1) - 1)
    with pytest.raises(ValueError, match="it does not use the rank"):
        analysis.rank_for_budget(lambda _: make(2), sites, 10**6)


# FLOPs


def of_compiled(fn: Any, *args: Any) -> float:
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def steps() -> dict[str, tuple[Any, ...]]:
    """An unrolled decoder: forward, all gradients, and the gradient of an adapter."""
    params = small_params()
    sites = lorax.trace(decoder(SMALL), params, TOKENS)
    spec = lorax.Spec({KERNELS: lorax.LoRA(rank=4)})
    adapter = jax.eval_shape(lambda p: lorax.init(jax.random.key(0), spec, sites, p), params)
    plain = lambda p, x: loss(decoder(SMALL)(p, x), x)
    adapted = lambda t, a, p, x: loss(lorax.adapt(decoder(SMALL))(p, a.replace(params=t), x), x)
    return {
        "forward": (decoder(SMALL), params, TOKENS),
        "all gradients": (jax.grad(plain), params, TOKENS),
        "the adapter's gradient": (jax.grad(adapted), adapter.params, adapter, params, TOKENS),
    }


@pytest.mark.parametrize("name", ["forward", "all gradients", "the adapter's gradient"])
def test_flops_are_xlas_of_an_unrolled_model(name: str) -> None:
    fn, *args = steps()[name]
    counted, compiled = analysis.flops(fn, *args), of_compiled(fn, *args)
    assert counted <= compiled <= (1 + XLA_TOL) * counted


f32 = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")
PRODUCT = 2 * 5 * 8 * 8  # of five rows with a square matrix of side 8


def test_a_scan_counts_as_often_as_it_runs() -> None:
    layer = lambda x, w: (jnp.tanh(x @ w), None)
    scanned = lambda ws, x: jnp.sum(lax.scan(layer, x, ws)[0])
    unrolled = lambda ws, x: jnp.sum(functools.reduce(lambda x, w: layer(x, w)[0], ws, x))
    ws, x = f32(7, 8, 8), f32(5, 8)
    assert analysis.flops(scanned, ws, x) == 7 * PRODUCT
    assert analysis.flops(jax.grad(scanned), ws, x) == analysis.flops(jax.grad(unrolled), ws, x) + PRODUCT
    recomputed = lambda ws, x: jnp.sum(lax.scan(jax.checkpoint(layer), x, ws)[0])
    assert analysis.flops(jax.grad(recomputed), ws, x) == (7 + 7 + 2 * 7) * PRODUCT
    nested = lambda ws, x: lax.scan(lambda x, ws: lax.scan(layer, x, ws), x, ws)[0]
    assert analysis.flops(nested, f32(3, 7, 8, 8), x) == 21 * PRODUCT


def test_other_control_flow() -> None:
    w, x = f32(8, 8), f32(5, 8)
    branches = lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)
    assert analysis.flops(branches, w, x) == 2 * PRODUCT
    loop = lambda w, x: lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ w, x)
    assert analysis.flops(loop, w, x, while_trips=6) == 6 * PRODUCT
    with pytest.raises(ValueError, match="give flops.while_trips="):
        analysis.flops(loop, w, x)
    counting = lambda x: lax.while_loop(lambda x: x[0, 0] > 0, jnp.sin, x)
    assert analysis.flops(counting, x) == 0
    ruled = jax.custom_vjp(lambda x, w: x @ w)
    ruled.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    assert analysis.flops(lambda w, x: jax.nn.relu(ruled(x, w)), w, x) == PRODUCT
    assert analysis.flops(jax.grad(lambda w, x: jnp.sum(ruled(x, w))), w, x) == PRODUCT, "of w alone"
    mesh = jax.sharding.AbstractMesh((2, 3), ("i", "j"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    mapped = jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(jax.P(), jax.P("i")), out_specs=jax.P("i"))
    assert analysis.flops(mapped, w, f32(10, 8)) == 3 * 2 * PRODUCT, "the axis j does the same three times"


def test_what_nothing_reads_is_not_counted() -> None:
    def fn(w: Any, x: Any) -> Any:
        used, _ = jax.jit(lambda w, x: (x @ w, x @ w @ w))(w, x)
        return used

    assert analysis.flops(fn, f32(8, 8), f32(5, 8)) == PRODUCT


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_without_padding_are_xlas(groups: int) -> None:
    x, w = f32(2, 9, 9, 6), f32(3, 3, 6 // groups, 8)
    numbers = ("NHWC", "HWIO", "NHWC")
    conv = lambda x, w: lax.conv_general_dilated(
        x, w, (1, 1), "VALID", dimension_numbers=numbers, feature_group_count=groups
    )
    by_hand = 2 * (2 * 7 * 7 * 8) * (3 * 3 * 6 // groups)
    assert analysis.flops(conv, x, w) == by_hand == of_compiled(conv, x, w)


def test_ragged_products_count_each_row_once() -> None:
    x, w, sizes = f32(12, 4), f32(3, 4, 5), jax.ShapeDtypeStruct((3,), "int32")
    product = lambda x, w, sizes: jnp.sum(lax.ragged_dot(x, w, sizes) ** 2)
    assert analysis.flops(product, x, w, sizes) == 2 * 12 * 4 * 5
    assert analysis.flops(jax.grad(product, argnums=(0, 1)), x, w, sizes) == 3 * 2 * 12 * 4 * 5
