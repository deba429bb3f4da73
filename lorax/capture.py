"""What reaches the sites of a function, and what leaves them: measured where the trace finds them, without an edit.

A measurement is a method that changes nothing and whose arrays have, as their gradients, what is to be measured. So it
adds up over several uses of a weight, and comes back layer by layer from scans, through remat and control flow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lorax.adapt import adapt
from lorax.adapter import Adapter, Plan
from lorax.interpret.activation import Activation
from lorax.interpret.contraction import arrange
from lorax.methods.base import Arrays, Method
from lorax.methods.prefix import Prefix
from lorax.sites import Site
from lorax.spec import Spec


class Moments(NamedTuple):
    """Sums over the inputs of a site, the fan-in flattened to I.

    Attributes:
      second: `XᵀX`, float32, shape (*S, I, I).
      total: the sum of the rows of `X`, shape (*S, I).
      rows: the number of rows, shape S.
    """

    second: jax.Array
    total: jax.Array
    rows: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Inputs(Method):
    """Measures the inputs. `index` tells, in whatever layout the weight has at the use, which input is which."""

    arrays = {"second": "SJK", "total": "SJ", "rows": "S", "index": "I"}
    output_arrays = ("second", "total", "rows", "index")

    def init(self, key: jax.Array, site: Site, base: Any) -> tuple[Arrays, Arrays]:
        """Zeros, and the number of each input."""
        n = site.size("I")
        sizes = {"J": n, "K": n}
        sums = {name: jnp.zeros(site.dims(self.arrays[name], **sizes)) for name in ("second", "total", "rows")}
        return sums, {"index": jnp.arange(n, dtype=jnp.int32).reshape(site.dims("I"))}

    def output(self, y: Activation, x: Activation, *, second: Any, total: Any, rows: Any, index: Any) -> Activation:
        """`y`, with the moments of `x` for gradients of the sums."""
        (number,) = index.terms[0].factors
        probes = [e.terms[0].factors[0] for e in (second, total, rows)]
        inputs = [a for a in x.axes if a in number.axes]
        stack = [a for a in x.axes if a in probes[2].axes]
        others = [a for a in x.axes if a not in inputs and a not in stack]
        order = [x.axes.index(a) for a in (*stack, *others, *inputs)]
        lead = [x.array.shape[x.axes.index(a)] for a in stack]
        size = probes[1].array.shape[-1]
        flat = number.array.transpose([number.axes.index(a) for a in inputs]).reshape(-1)

        @jax.custom_vjp
        def tap(y: jax.Array, x: jax.Array, flat: jax.Array, *sums: jax.Array) -> jax.Array:
            return y

        def forward(y: jax.Array, x: jax.Array, flat: jax.Array, *sums: jax.Array) -> Any:
            return y, (x, flat)

        def backward(kept: Any, dy: jax.Array) -> Any:
            x, flat = kept
            seen = x.astype(jnp.float32).transpose(order).reshape(*lead, -1, flat.size)
            wide = jnp.zeros((*seen.shape[:-1], size)).at[..., flat].set(seen)
            measured = (
                jnp.einsum("...ni,...nj->...ij", wide, wide, precision=lax.Precision.HIGHEST),
                wide.sum(-2),
                jnp.full(lead, float(seen.shape[-2])),
            )
            has = [[*stack, "J", "K"], [*stack, "J"], stack]
            sums = [arrange(m, h, p.axes, p.array.shape) for m, h, p in zip(measured, has, probes, strict=True)]
            return dy, jnp.zeros_like(x), None, *sums

        tap.defvjp(forward, backward)
        return dataclasses.replace(y, array=tap(y.array, x.array, flat, *(p.array for p in probes)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FirstPositions(Method):
    """Measures the output at the first positions of the first sequence."""

    length: int

    arrays = {"first": "SPO"}
    output_arrays = ("first",)

    def init(self, key: jax.Array, site: Site, base: Any) -> tuple[Arrays, Arrays]:
        """Zeros."""
        return {"first": jnp.zeros(site.dims("SPO", P=self.length))}, {}

    def output(self, y: Activation, x: Activation, *, first: Any) -> Activation:
        """`y`, with its first positions for a gradient of `first`."""
        (probe,) = first.terms[0].factors
        keep = {a for a in probe.axes if isinstance(a, int)} | {y.positions}

        @jax.custom_vjp
        def tap(y: jax.Array, probe: jax.Array) -> jax.Array:
            return y

        def forward(y: jax.Array, probe: jax.Array) -> Any:
            return y, y

        def backward(kept: jax.Array, dy: jax.Array) -> Any:
            one = kept[tuple(slice(None) if a in keep else 0 for a in y.axes)]
            axes = [a for a in y.axes if a in keep]
            at = axes.index(y.positions)
            one = lax.slice_in_dim(one, 0, self.length, axis=at).astype(jnp.float32)
            wanted = [y.positions if isinstance(a, str) else a for a in probe.axes]
            return dy, arrange(one, axes, wanted, probe.array.shape)

        tap.defvjp(forward, backward)
        return dataclasses.replace(y, array=tap(y.array, probe.array))


def input_moments(fn: Callable[..., Any], params: Any, sites: Iterable[Site], *args: Any, **kwargs: Any) -> Any:
    """Measure the inputs of sites when `fn(params, *args, **kwargs)` runs: one forward and one backward pass.

    Args:
      fn: the function; some output has to be floating point.
      params: the base.
      sites: sites of kind `linear`. Each takes `4·S·I²` bytes.
      *args: handed on.
      **kwargs: handed on.

    Returns:
      `{path: Moments}`. A use that reads a part of the fan-in counts there, and its rows count in full.

    Raises:
      ValueError: a site is no product, or a weight is not used as it is.

    >>> fn = lambda params, x: x @ params["w"]
    >>> params, x = {"w": jnp.ones((2, 3))}, jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> import lorax
    >>> moments = input_moments(fn, params, lorax.trace(fn, params, x), x)["w"]
    >>> moments.second.tolist(), moments.total.tolist(), float(moments.rows)
    ([[10.0, 14.0], [14.0, 20.0]], [4.0, 6.0], 2.0)
    """
    measured = _gradients(fn, params, [(site, _Inputs()) for site in sites], args, kwargs)
    return {path: Moments(**sums) for path, sums in measured.items()}


def prefix_from(fn: Callable[..., Any], params: Any, adapter: Adapter, *args: Any, **kwargs: Any) -> Adapter:
    """Start prefixes at the keys and values that the placeholder tokens of a batch have.

    For a causal function and batches that begin with the same placeholders, the adapter then changes nothing.

    Args:
      fn: the function, as adapted later.
      params: the base.
      adapter: one with `Prefix` methods; its other sites are kept.
      *args: a batch whose first sequence begins with the placeholders.
      **kwargs: handed on.

    Returns:
      The adapter with new values of its prefixes.

    Raises:
      ValueError: the adapter has no prefix.
    """
    found = [(site, _FirstPositions(length=m.length)) for site, m in adapter.plan.entries if isinstance(m, Prefix)]
    if not found:
        raise ValueError(f"prefix_from: none of {', '.join(adapter.methods)} has the method Prefix")
    measured = _gradients(fn, params, found, args, kwargs)
    values = {path: {"prefix": x["first"].astype(adapter.params[path]["prefix"].dtype)} for path, x in measured.items()}
    return adapter.replace(params={**adapter.params, **values})


def _gradients(fn: Callable[..., Any], params: Any, entries: Any, args: Any, kwargs: Any) -> Any:
    """Return the gradients of the measuring methods' arrays."""
    if bad := [f"{site.path} ({site.kind})" for site, _ in entries if site.kind != "linear"]:
        raise ValueError(f"{', '.join(bad)}: only inputs and outputs of products are measured; leave these out")
    made = {site.path: method.init(jax.random.key(0), site, None) for site, method in entries}
    trained, fixed = ({path: pair[i] for path, pair in made.items()} for i in (0, 1))
    probe = Adapter(trained, fixed, Plan(tuple(entries), Spec([])))

    def total(trained: Any) -> jax.Array:
        out = adapt(fn)(params, probe.replace(params=trained), *args, **kwargs)
        parts = [x for x in jax.tree.leaves(out) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
        if not parts:
            raise ValueError("the function returns no floating point numbers, through which it could be measured")
        return sum((jnp.sum(x.astype(jnp.float32)) for x in parts), jnp.float32(0))

    return jax.grad(total)(trained)
