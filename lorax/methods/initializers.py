"""How a pair of factors starts.

Axes: S stacked layers or experts, I fan-in, O fan-out (each flattened), R rank.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax import compat
from lorax.paths import is_quantized
from lorax.sites import Site

Factors = tuple[jax.Array, jax.Array]
PISSA_FAST = re.compile(r"pissa_niter_(\d+)")
FAST_ITERATIONS = 16  # of "pissa_fast": the most that the PiSSA paper tries, where it matches the exact SVD
OVERSAMPLING = 8  # further columns of a randomised SVD, Halko et al. 2011, section 4.2

_product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class Initializer:
    """A start of the factors: `draw(key, site, base, rank, scaling) -> (A, B)`.

    Attributes:
      draw: makes the factors, of shapes `site.dims("SIR", R=rank)` and `site.dims("SRO", R=rank)`.
      is_subtracted: whether `s·A·B` does not start at zero, so that its initial value has to be subtracted.
    """

    draw: Callable[[jax.Array, Site, Any, int, float], Factors]
    is_subtracted: bool = False

    def __call__(self, key: jax.Array, site: Site, base: Any, rank: int, scaling: float) -> Factors:
        """Return the factors in float32 (in the base's dtype, if that is wider and they are read off the base)."""
        return self.draw(key, site, base, rank, scaling)


def find(name: str) -> Initializer:
    """Return the initialiser of a name: one of `INITIALIZERS`, or `pissa_niter_<k>` with `k` power iterations.

    | name | start |
    |---|---|
    | `uniform` | `A ~ U(±1/√fan_in)`, `B = 0`: Kaiming's with `a = √5`, as in PEFT |
    | `normal`, `gaussian` | `A` normal with standard deviation `1/rank`, `B = 0` |
    | `orthogonal` | `A` with orthonormal columns, `B = 0` |
    | `pissa` | the leading singular triplets of the weight, Meng et al. 2024 (arXiv:2404.02948, section 3) |
    | `pissa_fast` | the same from a randomised SVD with 16 power iterations |
    | `olora` | the leading part of the weight's QR, Büyükakyüz 2024 (arXiv:2406.01775, section 3) |

    Of an embedding, the first three start with `A` zero and `B` standard normal, as in PEFT.

    Raises:
      ValueError: there is none.

    >>> find("pissa_niter_4").is_subtracted, find("uniform").is_subtracted
    (True, False)
    """
    if name in INITIALIZERS:
        return INITIALIZERS[name]
    if isinstance(name, str) and (match := PISSA_FAST.fullmatch(name)):
        return _pissa(_randomised_svd(int(match[1])))
    raise ValueError(f"initializer is {name!r}; known are {', '.join(INITIALIZERS)} and pissa_niter_<k>, k = 1, 2, …")


def _then_zero(draw_a: Callable[[jax.Array, tuple[int, ...], Site], jax.Array]) -> Initializer:
    """`A` random and `B` zero; of an embedding `A` zero and `B` standard normal, as in PEFT."""

    def draw(key: jax.Array, site: Site, base: Any, rank: int, scaling: float) -> Factors:
        a_shape, b_shape = site.dims("SIR", R=rank), site.dims("SRO", R=rank)
        if site.kind == "embedding":
            return jnp.zeros(a_shape), jax.random.normal(key, b_shape)
        return draw_a(key, a_shape, site), jnp.zeros(b_shape)

    return Initializer(draw)


def _uniform(key: jax.Array, shape: tuple[int, ...], site: Site) -> jax.Array:
    bound = 1 / math.sqrt(site.size("I"))
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _normal(key: jax.Array, shape: tuple[int, ...], site: Site) -> jax.Array:
    return jax.random.normal(key, shape) / shape[-1]


def _orthogonal(key: jax.Array, shape: tuple[int, ...], site: Site) -> jax.Array:
    keys = jax.random.split(key, site.size("S"))
    one = lambda k: jax.nn.initializers.orthogonal()(k, (site.size("I"), shape[-1]), jnp.float32)
    return jax.vmap(one)(keys).reshape(shape)


# Starts that are read off the weight.

Svd = Callable[[jax.Array, jax.Array, int], tuple[jax.Array, jax.Array, jax.Array]]


def matrices(site: Site, base: Any) -> jax.Array:
    """Return a leaf as matrices `[S, I, O]` in float32, or in its own dtype if that is wider.

    A quantised leaf is dequantised: what is decomposed is the weight that the function computes with. On a mesh with
    explicit axes the matrices are replicated, since a decomposition needs them whole.

    Args:
      site: the site.
      base: the leaf, of `site.shape`: an array, a tracer or a quantised node.
    """
    leaf = jnp.asarray(base.dequantize() if is_quantized(base) else base)
    if (mesh := compat.explicit_mesh(leaf)) is not None:
        leaf = jax.sharding.reshard(leaf, jax.sharding.NamedSharding(mesh, jax.P()))
    leaf = leaf if leaf.dtype.itemsize >= 4 else leaf.astype(jnp.float32)
    return leaf.transpose(site.axes("SIO")).reshape(site.size("S"), site.size("I"), site.size("O"))


def leaf_of(site: Site, matrices_SxIxO: jax.Array) -> jax.Array:
    """Undo `matrices`: return the leaf's layout."""
    order = site.axes("SIO")
    return matrices_SxIxO.reshape(site.dims("SIO")).transpose([order.index(a) for a in range(len(order))])


def principal(matrix_IxO: jax.Array, rank: int, scaling: float, svd: Svd | None = None, key: Any = None) -> Factors:
    """Return factors whose product times the scaling is the nearest of that rank: `A = U√(S/s)`, `B = √(S/s)Vᵀ`.

    Args:
      matrix_IxO: the matrix.
      rank: columns of `A`; those above the smaller side are zero.
      scaling: `s`, above zero.
      svd: takes a key, the matrix and a rank, and returns at least so many triplets; None is the exact one.
      key: for `svd`.

    Returns:
      `A` `[I, R]` and `B` `[R, O]`.

    >>> a, b = principal(jnp.diag(jnp.array([8.0, 2.0, 0.5])), rank=1, scaling=2.0)
    >>> float(jnp.abs(a[0, 0])), float(2.0 * (a @ b)[0, 0])
    (2.0, 8.0)
    """
    u_IxK, values_K, vt_KxO = (svd or _exact_svd)(key, matrix_IxO, rank)
    root_R = jnp.sqrt(values_K[:rank] / scaling)
    return _padded(u_IxK[:, :rank] * root_R, root_R[:, None] * vt_KxO[:rank], rank)


def _padded(a_IxK: jax.Array, b_KxO: jax.Array, rank: int) -> Factors:
    """Fill up to the rank with zeros, which training leaves zero: a gradient of either comes through the other."""
    missing = rank - a_IxK.shape[1]
    return jnp.pad(a_IxK, ((0, 0), (0, missing))), jnp.pad(b_KxO, ((0, missing), (0, 0)))


def by_layer(fn: Callable[..., Any], *stacked: jax.Array) -> Any:
    """Apply a function to one slice of a stack after another: a decomposition's temporaries are those of one."""
    if len(stacked[0]) > 1:
        return lax.map(lambda slices: fn(*slices), stacked)
    return jax.tree.map(lambda x: x[None], fn(*(x[0] for x in stacked)))


def _from_weight(decompose: Callable[[jax.Array, Site, jax.Array, int, float], Factors]) -> Initializer:
    """An initialiser of each of the weight's matrices; abstract params, under `eval_shape`, have shapes only."""

    def draw(key: jax.Array, site: Site, base: Any, rank: int, scaling: float) -> Factors:
        a_shape, b_shape = site.dims("SIR", R=rank), site.dims("SRO", R=rank)
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(base)):
            a, b = jnp.zeros(a_shape), jnp.zeros(b_shape)
            if not compat.is_traced(a):
                raise ValueError(
                    f"{site.path}: these factors are read off the base's values, and the params are abstract: use "
                    "eval_shape for shapes, or give init the arrays"
                )
            return a, b
        one = lambda key, matrix_IxO: decompose(key, site, matrix_IxO, rank, scaling)
        a, b = by_layer(one, jax.random.split(key, site.size("S")), matrices(site, base))
        return a.reshape(a_shape), b.reshape(b_shape)

    return Initializer(draw, is_subtracted=True)


