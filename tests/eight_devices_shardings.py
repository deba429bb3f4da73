"""Shardings derived from the base's, on eight fake devices: `python -m tests.eight_devices_shardings CHECK [few]`.

`few` is for fewer layouts of the base: fully sharded, tensor parallel, and all at once.

In a process of its own; prints a line for each check, an assertion fails the process. It runs in float64, as
`tests.eight_devices` does.
"""

import collections
import contextlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lorax
from tests.agreement import FAST_COMPILE, assert_close, assert_identical, normal

TOL = 1e-8  # float64, sums over devices in another order, amplified by attention and by Adam
D, F, H, K, L, E, V, B, T = 32, 64, 4, 8, 2, 4, 24, 8, 4
RANK = 1  # where communication is compared: the largest factor is smaller than the smallest part of a large weight
wide = lambda seed, *shape: normal(seed, *shape, dtype=jnp.float64)
PARAMS = {
    "embed": wide(0, V, D),
    "attn": {n: wide(i, D, H, K) for i, n in enumerate(("query", "key", "value"), 1)} | {"out": wide(4, H, K, D)},
    "layers": {"up": wide(5, L, D, F), "down": wide(6, L, F, D), "bias": wide(7, L, D)},
    "experts": {"up": wide(8, E, D, F), "down": wide(9, E, F, D)},
    "router": wide(10, D, E),
}
TOKENS = np.random.default_rng(0).integers(0, V, (B, T))
AXES = {"data": 2, "model": 2, "expert": 2}


def layout(fsdp: Any = None, tensor: Any = None, expert: Any = None) -> dict[str, Any]:
    """The specs of the base: widths over `fsdp`, heads and inner widths over `tensor`, experts over `expert`."""
    heads = dict.fromkeys(("query", "key", "value"), P(fsdp, tensor, None))
    return {
        "embed": P(tensor, fsdp),
        "attn": heads | {"out": P(tensor, None, fsdp)},
        "layers": {"up": P(None, fsdp, tensor), "down": P(None, tensor, fsdp), "bias": P()},
        "experts": {"up": P(expert, fsdp, tensor), "down": P(expert, tensor, fsdp)},
        "router": P(fsdp, None),
    }


LAYOUTS = {
    "data": layout(),
    "fsdp": layout(fsdp="data"),
    "tensor": layout(tensor="model"),
    "expert": layout(expert="expert"),
    "fsdp and tensor": layout(fsdp="data", tensor="model"),
    "all": layout(fsdp="data", tensor="model", expert="expert"),
    "two axes": layout(fsdp=("data", "expert"), tensor="model"),
}
# What an adapter's specs have to be, written out by hand: `all` is fsdp, tensor and expert parallel.
WANTED = {
    "embed": {"a": P("model", None), "b": P(None, "data")},
    "attn/query": {"a": P("data", None), "b": P(None, "model", None)},
    "attn/out": {"a": P("model", None, None), "b": P(None, "data")},
    "layers/up": {"a": P(None, "data", None), "b": P(None, None, "model")},
    "layers/down": {"a": P(None, "model", None), "b": P(None, None, "data")},
    "experts/up": {"a": P("expert", "data", None), "b": P("expert", None, "model")},
    "experts/down": {"a": P("expert", "model", None), "b": P("expert", None, "data")},
    "router": {"a": P("data", None), "b": P(None, None)},
}


def mesh(kind: AxisType = AxisType.Auto) -> Mesh:
    """A mesh of 2 × 2 × 2 devices."""
    return Mesh(np.array(jax.devices()).reshape(*AXES.values()), tuple(AXES), axis_types=(kind,) * 3)


