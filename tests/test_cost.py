"""What a training step costs, by XLA's own analysis of the compiled program, and how tracing grows with depth."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from experiments.bench.decoder import Shape, decoder, hand_written_lora, init_params, loss
from tests.agreement import abstract, assert_close, equations

FLOPS_OVER_HAND = 1.02
MEMORY_OVER_HAND = 1.05
FLOPS_UNDER_MERGED = 0.9  # what factoring saves at this size
ADDED_TRACING = 1.0  # of the plain function's equations, at most as much again for a site's own

# Sizes of which no activation has the shape of a weight, and few tokens, so that merged weights would be seen.
SMALL = Shape(layers=3, d_model=96, heads=4, kv_heads=2, d_ff=160, vocabulary=224)
BATCH, LENGTH, RANK = 2, 32, 4
KERNELS = r"(layers/\d+/\w+|head)/kernel"
TX = optax.adamw(1e-3)


@functools.cache
def parts() -> tuple[Any, Any, Any, Any]:
    """Params, tokens, adapter and optimiser state, as shapes only."""
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), SMALL))
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    sites = lorax.trace(decoder(SMALL), params, tokens)
    spec = lorax.Spec({KERNELS: lorax.LoRA(rank=RANK, alpha=2 * RANK)})
    adapter = jax.eval_shape(lambda p: lorax.init(jax.random.key(1), spec, sites, p), params)
    return params, tokens, adapter, jax.eval_shape(TX.init, adapter.params)


def with_factors(params: Any, factors: Any) -> Any:
    """Put the factors beside the kernels, where the decoder written by hand looks for them."""
    own = lambda path, layer: {**layer, **factors[path]}
    layers = [
        {n: own(f"layers/{i}/{n}/kernel", v) if isinstance(v, dict) else v for n, v in layer.items()}
        for i, layer in enumerate(params["layers"])
    ]
    return {**params, "layers": layers, "head": own("head/kernel", params["head"])}


def train_step(run: Any) -> Any:
    """A step of `run(params, adapter, tokens)`: loss, gradients, update."""

    def step(params: Any, adapter: Any, opt_state: Any, tokens: Any) -> Any:
        value, grads = jax.value_and_grad(lambda t: loss(run(params, adapter.replace(params=t), tokens), tokens))(
            adapter.params
        )
        updates, opt_state = TX.update(grads, opt_state, adapter.params)
        return optax.apply_updates(adapter.params, updates), opt_state, value, grads

    return step


FORMS = {
    "by hand": lambda p, a, x: decoder(SMALL, hand_written_lora(2.0))(with_factors(p, a.params), x),
    "lorax": lambda p, a, x: lorax.adapt(decoder(SMALL), strict=True)(p, a, x),
    "merged": lambda p, a, x: decoder(SMALL)(lorax.merge(p, a), x),
}


@functools.cache
def compiled(form: str) -> Any:
    """The compiled step; it is never run but where a test says so."""
    params, tokens, adapter, opt_state = parts()
    return jax.jit(train_step(FORMS[form])).lower(params, adapter, opt_state, tokens).compile()


flops = lambda form: compiled(form).cost_analysis()["flops"]
memory = lambda form: compiled(form).memory_analysis().temp_size_in_bytes


def test_every_linear_site_is_adapted() -> None:
    _, _, adapter, _ = parts()
    assert len(adapter.params) == 3 * 7 + 1


def test_flops_are_those_of_lora_written_by_hand() -> None:
    assert flops("lorax") <= FLOPS_OVER_HAND * flops("by hand")
    assert flops("lorax") < FLOPS_UNDER_MERGED * flops("merged"), "the count tells forms apart"


def test_temporary_memory_is_that_of_lora_written_by_hand() -> None:
    assert memory("lorax") <= MEMORY_OVER_HAND * memory("by hand")
    assert memory("merged") > MEMORY_OVER_HAND * memory("by hand"), "the figure tells forms apart"


def test_arguments_and_results_are_no_larger() -> None:
    sizes = lambda form: (
        compiled(form).memory_analysis().argument_size_in_bytes,
        compiled(form).memory_analysis().output_size_in_bytes,
    )
    hand, mine = sizes("by hand"), sizes("lorax")
    scales = 4 * len(parts()[2].state)  # one number a site, which the form by hand has in its program
    assert mine[0] - hand[0] <= scales
    assert mine[1] == hand[1]


def test_the_step_by_hand_and_through_lorax_compute_the_same() -> None:
    params = init_params(jax.random.key(0), SMALL)
    _, tokens, adapter, _ = parts()
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, SMALL.vocabulary, tokens.shape), jnp.int32)
    fill = lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype)
    adapter = adapter.replace(
        params=jax.tree.map(fill, adapter.params), state=jax.tree.map(lambda _: jnp.float32(2.0), adapter.state)
    )
    outs = {form: compiled(form)(params, adapter, TX.init(adapter.params), tokens) for form in ("by hand", "lorax")}
    for mine, hand in zip(outs["lorax"][2:], outs["by hand"][2:], strict=True):  # the loss and the gradients
        assert_close(mine, hand, 1e-4)


def constants(text: str) -> list[int]:
    """The sizes of a compiled program's constants."""
    return [int(np.prod([int(n) for n in dims.split(",")])) for dims in re.findall(r"\[([\d,]+)\]\S* constant\(", text)]


