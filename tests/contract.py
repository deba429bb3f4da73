"""What the contract suite runs over: every method, and every kind of site that a weight may be.

A form is a function of one leaf, `w`, with what else it needs in `rest`. What a method does to the output of a use can
be written into it by hand: `after(y, hand)` gets the output of every product with `w` and the arrays of `hand`, those
of one layer where the form scans.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import lorax
from tests.agreement import adapter_for, normal

METHODS: dict[str, lorax.Method] = {
    "LoRA": lorax.LoRA(rank=2, alpha=3),
    "LoRA, bfloat16": lorax.LoRA(rank=2, alpha=3, dtype="bfloat16"),
    "rsLoRA": lorax.LoRA(rank=2, alpha=3, rank_stabilized=True),
    "LoRA with a bias": lorax.LoRA(rank=2, alpha=3, bias=True),
    "PiSSA": lorax.LoRA(rank=2, alpha=3, initializer="pissa"),
    "OLoRA": lorax.LoRA(rank=2, alpha=3, initializer="olora"),
    "orthogonal LoRA": lorax.LoRA(rank=2, alpha=3, initializer="orthogonal"),
    "DoRA": lorax.DoRA(rank=2, alpha=3),
    "DoRA of PiSSA": lorax.DoRA(rank=2, alpha=3, initializer="pissa"),
    "AdaLoRA": lorax.AdaLoRA(rank=3, target_rank=2, alpha=3),
    "LoRAFA": lorax.LoRAFA(rank=2, alpha=3),
    "VeRA": lorax.VeRA(rank=5),
    "LoHa": lorax.LoHa(rank=2, alpha=3),
    "LoKr": lorax.LoKr(rank=2, alpha=3),
    "IA3": lorax.IA3(),
    "IA3 of inputs": lorax.IA3(on="input"),
    "Full": lorax.Full(),
    "Bottleneck": lorax.Bottleneck(rank=3),
    "Prompt": lorax.Prompt(length=2),
    "Prefix": lorax.Prefix(length=2),
    "TrainableTokens": lorax.TrainableTokens(tokens=(5, 1)),
}
UNMERGEABLE = {"LoRA with a bias", "Bottleneck", "Prompt", "Prefix"}
IRREVERSIBLE = {"DoRA", "DoRA of PiSSA", "Full", "TrainableTokens", *UNMERGEABLE}
ON_TABLES = {"Prompt", "TrainableTokens"}  # of rows that are looked up, and of nothing else
READ_OFF_THE_WEIGHT = {"PiSSA", "OLoRA", "DoRA of PiSSA"}
DRAWS_NOTHING = {"PiSSA", "OLoRA", "DoRA of PiSSA", "VeRA", "IA3", "IA3 of inputs", "Full", "TrainableTokens"}

D, F, H, K, L, E, V = 6, 8, 2, 4, 3, 3, 7
X = normal(1, 2, 5, D)  # batch, positions, width
IDS = jnp.asarray([[0, 6, 3, 1, 5], [1, 1, 5, 4, 2]], jnp.int32)
After = Callable[[Any, Any], Any]
unchanged: After = lambda y, hand: y


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """A way to use a weight.

    Attributes:
      fn: takes `{"w": ..., "rest": ..., "hand": ...}`, an input, and `after`.
      w: the leaf's shape.
      x: the input.
      rest: other parameters, which are frozen.
      sizes: the product of the axes of stack, fan-in and fan-out.
      is_reversible: whether it has reverse-mode derivatives.
      is_mapped: whether `vmap` knows it.
    """

    fn: Callable[..., Any]
    w: tuple[int, ...]
    x: Any
    sizes: tuple[int, int, int]
    rest: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_reversible: bool = True
    is_mapped: bool = True

    @property
    def params(self) -> dict[str, Any]:
        """The parameters."""
        return {"w": normal(2, *self.w), "rest": dict(self.rest)}


FORMS: dict[str, Form] = {}


def form(w: tuple[int, ...], sizes: tuple[int, int, int], x: Any = X, **settings: Any) -> Any:
    """Add a form, under the name of its function."""

    def add(fn: Callable[..., Any]) -> Callable[..., Any]:
        FORMS[fn.__name__.replace("_", " ")] = Form(fn=fn, w=w, x=x, sizes=sizes, **settings)
        return fn

    return add


@form((D, F), (1, D, F))
def linear(p: Any, x: Any, after: After = unchanged) -> Any:
    return jnp.tanh(after(x @ p["w"], p.get("hand")))


@form((F, D), (1, D, F))
def transposed(p: Any, x: Any, after: After = unchanged) -> Any:
    return jnp.tanh(after(x @ p["w"].T, p.get("hand")))


@form((D, F), (1, D, F))
def cast_to_bfloat16(p: Any, x: Any, after: After = unchanged) -> Any:
    return after(x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16), p.get("hand"))


@form((D, H, K), (1, D, H * K))
def heads_out(p: Any, x: Any, after: After = unchanged) -> Any:
    return jnp.tanh(after(jnp.einsum("btd,dhk->bthk", x, p["w"]), p.get("hand")))


@form((H, K, D), (1, H * K, D), normal(3, 2, 5, H, K))
def heads_in(p: Any, x: Any, after: After = unchanged) -> Any:
    return jnp.tanh(after(jnp.einsum("bthk,hkd->btd", x, p["w"]), p.get("hand")))


@form((D, 3 * F), (1, D, 3 * F))
def cut_before_the_product(p: Any, x: Any, after: After = unchanged) -> Any:
    q, k, v = (x @ part for part in jnp.split(p["w"], 3, axis=1))
    return jnp.tanh(q) * k + v


@form((3, D, F), (1, 3 * D, F))
def conv(p: Any, x: Any, after: After = unchanged) -> Any:
    y = lax.conv_general_dilated(x, p["w"], (2,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
    return jnp.tanh(after(y, p.get("hand")))


@form((3, 2, D // 2, F), (1, 3 * 2 * D // 2, F), normal(3, 2, 5, 4, D))
def conv_grouped_and_dilated(p: Any, x: Any, after: After = unchanged) -> Any:
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", rhs_dilation=(2, 1), dimension_numbers=numbers, feature_group_count=2
    )
    return jnp.tanh(after(y, p.get("hand")))


@form((V, D), (1, V, D), IDS)
def embedding(p: Any, ids: Any, after: After = unchanged) -> Any:
    return jnp.tanh(after(p["w"][ids], p.get("hand")))


@form((V, D), (1, D, V), IDS, rest={"mid": normal(4, D, D)})
def tied_embedding(p: Any, ids: Any, after: After = unchanged) -> Any:
    x = jnp.tanh(jnp.take(p["w"], ids, axis=0) @ p["rest"]["mid"])
    return after(x @ p["w"].T, p.get("hand"))


@form((E, D, F), (E, D, F), normal(3, E, 4, D))
def experts(p: Any, x: Any, after: After = unchanged) -> Any:
    return jnp.tanh(jax.vmap(after)(jnp.einsum("ebd,edf->ebf", x, p["w"]), p.get("hand")))


@form((E, D, F), (E, D, F), normal(3, 5, D), is_mapped=False)
def ragged(p: Any, x: Any, after: After = unchanged) -> Any:
    return jnp.tanh(lax.ragged_dot(x, p["w"], jnp.asarray([1, 3, 1], jnp.int32)))


@form((E, D, F), (E, D, F))
def picked_expert(p: Any, x: Any, after: After = unchanged) -> Any:
    chosen = jax.tree.map(lambda w: w[x.shape[0] - 1], (p["w"], p.get("hand")))
    return jnp.tanh(after(x @ chosen[0], chosen[1]))


def layer(x: Any, w_and_hand: Any, after: After) -> Any:
    """One dense layer of a scan."""
    w, hand = w_and_hand
    return jnp.tanh(after(x @ w, hand)), jnp.sum(x)


@form((L, D, D), (L, D, D))
def scan(p: Any, x: Any, after: After = unchanged) -> Any:
    return lax.scan(functools.partial(layer, after=after), x, (p["w"], p.get("hand")))


@form((L, D, D), (L, D, D))
def scan_with_remat(p: Any, x: Any, after: After = unchanged) -> Any:
    return lax.scan(jax.checkpoint(functools.partial(layer, after=after)), x, (p["w"], p.get("hand")))


@form((2, 2, D, D), (4, D, D))
def nested_scan(p: Any, x: Any, after: After = unchanged) -> Any:
    block = lambda c, ws: lax.scan(functools.partial(layer, after=after), c, ws)
    return lax.scan(jax.checkpoint(block), x, (p["w"], p.get("hand")))


@form((D, D), (1, D, D))
def branches(p: Any, x: Any, after: After = unchanged) -> Any:
    dense = lambda x, w, hand: jnp.tanh(after(x @ w, hand))
    other = lambda x, w, hand: after(jnp.sin(x) @ w, hand)
    return lax.cond(jnp.sum(x) > -1e6, dense, other, x, p["w"], p.get("hand"))


@form((D, D), (1, D, D), is_reversible=False)
def while_loop(p: Any, x: Any, after: After = unchanged) -> Any:
    body = lambda s: (s[0] + 1, jnp.tanh(after(s[1] @ p["w"], p.get("hand"))))
    return lax.while_loop(lambda s: s[0] < 3, body, (0, x))[1]


@form((D, D), (1, D, D))
def vmap_and_jit(p: Any, x: Any, after: After = unchanged) -> Any:
    dense = jax.jit(lambda x: after(x @ p["w"], p.get("hand")))
    return jax.vmap(lambda x: jnp.tanh(dense(jax.nn.silu(x))))(x)


@jax.custom_jvp
def smoothed(x: Any, w: Any) -> Any:
    """A dense layer whose author gives the tangent of a smoother function."""
    return jax.nn.relu(x @ w)


@smoothed.defjvp
def _smoothed_jvp(primals: Any, tangents: Any) -> Any:
    (x, w), (dx, dw) = primals, tangents
    return smoothed(x, w), jax.nn.sigmoid(x @ w) * (dx @ w + x @ dw)


@form((D, D), (1, D, D))
def custom_jvp(p: Any, x: Any, after: After = unchanged) -> Any:
    return smoothed(x, p["w"])


TABLES = {"embedding", "tied embedding"}
PAIRS = [(f, m) for f in FORMS for m in METHODS]


@functools.cache
def site_of(name: str) -> lorax.Site:
    """The site of a form's weight."""
    form = FORMS[name]
    return lorax.trace(form.fn, form.params, form.x)["w"]


@functools.cache
def refusal(name: str, method: str) -> str | None:
    """Why a method cannot adapt a form's weight."""
    return METHODS[method].refuses(site_of(name))


@functools.cache
def moved(name: str, method: str) -> Any:
    """A random adapter of a form's weight."""
    form = FORMS[name]
    return adapter_for(form.fn, form.params, form.x, method=METHODS[method], only="w")


def started(name: str, method: str, seed: int = 0, params: Any = None) -> Any:
    """The adapter of a form's weight as `init` makes it."""
    params = FORMS[name].params if params is None else params
    sites = lorax.trace(FORMS[name].fn, params, FORMS[name].x)
    return lorax.init(jax.random.key(seed), lorax.Spec({re.escape("w"): METHODS[method]}), sites, params)


@functools.cache
def shapes_of(name: str, method: str) -> Any:
    """The same, as shapes only."""
    return jax.eval_shape(lambda: started(name, method))
