"""What a spec selects, what it refuses, and the paths that it matches."""

import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import lorax
from tests.zoo import leaves_by_path
from tests.zoo.dense import TOL, X_BxI, make, model
from tests.zoo.entry import normal

# What a spec selects.


@pytest.mark.parametrize(
    ("pattern", "needle"),
    [
        ("first/kernal", "first/kernel"),
        (r"kernel", "kernel"),
        (r"layers/\d+/.*", "nothing|none|no "),
        (r".*bias|norm/.*", "norm/scale"),
    ],
)
def test_a_pattern_that_selects_nothing_is_refused(pattern: str, needle: str) -> None:
    fn, params, args = model()
    sites = lorax.trace(fn, params, *args)
    with pytest.raises(ValueError, match=needle) as error:
        lorax.init(
            jax.random.key(0), lorax.Spec({".*kernel": lorax.LoRA(rank=2), pattern: lorax.LoRA(rank=2)}), sites, params
        )
    assert pattern in str(error.value) or repr(pattern) in str(error.value)


def test_no_site_at_all_is_refused() -> None:
    fn = lambda p, x: x * p["scale"]
    params = {"scale": normal(2, 5)}
    sites = lorax.trace(fn, params, X_BxI)
    assert all(s.kind == "other" for s in sites)
    for rules in ({".*": lorax.LoRA(rank=2)}, {}):
        with pytest.raises(ValueError):
            lorax.init(jax.random.key(0), lorax.Spec(rules), sites, params)


def test_the_first_pattern_wins_and_the_rest_is_frozen() -> None:
    fn, params, args = model()
    spec = lorax.Spec({"first/kernel": lorax.LoRA(rank=3), r"(first|second)/kernel": lorax.LoRA(rank=1)})
    adapter = lorax.init(jax.random.key(0), spec, lorax.trace(fn, params, *args), params)
    assert {path: x["a"].shape[-1] for path, x in adapter.params.items()} == {"first/kernel": 3, "second/kernel": 1}


def test_a_pattern_has_to_match_the_whole_path() -> None:
    fn, params, args = model()
    with pytest.raises(ValueError):
        lorax.init(jax.random.key(0), lorax.Spec({"first": lorax.LoRA(rank=2)}), lorax.trace(fn, params, *args), params)


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_below_one_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="rank"):
        make(lorax.LoRA(rank=rank))


def test_rank_above_the_smaller_side_warns_and_names_the_sites() -> None:
    with pytest.warns(UserWarning, match="rank") as caught:
        make(lorax.LoRA(rank=4), ".*kernel")
    text = " ".join(str(w.message) for w in caught)
    assert "head/kernel" in text
    assert "first/kernel" not in text


def test_rank_of_the_smaller_side_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(lorax.LoRA(rank=3), "head/kernel")


# Paths.


def test_boxed_nnx_and_plain_trees_have_the_same_paths() -> None:
    class Linen(nn.Module):
        boxed: bool

        @nn.compact
        def __call__(self, x):
            init = nn.initializers.lecun_normal()
            init = nn.with_partitioning(init, (None, "model")) if self.boxed else init
            x = nn.Dense(7, kernel_init=init, name="value")(x)
            return nn.Dense(3, kernel_init=init, name="out")(jnp.tanh(x))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.value = nnx.Linear(5, 7, rngs=rngs)
            self.out = nnx.Linear(7, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.tanh(self.value(x)))

    found = []
    for boxed in (False, True):
        module = Linen(boxed)
        params = module.init(jax.random.key(0), X_BxI)["params"]
        found.append(lorax.trace(lambda p, x, module=module: module.apply({"params": p}, x), params, X_BxI))
    graph, state = nnx.split(Nnx(nnx.Rngs(0)))
    found.append(lorax.trace(lambda s, x: nnx.merge(graph, s)(x), state, X_BxI))
    pure = nnx.to_pure_dict(state)
    assert set(leaves_by_path(pure)) == {s.path for s in found[0]}
    for sites in found:
        assert {s.path: s.kind for s in sites} == {
            "value/kernel": "linear",
            "value/bias": "other",
            "out/kernel": "linear",
            "out/bias": "other",
        }


