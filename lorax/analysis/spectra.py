"""Singular values of what adapters add to weights, and the numbers that sum them up.

Axes: S stacked layers or experts, I fan-in, O fan-out (each flattened), R rank, K singular values.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax.adapter import Adapter, base_leaves
from lorax.analysis.updates import delta_matrices, factors, has_weight
from lorax.methods.initializers import by_layer, matrices


def svd(adapter: Adapter, path: str, params: Any = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the singular value decomposition of a weight's update, `ΔW = U·diag(σ)·Vᵀ`, in every layer.

    Of factors, `A = Q_A·R_A` and `Bᵀ = Q_B·R_B`, it is that of the small `R_A·R_Bᵀ`: no update is built.

    Args:
      adapter: the adapter.
      path: the weight's path.
      params: the base, for methods whose update is no product of factors or that derive from it.

    Returns:
      `U` [S, I, K], input directions as columns; `σ` [S, K], descending; `V` [S, O, K], output directions. K is the
      rank of the factors or the smaller side, whichever is less.

    Raises:
      ValueError: the path is not adapted, its method has no merged weight, the leaf is no matrix, or the base is needed
        and not given.
    """
    pair = factors(adapter, path, params)
    if not adapter.sites[path].is_adaptable:
        raise ValueError(f"{path}: shape {adapter.sites[path].shape} has no fan-in and fan-out, so no singular values")
    if pair is None:
        if params is None:
            method = type(adapter.methods[path]).__name__
            raise ValueError(f"{path}: the update of {method} is no product of two factors: give the params")
        decompose = lambda matrix_IxO: jnp.linalg.svd(matrix_IxO, full_matrices=False)
        u_SxIxK, values_SxK, vt_SxKxO = by_layer(decompose, delta_matrices(params, adapter, path))
        return u_SxIxK, values_SxK, jnp.swapaxes(vt_SxKxO, 1, 2)
    (q_a, r_a), (q_b, r_b) = jnp.linalg.qr(pair[0]), jnp.linalg.qr(jnp.swapaxes(pair[1], 1, 2))
    u_SxRxK, values_SxK, vt_SxKxR = jnp.linalg.svd(_product(r_a, jnp.swapaxes(r_b, 1, 2)), full_matrices=False)
    return _product(q_a, u_SxRxK), values_SxK, _product(q_b, jnp.swapaxes(vt_SxKxR, 1, 2))


def spectra(adapter: Adapter, params: Any = None) -> dict[str, jax.Array]:
    """Return the singular values of every weight's update.

    Args:
      adapter: the adapter. Leaves that are no matrices (biases, norm scales) and methods that change no weight are
        left out.
      params: the base, for methods whose update is no product of factors or that derive from it.

    Returns:
      By path the singular values [S, K], one row a layer of a stack, descending.

    Raises:
      ValueError: the base is needed and not given.

    >>> import lorax
    >>> fn, params = lambda p, x: x @ p["kernel"], {"kernel": jnp.eye(8)}
    >>> spec = lorax.Spec({"kernel": lorax.LoRA(rank=2)})
    >>> adapter = lorax.init(jax.random.key(0), spec, lorax.trace(fn, params, jnp.ones((1, 8))), params)
    >>> a, b = jnp.eye(8)[:, :2] * jnp.array([1.0, 4.0]), jnp.eye(8)[:2] * 0.5
    >>> spectra(adapter.replace(params={"kernel": {"a": a, "b": b}}))["kernel"].tolist()
    [[2.0, 0.5]]
    """
    entries = [site.path for site, method in adapter.plan.entries if site.is_adaptable and has_weight(method)]
    return {path: svd(adapter, path, params)[1] for path in entries}


def effective_rank(values: Any) -> jax.Array:
    """Return `exp(-Σ pᵢ·log pᵢ)` with `p = σ/Σσ`: Roy and Vetterli 2007 (EUSIPCO, definition 1).

    Between 1, one direction, and the number of singular values, all alike; 0 of a matrix that is zero.

    Args:
      values: singular values along the last axis.

    >>> effective_rank(jnp.array([[3.0, 3.0, 0.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]])).round(4).tolist()
    [2.0, 1.0, 0.0]
    """
    values = jnp.asarray(values)
    total = jnp.sum(values, axis=-1, keepdims=True)
    shares = values / jnp.where(total > 0, total, 1)
    entropy = -jnp.sum(jnp.where(shares > 0, shares * jnp.log(jnp.where(shares > 0, shares, 1)), 0), axis=-1)
    return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0)


def stable_rank(values: Any) -> jax.Array:
    """Return `‖M‖_F² / ‖M‖₂²`, the sum of the squared singular values over the largest square; 0 of a zero matrix.

    Rudelson and Vershynin 2007 (arXiv:math/0503442, section 1). Never above the rank, and little moved by small values.

    Args:
      values: singular values along the last axis.

    >>> stable_rank(jnp.array([2.0, 1.0, 1.0])).item()
    1.5
    """
    squares = jnp.square(jnp.asarray(values))
    largest = jnp.max(squares, axis=-1)
    return jnp.sum(squares, axis=-1) / jnp.where(largest > 0, largest, 1)


def amplification(params: Any, adapter: Adapter, path: str, rank: int | None = None) -> jax.Array:
    """Return by how much an update amplifies what the weight has in its directions: `‖ΔW‖_F / ‖Uᵀ·W·V‖_F`.

    Hu et al. 2021 (arXiv:2106.09685, section 7.3), `U` and `V` the leading singular directions of `ΔW`: large where
    the update is about directions that the weight hardly uses.

    Args:
      params: the base.
      adapter: the adapter.
      path: the weight's path.
      rank: how many directions; None takes all that the update has.

    Returns:
      A factor for each layer, [S]; zero where the update is.

    Raises:
      ValueError: as `svd`, or the rank is not between 1 and the number of directions.
    """
    u_SxIxK, values_SxK, v_SxOxK = svd(adapter, path, params)
    count = values_SxK.shape[-1]
    if rank is not None and not 1 <= rank <= count:
        raise ValueError(f"{path}: rank is {rank}, and the update has {count} directions: take 1 to {count}")
    is_used_SxK = is_nonzero(values_SxK, max(u_SxIxK.shape[1], v_SxOxK.shape[1])) & (
        jnp.arange(count) < (rank or count)
    )
    u_SxIxK, v_SxOxK = (x * is_used_SxK[:, None] for x in (u_SxIxK, v_SxOxK))
    weight_SxIxO = matrices(adapter.sites[path], base_leaves(params, [adapter.sites[path]])[0][path])
    seen_SxKxK = _product(_product(jnp.swapaxes(u_SxIxK, 1, 2), weight_SxIxO), v_SxOxK)
    norm_S, seen_S = jnp.linalg.norm(values_SxK, axis=-1), jnp.linalg.norm(seen_SxKxK, axis=(1, 2))
    return jnp.where(norm_S > 0, norm_S / seen_S, 0)


def is_nonzero(values: jax.Array, larger_side: int) -> jax.Array:
    """Tell which singular values of a matrix are more than round-off of the largest."""
    return values > larger_side * jnp.finfo(values.dtype).eps * values[..., :1]


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)
