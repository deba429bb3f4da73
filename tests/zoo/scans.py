"""Stacked layers: scans over plain arrays, linen and nnx stacks, with and without rematerialisation."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import lax

from tests.zoo.entry import Built, entry, linen, nnx_split, normal

X = normal(1, 4, 5)
X_BxTxD = normal(2, 2, 3, 8)
STACK = {"kernel": normal(3, 3, 5, 5), "bias": normal(4, 3, 5)}


def layer(x_BxD: jax.Array, p: dict[str, jax.Array]) -> tuple[jax.Array, None]:
    """One scanned dense layer."""
    return jnp.tanh(x_BxD @ p["kernel"] + p["bias"]), None


@entry(factored="kernel", shapes={"kernel": ((3, 5, 2), (3, 2, 5))}, numbers=3 * 20)
def scan() -> Built:
    return lambda p, x: lax.scan(layer, x, p)[0], STACK, (X,)


@entry(factored="kernel", numbers=3 * 20)
def scan_with_remat() -> Built:
    return lambda p, x: lax.scan(jax.checkpoint(layer), x, p)[0], STACK, (X,)


@entry(factored="kernel", numbers=3 * 20)
def scan_reversed_and_unrolled() -> Built:
    return lambda p, x: lax.scan(layer, x, p, reverse=True, unroll=2), STACK, (X,)


@entry(factored="kernel", numbers=3 * 20)
def scan_over_axis_one() -> Built:
    params = {"kernel": normal(3, 5, 3, 5), "bias": normal(4, 5, 3)}

    def fn(p, x):
        return lax.scan(layer, x, {"kernel": jnp.moveaxis(p["kernel"], 1, 0), "bias": p["bias"].T})[0]

    return fn, params, (X,)


@entry(factored="kernel", numbers=3 * 20)
def scan_over_the_last_axis() -> Built:
    def fn(p, x):
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["kernel"].transpose(2, 0, 1))[0]

    return fn, {"kernel": normal(3, 5, 5, 3)}, (X,)


@entry(factored="kernel", shapes={"kernel": ((5, 2), (2, 5))})
def scan_over_time_with_constant_weights() -> Built:
    def fn(p, xs):
        def step(c, x):
            y, _ = layer(c + x, p)
            return y, y

        return lax.scan(step, jnp.zeros((4, 5)), xs)

    return fn, {"kernel": normal(3, 5, 5), "bias": normal(4, 5)}, (normal(1, 3, 4, 5),)


@entry(factored="outer|inner", shapes={"inner": ((2, 3, 5, 2), (2, 3, 2, 5))})
def nested_scans() -> Built:
    def fn(p, x):
        def block(c, ws):
            c = jnp.tanh(c @ ws["outer"])
            return lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None)), c, ws["inner"])

        return lax.scan(jax.checkpoint(block), x, p)[0]

    return fn, {"outer": normal(3, 2, 5, 5), "inner": normal(4, 2, 3, 5, 5)}, (X,)


@entry(factored="w", numbers=4 * 20)
def stack_regrouped_for_nested_scans() -> Built:
    """Four stacked layers, scanned as two groups of two."""

    def fn(p, x):
        def block(c, ws):
            return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), c, ws)

        return lax.scan(block, x, p["w"].reshape(2, 2, 5, 5))[0]

    return fn, {"w": normal(3, 4, 5, 5)}, (X,)


@entry(factored="kernel", numbers=3 * 20)
def stack_used_by_a_python_loop() -> Built:
    def fn(p, x):
        for i in range(3):
            x, _ = layer(x, jax.tree.map(lambda a, i=i: a[i], p))
        return x

    return fn, STACK, (X,)


@entry(factored="kernel", numbers=3 * 20)
def part_of_a_stack() -> Built:
    """Only the last two of three layers are run."""
    return lambda p, x: lax.scan(layer, x, {"kernel": p["kernel"][1:], "bias": p["bias"][1:]})[0], STACK, (X,)


@entry(factored="kernel", numbers=3 * 20)
def stack_indexed_by_a_loop_counter() -> Built:
    def fn(p, x):
        def body(i, c):
            return jnp.tanh(c @ lax.dynamic_index_in_dim(p["kernel"], i, keepdims=False) + p["bias"][i])

        return lax.fori_loop(0, 3, body, x)

    return fn, STACK, (X,)


@entry(factored=r"layers/\d/kernel", numbers=3 * 20)
def layers_stacked_before_the_scan() -> Built:
    def fn(p, x):
        return lax.scan(layer, x, jax.tree.map(lambda *a: jnp.stack(a), *p["layers"]))[0]

    params = {"layers": [{"kernel": normal(i, 5, 5), "bias": normal(9 + i, 5)} for i in range(3)]}
    return fn, params, (X,)


@entry(factored="w")
def weight_carried_through_a_scan() -> Built:
    def fn(p, x):
        return lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1]), None), (x, p["w"]), None, length=3)[0][0]

    return fn, {"w": normal(3, 5, 5)}, (X,)


@entry(factored="w|stack")
def map_over_the_batch_and_over_weights() -> Built:
    def fn(p, x):
        y = lax.map(lambda row: jnp.tanh(row @ p["w"]), x)
        return lax.map(lambda w: y @ w, p["stack"])

    return fn, {"w": normal(3, 5, 7), "stack": normal(4, 3, 7, 2)}, (X,)


class Block(nn.Module):
    """A scanned block: attention-shaped kernels, a norm and an MLP."""

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        h = nn.LayerNorm(name="norm")(x_BxTxD)
        q = nn.DenseGeneral((2, 4), name="query")(h)
        x_BxTxD = x_BxTxD + nn.DenseGeneral(8, axis=(-2, -1), name="out")(jnp.tanh(q))
        return x_BxTxD + nn.Dense(8, name="mlp")(h), None


def stacked(axis: int, remat: bool) -> nn.Module:
    """Three blocks behind one `nn.scan`, stacked on an axis."""
    block = nn.remat(Block, prevent_cse=False) if remat else Block
    return nn.scan(block, variable_axes={"params": axis}, split_rngs={"params": True}, length=3)()


@entry(factored=".*kernel", numbers=3 * 3 * 32, shapes={"out/kernel": ((3, 2, 4, 2), (3, 2, 8))})
def linen_scan() -> Built:
    return linen(stacked(0, remat=False), X_BxTxD, None)


@entry(factored=".*kernel", numbers=3 * 3 * 32)
def linen_scan_on_axis_one() -> Built:
    return linen(stacked(1, remat=False), X_BxTxD, None)


@entry(factored=".*kernel", numbers=3 * 3 * 32)
def linen_scan_with_remat() -> Built:
    return linen(stacked(0, remat=True), X_BxTxD, None)


@entry(factored=".*kernel", numbers=3 * 3 * 32)
def linen_scan_on_axis_one_with_remat() -> Built:
    return linen(stacked(1, remat=True), X_BxTxD, None)


@entry(factored=".*kernel", numbers=4 * 3 * 32)
def linen_nested_scan() -> Built:
    class Group(nn.Module):
        @nn.compact
        def __call__(self, x_BxTxD, _):
            inner = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return inner(name="inner")(x_BxTxD, None)

    outer = nn.scan(nn.remat(Group), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    return linen(outer(), X_BxTxD, None)


@entry(factored=".*kernel", numbers=4 * 20)
def linen_remat_scan() -> Built:
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.tanh(nn.Dense(5)(x))

    return linen(nn.remat_scan(Body, lengths=(2, 2))(), X)


class NnxBlock(nnx.Module):
    """A block with attention, for stacks made by `nnx.vmap`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.query = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.out = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), rngs=rngs)
        self.mlp = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        h = self.norm(x_BxTxD)
        return x_BxTxD + self.out(jnp.tanh(self.query(h))) + self.mlp(h)


def nnx_stack(axis: int, remat: bool) -> Built:
    """Three nnx blocks stacked on an axis and scanned."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(nnx.StateAxes({nnx.RngState: 0}),), out_axes=nnx.StateAxes({nnx.Param: axis, ...: 0}))
    def make(rngs):
        return NnxBlock(rngs)

    def call(blocks, x_BxTxD):
        def step(x_BxTxD, block):
            return (nnx.remat(lambda b, x: b(x)) if remat else lambda b, x: b(x))(block, x_BxTxD)

        axes = (nnx.Carry, nnx.StateAxes({nnx.Param: axis, ...: 0}))
        return nnx.scan(step, in_axes=axes, out_axes=nnx.Carry)(x_BxTxD, blocks)

    return nnx_split(lambda: make(nnx.Rngs(0)), X_BxTxD, call=call)


@entry(factored=".*kernel", numbers=3 * 3 * 32, shapes={"out/kernel": ((3, 2, 4, 2), (3, 2, 8))})
def nnx_scan() -> Built:
    return nnx_stack(0, remat=False)


@entry(factored=".*kernel", numbers=3 * 3 * 32)
def nnx_scan_on_axis_one_with_remat() -> Built:
    return nnx_stack(1, remat=True)
