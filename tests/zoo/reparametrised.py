"""Weights computed from leaves: scaled, normalised, summed, multiplied, concatenated."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tests.zoo.entry import Built, entry, linen, nnx_split, normal

X = normal(1, 4, 5)


@entry(factored="w[1234]", numbers=2 * (12 + 13 + 12 + 11))
def scalar_scaled() -> Built:
    def fn(p, x, s):
        x = jnp.tanh(x @ (p["w1"] * (1 / 5**0.5)))
        x = jnp.tanh(x @ (p["w2"] / s))
        x = jnp.tanh(x @ (p["gain"] * p["w3"]))
        return x @ -p["w4"]

    params = {
        "w1": normal(3, 5, 7),
        "w2": normal(4, 7, 6),
        "w3": normal(5, 6, 6),
        "w4": normal(6, 6, 5),
        "gain": jnp.float32(1.3),
    }
    return fn, params, (X, jnp.float32(2.0))


@entry(factored="w", numbers=24)
def per_output_vector_scaled() -> Built:
    return lambda p, x: x @ (p["w"] * p["scale"]), {"w": normal(3, 5, 7), "scale": normal(4, 7)}, (X,)


@entry(factored="w", numbers=24)
def per_input_vector_scaled() -> Built:
    return lambda p, x: x @ (p["w"] * p["scale"][:, None]), {"w": normal(3, 5, 7), "scale": normal(4, 5)}, (X,)


@entry(factored="w", numbers=2 * (5 + 14))
def per_head_scaled() -> Built:
    """Equalised learning rate and a gain per head."""

    def fn(p, x):
        return jnp.einsum("bi,ihk->bhk", x, p["w"] * p["gain"][:, None])

    return fn, {"w": normal(3, 5, 2, 7), "gain": normal(4, 2)}, (X,)


@entry(materialised="v", numbers=24)
def weight_norm() -> Built:
    def fn(p, x):
        return x @ (p["v"] / jnp.linalg.norm(p["v"], axis=0) * p["g"])

    return fn, {"v": normal(3, 5, 7), "g": normal(4, 7)}, (X,)


@entry(materialised="v", numbers=2 * (3 * 5 + 7))
def weight_norm_of_a_convolution_with_a_gain_of_full_rank() -> Built:
    """The gain has the kernel's rank; what it is repeated along is no fan-in of its own."""

    def fn(p, x):
        kernel = p["v"] / jnp.linalg.norm(p["v"], axis=(0, 1), keepdims=True) * p["g"]
        return lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    return fn, {"v": normal(3, 3, 5, 7), "g": normal(4, 1, 1, 7)}, (normal(1, 2, 6, 5),)


@entry(materialised="w", numbers=24)
def weight_standardisation() -> Built:
    def fn(p, x):
        w = p["w"]
        return x @ ((w - w.mean(0)) * lax.rsqrt(w.var(0) + 1e-3))

    return fn, {"w": normal(3, 5, 7)}, (X,)


@entry(materialised="w", numbers=3 * 20)
def weight_norm_inside_a_rematerialised_scan() -> Built:
    def fn(p, x):
        body = jax.checkpoint(lambda c, w: (jnp.tanh(c @ (w / jnp.linalg.norm(w, axis=0))), None))
        return lax.scan(body, x, p["w"])[0]

    return fn, {"w": normal(3, 3, 5, 5)}, (X,)


@entry(materialised="u|v", numbers=48)
def product_of_two_leaves() -> Built:
    return lambda p, x: x @ (p["u"] * p["v"]), {"u": normal(3, 5, 7), "v": normal(4, 5, 7)}, (X,)


@entry(adaptable="u|v")
def matrix_product_of_two_leaves() -> Built:
    return lambda p, x: x @ (p["u"] @ p["v"]), {"u": normal(3, 5, 6), "v": normal(4, 6, 7)}, (X,)


@entry(adaptable="u|v", numbers=48)
def sum_of_two_leaves() -> Built:
    return lambda p, x: x @ (p["u"] + p["v"]), {"u": normal(3, 5, 7), "v": normal(4, 5, 7)}, (X,)


@entry(adaptable="w|v")
def masked_and_triangular() -> Built:
    def fn(p, x):
        mask = jnp.arange(35).reshape(5, 7) % 3 == 0
        return jnp.where(mask, p["w"], 0).T @ (jnp.tril(p["v"]) @ x.T)

    return fn, {"w": normal(3, 5, 7), "v": normal(4, 5, 5)}, (X,)


@entry(adaptable="w")
def identity_plus_weight() -> Built:
    return lambda p, x: x @ (jnp.eye(5) + p["w"]), {"w": normal(3, 5, 5)}, (X,)


@entry(factored="[qkv]", numbers=2 * 3 * 13)
def concatenated_before_the_product() -> Built:
    def fn(p, x):
        return jnp.split(x @ jnp.concatenate([p["q"], p["k"], p["v"]], axis=1), 3, axis=1)

    return fn, {k: normal(i, 5, 8) for i, k in enumerate("qkv", 3)}, (X,)


@entry(adaptable="w", inert="w")
def stop_gradient_on_the_weight() -> Built:
    return lambda p, x: x @ lax.stop_gradient(p["w"]), {"w": normal(3, 5, 7)}, (X,)


@entry(factored="w")
def optimization_barrier_and_named_residual() -> Built:
    def fn(p, x):
        w = lax.optimization_barrier(p["w"])
        return jax.checkpoint(lambda w, x: jnp.tanh(x @ checkpoint_name(w, "weight")))(w, x)

    return fn, {"w": normal(3, 5, 7)}, (X,)


@entry(anything="re|im")
def complex_weight_from_two_leaves() -> Built:
    """The spectral convolution of a Fourier neural operator."""

    def fn(p, x):
        y = jnp.einsum("bnc,ncd->bnd", jnp.fft.rfft(x, axis=1), lax.complex(p["re"], p["im"]))
        return jnp.fft.irfft(y, axis=1, n=x.shape[1])

    return fn, {"re": normal(3, 3, 4, 4), "im": normal(4, 3, 4, 4)}, (normal(1, 2, 4, 4),)


@entry(materialised="layer_instance/kernel", numbers=24)
def linen_weight_norm() -> Built:
    return linen(nn.WeightNorm(nn.Dense(7)), X)


@entry(factored="layer_instance/kernel", numbers=24)
def linen_spectral_norm() -> Built:
    return linen(nn.SpectralNorm(nn.Dense(7)), X, update_stats=False, stats=True)


@entry(materialised="layer_instance/kernel", numbers=2 * (3 * 3 + 4))
def linen_weight_norm_convolution() -> Built:
    return linen(nn.WeightNorm(nn.Conv(4, (3,))), normal(1, 2, 6, 3))


@entry(adaptable=".*kernel", numbers=24)
def nnx_weight_norm() -> Built:
    def make():
        rngs = nnx.Rngs(0)
        return nnx.WeightNorm(nnx.Linear(5, 7, rngs=rngs), rngs=rngs)

    return nnx_split(make, X, abstract=False)