def model(out: Any = None) -> Callable[[Any, Any], Any]:
    """An embedding, attention, a scanned stack and experts; `out` names the shardings of activations by their axes.

    On explicit axes these are the output shardings of products, on others constraints, as users write them.
    """
    is_explicit = out is not None and AxisType.Explicit in out("b").mesh.axis_types
    placed = lambda x, axes: lax.with_sharding_constraint(x, out(axes)) if out and not is_explicit else x

    def einsum(sums: str, *xs: Any) -> Any:
        axes = sums.split("->")[1]
        return placed(jnp.einsum(sums, *xs, out_sharding=out(axes) if is_explicit else None), axes)

    def fn(p: Any, tokens: Any) -> Any:
        x = p["embed"].at[tokens].get(out_sharding=out("btd")) if is_explicit else placed(p["embed"][tokens], "btd")
        x = x + p["shift"] if "shift" in p else x
        q, k, v = (einsum("btd,dhk->bthk", x, p["attn"][n]) for n in ("query", "key", "value"))
        weights = jax.nn.softmax(einsum("bthk,bshk->bhts", q, k) / 4)
        x = x + einsum("bthk,hkd->btd", einsum("bhts,bshk->bthk", weights, v), p["attn"]["out"])

        def layer(x: Any, p: Any) -> Any:
            return x + einsum("btf,fd->btd", jnp.tanh(einsum("btd,df->btf", x, p["up"])), p["down"]) + p["bias"], None

        x = lax.scan(jax.checkpoint(layer), x, p["layers"])[0]
        gates = jax.nn.softmax(einsum("btd,de->bte", x, p["router"]))
        each = einsum("bte,btd->ebtd", gates, x)
        inner = jnp.tanh(einsum("ebtd,edf->ebtf", each, p["experts"]["up"]))
        x = x + einsum("ebtf,efd->ebtd", inner, p["experts"]["down"]).sum(0)
        return jnp.mean(jnp.sin(x))

    return fn


def on(where: Mesh, name: str) -> tuple[Any, Any, Any]:
    """The base and the tokens on a mesh, and the model with the shardings of its activations."""
    specs = LAYOUTS[name]
    params = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(where, s)), PARAMS, specs)
    batch = specs["router"][0] or "data"
    tokens = jax.device_put(TOKENS, NamedSharding(where, P(batch)))
    tensor = "model" if specs["attn"]["query"][1] else None
    letters = {"b": batch, "h": tensor, "f": tensor, "e": specs["experts"]["up"][0]}
    return params, tokens, model(lambda axes: NamedSharding(where, P(*map(letters.get, axes))))


def spec_of(**settings: Any) -> lorax.Spec:
    """LoRA of all weights."""
    return lorax.Spec({".*": lorax.LoRA(rank=2, alpha=3, dtype="float64", **settings)})


SITES = lorax.trace(model(), PARAMS, TOKENS)


def make(spec: lorax.Spec, params: Any = PARAMS) -> Callable[[Any], lorax.Adapter]:
    """What `init` does, as a function of the key and the params."""
    return lambda key, params=params: lorax.init(key, spec, SITES, params)


def specs(where: lorax.Adapter, path: str) -> dict[str, P]:
    """All specs of a site."""
    return {n: s.spec for n, s in {**where.params[path], **where.state[path]}.items()}