def test_an_adapter_moves_between_boxed_and_plain_params() -> None:
    fn, params, args, adapter = make()
    boxed = jax.tree.map(lambda x: nn.Partitioned(x, names=(None,) * x.ndim), params)
    unboxed = lambda p, x: fn(nn.meta.unbox(p), x)
    np.testing.assert_allclose(
        lorax.adapt(unboxed)(boxed, adapter, *args), lorax.adapt(fn)(params, adapter, *args), atol=TOL
    )
    assert isinstance(lorax.merge(boxed, adapter)["head"]["kernel"], nn.Partitioned)


def test_paths_that_collide_are_refused() -> None:
    fn = lambda p, x: x @ p["a"]["b/w"] @ p["a/b"]["w"]
    params = {"a": {"b/w": normal(2, 5, 5)}, "a/b": {"w": normal(3, 5, 5)}}
    with pytest.raises(ValueError, match="a/b/w"):
        lorax.trace(fn, params, X_BxI)


# Wrong input.


def wrong_params() -> list[Any]:
    """Params that an adapter of the model does not belong to, and what the message has to name."""
    _, params, _ = model()
    narrow = params | {"head": {"kernel": params["head"]["kernel"][:, :2], "bias": params["head"]["bias"][:2]}}
    renamed = {("last" if k == "head" else k): v for k, v in params.items()}
    return [(narrow, r"\(7, 2\).*\(7, 3\)|\(7, 3\).*\(7, 2\)"), (renamed, "last/kernel")]


@pytest.mark.parametrize(("params", "needle"), wrong_params())
@pytest.mark.parametrize("call", ["adapt", "merge", "unmerge", "explain"])
def test_params_of_another_model_are_refused(params: Any, needle: str, call: str) -> None:
    fn, _, args, adapter = make()
    calls = []

    def counting(p, x):
        calls.append(1)
        return fn(p, x)

    run = {
        "adapt": lambda: lorax.adapt(counting)(params, adapter, *args),
        "merge": lambda: lorax.merge(params, adapter),
        "unmerge": lambda: lorax.unmerge(params, adapter),
        "explain": lambda: lorax.explain(counting, params, adapter, *args),
    }[call]
    with pytest.raises(ValueError, match=needle) as error:
        run()
    assert "head/kernel" in str(error.value)
    assert not calls, "the function ran before the params were checked"


def test_init_refuses_params_of_another_model() -> None:
    fn, params, args = model()
    sites = lorax.trace(fn, params, *args)
    for wrong, _ in wrong_params():
        with pytest.raises(ValueError, match="head/kernel"):
            lorax.init(jax.random.key(0), lorax.Spec({"head/kernel": lorax.LoRA(rank=2)}), sites, wrong)


def test_nan_in_an_adapter_is_refused_by_merge() -> None:
    fn, params, args, adapter = make()
    arrays = adapter.params["head/kernel"]
    for bad in (jnp.nan, jnp.inf):
        broken = adapter.replace(params=adapter.params | {"head/kernel": arrays | {"b": arrays["b"].at[0, 1].set(bad)}})
        with pytest.raises(ValueError, match="head/kernel"):
            lorax.merge(params, broken)
        with pytest.raises(ValueError, match="head/kernel"):
            lorax.unmerge(params, broken)


def test_bad_patterns_and_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="regular expression"):
        lorax.Spec({"(": lorax.LoRA(rank=2)})
    with pytest.raises((ValueError, TypeError)):
        lorax.Spec({".*": "lora"})


def test_the_functions_own_errors_pass_through() -> None:
    fn, params, _, adapter = make()
    with pytest.raises((TypeError, ValueError)) as plain:
        fn(params, normal(1, 4, 6))
    with pytest.raises(type(plain.value), match=re.escape(str(plain.value))):
        lorax.adapt(fn)(params, adapter, normal(1, 4, 6))
