"""Quantised weights: bitsandbytes' numbers, orientations, stacks, memory, errors, and eight devices."""

import dataclasses
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorax
from experiments import models
from lorax.quant import FP4, NF4, Format, Int4, Int8, Quantized, dequantize, quantize, quantize_leaf, stack_nodes
from lorax.quant.codes import FP4 as FP4_CODES
from lorax.quant.codes import NF4 as NF4_CODES
from lorax.quant.codes import dynamic_map, expand_scales
from lorax.quant.ordered_sum import ordered_mean
from tests.agreement import assert_close, assert_identical, equations, normal

GOLDEN = pathlib.Path(__file__).parent / "golden"
ROUND_OFF = 1e-6  # relative: a product and a sum in float32
BF16_STEP = 2**-7
LOGITS = 1e-3
FORMATS = (NF4(), NF4(double=False), FP4(), FP4(variant="e2m1", double=True), Int8(), Int4(), Int4(symmetric=False))
each_format = pytest.mark.parametrize("format", FORMATS, ids=str)


def kernel(weight: Any, format: Format) -> Quantized:
    """The node of a kernel whose torch weight [out, in] is given."""
    return quantize_leaf(weight.T, format, fan_in=(0,), fan_out=(1,))


def packed(node: Quantized, count: int) -> np.ndarray:
    return np.asarray(node.codes).ravel()[:count]


# Reference numbers.


def test_tables_of_values() -> None:
    with np.load(GOLDEN / "quant/nf4_b64_dq.npz") as golden:
        np.testing.assert_array_equal(dynamic_map(), golden["code2"])
        np.testing.assert_array_equal(np.float32(NF4_CODES), golden["code"])
    quantile = np.vectorize(statistics.NormalDist().inv_cdf)
    start = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))
    positive, negative = (quantile(np.linspace(start, 0.5, n)[:-1]) for n in (9, 8))
    made = np.sort([*positive, 0, *-negative])
    np.testing.assert_allclose(NF4_CODES, made / made.max(), rtol=0, atol=2e-7)
    assert FP4_CODES["e2m1"][:8] == tuple(x / 6 for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6))
    assert sorted(FP4_CODES["bnb"])[-1] == 1 and FP4_CODES["bnb"][1] == 0.0625 / 12


def test_nf4_equals_bitsandbytes() -> None:
    weight = np.load(GOLDEN / "quant/W.npy")
    golden = np.load(GOLDEN / "quant/nf4_b64.npz")
    node = kernel(weight, NF4(block=64, double=False))
    np.testing.assert_array_equal(packed(node, 6144), golden["packed"].ravel())
    np.testing.assert_array_equal(np.ravel(node.absmax), golden["absmax"])
    np.testing.assert_array_equal(node.dequantize().T, golden["dequant"])


def test_double_quantised_nf4_equals_bitsandbytes() -> None:
    weight = np.load(GOLDEN / "quant/W.npy")
    golden = np.load(GOLDEN / "quant/nf4_b64_dq.npz")
    node = kernel(weight, NF4(block=64, double=True))
    np.testing.assert_array_equal(packed(node, 6144), golden["packed"].ravel())
    np.testing.assert_array_equal(np.ravel(node.absmax), golden["absmax"])
    np.testing.assert_allclose(node.absmax2, golden["absmax2"], rtol=ROUND_OFF)
    np.testing.assert_allclose(node.offset, golden["offset"], rtol=ROUND_OFF)
    np.testing.assert_allclose(node.dequantize().T, golden["dequant"], rtol=0, atol=ROUND_OFF * 4)


