"""Settings that hold for every test: the CPU backend, and which variants of a test the default suite leaves out."""

import os
import zlib

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

ONE_IN = 4  # of the variants of a parametrised test, so many are in the default suite


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `variant` what is not the first of a test's parametrisations and not drawn by its name."""
    seen = set()
    for item in items:
        if not isinstance(item, pytest.Function) or not hasattr(item, "callspec") or item.get_closest_marker("slow"):
            continue
        test = item.nodeid.removesuffix(f"[{item.callspec.id}]")
        if test in seen and zlib.crc32(item.name.encode()) % ONE_IN:
            item.add_marker("variant")
        seen.add(test)
