"""How much of the subspaces of two matrices, or of two adapters' updates, is the same.

Axes: S stacked layers or experts, D the side that is compared, K directions of it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax.adapter import Adapter
from lorax.analysis.spectra import is_nonzero, svd


def subspace_similarity(a: Any, b: Any, i: int, j: int) -> jax.Array:
    """Return `φ(A, B, i, j) = ‖U_Aⁱᵀ·U_Bʲ‖_F² / min(i, j)`, between 0 (orthogonal) and 1 (one contains the other).

    Hu et al. 2021 (arXiv:2106.09685, section 7.2): `U_Aⁱ` holds the `i` leading left singular vectors of `A`. Of
    subspaces drawn at random it is `max(i, j)/D` on average, against which a value has to be held. A direction of the
    singular value zero is shared with nothing.

    Args:
      a: a matrix whose columns span the one subspace, [..., D, M]; any leading axes, alike in both.
      b: likewise, [..., D, N].
      i: how many directions of `a`, at most D or M.
      j: how many directions of `b`.

    Raises:
      ValueError: there are no so many directions, or the sides differ.

    >>> a, b = jnp.diag(jnp.array([3.0, 2.0, 1.0])), jnp.diag(jnp.array([1.0, 2.0, 3.0]))
    >>> [float(subspace_similarity(a, b, i, 2)) for i in (1, 2, 3)]
    [0.0, 0.5, 1.0]
    """
    grid = subspace_map(a, b)
    if not (1 <= i <= grid.shape[-2] and 1 <= j <= grid.shape[-1]):
        raise ValueError(f"i = {i} and j = {j}: there are {grid.shape[-2]} and {grid.shape[-1]} directions")
    return grid[..., i - 1, j - 1]


def subspace_map(a: Any, b: Any) -> jax.Array:
    """Return `φ(A, B, i, j)` for all `i` and `j`, counted from 1: see `subspace_similarity`.

    Of two adapters' updates compare the output side, `directions(adapter, path)`: LoRA's `A` is mostly what it started
    as, so that the inputs of two runs of one seed agree whatever they learned, and of two seeds hardly at all.

    Args:
      a: [..., D, M].
      b: [..., D, N].

    Returns:
      [..., min(D, M), min(D, N)].

    Raises:
      ValueError: the sides differ.
    """
    a, b = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (jnp.asarray(a), jnp.asarray(b)))
    if a.ndim < 2 or a.shape[:-1] != b.shape[:-1]:
        raise ValueError(f"matrices of shape {a.shape} and {b.shape}: all but the last side have to be alike")
    cosines = jnp.matmul(jnp.swapaxes(_basis(a), -1, -2), _basis(b), precision=lax.Precision.HIGHEST)
    total = jnp.cumsum(jnp.cumsum(jnp.square(cosines), axis=-2), axis=-1)
    return total / jnp.minimum(jnp.arange(1, total.shape[-2] + 1)[:, None], jnp.arange(1, total.shape[-1] + 1))


def _basis(x: jax.Array) -> jax.Array:
    """Return the left singular vectors, zero for those of the singular value zero, which could be any."""
    u, values, _ = jnp.linalg.svd(x, full_matrices=False)
    return u * is_nonzero(values, max(x.shape[-2:]))[..., None, :]


def directions(adapter: Adapter, path: str, side: str = "output", params: Any = None) -> jax.Array:
    """Return the singular directions of a weight's update as columns, each as long as its singular value.

    Args:
      adapter: the adapter.
      path: the weight's path.
      side: `output`, `V·diag(σ)`, or `input`, `U·diag(σ)` of `ΔW = U·diag(σ)·Vᵀ`.
      params: the base, as for `svd`.

    Returns:
      [S, D, K], for `subspace_map`.

    Raises:
      ValueError: the side is neither, or as `svd`.
    """
    if side not in ("input", "output"):
        raise ValueError(f"side is {side!r}; it has to be 'input' or 'output'")
    u_SxIxK, values_SxK, v_SxOxK = svd(adapter, path, params)
    return (u_SxIxK if side == "input" else v_SxOxK) * values_SxK[:, None]
