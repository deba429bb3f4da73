"""Every model of the zoo: its sites are found, evaluated as expected, and right in value and gradient."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from tests.zoo import ENTRIES, is_float, leaves_by_path
from tests.zoo.case import assert_close, case

EXACT = 1e-6

# With a scope, the tests of one entry run one after another, and one process builds it.
all_entries = pytest.mark.parametrize("name", ENTRIES, scope="module")


@all_entries
def test_sites_are_found(name: str) -> None:
    c = case(name)
    entry, leaves = c.entry, leaves_by_path(c.params)
    sites = {s.path: s for s in c.sites}
    for path, leaf in leaves.items():
        if not is_float(leaf):
            assert path not in sites or sites[path].kind == "other", path
            continue
        site, expected = sites[path], entry.expected(path)
        assert (site.shape, jnp.dtype(site.dtype)) == (leaf.shape, leaf.dtype), path
        if expected != "anything":
            assert (site.kind != "other") == (expected != "other"), (path, site.kind, expected)
        if site.kind != "other":
            assert sorted([*site.stack, *site.fan_in, *site.fan_out]) == list(range(leaf.ndim)), path
    assert set(sites) <= set(leaves)
    assert {path: sites[path].kind for path in entry.kinds} == entry.kinds


@all_entries
def test_abstract_params_give_the_same_sites(name: str) -> None:
    c = case(name)
    leaves, tree = jax.tree.flatten((c.params, c.args))
    abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x for x in leaves]
    params, args = tree.unflatten(abstract)
    again = lorax.trace(c.fn, params, *args)
    fields = [(s.path, s.kind, s.fan_in, s.fan_out, s.stack) for s in c.sites]
    assert [(s.path, s.kind, s.fan_in, s.fan_out, s.stack) for s in again] == fields


@all_entries
def test_factors_have_the_expected_shapes(name: str) -> None:
    c = case(name)
    trained = c.adapter.params if c.adapter else {}
    assert {path: (trained[path]["a"].shape, trained[path]["b"].shape) for path in c.entry.shapes} == c.entry.shapes
    if c.entry.numbers is not None:
        assert sum(x.size for x in jax.tree.leaves(trained)) == c.entry.numbers


@all_entries
def test_explain_says_how(name: str) -> None:
    c = case(name)
    if c.adapter is None:
        pytest.skip("nothing to adapt")
    assert set(c.rows) == set(c.adapter.params)
    for path, row in c.rows.items():
        expected = c.entry.expected(path)
        assert row.how in ("factored", "materialised")
        if expected in ("factored", "materialised"):
            assert row.how == expected, (path, row.how, row.reason)
        assert row.reason, path


@all_entries
def test_strict_refuses_exactly_what_is_materialised(name: str) -> None:
    c = case(name)
    if c.adapter is None:
        pytest.skip("nothing to adapt")
    built = [path for path, row in c.rows.items() if row.how == "materialised"]

    def abstract():
        run = lambda params, adapter, *arrays: [
            x
            for x in jax.tree.leaves(lorax.adapt(c.fn, strict=True)(params, adapter, *c.with_arrays(arrays)))
            if hasattr(x, "dtype")
        ]
        return jax.eval_shape(run, c.params, c.adapter, *c.arrays)

    if built:
        with pytest.raises(ValueError, match="strict") as error:
            abstract()
        assert all(path in str(error.value) for path in built)
    else:
        abstract()


@all_entries
def test_adapted_equals_merged(name: str) -> None:
    c = case(name)
    if c.adapter is None:
        pytest.skip("nothing to adapt")
    (out, grad), (want, want_grad) = c.run(c.params, c.adapter), c.reference(c.params, c.adapter)
    assert_close(out, want, c.entry.tol)
    assert_close(grad, want_grad, 5 * c.entry.tol)
    for path, arrays in want_grad.items():
        if not re.fullmatch(c.entry.inert, path):
            assert all(np.any(np.asarray(x)) for x in arrays.values()), f"{path}: no gradient, the check is void"


@all_entries
def test_initial_adapter_changes_nothing(name: str) -> None:
    c = case(name)
    if c.initial is None:
        pytest.skip("nothing to adapt")
    base, merged = leaves_by_path(c.params), leaves_by_path(lorax.merge(c.params, c.initial))
    assert list(base) == list(merged)
    for path in c.initial.params:
        np.testing.assert_array_equal(np.asarray(merged[path]), np.asarray(base[path]))
    out, _ = c.run(c.params, c.initial)
    want, _ = c.reference(c.params, c.initial)
    assert_close(out, want, max(EXACT, c.entry.tol / 10))