@pytest.mark.parametrize(
    ("case", "format", "dtype"),
    [
        ("fp4_zero_blocks", FP4(), "float32"),
        ("fp4_dq_uneven", FP4(double=True), "float32"),
        ("nf4_dq_uneven", NF4(), "float32"),
        ("nf4_huge", NF4(double=False), "float32"),
        ("nf4_dq_b128_bfloat16", NF4(block=128), "bfloat16"),
    ],
)
def test_further_cases_equal_bitsandbytes(case: str, format: Format, dtype: str) -> None:
    with np.load(GOLDEN / f"quant/{case}.npz") as golden:
        node = kernel(golden["W"].astype(jnp.dtype(dtype)), format)
        np.testing.assert_array_equal(packed(node, golden["packed"].size), golden["packed"])
        np.testing.assert_array_equal(np.ravel(node.absmax), golden["absmax"])
        for name in ("absmax2", "offset"):
            assert (name in golden) == (name in node.children)
            if name in golden:
                np.testing.assert_allclose(node.children[name], golden[name], rtol=ROUND_OFF)
        got = node.dequantize()
        assert got.dtype == dtype
        tol = ROUND_OFF if dtype == "float32" else BF16_STEP
        np.testing.assert_allclose(got.T.astype("float32"), golden["dequant"], rtol=tol, atol=0)


@pytest.mark.parametrize(
    ("count", "want"),
    [(31, 2.4963161945343018), (33, 2.4946043491363525), (200, 2.4993817806243896), (1000, 2.499976396560669)]
    + [(5000, 2.4999496936798096), (40001, 2.4999897480010986)],
)
def test_the_mean_of_the_scales_is_summed_in_torchs_order(count: int, want: float) -> None:
    """To the last bit: `torch.tensor(numbers).mean()` of torch 2.13 on one thread."""
    numbers = (2 + np.arange(count) * 2654435761 % 2**32 / 2**32).astype(np.float32)
    assert jax.jit(ordered_mean)(numbers).item() == want


def as_the_cpu_kernel_reads(node: Quantized) -> jax.Array:
    """A stack of kernels (in, out) with the scales that bitsandbytes takes on a CPU: see golden/quant/README.md."""
    _, inputs, outputs = node.shape
    assert node.is_flat and isinstance(node.format, NF4)
    scales = expand_scales(node.absmax, node.absmax2, node.offset)[:, 0]
    unit = NF4(double=False).decode({"codes": node.codes, "absmax": jnp.ones_like(scales[:, None])})
    row, column = np.indices((outputs, inputs))
    taken = scales[:, row * (inputs // node.format.block) + column // node.format.block]
    weights = unit[:, 0, : inputs * outputs].reshape(-1, outputs, inputs) * taken
    return weights.transpose(0, 2, 1)


def test_qlora_logits() -> None:
    """Logits on a base in NF4; the one fault of the reference is repeated here, and not in the library."""
    model = models.load(GOLDEN / "peft/base")
    ids = np.load(GOLDEN / "peft/inputs.npz")["input_ids"]
    sites = lorax.trace(model.apply, model.params, ids)
    base = quantize(model.params, {r"layers/.*kernel": NF4(block=64, double=True)}, sites=sites)
    adapter = lorax.peft.load(GOLDEN / "peft/adapters/qv_r8", model.params, sites, names=model.peft_names)
    reference = np.load(GOLDEN / "quant/qlora_qv_r8.npz")
    logits = lambda params: lorax.adapt(model.apply)(params, adapter, ids)
    assert_logits = lambda got, name: np.testing.assert_allclose(got, reference[name], rtol=0, atol=LOGITS)
    assert_logits(logits(model.params), "logits_fullprec")
    mlp = base["layers"]["mlp"]
    misread = {**mlp, "down": {"kernel": as_the_cpu_kernel_reads(mlp["down"]["kernel"])}}
    assert_logits(logits({**base, "layers": {**base["layers"], "mlp": misread}}), "logits")
    # Read as it was stored, the same base is nearer to the full-precision weights.
    down = model.params["layers"]["mlp"]["down"]["kernel"]
    error = lambda x: float(jnp.linalg.norm(x - down) / jnp.linalg.norm(down))
    assert error(mlp["down"]["kernel"].dequantize()) < 0.1 < 0.2 < error(misread["down"]["kernel"])


def test_error_on_normal_weights() -> None:
    """The order of the formats in the QLoRA paper's setting, blocks of 64 on normal weights."""
    weight = normal(0, 512, 2048, scale=1.0)
    formats = {
        "affine int4": Int4(symmetric=False),
        "NF4": NF4(double=False),
        "E2M1": FP4(variant="e2m1"),
        "int4": Int4(),
        "FP4": FP4(),
        "NF4 and double quantisation": NF4(),
    }
    error = lambda format: float(jnp.sqrt(jnp.mean((kernel(weight, format).dequantize().T - weight) ** 2)))
    rmse = {name: error(format) for name, format in formats.items()}
    want = {"affine int4": 0.0897, "NF4": 0.0919, "E2M1": 0.1057, "int4": 0.1077, "FP4": 0.1219}
    for name, value in want.items():
        assert abs(rmse[name] - value) < 2e-4, (name, rmse)
    assert sorted(want, key=rmse.__getitem__) == list(want)
    assert 1.00005 < rmse["NF4 and double quantisation"] / rmse["NF4"] < 1.0004


def test_bits_per_weight() -> None:
    bits = lambda format: kernel(jnp.zeros((512, 1024), jnp.bfloat16), format).bits_per_weight
    assert bits(NF4()) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256) + 32 / 512 / 1024, rel=1e-9)
    assert round(bits(NF4()), 3) == 4.127
    assert bits(NF4(double=False)) == bits(FP4()) == bits(Int4()) == 4.5
    assert bits(Int4(symmetric=False)) == 5
    assert bits(Int8()) == 8 + 32 / 1024


