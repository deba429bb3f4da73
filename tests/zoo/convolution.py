"""Convolutions: every number of axes, stride, dilation, group and padding, plain, linen and nnx."""

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import lax

from tests.zoo.entry import Built, entry, linen, nnx_split, normal

X_BxLxC = normal(1, 2, 8, 4)
X_BxHxWxC = normal(2, 2, 6, 7, 4)
CONV = {"kernel": "conv"}


@entry(factored="kernel", kinds=CONV, shapes={"kernel": ((3, 4, 2), (2, 6))}, numbers=2 * (12 + 6))
def conv_1d() -> Built:
    return linen(nn.Conv(6, (3,)), X_BxLxC)


@entry(factored="kernel", kinds=CONV, shapes={"kernel": ((3, 3, 4, 2), (2, 6))})
def conv_2d() -> Built:
    return linen(nn.Conv(6, (3, 3)), X_BxHxWxC)


@entry(factored="kernel", kinds=CONV)
def conv_pointwise() -> Built:
    return linen(nn.Conv(6, (1, 1)), X_BxHxWxC)


@entry(factored="kernel", kinds=CONV)
def conv_strided() -> Built:
    return linen(nn.Conv(6, (3, 3), strides=(2, 1), padding="VALID"), X_BxHxWxC)


@entry(factored="kernel", kinds=CONV)
def conv_dilated() -> Built:
    return linen(nn.Conv(6, (3, 2), padding=((2, 1), (0, 2)), kernel_dilation=(2, 1), input_dilation=(1, 2)), X_BxHxWxC)


@entry(factored="kernel", kinds=CONV)
def conv_circular() -> Built:
    return linen(nn.Conv(6, (3, 3), padding="CIRCULAR"), X_BxHxWxC)


@entry(factored="kernel", kinds=CONV)
def conv_causal() -> Built:
    return linen(nn.Conv(6, (3,), padding="CAUSAL"), X_BxLxC)


@entry(factored="kernel", kinds=CONV)
def conv_grouped() -> Built:
    return linen(nn.Conv(6, (3, 3), feature_group_count=2), X_BxHxWxC)


@entry(factored="kernel", kinds=CONV)
def conv_depthwise() -> Built:
    return linen(nn.Conv(8, (3, 3), feature_group_count=4), X_BxHxWxC)


@entry(factored="kernel", kinds=CONV)
def conv_depthwise_causal_1d() -> Built:
    return linen(nn.Conv(4, (4,), padding="CAUSAL", feature_group_count=4), X_BxLxC)


@entry(factored="kernel", kinds=CONV)
def conv_transposed() -> Built:
    return linen(nn.ConvTranspose(6, (3, 3), strides=(2, 2)), X_BxHxWxC)


@entry(factored="kernel", kinds=CONV)
def conv_transposed_with_flipped_kernel() -> Built:
    return linen(nn.ConvTranspose(6, (3, 3), strides=(2, 2), transpose_kernel=True), X_BxHxWxC)


@entry(factored="kernel")
def conv_transposed_circular() -> Built:
    return linen(nn.ConvTranspose(6, (3,), strides=(2,), padding="CIRCULAR"), X_BxLxC)


@entry(factored="kernel", kinds=CONV)
def conv_without_batch_axis() -> Built:
    return linen(nn.Conv(6, (3, 3)), X_BxHxWxC[0])


@entry(factored="kernel", kinds=CONV, tol=3e-2)
def conv_bf16() -> Built:
    return linen(nn.Conv(6, (3, 3), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), X_BxHxWxC)


@entry(adaptable="kernel")
def conv_with_a_masked_kernel() -> Built:
    return linen(nn.Conv(6, (3, 3), mask=jnp.ones((3, 3, 4, 6)).at[1:].set(0)), X_BxHxWxC)


@entry(factored="kernel")
def conv_local() -> Built:
    return linen(nn.ConvLocal(6, (3,)), X_BxLxC)


@entry(factored="w", kinds={"w": "conv"}, shapes={"w": ((4, 3, 2, 2), (2, 6))})
def conv_torch_layout() -> Built:
    def fn(p, x_BxCxHxW):
        return lax.conv_general_dilated(x_BxCxHxW, p["w"], (1, 1), "SAME")

    return fn, {"w": normal(3, 6, 4, 3, 2)}, (normal(1, 2, 4, 5, 6),)


@entry(anything="w")
def conv_batch_grouped() -> Built:
    def fn(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=numbers, batch_group_count=2)

    return fn, {"w": normal(3, 3, 3, 4, 6)}, (normal(1, 2, 5, 5, 4),)


@entry(factored="w", kinds={"w": "conv"})
def conv_3d_with_flipped_and_transposed_weight() -> Built:
    def fn(p, x):
        w = p["w"].transpose(1, 2, 3, 4, 0)
        return lax.conv_general_dilated(x, w, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))

    return fn, {"w": normal(3, 5, 2, 2, 2, 3)}, (normal(1, 1, 3, 4, 3, 3),)


@entry(anything="w")
def conv_with_the_weight_on_the_left() -> Built:
    """A learned signal convolved by a filter that comes from the input."""

    def fn(p, filters):
        return lax.conv_general_dilated(p["w"], filters, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))

    return fn, {"w": normal(3, 2, 8, 4)}, (normal(1, 3, 4, 5),)


@entry(factored="patches/kernel")
def patches_by_reshape() -> Built:
    """A patch embedding written as a reshape and a product."""

    def fn(p, x):
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
        return jnp.einsum("bhwpqc,pqcd->bhwd", x, p["patches"]["kernel"])

    return fn, {"patches": {"kernel": normal(3, 2, 2, 4, 5)}}, (normal(2, 2, 6, 4, 4),)


@entry(factored="kernel", kinds=CONV, shapes={"kernel": ((3, 3, 4, 2), (2, 6))})
def nnx_conv() -> Built:
    return nnx_split(lambda: nnx.Conv(4, 6, (3, 3), strides=2, rngs=nnx.Rngs(0)), X_BxHxWxC)


@entry(factored="kernel", kinds=CONV)
def nnx_conv_depthwise_causal() -> Built:
    return nnx_split(lambda: nnx.Conv(4, 4, (3,), padding="CAUSAL", feature_group_count=4, rngs=nnx.Rngs(0)), X_BxLxC)


@entry(factored="kernel", kinds=CONV)
def nnx_conv_transposed() -> Built:
    return nnx_split(lambda: nnx.ConvTranspose(4, 6, (3, 3), strides=(2, 2), rngs=nnx.Rngs(0)), X_BxHxWxC)
