"""Parameter trees of every shape: containers, boxes, leaves that are no weights."""

import dataclasses
import typing

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import AxisType, Mesh

from tests.zoo.entry import Built, entry, linen, nnx_split, normal

X = normal(1, 4, 5)


@entry(factored=r"layers/\d/0|heads/[37]/w", numbers=80)
def lists_tuples_and_integer_keys() -> Built:
    def fn(p, x):
        for w, b in p["layers"]:
            x = jnp.tanh(x @ w + b)
        return x @ p["heads"][3]["w"] @ p["heads"][7]["w"]

    layers = [(normal(i, 5, 5), normal(9 + i, 5)) for i in range(2)]
    return fn, {"layers": layers, "heads": {3: {"w": normal(3, 5, 5)}, 7: {"w": normal(7, 5, 5)}}}, (X,)


@entry(factored=r"layers/\d+|a/w|a-b/w|a.b/w", numbers=14 * 20 + 2 * 20 - 20)
def order_of_paths_is_not_alphabetical() -> Built:
    """More than ten layers in a list, and keys with characters that sort before a slash."""

    def fn(p, x):
        for i, w in enumerate(p["layers"]):
            x = jnp.tanh(x @ (w if i % 3 else w.T))
        return x @ p["a"]["w"] @ p["a-b"]["w"].T @ p["a.b"]["w"]

    layers = [normal(i, 5, 5) for i in range(12)]
    return fn, {"layers": layers} | {k: {"w": normal(i, 5, 5)} for i, k in enumerate(["a", "a-b", "a.b"], 20)}, (X,)


@flax.struct.dataclass
class Projections:
    """Parameters of an attention head as a dataclass, with a field called `value` and a static one."""

    query: jax.Array
    value: jax.Array
    heads: int = flax.struct.field(pytree_node=False, default=1)


class Pair(typing.NamedTuple):
    """Parameters as a named tuple."""

    kernel: jax.Array
    bias: jax.Array


@entry(factored="attn/(query|value)|dense/kernel|tail/kernel", numbers=80)
def dataclasses_and_named_tuples() -> Built:
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Tail:
        kernel: jax.Array

    def fn(p, x):
        x = jnp.tanh(x @ p["attn"].query / p["attn"].heads) * (x @ p["attn"].value)
        return (x @ p["dense"].kernel + p["dense"].bias) @ p["tail"].kernel

    w = [normal(i, 5, 5) for i in range(4)]
    return fn, {"attn": Projections(w[0], w[1], heads=2), "dense": Pair(w[2], normal(9, 5)), "tail": Tail(w[3])}, (X,)


@entry(factored="w", numbers=20)
def none_leaves_and_empty_subtrees() -> Built:
    def fn(p, x):
        y = x @ p["w"]
        return y if p["bias"] is None else y + p["bias"]

    return fn, {"w": normal(3, 5, 5), "bias": None, "empty": {}, "also": [(), None, {}]}, (X,)


@entry(factored="w", numbers=20)
def integer_boolean_and_key_leaves() -> Built:
    def fn(p, x):
        noise = jax.random.normal(p["key"], x.shape) * 0.1
        y = (x + noise) @ p["w"]
        return jnp.where(p["mask"], y, 0)[:, p["order"]] + p["steps"]

    params = {
        "w": normal(3, 5, 5),
        "key": jax.random.key(3),
        "mask": jnp.array([True, False, True, True, True]),
        "order": jnp.array([1, 0, 2, 4, 3]),
        "steps": jnp.uint8(7),
    }
    return fn, params, (X,)


@entry(factored="w", numbers=20)
def numpy_and_python_leaves() -> Built:
    def fn(p, x):
        return x @ p["w"] * p["gain"] + p["offset"] + p["b"]

    return fn, {"w": np.asarray(normal(3, 5, 5)), "b": np.ones(5, np.float32), "gain": 1.5, "offset": 2}, (X,)


@entry(factored="w", numbers=20)
def frozen_dict_and_static_outputs() -> Built:
    return lambda p, x: {"y": x @ p["w"], "none": None, "flag": True}, FrozenDict({"w": normal(3, 5, 5)}), (X,)


@entry(factored="", numbers=0)
def nothing_to_adapt() -> Built:
    return lambda p, x: x * p["scale"] + p["bias"], {"scale": normal(3, 5), "bias": normal(4, 5)}, (X,)


@entry(factored="", numbers=0)
def unused_weight() -> Built:
    return lambda p, x: jnp.sin(x), {"w": normal(3, 5, 5)}, (X,)


@entry(anything=".*", numbers=20)
def only_a_bare_array() -> Built:
    """The parameters are one array: its path is the empty string, or whatever it is called."""
    return lambda p, x: x @ p, normal(3, 5, 5), (X,)


@entry(factored="w", numbers=20)
def arguments_that_are_no_arrays() -> Built:
    """Flags, strings, functions, None and numbers among the arguments."""

    def fn(p, batch, train, activation, mode, extra, power):
        y = activation(batch["x"] @ p["w"])
        if train or mode == "double":
            y = y * 2
        return (y if extra is None else y + extra) ** power

    return fn, {"w": normal(3, 5, 5)}, ({"x": X, "y": None}, False, jnp.tanh, "double", None, 2)


class Boxed(nn.Module):
    """Two dense layers with partitioned kernels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        x = jnp.tanh(nn.Dense(7, kernel_init=init)(x))
        logical = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        return nn.Dense(3, kernel_init=logical)(x)


@entry(factored=r"Dense_\d/kernel", numbers=2 * (12 + 10))
def linen_partitioned() -> Built:
    return linen(Boxed(), X)


@entry(factored=r"value/kernel|proj/kernel", numbers=2 * (12 + 10))
def nnx_partitioned() -> Built:
    class Model(nnx.Module):
        def __init__(self, rngs):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
            with jax.set_mesh(Mesh(np.array(jax.devices()[:1]), ("model",), axis_types=(AxisType.Auto,))):
                self.value = nnx.Linear(5, 7, kernel_init=init, rngs=rngs)
            self.proj = nnx.Linear(7, 3, rngs=rngs)

        def __call__(self, x):
            return self.proj(jnp.tanh(self.value(x)))

    return nnx_split(lambda: Model(nnx.Rngs(0)), X, abstract=False)


@entry(factored="layers/[01]/kernel|head", numbers=60)
def nnx_lists_and_raw_params() -> Built:
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(5, 5, rngs=rngs) for _ in range(2)])
            self.head = nnx.Param(jnp.zeros((5, 5)))

        def __call__(self, x):
            for layer in self.layers:
                x = jnp.tanh(layer(x))
            return x @ self.head[...]

    return nnx_split(lambda: Model(nnx.Rngs(0)), X)


@entry(factored=r"0/kernel|1/kernel", numbers=40)
def nnx_pure_dict() -> Built:
    """The state as a plain dict, as checkpoints hold it."""
    graph, state = nnx.split(nnx.eval_shape(lambda: nnx.List([nnx.Linear(5, 5, rngs=nnx.Rngs(0)) for _ in range(2)])))
    pure = jax.tree.map(lambda s: normal(s.ndim, *s.shape), nnx.to_pure_dict(state))

    def fn(p, x):
        full = jax.tree.map(lambda s: s, state)
        nnx.replace_by_pure_dict(full, p)
        for layer in nnx.merge(graph, full):
            x = jnp.tanh(layer(x))
        return x

    return fn, pure, (X,)