def test_int8_by_hand() -> None:
    """Torch's [out, in] = [[1, -2], [0, 0], [127, 63.6]]: one scale an output."""
    node = kernel(jnp.array([[1.0, -2.0], [0.0, 0.0], [127.0, 63.6]]), Int8())
    np.testing.assert_array_equal(node.codes, [[64, -127], [0, 0], [127, 64]])
    np.testing.assert_array_equal(node.absmax, [[2], [0], [127]])
    np.testing.assert_allclose(node.dequantize().T, [[128 / 127, -2], [0, 0], [127, 64]], rtol=ROUND_OFF)


def test_int4_by_hand() -> None:
    """A block of eight: steps of 7/7 and of 15/15."""
    symmetric = kernel(jnp.array([[-7.0, 7, 0, 0.6, -0.4, 3, -3, 1]]), Int4(block=8))
    np.testing.assert_array_equal(symmetric.codes, [[0x1F, 0x89, 0x8B, 0x59]])
    np.testing.assert_allclose(symmetric.dequantize().T, [[-7, 7, 0, 1, 0, 3, -3, 1]], rtol=ROUND_OFF)
    affine = kernel(jnp.array([[2.0, 17, 3, 3.4, 10, 4, 5, 6]]), Int4(block=8, symmetric=False))
    np.testing.assert_array_equal(affine.codes, [[0x0F, 0x11, 0x82, 0x34]])
    assert (affine.absmax.item(), affine.offset.item()) == (15, 2)
    uneven = kernel(jnp.array([[2.0, 17, 5], [3, 4, 6]]), Int4(block=8, symmetric=False))  # filled up, but not with 0
    assert (uneven.absmax.item(), uneven.offset.item()) == (15, 2)
    np.testing.assert_allclose(affine.dequantize().T, [[2, 17, 3, 3, 10, 4, 5, 6]], rtol=ROUND_OFF)


# Every format.


