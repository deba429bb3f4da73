"""Experts: one matrix each, chosen by vmap, by a gather, by a grouped product or by a dense mixture."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import lax

from tests.zoo.entry import Built, entry, linen, nnx_split, normal, tokens

X_TxD = normal(1, 6, 5)
EXPERT_SHAPES = {"up": ((3, 5, 2), (3, 2, 7)), "down": ((3, 7, 2), (3, 2, 5))}
EXPERT_NUMBERS = 2 * 3 * 2 * (5 + 7)


def experts() -> dict[str, jax.Array]:
    """Three experts with a hidden layer of 7."""
    return {"up": normal(3, 3, 5, 7), "down": normal(4, 3, 7, 5), "router": normal(5, 5, 3)}


@entry(factored="up|down", shapes=EXPERT_SHAPES, kinds={"up": "grouped", "down": "grouped"}, numbers=EXPERT_NUMBERS)
def ragged_dot() -> Built:
    def fn(p, x_TxD, sizes):
        return lax.ragged_dot(jnp.tanh(lax.ragged_dot(x_TxD, p["up"], sizes)), p["down"], sizes)

    params = {k: v for k, v in experts().items() if k != "router"}
    return fn, params, (X_TxD, jnp.array([1, 3, 2], jnp.int32))


@entry(factored="up|down|router", shapes=EXPERT_SHAPES)
def ragged_dot_with_routing() -> Built:
    """Tokens sorted by their expert, as dropless mixtures do, with the experts' hidden bias gathered."""

    def fn(p, x_TxD):
        expert_T = jnp.argmax(x_TxD @ p["router"], axis=1)
        weight_T = jnp.max(jax.nn.softmax(x_TxD @ p["router"]), axis=1)
        order = jnp.argsort(expert_T)
        sizes = jnp.bincount(expert_T, length=3).astype(jnp.int32)
        h = jnp.tanh(lax.ragged_dot(x_TxD[order], p["up"], sizes))
        y = lax.ragged_dot(h, p["down"], sizes)
        return jnp.zeros_like(x_TxD).at[order].set(y) * weight_T[:, None]

    return fn, experts(), (X_TxD,)


@entry(factored="up|down", shapes=EXPERT_SHAPES, numbers=EXPERT_NUMBERS)
def gather_of_expert() -> Built:
    """One matrix a token: `W[index]`, then a batched product."""

    def fn(p, x_TxD, index_T):
        h = jnp.tanh(jnp.einsum("td,tdf->tf", x_TxD, p["up"][index_T]))
        return jnp.einsum("tf,tfd->td", h, p["down"][index_T])

    params = {k: v for k, v in experts().items() if k != "router"}
    return fn, params, (X_TxD, tokens(1, 3, 6))


@entry(factored="up|down", numbers=EXPERT_NUMBERS)
def one_expert_for_all_tokens() -> Built:
    """A traced scalar picks the expert, as a task id or a noise level does."""

    def fn(p, x_TxD, index):
        return jnp.tanh(x_TxD @ p["up"][index]) @ lax.dynamic_index_in_dim(p["down"], index, keepdims=False)

    params = {k: v for k, v in experts().items() if k != "router"}
    return fn, params, (X_TxD, jnp.int32(1))


@entry(factored="up|down|router")
def dense_mixture() -> Built:
    def fn(p, x_TxD):
        gate_TxE = jax.nn.softmax(x_TxD @ p["router"])
        h = jnp.tanh(jnp.einsum("td,edf->tef", x_TxD, p["up"]))
        return jnp.einsum("te,ted->td", gate_TxE, jnp.einsum("tef,efd->ted", h, p["down"]))

    return fn, experts(), (X_TxD,)


@entry(factored="up|down|router", shapes=EXPERT_SHAPES)
def capacity_mixture() -> Built:
    """Dispatch and combine by einsum, as in Switch and in GShard."""

    def fn(p, x_TxD):
        gate_TxE = jax.nn.softmax(x_TxD @ p["router"])
        expert_TxE = jax.nn.one_hot(jnp.argmax(gate_TxE, 1), 3)
        place_TxE = ((jnp.cumsum(expert_TxE, 0) - 1) * expert_TxE).astype(jnp.int32)
        dispatch_TxExC = expert_TxE[..., None] * jax.nn.one_hot(place_TxE, 4)
        x_ExCxD = jnp.einsum("tec,td->ecd", dispatch_TxExC, x_TxD)
        h = jnp.tanh(jnp.einsum("ecd,edf->ecf", x_ExCxD, p["up"]))
        y = jnp.einsum("ecf,efd->ecd", h, p["down"])
        return jnp.einsum("tec,te,ecd->td", dispatch_TxExC, gate_TxE, y)

    return fn, experts(), (X_TxD,)


@entry(factored="up|down", shapes=EXPERT_SHAPES, numbers=EXPERT_NUMBERS)
def vmap_over_experts() -> Built:
    def fn(p, x_TxD):
        def one(up, down, x):
            return jnp.tanh(x @ up) @ down

        return jax.vmap(one)(p["up"], p["down"], x_TxD.reshape(3, 2, 5))

    return fn, {k: v for k, v in experts().items() if k != "router"}, (X_TxD,)


@entry(factored="up|down")
def vmap_over_experts_with_one_input() -> Built:
    """All experts read the same input: their axis is free in the first product and a batch axis in the second."""

    def fn(p, x_TxD):
        return jax.vmap(lambda up, down: jnp.tanh(x_TxD @ up) @ down)(p["up"], p["down"])

    return fn, {k: v for k, v in experts().items() if k != "router"}, (X_TxD,)


@entry(factored="kernel", shapes={"kernel": ((3, 5, 2), (3, 2, 7))})
def linen_vmap_experts() -> Built:
    make = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0, out_axes=0)
    return linen(make(7), X_TxD.reshape(3, 2, 5))


@entry(factored="kernel")
def linen_vmap_experts_on_axis_one() -> Built:
    make = nn.vmap(
        nn.Dense, variable_axes={"params": 1}, split_rngs={"params": True}, in_axes=None, out_axes=0, axis_size=3
    )
    return linen(make(7), X_TxD)


@entry(factored="kernel", shapes={"kernel": ((3, 5, 2), (3, 2, 7))})
def nnx_vmap_experts() -> Built:
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return nnx.Linear(5, 7, rngs=rngs)

    def call(model, x):
        return nnx.vmap(lambda m, x: m(x), in_axes=(0, 0))(model, x)

    return nnx_split(lambda: make(nnx.Rngs(0)), X_TxD.reshape(3, 2, 5), call=call)
