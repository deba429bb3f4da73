"""What a method is: arrays with named axes, their initial values, and the merged weight as an expression of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, dataclass_transform

import jax

from lorax.interpret.weight import Expression, Factor, Term, Weight, leaf_weight
from lorax.sites import Site

Arrays = dict[str, jax.Array]
METHODS: dict[str, type[Method]] = {}


class Method:
    """How a site is adapted: subclass it and decorate with `lorax.register`.

    A method declares its arrays and the axes they span, their initial values, and the merged weight. The fast path
    follows from the merged weight: `w + scale * a @ b` is evaluated at every use as one product with `w` and two thin
    ones with `a` and `b`, whatever the layout of the weight is there, and `lorax.merge` is the same expression
    without an activation.

    Attributes:
      arrays: for each array the letters of its axes: `S` stack (layers, experts), `I` fan-in, `O` fan-out, `W` all
        axes of the leaf in order; any other letter is a bond of the method's own, summed over in `weight`.
      is_invertible: whether the base follows from the merged weight, as it does when `weight` is `g * w + delta`.
    """

    arrays: ClassVar[Mapping[str, str]] = {}
    is_invertible: ClassVar[bool] = True

    def refuses(self, site: Site) -> str | None:
        """Return why a site cannot be adapted in this way, or None when it can."""
        if not site.is_floating:
            return f"{site.dtype} is not floating point"
        return None if site.is_adaptable else "no use contracts one of its axes and leaves another free"

    def init(self, key: jax.Array, site: Site, base: Any) -> tuple[Arrays, Arrays]:
        """Return the arrays that are trained and those that are not (scales, masks, frozen projections).

        Args:
          key: a PRNG key of this site's own.
          site: the site; `site.dims("SIR", R=8)` is an array's shape.
          base: the base leaf, an array or a tracer of `site.shape`; never to be changed.

        Returns:
          Two dicts with, together, the names in `arrays`. The weight they give has to equal the base.
        """
        raise NotImplementedError

    def weight(self, w: Expression, *args: Any, **arrays: Any) -> Expression:
        """Return the merged weight as an expression of the base `w` and the method's arrays: the method's meaning."""
        raise NotImplementedError(f"{type(self).__name__} has no merged weight")

    @property
    def is_mergeable(self) -> bool:
        """Whether the method has a merged weight."""
        return type(self).weight is not Method.weight

    def leaf(self, site: Site, base: Any, arrays: Mapping[str, Any]) -> Weight:
        """Return a leaf's adapted weight.

        Raises:
          ValueError: an array has another shape than the site and the method say.
        """
        named = {}
        for name, dims in self.arrays.items():
            array, axes = arrays[name], site.axes(dims)
            sized = zip(axes, array.shape, strict=False)
            if len(array.shape) != len(axes) or any(n != site.shape[a] for a, n in sized if isinstance(a, int)):
                raise ValueError(
                    f"{site.path}: the adapter's {name!r} has shape {tuple(array.shape)}, which is not that of "
                    f"{self} for a weight of shape {site.shape}. Values of several adapters are for jax.vmap"
                )
            named[name] = Expression((Term((Factor(array, axes),)),))
        whole = Expression((Term((Factor(base, tuple(range(len(site.shape)))),)),))
        return leaf_weight(site.path, base, self.weight(whole, **named))


M = TypeVar("M", bound=type[Method])


@dataclass_transform(kw_only_default=True, frozen_default=True)
def register(cls: M) -> M:
    """Make a method of a class: a frozen, keyword-only dataclass that checkpoints can name.

    Raises:
      ValueError: another method has the name, or an array is not described.

    >>> @register
    ... class ScaledOutput(Method):
    ...     start: float = 1.0
    ...     arrays = {"gain": "SO"}
    ...     def init(self, key, site, base):
    ...         return {"gain": jax.numpy.full(site.dims("SO"), self.start)}, {}
    ...     def weight(self, w, *, gain):
    ...         return w * gain
    >>> ScaledOutput(start=1.0)
    ScaledOutput(start=1.0)
    """
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    known = METHODS.get(made.__name__)
    if known is not None and (known.__module__, known.__qualname__) != (made.__module__, made.__qualname__):
        raise ValueError(f"a method called {made.__name__} is registered already by {known.__module__}")
    METHODS[made.__name__] = made
    return made