def within(format: Format, weight: Any, got: Any) -> None:
    """Every weight is off by at most half the widest gap between codes times the largest magnitude."""
    gap = {"NF4": 0.152, "FP4": 1 / 6, "Int8": 1 / 254, "Int4": 1 / 14}[type(format).__name__]
    if isinstance(format, Int4) and not format.symmetric:
        gap = 1 / 15  # half of a fifteenth of the range, which is at most twice the largest magnitude
    slack = 1.1 if getattr(format, "double", False) else 1.001
    limit = slack * gap * float(jnp.abs(weight).max())
    assert float(jnp.abs(got.astype(jnp.float32) - weight.astype(jnp.float32)).max()) <= limit


@pytest.mark.slow
@each_format
@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((64, 48), {"fan_in": (0,), "fan_out": (1,)}),
        ((48, 64), {"fan_in": (1,), "fan_out": (0,)}),
        ((32, 4, 16), {"fan_in": (0,), "fan_out": (1, 2)}),
        ((4, 16, 32), {"fan_in": (0, 1), "fan_out": (2,)}),
        ((5, 8, 32, 8), {"fan_in": (1, 3), "fan_out": (2,), "stack": 1}),
        ((2, 3, 64, 8), {"fan_in": (-2,), "fan_out": (-1,), "stack": 2}),
        ((3, 5, 7), {"fan_in": (1,), "fan_out": (2,), "stack": 1}),
        ((40, 64), {"fan_in": (0,), "fan_out": (1,), "embedding": True}),
    ],
)
def test_every_layout(format: Format, shape: tuple[int, ...], settings: dict[str, Any]) -> None:
    """A node is the torch matrix of each slice in torch's layout, and comes back in the leaf's own."""
    weight = normal(1, *shape)
    node = quantize_leaf(weight, format, **settings)
    assert (node.shape, node.ndim, node.size, node.dtype) == (shape, len(shape), weight.size, weight.dtype)
    assert node.nbytes == sum(x.nbytes for x in jax.tree.leaves(node))
    got = node.dequantize()
    assert (got.shape, got.dtype) == (weight.shape, weight.dtype)
    within(format, weight, got)
    # The same by hand, a slice at a time, as one plain kernel.
    count = settings.get("stack", 0)
    fan_in, fan_out = (tuple(a % len(shape) - count for a in settings[n]) for n in ("fan_in", "fan_out"))
    order = (*fan_in, *fan_out) if settings.get("embedding") else (*fan_out, *fan_in)
    rows = int(np.prod([shape[count + a] for a in (fan_in if settings.get("embedding") else fan_out)]))
    for i in np.ndindex(shape[:count]):
        plain = kernel(weight[i].transpose(order).reshape(rows, -1), format)
        part = jax.tree.map(lambda x, i=i: x[i], node)
        assert part.shape == shape[count:]
        assert_identical(tuple(part.children.values()), tuple(plain.children.values()))
        want = plain.dequantize().T.reshape([shape[count + a] for a in order]).transpose(np.argsort(order))
        assert_close(part.dequantize(), want, ROUND_OFF)
        assert_close(got[i], want, ROUND_OFF)