def check_specs() -> None:
    """Written out for LoRA on every kind of base, and for other methods where they have other axes."""
    where = mesh()
    params, _, _ = on(where, "all")
    adapter = jax.eval_shape(make(spec_of()), jax.random.key(0), params)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    given = {"arrays": params, "abstract": abstract, "shardings": jax.tree.map(lambda x: x.sharding, params)}
    for base in given.values():
        placed = lorax.shardings(base, adapter)
        assert jax.tree.structure(placed) == jax.tree.structure(adapter)
        for path, wanted in WANTED.items():
            got = specs(placed, path)
            assert got.pop("scale") == P()
            assert got == wanted, (path, got)
    replicated = lorax.shardings(on(where, "data")[0], adapter)
    assert all(s.is_fully_replicated for s in jax.tree.leaves(replicated))
    assert tuple(specs(lorax.shardings(on(where, "two axes")[0], adapter), "router")["a"]) == (("data", "expert"), None)

    def of(method: lorax.Method, path: str) -> dict[str, tuple[Any, ...]]:
        made = jax.eval_shape(make(lorax.Spec({path: method})), jax.random.key(0), params)
        placed = lorax.shardings(params, made)
        shared = {n: tuple(s.spec) for name in made.plan.shared.values() for n, s in placed.state[name].items()}
        return {n: tuple(s) for n, s in specs(placed, path).items()} | shared

    assert of(lorax.DoRA(rank=2), "experts/up")["magnitude"] == ("expert", "model")
    assert of(lorax.DoRA(rank=2, initializer="pissa"), "layers/up")["a0"] == (None, "data", None)
    assert of(lorax.Full(), "experts/down")["value"] == ("expert", "model", "data")
    assert of(lorax.Full(), "layers/bias")["value"] == (None, None)
    assert of(lorax.IA3(), "attn/key")["gain"] == ("model", None)
    # D = 32 inputs, cut 4 × 8: the slow part is split; H = 4 heads and K = 8 go to one factor each.
    lokr = of(lorax.LoKr(rank=2), "attn/query")
    assert lokr["c"] == ("data", "model") and lokr["a"] == (None, None) and lokr["b"] == (None, None), lokr
    assert of(lorax.TrainableTokens(tokens=(1, 2)), "embed")["value"] == (None, "data")
    assert of(lorax.Prompt(length=2), "embed")["prompt"] == (None, "data")
    vera = of(lorax.VeRA(rank=4), "attn/query")
    assert vera["d"] == (None,) and vera["shared_a"] == ("data", None) and vera["shared_b"] == (None, "model", None)
    # One pair of projections for two weights of one shape: split where both are.
    both = {n: jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(where, s))
            for n, s in {"q": P("data", "model"), "o": P("model", "data"), "v": P("data", None)}.items()}  # fmt: skip
    square = lambda p, x: x @ p["q"] @ p["o"] @ p["v"]
    sites = lorax.trace(square, both, jax.ShapeDtypeStruct((2, 8), jnp.float32))
    for paths, wanted in (("q|o", (None, None)), ("q|v", ("data", None))):
        spec = lorax.Spec({paths: lorax.VeRA(rank=2)})
        made = jax.eval_shape(lambda k, spec=spec: lorax.init(k, spec, sites, both), jax.random.key(0))
        (name,) = set(made.plan.shared.values())
        assert tuple(lorax.shardings(both, made).state[name]["shared_a"].spec) == wanted
    # A stack has its members' axis in front.
    stacked = jax.eval_shape(lambda k: lorax.stack([make(spec_of())(k), make(spec_of())(k)]), jax.random.key(0))
    experts = specs(lorax.shardings(on(where, "fsdp")[0], stacked, members="expert"), "experts/up")
    assert experts["a"] == P("expert", None, "data", None) and experts["scale"] == P("expert"), experts
    assert specs(lorax.shardings(params, stacked), "router")["a"] == P(None, "data", None)
    with contextlib.suppress(ValueError):
        lorax.shardings(params, stacked, members="data")
        raise AssertionError("members over an axis that splits the base")
    print("ok specs")


