"""AdaLoRA's budget: how many triplets may live after each update."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """A budget that falls along a cubic, `b_T + (b₀ − b_T)(1 − (t − t_i)/(T − t_i − t_f))³`.

    This is arXiv:2303.10512, section 3.3. Steps count from 1. Triplets are chosen after every `interval`-th step of the
    fall and after its last one, which is step `total_steps - final_steps`; that choice then stays. Rounding is PEFT's:
    down.

    Attributes:
      initial: triplets `b₀` until the fall begins.
      target: triplets `b_T` when it ends.
      total_steps: `T`, the steps of the whole training.
      warmup_steps: `t_i`, steps before the fall.
      final_steps: `t_f`, steps after it.
      interval: `ΔT`, steps from one choice to the next.

    >>> budget = Budget(initial=24, target=12, total_steps=24, warmup_steps=4, final_steps=6, interval=2)
    >>> [int(budget.at(step)) for step in (1, 4, 5, 6, 8, 17, 18, 24, 100)]
    [24, 24, 21, 19, 16, 12, 12, 12, 12]
    >>> [step for step in range(1, 25) if budget.is_due(step)]
    [6, 8, 10, 12, 14, 16, 18]
    """

    initial: int
    target: int
    total_steps: int
    warmup_steps: int = 0
    final_steps: int = 0
    interval: int = 1

    def __post_init__(self) -> None:
        for name, least in (("total_steps", 1), ("warmup_steps", 0), ("final_steps", 0), ("interval", 1)):
            n = getattr(self, name)
            if not isinstance(n, int) or isinstance(n, bool) or n < least:
                raise ValueError(f"adalora: {name} is {n!r}; it has to be a whole number of at least {least}")
        if self.warmup_steps >= self.last:
            raise ValueError(
                f"adalora: warmup_steps is {self.warmup_steps} and final_steps {self.final_steps}, which leaves none "
                f"of the {self.total_steps} total_steps for the budget to fall in. Make them smaller, or train longer"
            )

    @property
    def last(self) -> int:
        """The step of the last choice."""
        return self.total_steps - self.final_steps

    @functools.cached_property
    def _table(self) -> np.ndarray:
        # In float64 on the host, as PEFT does: in float32 the cube is now and then on the other side of a whole number.
        left = 1 - np.arange(self.last - self.warmup_steps + 1) / (self.last - self.warmup_steps)
        return ((self.initial - self.target) * left**3 + self.target).astype(np.int32)

    def at(self, step: Any) -> Any:
        """Return the budget after a step, a number or an int array."""
        table = jnp.asarray(self._table)
        return table[jnp.clip(step - self.warmup_steps, 0, len(self._table) - 1)]

    def is_due(self, step: Any) -> Any:
        """Return whether triplets are chosen after a step."""
        is_falling = (step > self.warmup_steps) & (step < self.last)
        return (is_falling & (step % self.interval == 0)) | (step == self.last)
