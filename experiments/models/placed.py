"""Arrays that are filled piece by piece, of which a host holds no more than its devices do."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

# Where a leaf lies, by its path and shape; none: on the default device.
Places = Callable[[str, tuple[int, ...]], NamedSharding]
Bounds = tuple[tuple[int, int], ...]


class PlacedArray:
    """An array of which this process holds, on the host, the parts of its own devices until they are all filled.

    Args:
        shape: of the whole.
        dtype: of the whole.
        sharding: which device holds what; none: the default device holds all.
    """

    def __init__(self, shape: Sequence[int], dtype: Any, sharding: NamedSharding | None = None):
        """Allocate the parts, one for all devices that hold the same."""
        self._shape, self._sharding = tuple(shape), sharding
        self._of_device: dict[jax.Device, Bounds] = {}
        if sharding is None:
            bounds = [tuple((0, size) for size in self._shape)]
        else:
            held = sharding.addressable_devices_indices_map(self._shape)
            self._of_device = {device: self._bounds(index or ()) for device, index in held.items()}
            bounds = list(dict.fromkeys(self._of_device.values()))
        self._parts = {b: np.empty([stop - start for start, stop in b], dtype) for b in bounds}

    def fill(self, array: np.ndarray, row: int | None = None) -> None:
        """Write the whole array, or one row along its leading axis."""
        for bounds, part in self._parts.items():
            if row is None:
                part[...] = array[tuple(slice(*b) for b in bounds)]
            elif bounds[0][0] <= row < bounds[0][1]:
                part[row - bounds[0][0]] = array[tuple(slice(*b) for b in bounds[1:])]

    def done(self) -> jax.Array:
        """Return the array, once everything is written; the parts go to the devices."""
        if self._sharding is None:
            (part,) = self._parts.values()
            return jnp.asarray(part)
        parts = [jax.device_put(self._parts[bounds], device) for device, bounds in self._of_device.items()]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, parts)

    def _bounds(self, index: tuple[slice, ...]) -> Bounds:
        return tuple(part.indices(size)[:2] for part, size in zip(index, self._shape, strict=True))
