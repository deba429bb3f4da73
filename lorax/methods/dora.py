"""DoRA: a magnitude for every output unit, and a low-rank update of the direction."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax.interpret.contraction import absorb, arrange, axis_specs
from lorax.interpret.weight import Expression, Factor, cast, promoted
from lorax.methods.base import Arrays, base_values, register
from lorax.methods.lowrank import LowRank
from lorax.paths import is_quantized
from lorax.sites import Site


@register
class DoRA(LowRank):
    """Weight-decomposed low-rank adaptation, Liu et al. 2024 (arXiv:2402.09353, section 4).

    `W' = m · (W + s·A·B) / ‖W + s·A·B‖`: the norm is over the fan-in, one magnitude `m` an output unit, and starts at
    `‖W‖`. As in the paper (section 4.3) and in PEFT, the norm has no gradient, and a bias is not rescaled. As opposed
    to PEFT, dropout acts on what enters `A` alone and not on the base product.

    The norm is `‖W‖² + 2s·Σ(WᵀA)∘Bᵀ + s²·Σ(AᵀA·B)∘B`, of which the first part is constant: it costs as much as a
    product with `rank` rows, and builds no weight.

    The settings are those of `LoRA`. Trained are `a`, `b` and `magnitude` (stacked and fan-out axes; float32 where the
    factors are narrower, so that it starts at the norm exactly); the state holds `scale` and `squared_norm`, where zero
    marks an output unit that has no gain.
    """

    arrays = {
        "a": "SIR",
        "b": "SRO",
        "scale": "S",
        "a0": "SIR",
        "b0": "SRO",
        "magnitude": "SO",
        "squared_norm": "SO",
        "gain": "SO",
    }
    sizes = ("rank",)
    is_invertible = False  # the base's direction is not in the merged weight alone

    def init(self, key: jax.Array, site: Site, base: Any) -> tuple[Arrays, Arrays]:
        """Draw the factors; the magnitude is the norm of the base."""
        trained, fixed = self.factors(key, site, base)
        axes = tuple(range(len(site.shape)))
        norms = lambda w, w_axes: _squared_norm(w, w_axes, site.fan_in)
        squared = _by_layer(norms, base_values(site, base), axes, site.stack)
        squared = arrange(squared, *_order(site), site.dims("SO"))
        magnitude = jnp.sqrt(squared).astype(promoted(self.dtype, jnp.float32))
        return {**trained, "magnitude": magnitude}, {**fixed, "squared_norm": squared}

    def derive(self, site: Site, base: Any, arrays: Mapping[str, Any]) -> Arrays:
        """Return the gain `m / ‖W + s·A·B‖`, the norm without a gradient."""
        a, b = arrays["a"], arrays["b"]
        a_axes, b_axes = site.axes("SIR"), site.axes("SRO")
        if "a0" in arrays:  # s·(A·B − A₀·B₀) is one product of twice the rank
            a = jnp.concatenate([a, arrays["a0"].astype(a.dtype)], a_axes.index("R"))
            b = jnp.concatenate([b, -arrays["b0"].astype(b.dtype)], b_axes.index("R"))
        cross = lambda w, w_axes, a, b: _cross(w, w_axes, site.fan_in, a, b)
        axes = tuple(range(len(site.shape)))
        cross_SO = _by_layer(cross, base, axes, site.stack, Factor(a, a_axes), Factor(b, b_axes))
        cross_SO = arrange(cross_SO, *_order(site), site.dims("SO"))
        a, b = _wide(a), _wide(b)
        again = [Factor(a, site.axes("SIQ")), Factor(b, b_axes), Factor(b, site.axes("SQO"))]
        own, own_axes = absorb(a, a_axes, again, site.fan_in, specs=axis_specs((a, a_axes), (b, b_axes)))
        own_SO = arrange(own, own_axes, site.axes("SO"), site.dims("SO"))
        scale = arrays["scale"]
        scale = scale.reshape(scale.shape + (1,) * (own_SO.ndim - scale.ndim))
        squared = lax.stop_gradient(arrays["squared_norm"] + 2 * scale * cross_SO + scale**2 * own_SO)
        has_norm = (squared > 0) & (arrays["squared_norm"] > 0)
        # Selected after the root: XLA makes `m / √x` of a root that is divided by directly `m · rsqrt(x)`, not quite 1.
        norm = jnp.where(has_norm, jnp.sqrt(squared), 1)
        return {"gain": jnp.where(has_norm, cast(arrays["magnitude"], norm.dtype) / norm, 1)}

    def weight(
        self,
        w: Expression,
        *,
        a: Expression,
        b: Expression,
        scale: Expression,
        gain: Expression,
        a0: Expression | None = None,
        b0: Expression | None = None,
        **norms: Expression,
    ) -> Expression:
        """`(W + s·A·B) · gain`."""
        return (w + self.update(a, b, scale, a0, b0)).rescaled(gain)


def _order(site: Site) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    kept = tuple(a for a in range(len(site.shape)) if a not in site.fan_in)
    return kept, site.axes("SO")


def _wide(x: Any) -> Any:
    return cast(x, promoted(x.dtype, jnp.float32))


def _squared_norm(w: Any, w_axes: Sequence[int], fan_in: Collection[int]) -> jax.Array:
    """`Σ W²` over the fan-in, the other axes in the leaf's order, at least float32."""
    return jnp.sum(jnp.square(_wide(w)), axis=tuple(i for i, a in enumerate(w_axes) if a in fan_in))


def _cross(w: Any, w_axes: Sequence[int], fan_in: Collection[int], a: Factor, b: Factor) -> jax.Array:
    """`Σ (WᵀA)∘Bᵀ` over fan-in and rank, the other axes in the leaf's order, at least float32."""
    w = cast(w, promoted(w.dtype))
    specs = axis_specs((w, w_axes))
    wide = promoted(w.dtype, jnp.float32)
    wa, axes = absorb(w, w_axes, [Factor(cast(a.array, w.dtype), a.axes)], fan_in, accumulate=wide, specs=specs)
    x, axes = absorb(wa, axes, [Factor(cast(b.array, wa.dtype), b.axes)], (), specs=specs)
    kept = [i for i in w_axes if i not in fan_in]
    return arrange(x, axes, kept, [w.shape[w_axes.index(i)] for i in kept])


def _by_layer(
    fn: Callable[..., jax.Array], base: Any, axes: tuple[int, ...], stack: Collection[int], *factors: Factor
) -> jax.Array:
    """Apply a function of a weight, its axes and factors; of a quantised stack one layer after another.

    So no more than one layer is held dequantised. The layer's axis comes first in what is returned.
    """
    if not is_quantized(base):
        return fn(base, axes, *factors)
    stacked = len(base.stack) > 0 and axes[0] in stack
    if not stacked or any(f.axes[:1] != axes[:1] for f in factors):
        return fn(base.dequantize(), axes, *factors)

    def layer(sliced: Any) -> jax.Array:
        base, arrays = sliced
        inner = [Factor(x, f.axes[1:]) for x, f in zip(arrays, factors, strict=True)]
        return _by_layer(fn, base, axes[1:], stack, *inner)

    return lax.map(layer, (base, [f.array for f in factors]))