def check_quantized() -> None:
    """A quantised base gives the specs of what it stands for, from arrays, abstract arrays and shardings."""
    where = mesh()
    params = {"up": PARAMS["experts"]["up"], "out": PARAMS["attn"]["out"]}
    split = {"up": P("expert", "data", "model"), "out": P("model", None, "data")}
    params = {n: jax.device_put(x, NamedSharding(where, split[n])) for n, x in params.items()}

    def fn(p: Any, x: Any) -> Any:
        y = jnp.einsum("ebd,edf->ebf", x, p["up"])[..., : H * K].reshape(E, B, H, K)
        return jnp.einsum("ebhk,hkd->ebd", y, p["out"])

    x = wide(20, E, B, D)
    sites = lorax.trace(fn, params, x)
    rules = {".*": lorax.NF4(block=4, double=False)}
    quantised = lorax.quantize(params, rules, sites=sites)
    adapter = lorax.init(jax.random.key(0), spec_of(), sites, quantised)
    wanted = lorax.shardings(params, adapter)
    abstract = jax.eval_shape(lambda p: lorax.quantize(p, rules, sites=sites), params)
    to = lorax.quant.shardings(abstract, jax.tree.map(lambda x: x.sharding, params))
    made = jax.jit(lambda p: lorax.quantize(p, rules, sites=sites), out_shardings=to)(params)
    assert_identical(jax.device_get(made), jax.device_get(quantised))
    shards = {n: math.prod(node.codes.sharding.shard_shape(node.codes.shape)) for n, node in made.items()}
    assert shards == {"up": E * D * F // 2 // 8, "out": H * K * D // 2 // 4}, shards
    for base in (quantised, made, to, jax.tree.map(lambda x: x.sharding, made)):
        assert jax.tree.map(lambda s: s.spec, lorax.shardings(base, adapter)) == jax.tree.map(lambda s: s.spec, wanted)
    print("ok quantised")


def compiled_collectives(text: str) -> collections.Counter:
    """The collectives of a program: kind and the elements of each result."""
    found: collections.Counter = collections.Counter()
    kinds = r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    for shapes, kind in re.findall(kinds, text):
        sizes = [math.prod(map(int, dims.split(","))) if dims else 1 for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)]
        found[kind, sum(sizes)] += 1
    return found


def train(name: str, kind: AxisType | None) -> tuple[list[float], lorax.Adapter]:
    """Make the adapter and its optimiser's state under jit where they belong, train five steps, return the losses."""
    tx = optax.adamw(1e-2)
    if kind is None:
        params, tokens, fn, where = PARAMS, TOKENS, model(), None
    else:
        where = mesh(kind)
        params, tokens, fn = on(where, name)
    with jax.set_mesh(where) if kind == AxisType.Explicit else contextlib.nullcontext():
        build = make(spec_of())
        if where is None:
            adapter = build(jax.random.key(0), params)
            state = tx.init(adapter.params)
            places = None
        else:
            shape = jax.eval_shape(build, jax.random.key(0), params)
            to = lorax.shardings(params, shape)
            init = jax.jit(build, out_shardings=to).lower(jax.random.key(0), params).compile()
            assert not compiled_collectives(init.as_text()), name  # nothing is ever whole anywhere
            adapter = init(jax.random.key(0), params)
            of_state = lorax.optim.shardings(jax.eval_shape(tx.init, shape.params), shape, to)
            state = jax.jit(tx.init, out_shardings=of_state)(adapter.params)
            eager = tx.init(adapter.params)
            for mine, theirs in zip(jax.tree.leaves(state[0].mu), jax.tree.leaves(eager[0].mu), strict=True):
                assert mine.sharding.is_equivalent_to(theirs.sharding, mine.ndim)
            places = to, of_state

        def step(params: Any, adapter: Any, state: Any, tokens: Any) -> Any:
            loss = lambda p: lorax.adapt(fn)(params, adapter.replace(params=p), tokens)
            value, grads = jax.value_and_grad(loss)(adapter.params)
            updates, state = tx.update(grads, state, adapter.params)
            return adapter.replace(params=optax.apply_updates(adapter.params, updates)), state, value

        run = jax.jit(
            step, donate_argnums=(1, 2), out_shardings=places and (*places, None), compiler_options=FAST_COMPILE
        )
        losses = []
        for _ in range(5):
            adapter, state, value = run(params, adapter, state, tokens)
            losses.append(float(value))
    return losses, jax.device_get(adapter)


def check_training(kind: AxisType, names: Sequence[str]) -> None:
    """On every layout the losses and the adapter are those of one device."""
    losses, adapter = train("", None)
    for name in names:
        got, trained = train(name, kind)
        np.testing.assert_allclose(got, losses, rtol=TOL)
        assert_close(trained.params, adapter.params, TOL, name)
        print("ok", kind, name, flush=True)


