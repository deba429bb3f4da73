"""Settings that hold for every test: the CPU backend, and no silent promotion of ranks."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
