"""Rotary positions and grouped-query attention: who may look at whom, and the products.

Axes: B batch, T query tokens, S key slots, N query heads, K key/value heads, G query heads per key head, GT the two
joined, H head width, F rows of rotary frequencies, C queries in a block.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.models.partition import over_rows_and_heads

# Written into masked scores. Finite, so that a row with nothing to attend to (padding) gives no NaN.
_MASKED = -1e30
# In order of preference: of TPUs or Hopper GPUs, of other GPUs, of any device.
_KERNELS = ("mosaic", "triton", "xla_chunked")


class Tokens(NamedTuple):
    """Queries or keys, for what one may see of the other; each B x T or 1 x T, int32.

    Args:
        slot: where a token stands in its row; a query sees slots up to its own.
        place: how many tokens of the row stand before it, which is what windows count.
        segment: a query sees keys of its own segment only; none: all are of one.
    """

    slot: jax.Array
    place: jax.Array
    segment: jax.Array | None


def visible(queries: Tokens, keys: Tokens) -> jax.Array:
    """True where a query may look at a key, B x T x S, but for windows."""
    mask_BxTxS = queries.slot[:, :, None] >= keys.slot[:, None, :]
    if queries.segment is not None and keys.segment is not None:
        mask_BxTxS = mask_BxTxS & (queries.segment[:, :, None] == keys.segment[:, None, :])
    return mask_BxTxS


def within(window: jax.Array, queries: Tokens, keys: Tokens) -> jax.Array:
    """True where a key is one of the last `window` tokens up to the query, B x T x S; a window of 0 has no end."""
    return (window == 0) | (queries.place[:, :, None] - keys.place[:, None, :] < window)


def rotary_tables(frequencies_FxH: jax.Array, positions_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary angles.

    Args:
        frequencies_FxH: float32, for half of a head's width.
        positions_BxT: integer positions in tokens.

    Returns:
        Two float32 arrays F x B x T x 1 x H/2.
    """
    angles = positions_BxT[:, :, None, None].astype(jnp.float32) * frequencies_FxH[:, None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BxTxNxH: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair `(x[i], x[i + H/2])` by its angle (the rotate-half convention of Hugging Face)."""
    cos, sin = table
    first, second = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BxTxNxH.dtype)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Bounds `x` smoothly: `cap tanh(x / cap)`; None: not at all."""
    return x if cap is None else cap * jnp.tanh(x / cap)


@jax.custom_jvp
def softmax(x_xS: jax.Array) -> jax.Array:
    """The softmax over the last axis; a backward pass reads its result alone, and not also the exponentials."""
    return jax.nn.softmax(x_xS, axis=-1)


@softmax.defjvp
def _softmax_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    y_xS, (dx_xS,) = softmax(*primals), tangents
    return y_xS, y_xS * (dx_xS - jnp.sum(y_xS * dx_xS, axis=-1, keepdims=True))


def attend(
    q_BxTxNxH: jax.Array,
    k_BxSxKxH: jax.Array,
    v_BxSxKxH: jax.Array,
    mask_BxTxS: jax.Array,
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Grouped-query attention, softmax in float32.

    Args:
        q_BxTxNxH: queries; head n reads key head `n // G`.
        k_BxSxKxH: keys.
        v_BxSxKxH: values.
        mask_BxTxS: True where a query may look; the batch axis may have size 1.
        scale: multiplies the scores; none: `H ** -0.5`.
        cap: of `soft_cap`, on the scores.

    Returns:
        Attended values B x T x N x H.
    """
    B, T, N, H = q_BxTxNxH.shape
    S, K = k_BxSxKxH.shape[1:3]
    G = N // K
    # Heads before tokens, and the G query heads of a key head as rows of one product: half the time, in XLA's
    # CPU back end, of the same products written as one einsum over all axes.
    factor = H**-0.5 if scale is None else scale
    q_BxKxTxGxH = (q_BxTxNxH * factor).reshape(B, T, K, G, H).swapaxes(1, 2)
    q_BxKxGTxH = q_BxKxTxGxH.swapaxes(2, 3).reshape(B, K, G * T, H)
    scores_BxKxGTxS = jnp.einsum("bkmh,bksh->bkms", q_BxKxGTxH, k_BxSxKxH.swapaxes(1, 2))
    scores_BxKxGxTxS = soft_cap(scores_BxKxGTxS.reshape(B, K, G, T, S).astype(jnp.float32), cap)
    scores_BxKxGxTxS = jnp.where(mask_BxTxS[:, None, None], scores_BxKxGxTxS, _MASKED)
    # In the shape that the product below takes, so that the backward passes of both read one array.
    scores_BxKxGTxS = scores_BxKxGxTxS.reshape(B, K, G * T, S)
    weights_BxKxGTxS = softmax(scores_BxKxGTxS).astype(v_BxSxKxH.dtype)
    y_BxKxGTxH = jnp.einsum("bkms,bksh->bkmh", weights_BxKxGTxS, v_BxSxKxH.swapaxes(1, 2))
    return y_BxKxGTxH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def attend_flash(
    q_BxTxNxH: jax.Array,
    k_BxSxKxH: jax.Array,
    v_BxSxKxH: jax.Array,
    mask_BxTxS: jax.Array,
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """What `attend` returns, without ever holding all scores: the first of tokamax's kernels that the device runs.

    On a mesh each device attends for its own rows and heads.

    Raises:
        ValueError: if tokamax is not installed.
    """
    tokamax = _tokamax()

    def attend_all(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        return tokamax.dot_product_attention(
            q, k, v, mask=mask[:, None], scale=scale, logits_soft_cap=cap, implementation=_KERNELS
        )

    mask_BxTxS = jnp.broadcast_to(mask_BxTxS, (len(q_BxTxNxH), *mask_BxTxS.shape[1:]))
    return over_rows_and_heads(attend_all)(q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, mask_BxTxS)


def _tokamax() -> Any:
    try:
        import tokamax
        from absl import flags
    except ImportError as error:
        raise ValueError("attention='flash' needs tokamax; run: pip install 'lorax-flax[flash]'") from error
    if not flags.FLAGS.is_parsed():  # it would take the command line of whatever program this is for its own
        flags.FLAGS.mark_as_parsed()
    return tokamax