@each_format
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(format: Format, dtype: str) -> None:
    weight = normal(2, 64, 32).astype(dtype)
    node = kernel(weight, format)
    assert node.dtype == dtype and node.dequantize().dtype == dtype
    floats = [x.dtype for x in node.children.values() if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats and set(floats) == {jnp.dtype("float32")}
    exact = kernel(weight.astype(jnp.float32), format)
    assert_identical(tuple(node.children.values()), tuple(exact.children.values()))
    assert_identical(node.dequantize(), exact.dequantize().astype(dtype))


@each_format
def test_zeros_and_extremes(format: Format) -> None:
    """No block of zeros, and no very large or very small one, gives NaN."""
    weight = np.array(normal(3, 6, 128))
    weight[0] = 0
    weight[1, :64] = 0
    weight[2] *= 1e-36
    weight[3] *= 1.6e38 / np.abs(weight[3]).max()
    weight[4, 5] = 1e30
    got = np.asarray(kernel(weight, format).dequantize().T)
    assert np.isfinite(got).all() and not got[0].any()
    if not getattr(format, "double", False):  # whose scales would share the largest block's
        within(format, weight[2] * 1e36, got[2] * 1e36)
        within(format, weight[3] * 1e-36, got[3] * 1e-36)
        assert np.unique(got[3]).size > 8
        within(format, weight[5], got[5])
    assert not np.asarray(kernel(np.zeros((4, 64), np.float32), format).dequantize()).any()


@each_format
def test_traced_abstract_and_again(format: Format) -> None:
    """Under jit, vmap, scan and eval_shape a node is what it is outside."""
    weight = normal(4, 3, 64, 16)
    make = lambda x: quantize_leaf(x, format, fan_in=(1,), fan_out=(2,), stack=1)
    node = make(weight)
    assert_identical(jax.jit(make)(weight), node)
    one = lambda x: quantize_leaf(x, format, fan_in=(0,), fan_out=(1,))
    assert_identical(jax.vmap(one)(weight), node)
    assert_identical(lax.map(lambda part: part.dequantize(), node), node.dequantize())
    assert_identical(jax.vmap(lambda part: part.dequantize())(node), node.dequantize())
    shapes: list[tuple[int, ...]] = []
    lax.scan(lambda c, part: (c, shapes.append(part.shape)), 0, node)
    assert shapes[0] == (64, 16)
    for made in (jax.eval_shape(make, weight), make(jax.ShapeDtypeStruct(weight.shape, weight.dtype))):
        assert jax.tree.structure(made) == jax.tree.structure(node)
        assert (made.shape, made.nbytes, made.dtype) == (node.shape, node.nbytes, node.dtype)
        assert isinstance(made.codes, jax.ShapeDtypeStruct) and "shape=(3, 64, 16)" in repr(made)
        assert jax.eval_shape(lambda n: n.dequantize(), made).shape == weight.shape
    assert_identical(node.with_values(weight), node)
    shorter = weight[:, ::-1].astype(jnp.bfloat16)
    other = node.with_values(shorter)
    assert jax.tree.structure(other) == jax.tree.structure(node)
    within(format, shorter, other.dequantize())
    with pytest.raises(ValueError, match=re.escape("(3, 16, 64)")):
        node.with_values(jnp.zeros((3, 16, 64)))


@each_format
def test_numpy_and_stacked_nodes(format: Format, tmp_path: pathlib.Path) -> None:
    """A stack in a file, whole or layer by layer, gives the same node as an array on the device."""
    weight = normal(5, 3, 2, 64, 16)
    np.save(tmp_path / "w.npy", weight)
    mapped = np.load(tmp_path / "w.npy", mmap_mode="r")
    settings: Any = {"fan_in": (-2,), "fan_out": (-1,)}
    node = quantize_leaf(weight, format, stack=2, **settings)
    assert_identical(quantize_leaf(mapped, format, stack=2, **settings), node)
    layers = [quantize_leaf(mapped[i], format, stack=1, **settings) for i in range(3)]
    assert_identical(stack_nodes(layers), node)
    on_host = stack_nodes([jax.device_get(layer) for layer in layers])
    assert isinstance(on_host.codes, np.ndarray)
    assert_identical(on_host.dequantize(), node.dequantize())


def test_settings_are_json_and_hashable() -> None:
    assert len(set(FORMATS)) == len(FORMATS)
    for format in FORMATS:
        assert type(format)(**json.loads(json.dumps(dataclasses.asdict(format)))) == format
    assert NF4() == NF4(block=64, double=True)


def test_key_paths_name_the_children() -> None:
    tree = {"kernel": kernel(normal(6, 8, 64), NF4())}
    names = [jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    assert names == [f"['kernel'].{n}" for n in ("codes", "absmax", "absmax2", "offset")]


def test_a_format_of_ones_own() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Sign(Format):
        def encode(self, matrix: Any) -> dict[str, Any]:
            return {"codes": jnp.sign(matrix).astype(jnp.int8), "absmax": jnp.abs(matrix).mean(-1, keepdims=True)}

        def decode(self, children: Any) -> Any:
            return children["codes"].astype(jnp.float32) * children["absmax"]

    node = quantize_leaf(jnp.array([[1.0, -2], [3, 6]]), Sign(), fan_in=(0,), fan_out=(1,))
    np.testing.assert_allclose(node.dequantize(), [[2, -4], [2, 4]])


@each_format
def test_dequantising_keeps_nothing_large(format: Format) -> None:
    """The program holds the result and next to nothing else, and no constant of the weight's size."""
    shape = jax.ShapeDtypeStruct((2, 512, 256), "bfloat16")
    node = quantize_leaf(shape, format, fan_in=(1,), fan_out=(2,), stack=1)
    program = jax.jit(lambda n: n.dequantize()).lower(node).compile()
    size = 2 * 512 * 256
    assert program.memory_analysis().temp_size_in_bytes < 0.1 * size
    jaxpr = jax.make_jaxpr(lambda n: n.dequantize())(node)
    assert all(x.aval.size <= 256 for eqn in equations(jaxpr) for x in eqn.invars if hasattr(x, "val"))
    assert all(np.size(x) <= 256 for x in jaxpr.consts)


# Parameters and rules.


def small_model() -> tuple[Any, Any, Any]:
    """A table that is looked up and used as the head, a table of positions, a scanned stack, experts and a head."""
    params = {
        "embed": normal(1, 128, 64),
        "positions": normal(2, 8, 64),
        "blocks": {"kernel": normal(3, 3, 64, 4, 16), "out": normal(4, 3, 4, 16, 64), "bias": normal(5, 3, 64)},
        "experts": normal(6, 64, 2, 64),
        "head": {"kernel": normal(7, 64, 10), "bias": normal(8, 10)},
        "steps": jnp.arange(4),
    }

    def fn(p: Any, tokens: Any) -> Any:
        x = jnp.take(p["embed"], tokens, axis=0) + p["positions"][jnp.arange(tokens.shape[1])]

        def block(c: Any, w: Any) -> Any:
            y = jnp.einsum("btd,dhk->bthk", c, w["kernel"])
            return jnp.einsum("bthk,hkd->btd", jnp.tanh(y), w["out"]) + w["bias"], None

        x, _ = lax.scan(block, x, p["blocks"])
        x = jnp.einsum("btd,deo->beto", x, p["experts"]).sum(1)
        return x @ p["embed"].T, x @ p["head"]["kernel"] + p["head"]["bias"]

    return fn, params, jnp.arange(6).reshape(2, 3)


def test_sites_tell_the_layout() -> None:
    fn, params, tokens = small_model()
    sites = lorax.trace(fn, params, tokens)
    made = quantize(params, {".*": Int8()}, sites=sites)
    nodes = {path: x for path, x in lorax.paths.flatten(made)[0].items() if isinstance(x, Quantized)}
    layouts = {path: (len(x.stack), x.rows, x.columns, x.codes.shape) for path, x in nodes.items()}
    assert layouts == {
        "embed": (0, (0,), (1,), (128, 64)),  # tied: rows of the table, which are also the outputs of its product
        "positions": (0, (0,), (1,), (8, 64)),
        "blocks/kernel": (1, (1, 2), (0,), (3, 64, 64)),
        "blocks/out": (1, (2,), (0, 1), (3, 64, 64)),
        "experts": (0, (1, 2), (0,), (128, 64)),
        "head/kernel": (0, (1,), (0,), (10, 64)),
    }
    for path, leaf in lorax.paths.flatten(params)[0].items():
        want = nodes[path].dequantize() if path in nodes else leaf
        assert_identical(lorax.paths.flatten(dequantize(made))[0][path], want)
    bare = quantize(params, {".*kernel|experts": Int8()})
    assert (len(bare["blocks"]["kernel"].stack), bare["blocks"]["kernel"].rows) == (2, (1,))
    assert bare["experts"].stack == (64,)


def test_experts_that_are_batched_are_stacked() -> None:
    params = {"w": normal(1, 4, 64, 8)}
    sites = lorax.trace(lambda p, x: jnp.einsum("etd,edo->eto", x, p["w"]), params, jnp.ones((4, 2, 64)))
    assert quantize(params, {"w": NF4()}, sites=sites)["w"].stack == (4,)
    params = {"w": normal(1, 64, 4, 8)}  # the experts' axis in the middle: output units of one matrix
    sites = lorax.trace(lambda p, x: jnp.einsum("etd,deo->eto", x, p["w"]), params, jnp.ones((4, 2, 64)))
    node = quantize(params, {"w": NF4()}, sites=sites)["w"]
    assert (node.stack, node.rows, node.columns, node.codes.shape) == ((), (1, 2), (0,), (32, 32))


def test_rules_are_ordered() -> None:
    params = {"a": {"kernel": normal(1, 64, 8)}, "b": {"kernel": normal(2, 64, 8), "bias": jnp.ones(8)}, "n": 3}
    made = quantize(params, {"a/.*": None, ".*/kernel": NF4()})
    assert made["a"]["kernel"] is params["a"]["kernel"] and made["b"]["kernel"].format == NF4()
    assert made["b"]["bias"] is params["b"]["bias"] and made["n"] == 3
    made = quantize(params, [("b/kernel", Int8()), (".*", NF4())])
    assert (made["a"]["kernel"].format, made["b"]["kernel"].format) == (NF4(), Int8())
    again = quantize(quantize(params, {"a/.*": NF4()}), {".*kernel": Int8()})
    assert (again["a"]["kernel"].format, again["b"]["kernel"].format) == (NF4(), Int8())
    traced = jax.jit(lambda p: quantize(p, {".*kernel": NF4()}))({k: params[k] for k in "ab"})
    assert_identical(traced["b"]["kernel"], kernel(params["b"]["kernel"].T, NF4()))
    abstract = jax.eval_shape(lambda: {"w": normal(1, 64, 8)})
    assert quantize(abstract, {"w": NF4()})["w"].nbytes == made["a"]["kernel"].nbytes


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"kernl": NF4()}, ["kernl", "matches none of 3 paths", "kernel"]),
        ({"bias": NF4()}, ["bias", "1 axes"]),
        ({"steps": Int8()}, ["steps", "int32"]),
        ({"kernel": NF4(), "kern.*": Int8()}, ["kern.*", "earlier", "kernel has 'kernel'"]),
        ({"kernel": lorax.LoRA()}, ["kernel", "LoRA", "NF4"]),
        ({"(": NF4()}, ["not a regular expression"]),
    ],
)
def test_rules_that_are_refused(rules: Any, words: list[str]) -> None:
    params = {"kernel": normal(1, 64, 8), "bias": jnp.ones(8), "steps": jnp.ones((2, 2), jnp.int32)}
    with pytest.raises(ValueError) as error:
        quantize(params, rules)
    assert all(word in str(error.value) for word in words), error.value


