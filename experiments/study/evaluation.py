"""How runs do on held-out examples: a loss and a score for every example, of all members of a stack at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lorax
from experiments.study.problem import Arrays, Problem, Retained, examples


class Scores(NamedTuple):
    """A loss and a score for every example, float32 [..., examples]."""

    loss: np.ndarray
    score: np.ndarray

    def means(self, *member: int) -> dict[str, float]:
        """Return the mean loss and score, of a member of a stack."""
        of_member = Scores(self.loss[member], self.score[member])
        return {name: float(of.mean(dtype=np.float64)) for name, of in of_member._asdict().items()}


class Evaluator:
    """Evaluates adapters on the examples of one split, in batches of one size.

    Args:
        task: function, loss and score.
        data: the examples.
        batch: how many at once; the last batch is filled up with copies, which are dropped.
    """

    def __init__(self, task: Problem | Retained, data: Arrays, *, batch: int):
        """Compile nothing yet."""
        self.count = examples(data)
        self._batches = [
            {name: array[np.minimum(np.arange(first, first + batch), self.count - 1)] for name, array in data.items()}
            for first in range(0, self.count, batch)
        ]
        one = _of_examples(task)
        self._of_adapter = jax.jit(one)
        self._of_stack = jax.jit(jax.vmap(one, (None, 0, None)))

    def stack(self, params: Any, stack: lorax.Adapter) -> Scores:
        """Return the scores of all members, [N, examples]."""
        return self._scores(self._of_stack, params, stack)

    def base(self, params: Any) -> Scores:
        """Return the scores of the base without an adapter, [examples]."""
        return self._scores(self._of_adapter, params, None)

    def _scores(self, of_batch: Callable[..., Any], params: Any, adapter: lorax.Adapter | None) -> Scores:
        parts = [jax.device_get(of_batch(params, adapter, batch)) for batch in self._batches]
        whole = [np.concatenate(part, axis=-1)[..., : self.count] for part in zip(*parts, strict=True)]
        return Scores(*whole)


def _of_examples(task: Problem | Retained) -> Callable[..., tuple[jax.Array, jax.Array]]:
    adapted = lorax.adapt(task.fn)

    def of_examples(params: Any, adapter: lorax.Adapter | None, batch: Any) -> tuple[jax.Array, jax.Array]:
        outputs = adapted(params, adapter, batch)
        loss_B = task.loss(outputs, batch).astype(jnp.float32)
        return loss_B, -loss_B if task.score is None else task.score(outputs, batch).astype(jnp.float32)

    return of_examples
