"""Control flow and wrappers that a weight passes through on its way to a product."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, PartitionSpec

from tests.zoo.entry import Built, entry, normal

X = normal(1, 4, 5)


def matrix(seed: int = 3) -> dict[str, jax.Array]:
    """A square weight, its bias."""
    return {"w": normal(seed, 5, 5), "b": normal(seed + 50, 5)}


@entry(factored="w", numbers=20)
def inner_jit() -> Built:
    inner = jax.jit(lambda w, x: jnp.tanh(x @ w))
    outer = jax.jit(lambda p, x: inner(p["w"], inner(p["w"], x)) + p["b"])
    return outer, matrix(), (X,)


@entry(factored="w", numbers=20)
def inner_jit_with_static_arguments() -> Built:
    @functools.partial(jax.jit, static_argnames=("activation",), donate_argnums=())
    def dense(w, x, *, activation):
        return getattr(jnp, activation)(x @ w)

    return lambda p, x: dense(p["w"], x, activation="sin") + p["b"], matrix(), (X,)


@entry(factored="w", numbers=20)
def checkpoint() -> Built:
    return lambda p, x: jax.checkpoint(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]))(p, x), matrix(), (X,)


@entry(factored="w", numbers=20)
def checkpoint_policies() -> Built:
    policies = jax.checkpoint_policies

    def fn(p, x):
        def body(x):
            y = checkpoint_name(x @ p["w"], "kept")
            return jnp.tanh(y + p["b"])

        for policy in (policies.dots_saveable, policies.save_only_these_names("kept"), policies.nothing_saveable):
            x = jax.checkpoint(body, policy=policy)(x)
        return x

    return fn, matrix(), (X,)


@entry(factored="w|v", numbers=40)
def cond() -> Built:
    def fn(p, x, flag):
        x = lax.cond(flag, lambda w, x: jnp.tanh(x @ w), lambda w, x: x @ w.T, p["w"], x)
        return lax.cond(flag, lambda: x, lambda: x @ p["v"]) + p["b"]

    return fn, matrix() | {"v": normal(5, 5, 5)}, (X, jnp.array(False))


@entry(factored="[uvw]", numbers=60)
def switch() -> Built:
    def fn(p, x, index):
        branches = [lambda x: x @ p["u"], lambda x: jnp.tanh(x @ p["v"]), lambda x: jnp.sin(x @ p["w"].T)]
        return sum(lax.switch(i, branches, x) for i in (index, (index + 1) % 3, (index + 2) % 3))

    return fn, {k: normal(i, 5, 5) for i, k in enumerate("uvw")}, (X, jnp.int32(1))


@entry(adaptable="w", anything="v")
def branch_that_chooses_the_weight() -> Built:
    """The weight itself leaves the conditional, and one leaf is the other way round in the other branch."""

    def fn(p, x, flag):
        x = jnp.tanh(x @ lax.cond(flag, lambda w: w, lambda w: 2 * w, p["w"]))
        return x @ lax.cond(flag, lambda v: v, lambda v: v.T, p["v"])

    return fn, {"w": normal(3, 5, 5), "v": normal(4, 5, 5)}, (X, jnp.array(True))


@entry(factored="w", numbers=20, grad=False)
def while_loop() -> Built:
    def fn(p, x, n):
        def body(state):
            i, x = state
            return i + 1, jnp.tanh(x @ p["w"] + p["b"])

        return lax.while_loop(lambda state: (state[0] < n) & (jnp.sum(state[1] @ p["w"]) < 1e6), body, (0, x))

    return fn, matrix(), (X, jnp.int32(3))


@entry(factored="w", numbers=20)
def fori_loop() -> Built:
    return lambda p, x: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"] + i * p["b"]), x), matrix(), (X,)


@entry(factored="w", numbers=20)
def vmap_over_the_batch() -> Built:
    return lambda p, x: jax.vmap(lambda row: jnp.tanh(p["w"].T @ row) + p["b"])(x), matrix(), (X,)


@entry(factored="w|v", numbers=40)
def gradient_inside() -> Built:
    """A score function: minus the gradient of an energy with respect to its input."""

    def fn(p, x):
        energy = lambda x: jnp.sum(jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]))
        return -jax.grad(energy)(x)

    return fn, matrix() | {"v": normal(5, 5, 5)}, (X,)


@entry(factored="w", numbers=20)
def jvp_and_divergence_inside() -> Built:
    def fn(p, x):
        field = lambda x: jnp.tanh(x @ p["w"] + p["b"])
        y, dy = jax.jvp(field, (x,), (jnp.ones_like(x),))
        return y, dy, jax.vmap(lambda row: jnp.trace(jax.jacfwd(field)(row)))(x)

    return fn, matrix(), (X,)


@entry(materialised="w", numbers=20)
def inner_optimisation_step() -> Built:
    """A gradient step on the weights themselves, as in test-time training."""

    def fn(p, x):
        loss = lambda w: jnp.mean((x @ w - x) ** 2)
        return x @ (p["w"] - 0.1 * jax.grad(loss)(p["w"]))

    return fn, {"w": normal(3, 5, 5)}, (X,)


@jax.custom_vjp
def straight_through(w: jax.Array, x: jax.Array) -> jax.Array:
    """A product with rounded weights."""
    return x @ (jnp.round(w * 8) / 8 + w)


straight_through.defvjp(
    lambda w, x: (straight_through(w, x), (w, x)),
    # Neither is the true derivative: the author scales one by 3 and takes the sine of the other.
    lambda saved, dy: (3.0 * saved[1].T @ dy, jnp.sin(dy) @ saved[0].T),
)


@entry(materialised="w", factored="v", numbers=40)
def custom_vjp_with_the_weight() -> Built:
    return lambda p, x: straight_through(p["w"], x) @ p["v"], {"w": normal(3, 5, 5), "v": normal(4, 5, 5)}, (X,)


@jax.custom_vjp
def clipped_cotangent(x: jax.Array) -> jax.Array:
    """Identity with a clipped cotangent."""
    return x


clipped_cotangent.defvjp(lambda x: (x, None), lambda _, dy: (jnp.clip(dy, -0.01, 0.01),))


@entry(factored="w|v", numbers=40)
def custom_vjp_on_activations() -> Built:
    return lambda p, x: clipped_cotangent(x @ p["w"]) @ p["v"], {"w": normal(3, 5, 5), "v": normal(4, 5, 5)}, (X,)


@jax.custom_jvp
def dense_with_own_tangent(w: jax.Array, x: jax.Array) -> jax.Array:
    """A dense layer whose author gives the tangent of a smoother function."""
    return jax.nn.relu(x @ w)


@dense_with_own_tangent.defjvp
def _dense_tangent(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return dense_with_own_tangent(w, x), jax.nn.sigmoid(x @ w) * (x @ dw + 2 * dx @ w)


@entry(adaptable="w", numbers=20)
def custom_jvp_with_the_weight() -> Built:
    return lambda p, x: dense_with_own_tangent(p["w"], dense_with_own_tangent(p["w"], x)), matrix(), (X,)


@jax.custom_jvp
def own_slope(x: jax.Array) -> jax.Array:
    """A step with a made-up slope."""
    return jnp.sign(x)


own_slope.defjvps(lambda dx, y, x: dx / (1 + x**2))


@entry(factored="w|v", numbers=40)
def custom_jvp_on_activations() -> Built:
    return lambda p, x: own_slope(jax.nn.silu(x @ p["w"])) @ p["v"], {"w": normal(3, 5, 5), "v": normal(4, 5, 5)}, (X,)


@entry(factored="[wv]", numbers=40)
def shard_map() -> Built:
    """On a mesh of one device; `eight_devices.py` has a real one."""
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec

    def fn(p, x):
        def block(w, v, x):
            return lax.psum(jnp.tanh(x @ w) @ v, "model")

        mapped = jax.shard_map(
            block,
            mesh=mesh,
            in_specs=(spec(None, "model"), spec("model", None), spec("data")),
            out_specs=spec("data"),
        )
        return mapped(p["w"], p["v"], x) + p["b"]

    return fn, matrix() | {"v": normal(5, 5, 5)}, (X,)


@entry(factored="w", numbers=20)
def sharding_constraint() -> Built:
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",), axis_types=(AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec(None, "model"))
    return lambda p, x: x @ lax.with_sharding_constraint(p["w"], sharding) + p["b"], matrix(), (X,)


@entry(factored="w", numbers=20)
def every_wrapper_at_once() -> Built:
    def fn(p, x, flag):
        @jax.checkpoint
        def body(x, w):
            dense = jax.jit(lambda w, x: jax.named_call(jnp.tanh, name="tanh")(x @ w))
            return lax.cond(flag, dense, lambda w, x: x, w, x), None

        rows = jax.vmap(lambda row: lax.scan(body, row, p["w"])[0])
        return jax.jit(rows)(x)

    return fn, {"w": normal(3, 1, 5, 5)}, (X, jnp.array(True))


@entry(factored="w", numbers=20)
def associative_scan_over_products() -> Built:
    def fn(p, x):
        return lax.associative_scan(jnp.add, jnp.tanh(x @ p["w"])), jnp.cumsum(x @ p["w"], 0)

    return fn, {"w": normal(3, 5, 5)}, (X,)
