"""Which examples a run sees when: from its seed alone, so that a member of a stack sees what it would see by itself."""

from __future__ import annotations

import itertools

import numpy as np

from experiments.data.batches import shuffled


def rows(total: int, examples: int, *, steps: int, batch: int, seed: int) -> np.ndarray:
    """Return the training examples of every update.

    The seed draws `examples` of the `total` (fewer are always among more), then an order of these for every epoch.

    Returns:
        int32 [steps, batch], places in the training data.

    >>> rows(6, 4, steps=3, batch=2, seed=0).shape
    (3, 2)
    """
    drawn = shuffled(total, seed, 0)[:examples]
    epochs = (drawn[shuffled(examples, seed, epoch)] for epoch in itertools.count(1))
    stream = itertools.islice(itertools.chain.from_iterable(epochs), steps * batch)
    return np.fromiter(stream, np.int32, steps * batch).reshape(steps, batch)