def collectives(name: str, kind: AxisType, method: Any) -> tuple[collections.Counter, collections.Counter, Any]:
    """The collectives of a loss and its gradients, plain (of an activation) and adapted (of the adapter)."""
    where = mesh(kind)
    params, tokens, fn = on(where, name)
    shift = jax.device_put(jnp.zeros((B, T, D)), NamedSharding(where, tokens.sharding.spec))
    spec = lorax.Spec({"embed": lorax.LoRA(rank=RANK, dtype="float64"), ".*": method})
    with jax.set_mesh(where) if kind == AxisType.Explicit else contextlib.nullcontext():
        adapter = make(spec)(jax.random.key(0), params)
        to = lorax.shardings(params, adapter)
        adapter = jax.device_put(adapter, to)
        plain = lambda shift, params, tokens: fn({**params, "shift": shift}, tokens)

        def adapted(trained: Any, adapter: Any, shift: Any, params: Any, tokens: Any) -> Any:
            moved = lambda params, tokens: fn({**params, "shift": shift}, tokens)
            return lorax.adapt(moved)(params, adapter.replace(params=trained), tokens)

        def text(loss: Any, out: Any, *args: Any) -> str:
            run = jax.jit(jax.value_and_grad(loss), out_shardings=(None, out))
            return run.lower(*args).compile(FAST_COMPILE).as_text()

        texts = (
            text(plain, shift.sharding, shift, params, tokens),
            text(adapted, to.params, adapter.params, adapter, shift, params, tokens),
        )
    return *map(compiled_collectives, texts), adapter


def check_collectives(kind: AxisType, names: Sequence[str]) -> None:
    """What the adapted step communicates beyond the plain one: factors, their gradients, `rank` columns.

    No base weight is gathered that the plain model would not gather, and no gradient is larger than the adapter.
    """
    dora = lorax.DoRA(rank=RANK, dtype="float64")
    runs = [(name, lorax.LoRA(rank=RANK, dtype="float64")) for name in names]
    for name, method in [*runs, ("fsdp", dora), ("all", dora)]:
        plain, adapted, adapter = collectives(name, kind, method)
        case = kind, name, type(method).__name__, dict(adapted - plain), dict(plain - adapted)
        of_kind = lambda found, kind: sum(n * count for (k, n), count in found.items() if k == kind)
        largest = max(x.size for x in jax.tree.leaves(adapter.params))
        gathers = sorted(n for n in (adapted - plain).elements() if n[0] in ("all-gather", "all-to-all"))
        if method is dora and gathers[-1][1] in (D * F, D * F // 2):
            gathers.pop()  # where a layer is recomputed, so is its last product, whose output the gain's gradient needs
        assert all(n <= largest for _, n in gathers), case
        # With tensor parallelism the products of `rank` columns with what was split are summed too: forward, again
        # where a layer is recomputed, and backward.
        columns = 3 * len(SITES) * E * B * T * RANK if "model" in str(LAYOUTS[name]) else 0
        added = of_kind(adapted, "all-reduce") - of_kind(plain, "all-reduce")
        assert added <= sum(x.size for x in jax.tree.leaves(adapter)) + columns, case
        print("ok collectives", *case[:3], flush=True)


WHOLE = {"specs": check_specs, "quantized": check_quantized}
BY_LAYOUT = {"training": check_training, "collectives": check_collectives}
FEW = ("fsdp", "tensor", "all")

if __name__ == "__main__":
    assert len(jax.devices()) == 8
    assert PARAMS["embed"].dtype == jnp.float64
    check, *few = sys.argv[1:]
    if check in WHOLE:
        WHOLE[check]()
    for kind in AxisType.Auto, AxisType.Explicit:
        if check in BY_LAYOUT:
            BY_LAYOUT[check](kind, FEW if few else list(LAYOUTS))