def test_leaves_that_are_refused() -> None:
    fn, params, tokens = small_model()
    sites = lorax.trace(fn, params, tokens)
    cases = [
        (lambda: quantize(params, {"blocks/bias": NF4()}, sites=sites), ["blocks/bias", "contracts"]),
        (lambda: quantize(params, {"head/kernel": NF4()}, sites=[sites["embed"]]), ["head/kernel", "among the sites"]),
        (lambda: quantize({"head": {"kernel": normal(1, 64, 3)}}, {".*": NF4()}, sites=sites), ["(64, 10)"]),
        (lambda: quantize(quantize(params, {"embed": NF4()}), {"embed": Int8()}), ["embed", "already", "NF4"]),
        (lambda: quantize_leaf(jnp.float32(1), NF4(), fan_in=(), fan_out=()), ["0 axes"]),
        (lambda: quantize_leaf(jnp.ones((0, 3)), NF4(), fan_in=(0,), fan_out=(1,)), ["empty"]),
        (lambda: quantize_leaf(jnp.ones((2, 3)), NF4(), fan_in=(0,), fan_out=(0,)), ["(2, 3)", "fan_in=(0,)"]),
        (lambda: quantize_leaf(jnp.ones((2, 3)), None, fan_in=(0,), fan_out=(1,)), ["None", "NF4"]),
        (lambda: stack_nodes([]), ["no nodes"]),
        (lambda: stack_nodes([kernel(jnp.ones((4, 64)), f) for f in (NF4(), Int8())]), ["entry 1", "Int8"]),
    ]
    for act, words in cases:
        with pytest.raises(ValueError) as error:
            act()
        assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("make", [np.array, jnp.array])
