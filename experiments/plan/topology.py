"""The devices that a plan is for: those here, or TPUs that are not."""

import os
from collections.abc import Sequence

import jax

# What libtpu asks its surroundings for, on a machine without a TPU.
_NO_TPU = {
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}
_WANTED = (
    "wanted local, or v5e:AxB, v6e:AxB or v5p:AxBxC, such as v5e:1x1, v5e:2x4, v5p:2x2x1 or v6e:16x16: chips along the "
    "sides of a slice, which are 1, or even, and up to 16"
)


def devices(name: str) -> Sequence[jax.Device]:
    """Returns the devices of a topology.

    Args:
        name: "local" for those of this machine, or a kind of TPU and how its chips are arranged, such as "v5e:4x4",
            which on a machine without TPUs can be compiled for, but not run on.

    Raises:
        ValueError: if there is no such topology, or libtpu is not installed.
    """
    if name == "local":
        return jax.devices()
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--topology={name} needs TPU's compiler; run: pip install 'lorax-flax[tpu-plan]'") from error
    from jax.experimental import topologies

    for key, value in _NO_TPU.items():
        os.environ.setdefault(key, value)
    try:
        # A host has up to four chips, two by two.
        sides = [int(side) for side in name.partition(":")[2].split("x")]
        host = [min(side, most) for side, most in zip((*sides, 1)[:3], (2, 2, 1), strict=True)]
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, chips_per_host_bounds=host)
        return described.devices
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"--topology={name}: {_WANTED}. {error}") from error