def _pissa(svd: Svd) -> Initializer:
    """PiSSA: `s·A·B` is the weight's best approximation of that rank."""

    def decompose(key: jax.Array, site: Site, matrix_IxO: jax.Array, rank: int, scaling: float) -> Factors:
        if not scaling > 0:
            raise ValueError(
                f"{site.path}: PiSSA divides by the scaling, which is {scaling}: choose an alpha above 0, or a start "
                "that is not read off the weight"
            )
        return principal(matrix_IxO, rank, scaling, svd, key)

    return _from_weight(decompose)


def _exact_svd(key: Any, matrix_IxO: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    u_IxK, values_K, vt_KxO = jnp.linalg.svd(matrix_IxO, full_matrices=False)
    return u_IxK, values_K, vt_KxO


def _randomised_svd(iterations: int) -> Svd:
    """The leading triplets by subspace iteration, Halko et al. 2011 (arXiv:0909.4061, algorithms 4.4 and 5.1)."""

    def svd(key: Any, matrix_IxO: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        basis = lambda x: jnp.linalg.qr(x)[0]
        width = min(rank + OVERSAMPLING, *matrix_IxO.shape)
        some_OxK = jax.random.normal(key, (matrix_IxO.shape[1], width), matrix_IxO.dtype)
        refine = lambda _, q_IxK: basis(_product(matrix_IxO, basis(_product(matrix_IxO.T, q_IxK))))
        q_IxK = lax.fori_loop(0, iterations, refine, basis(_product(matrix_IxO, some_OxK)))
        u_KxK, values, vt_KxO = jnp.linalg.svd(_product(q_IxK.T, matrix_IxO), full_matrices=False)
        return _product(q_IxK, u_KxK), values, vt_KxO

    return svd


def _qr(key: jax.Array, site: Site, matrix_IxO: jax.Array, rank: int, scaling: float) -> Factors:
    """OLoRA: with `Wᵀ = Q·R` (O×I, as torch stores it), `Bᵀ` is the first columns of `Q`, `Aᵀ` the first rows of `R`.

    As in PEFT, the scaling is not divided out: what is subtracted is `s·A·B`, s times the leading part.
    """
    q_OxK, r_KxI = jnp.linalg.qr(matrix_IxO.T)
    return _padded(r_KxI[:rank].T, q_OxK[:, :rank].T, rank)


INITIALIZERS: dict[str, Initializer] = {
    "uniform": _then_zero(_uniform),
    "normal": _then_zero(_normal),
    "gaussian": _then_zero(_normal),
    "orthogonal": _then_zero(_orthogonal),
    "pissa": _pissa(_exact_svd),
    "pissa_fast": _pissa(_randomised_svd(FAST_ITERATIONS)),
    "olora": _from_weight(_qr),
}
