"""What a method is: arrays with named axes, their initial values, and the merged weight as an expression of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from lorax import compat
from lorax.interpret.deferred import Deferred
from lorax.interpret.weight import Expression, Factor, Output, Part, Pending, Term, Weight, leaf_weight
from lorax.paths import is_quantized
from lorax.sites import Site

Arrays = dict[str, jax.Array]
METHODS: dict[str, type[Method]] = {}

# What the state of any method may say of a member of a stack: whether it adapts the site, and its dropout's rate.
OF_A_MEMBER = {"is_present": "", "dropout": ""}


class Method:
    """How a site is adapted: subclass it and decorate with `lorax.register`.

    A method declares its arrays and the axes they span, their initial values, and the merged weight. The fast path
    follows from the merged weight: `w + scale * a @ b` is evaluated at every use as one product with `w` and two thin
    ones with `a` and `b`, whatever the layout of the weight is there, and `lorax.merge` is the same expression
    without an activation.

    Attributes:
      arrays: for each array the letters of its axes: `S` stack (layers, experts), `I` fan-in, `O` fan-out, `W` all
        axes of the leaf in order; any other letter is a bond of the method's own, summed over in `weight`. A site
        need not have all of them, and a scalar may stand for one that is the same everywhere.
      output_arrays: those that `output` gets and `weight` does not.
      is_invertible: whether the base follows from the merged weight, as it does when `weight` is `g * w + delta`.
      acts_on_lookups: whether `output` is about rows that are looked up, also of a weight that products read as well.
      sizes: settings that are the size of a bond, such as the rank, if arrays that are filled up with zeros along it
        give the same weight and the zeros get no gradient: adapters of different size then stack.
      starts: settings that `init` puts into the arrays and nothing asks for later: initial values, scalings. Adapters
        that differ in them stack too.
    """

    arrays: ClassVar[Mapping[str, str]] = {}
    output_arrays: ClassVar[tuple[str, ...]] = ()
    sizes: ClassVar[tuple[str, ...]] = ()
    starts: ClassVar[tuple[str, ...]] = ()
    is_invertible: ClassVar[bool] = True
    acts_on_lookups: ClassVar[bool] = False

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
          Two dicts of arrays that `arrays` describes. The weight they give has to equal the base.
        """
        raise NotImplementedError

    def shared(self, site: Site) -> tuple[str, Callable[[], Arrays]] | None:
        """Return the name and the maker of arrays that a site has in common with others; mostly there are none.

        An adapter holds what has one name once, beside the sites' own state. The arrays follow from the name alone,
        are described by `arrays` like the site's own, and are not trained.
        """
        return None

    def derive(self, site: Site, base: Any, arrays: Mapping[str, Any]) -> Arrays:
        """Return what `weight` needs besides and follows from the base and the arrays, such as norms; often nothing."""
        return {}

    @property
    def derives(self) -> bool:
        """Whether `derive` returns anything."""
        return type(self).derive is not Method.derive

    def weight(self, w: Expression, *args: Any, **arrays: Any) -> Expression:
        """Return the merged weight as an expression of the base `w` and the method's arrays: the method's meaning."""
        raise NotImplementedError(f"{type(self).__name__} has no merged weight")

    def output(self, y: Any, x: Any, *args: Any, **arrays: Any) -> Any:
        """Return the output of a use after what the method does to it, where that is no change of the weight.

        Args:
          y: the output, a `lorax.interpret.activation.Activation`: `@` contracts it with an array, `+` adds one.
          x: the activation that entered the use, likewise.
          *args: none.
          **arrays: those of `output_arrays` that the site has.
        """
        raise NotImplementedError(f"{type(self).__name__} does nothing to the output")

    @property
    def is_mergeable(self) -> bool:
        """Whether the method has a merged weight and that is all it does."""
        return type(self).weight is not Method.weight and not self.output_arrays

    def axes(self, site: Site, name: str) -> tuple[Any, ...]:
        """Return the labels of an array's axes at a site: those that its letters in `arrays` stand for."""
        return site.axes({**OF_A_MEMBER, **self.arrays}[name])

    @classmethod
    def common(cls, members: Sequence[Method]) -> Method:
        """Return the method that evaluates each of several adapters of a stack, filled up to its sizes.

        Args:
          members: the methods of one site, all of this class.

        Raises:
          ValueError: they differ in more than `sizes`, `starts` and dropout.
        """
        settings: dict[str, Any] = {}
        for field in dataclasses.fields(members[0]):  # type: ignore[arg-type]
            values = [getattr(m, field.name) for m in members]
            if all(v == values[0] for v in values):
                settings[field.name] = values[0]
            elif field.name in (*cls.sizes, "dropout"):
                settings[field.name] = max(values)
            elif field.name in cls.starts:
                settings[field.name] = field.default
            else:
                listed = " and ".join(dict.fromkeys(map(repr, values)))
                raise ValueError(f"{cls.__name__} with {field.name} {listed}")
        return cls(**settings)

    def carried(self, site: Site, common: Method) -> Arrays:
        """Return what the state of a member of a stack says besides, since the common method does not.

        Args:
          site: the site.
          common: the method of the stack, of which `self` is one.
        """
        return {"dropout": jnp.asarray(getattr(self, "dropout", 0.0), float)} if getattr(common, "dropout", 0.0) else {}

    def leaf(self, site: Site, base: Any, arrays: Mapping[str, Any]) -> Weight:
        """Return a leaf's adapted weight.

        Raises:
          ValueError: an array has another shape than the site and the method say.
        """
        base = Deferred(base) if is_quantized(base) else base
        if not self.derives:
            return self.build(site, base, arrays)
        whole = Expression((Term((Factor(base, tuple(range(len(site.shape)))),)),))
        named = {name: e.terms[0].factors[0] for name, e in self._labelled(site, arrays).items()}
        pending = Pending(tuple(named.values()), tuple(named), self, site)
        return dataclasses.replace(leaf_weight(site.path, base, whole), pending=pending)

    def build(self, site: Site, base: Any, arrays: Mapping[str, Any]) -> Weight:
        """Return the adapted weight of a leaf, or of a layer of it, with what follows from the base."""
        if self.derives:
            node = base.node if isinstance(base, Deferred) else base
            arrays = {**arrays, **self.derive(site, node, arrays)}
        named = self._labelled(site, arrays)
        of_a_member = {name: named.pop(name).terms[0].factors[0] for name in OF_A_MEMBER if name in named}
        at_output = {name: named.pop(name) for name in self.output_arrays if name in named}
        whole = Expression((Term((Factor(base, tuple(range(len(site.shape)))),)),))
        weight = self.weight(whole, **named) if type(self).weight is not Method.weight else whole
        outputs = ()
        if at_output:
            factors = tuple(e.terms[0].factors[0] for e in at_output.values())
            over = frozenset((site.path, a) for a in site.axes("L" if self.acts_on_lookups else "O"))
            outputs = (Output(factors, tuple(at_output), self, over),)
        made = leaf_weight(site.path, base, weight, outputs)
        if "dropout" in of_a_member:
            made = made.at_rate(of_a_member["dropout"])
        return made.where(of_a_member["is_present"].array, base) if "is_present" in of_a_member else made

    def _labelled(self, site: Site, arrays: Mapping[str, Any]) -> dict[str, Expression]:
        named = {}
        for name, array in arrays.items():
            axes = self.axes(site, name) if array.shape else ()
            wanted = [None if isinstance(a, str) else a.size if isinstance(a, Part) else site.shape[a] for a in axes]
            sized = zip(wanted, array.shape, strict=False)
            if len(array.shape) != len(axes) or any(n != m for m, n in sized if m is not None):
                raise ValueError(
                    f"{site.path}: the adapter's {name!r} has shape {tuple(array.shape)}, which is not that of "
                    f"{self} for a weight of shape {site.shape}. Values of several adapters are for jax.vmap"
                )
            named[name] = Expression((Term((Factor(array, axes),)),))
        return named


def base_values(site: Site, base: Any) -> Any:
    """Return a base leaf for an initial value that depends on it; zeros for an abstract one, where nothing is run.

    Raises:
      ValueError: the base is abstract, and values are wanted.
    """
    if not isinstance(base, jax.ShapeDtypeStruct):
        return base
    value = jnp.zeros(base.shape, base.dtype)
    if not compat.is_traced(value):
        raise ValueError(f"{site.path}: it starts at values of the base, and the params are abstract: use eval_shape")
    return value


M = TypeVar("M", bound=type[Method])


@dataclass_transform(kw_only_default=True, frozen_default=True)
def register(cls: M) -> M:
    """Make a method of a class: a frozen, keyword-only dataclass that checkpoints can name.

    Raises:
      ValueError: another method has the name, or an array is called `is_present` or `dropout`, which a stack's are.

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
    if taken := sorted(set(made.arrays) & set(OF_A_MEMBER)):
        raise ValueError(f"{made.__name__}: an array is called {taken[0]!r}, which is what a stack says of its members")
    METHODS[made.__name__] = made
    return made
