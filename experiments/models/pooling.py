"""From hidden states to one vector.

Axes: B batch, T tokens, D width.
"""

import jax
import jax.numpy as jnp


def mean_pool(hidden_BxTxD: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """The mean hidden state B x D over the tokens that are no padding; 0 where all are."""
    weights_BxTx1 = mask_BxT[:, :, None].astype(hidden_BxTxD.dtype)
    return jnp.sum(hidden_BxTxD * weights_BxTx1, axis=1) / jnp.maximum(jnp.sum(weights_BxTx1, axis=1), 1)


def unit_length(x_xD: jax.Array) -> jax.Array:
    """Vectors of the same directions and of length 1, in float32; 0 stays 0."""
    x_xD = x_xD.astype(jnp.float32)
    return x_xD * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x_xD), axis=-1, keepdims=True), 1e-24))
