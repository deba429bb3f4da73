"""Quantised weights on a mesh of eight fake devices: `python -m tests.quant_on_eight_devices`, in a process of its own.

Prints a line for each check; an assertion fails the process.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax.quant import NF4, Format, Int4, Int8, Quantized, quantize, quantize_leaf
from tests.agreement import assert_identical, normal

WEIGHT = normal(1, 3, 256, 4, 16)  # layers, inputs, heads, width of a head
SPEC = P(None, "data", "model")
SETTINGS = {"fan_in": (1,), "fan_out": (2, 3), "stack": 1}
FORMATS = (NF4(), NF4(double=False), Int4(symmetric=False), Int8())


def mesh(kind: AxisType) -> Mesh:
    """A mesh of 2 × 4 devices."""
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"), axis_types=(kind,) * 2)


def placed(node: Quantized, where: Mesh) -> Quantized:
    """The node laid out as its weight would be under `SPEC`."""
    put = lambda x, spec: jax.device_put(x, NamedSharding(where, spec))
    return jax.tree.map(put, node, node.partition_specs(SPEC, where))


def check_placed(kind: AxisType, format: Format) -> None:
    """A node that was put on the mesh, and one that was made from a weight there, are split and say the same."""
    where, node = mesh(kind), quantize_leaf(WEIGHT, format, **SETTINGS)
    want = jax.device_get(node.dequantize())
    on_mesh = placed(node, where)
    assert on_mesh.codes.sharding.shard_shape(on_mesh.codes.shape)[1:] == (16, node.codes.shape[-1] // 2)
    weight = jax.device_put(WEIGHT, NamedSharding(where, SPEC))
    make = functools.partial(quantize_leaf, format=format, **SETTINGS)
    for made in (on_mesh, make(weight), jax.jit(make)(weight) if kind == AxisType.Explicit else on_mesh):
        assert_identical(jax.device_get(made), jax.device_get(node))
        is_same = lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim)
        assert jax.tree.all(jax.tree.map(is_same, made, on_mesh)), jax.tree.map(jax.typeof, made)
        assert made.sharding.is_equivalent_to(weight.sharding, weight.ndim)
        for got in (made.dequantize(), jax.jit(lambda n: n.dequantize())(made)):
            assert_identical(jax.device_get(got), want)
            if kind == AxisType.Explicit or not got.sharding.is_fully_replicated:
                assert got.sharding.is_equivalent_to(weight.sharding, got.ndim), got.sharding
        layers = jax.lax.map(lambda part: part.dequantize(), made)
        assert_identical(jax.device_get(layers), want)
    print("ok", kind, format)


def check_nothing_is_gathered() -> None:
    """Dequantising where the codes lie moves nothing between devices."""
    where = mesh(AxisType.Auto)
    for format in (NF4(double=False), Int8()):
        node = placed(quantize_leaf(WEIGHT, format, **SETTINGS), where)
        run = jax.jit(lambda n: n.dequantize(), out_shardings=NamedSharding(where, SPEC))
        text = run.lower(node).compile().as_text()
        moves = ("all-gather", "all-to-all", "collective-permute", "all-reduce")
        assert not any(word in text for word in moves), format
    print("ok nothing is gathered")


def check_abstract() -> None:
    """An abstract weight with a sharding gives abstract children with theirs."""
    where = mesh(AxisType.Auto)
    leaf = jax.ShapeDtypeStruct(WEIGHT.shape, jnp.bfloat16, sharding=NamedSharding(where, SPEC))
    node = quantize_leaf(leaf, NF4(), **SETTINGS)
    assert node.codes.sharding == NamedSharding(where, P(None, "model", "data"))
    assert node.absmax2.sharding == NamedSharding(where, P(None, None))
    uneven = jax.device_put(jnp.ones((50, 8)), NamedSharding(where, P("data", "model")))
    flat = quantize({"w": uneven}, {"w": NF4()})["w"]
    assert flat.is_flat and flat.codes.sharding.is_fully_replicated
    print("ok abstract")


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        for each in FORMATS:
            check_placed(axis_type, each)
    check_nothing_is_gathered()
    check_abstract()