def test_numbers_that_are_not_finite_are_refused(bad: float, make: Any) -> None:
    weight = np.array(normal(1, 3, 64, 8))
    weight[2, 5, 7] = bad
    with pytest.raises(ValueError, match="block/kernel: it holds NaN or infinity"):
        quantize({"block": {"kernel": make(weight)}}, {".*": NF4()})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NF4(block=0), "block is 0"),
        (lambda: NF4(block=63), "block is 63"),
        (lambda: Int4(block=True), "block is True"),
        (lambda: FP4(block="64"), "block is '64'"),
        (lambda: NF4(double=1), "double is 1"),
        (lambda: Int4(symmetric=None), "symmetric is None"),
        (lambda: FP4(variant="e3m0"), "e3m0.*bnb, e2m1"),
    ],
)
def test_settings_that_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


# Meshes.


def test_partition_specs() -> None:
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "model"))
    spec = jax.P(None, "data", "model", None)
    node = quantize_leaf(normal(1, 3, 256, 4, 16), NF4(), fan_in=(1,), fan_out=(2, 3), stack=1)
    specs = node.partition_specs(spec, mesh)
    assert jax.tree.structure(specs) == jax.tree.structure(node)
    assert tuple(specs.codes) == tuple(specs.absmax) == (None, "model", "data")
    assert (tuple(specs.absmax2), tuple(specs.offset)) == ((None, None), (None,))
    # A second axis of the rows stays together, and so do two blocks a row on four devices.
    assert tuple(node.partition_specs(jax.P(None, "model", None, "data"), mesh).codes) == (None, None, "model")
    two = quantize_leaf(normal(1, 128, 8), NF4(double=False), fan_in=(0,), fan_out=(1,))
    assert tuple(two.partition_specs(jax.P("model", "data"), mesh).codes) == ("data", None)
    assert tuple(two.partition_specs(jax.P("data", "model"), mesh).absmax) == ("model", "data")
    # Without a mesh the codes alone are split along columns.
    bare = two.partition_specs(jax.P("data", "model"))
    assert (tuple(bare.codes), tuple(bare.absmax)) == (("model", "data"), ("model", None))
    eight = quantize_leaf(normal(1, 128, 8), Int8(), fan_in=(0,), fan_out=(1,))
    eight = eight.partition_specs(jax.P("data", "model"), mesh)
    assert (tuple(eight.codes), tuple(eight.absmax)) == (("model", "data"), ("model", None))
    flat = quantize_leaf(normal(1, 3, 50, 8), NF4(), fan_in=(1,), fan_out=(2,), stack=1)
    assert tuple(flat.partition_specs(jax.P("data", None, "model"), mesh).codes) == ("data", None, None)


@pytest.mark.slow
def test_on_eight_devices() -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.quant_on_eight_devices"]
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(
        command, cwd=root, env=os.environ | flags, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count("ok ") == 10, done.stdout