def test_no_frozen_weight_is_a_constant_of_the_program() -> None:
    smallest = min(np.prod(x.shape) for x in jax.tree.leaves(parts()[0]) if len(x.shape) > 1)
    assert max(constants(compiled("lorax").as_text()), default=0) < smallest
    # A closure over the base makes it one: the search is able to fail.
    x, w = jnp.ones((2, 96)), jnp.asarray(np.random.default_rng(0).normal(size=(96, 96)), jnp.float32)
    assert max(constants(jax.jit(lambda x: x @ w).lower(x).compile().as_text())) >= 96 * 96


def test_nothing_of_a_frozen_leafs_shape_is_in_gradients_or_the_optimiser() -> None:
    params, tokens, adapter, opt_state = parts()
    new, new_state, _, grads = jax.eval_shape(train_step(FORMS["lorax"]), params, adapter, opt_state, tokens)
    frozen = {x.shape for x in jax.tree.leaves(params)}
    assert not frozen & {x.shape for x in jax.tree.leaves((grads, new, new_state, opt_state)) if x.shape}
    assert abstract(new) == adapter.params
    numbers = lambda tree: sum(x.size for x in jax.tree.leaves(tree) if x.shape)
    assert numbers(opt_state) == 2 * numbers(adapter.params)
    assert numbers(adapter.params) == sum(RANK * (s.size("I") + s.size("O")) for s, _ in adapter.plan.entries)


def test_no_product_of_the_step_makes_a_weight() -> None:
    params, tokens, adapter, opt_state = parts()
    kernels = {tuple(sorted(x.shape)) for x in jax.tree.leaves(params) if len(x.shape) == 2}

    def found(form: str) -> set[tuple[int, ...]]:
        jaxpr = jax.make_jaxpr(train_step(FORMS[form]))(params, adapter, opt_state, tokens)
        shapes = {
            tuple(sorted(v.aval.shape))
            for e in equations(jaxpr)
            if e.primitive.name in ("dot_general", "add", "add_any", "mul", "sub")
            for v in e.outvars
        }
        return shapes & kernels

    embedding = tuple(sorted(params["embed"].shape))
    assert not found("lorax") - {embedding}
    assert len(found("merged")) >= 4


@functools.cache
def traced(layers: int) -> tuple[int, int]:
    """The numbers of equations of the plain and of the adapted decoder."""
    shape = Shape(layers=layers, d_model=32, heads=4, kv_heads=2, d_ff=48, vocabulary=64)
    fn = decoder(shape)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), shape))
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    sites = lorax.trace(fn, params, tokens)
    spec = lorax.Spec({KERNELS: lorax.LoRA(rank=2)})
    adapter = jax.eval_shape(lambda p: lorax.init(jax.random.key(0), spec, sites, p), params)
    plain = jax.make_jaxpr(fn)(params, tokens)
    adapted = jax.make_jaxpr(lorax.adapt(fn))(params, adapter, tokens)
    return len(equations(plain)), len(equations(adapted))


def test_equations_grow_linearly_with_depth() -> None:
    plain, adapted = zip(*(traced(n) for n in (2, 4, 8)), strict=True)
    per_layer = (adapted[1] - adapted[0]) / 2
    assert (adapted[2] - adapted[1]) / 4 == per_layer
    assert adapted[2] - plain[2] <= (1 + ADDED_TRACING) * plain[2]


@pytest.mark.parametrize("layers", [4])
def test_a_scanned_stack_is_traced_once(layers: int) -> None:
    fn = lambda p, x: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]

    def count(n: int) -> int:
        params, x = {"w": jnp.zeros((n, 4, 4))}, jnp.zeros((2, 4))
        sites = lorax.trace(fn, params, x)
        adapter = lorax.init(jax.random.key(0), lorax.Spec({"w": lorax.LoRA(rank=1)}), sites, params)
        return len(equations(jax.make_jaxpr(lorax.adapt(fn))(params, adapter, x)))

    assert count(layers) == count(8 * layers)
