"""What a study trains on: a function with pretrained parameters, a loss, data, and names for what can be adapted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import lorax
from lorax import fingerprint

Arrays = dict[str, np.ndarray]  # arrays with one leading axis, the examples
Patterns = str | Sequence[str]  # regular expressions that match whole leaf paths

Function = Callable[[Any, Mapping[str, jax.Array]], Any]  # (params, batch) -> outputs
PerExample = Callable[[Any, Mapping[str, jax.Array]], jax.Array]  # (outputs, batch) -> float32 [B]

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retained:
    """What the base could do before, evaluated on the trained parameters and never trained on.

    Attributes:
        fn: `(params, batch) -> outputs`, of the problem's parameters.
        loss: `(outputs, batch) -> float32 [B]`, a number an example.
        data: the examples.
        score: `(outputs, batch) -> float32 [B]` in [0, 1], higher is better; None: minus the loss.
        score_name: what the report calls the score.
    """

    fn: Function
    loss: PerExample
    data: Arrays
    score: PerExample | None = None
    score_name: str = "retained accuracy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What a study trains on.

    Attributes:
        name: what the report calls it.
        fn: `(params, batch) -> outputs`, plain JAX; a batch is `{name: array}`, B examples along the first axis.
        params: the frozen base.
        loss: `(outputs, batch) -> float32 [B]`, nats or another number an example; its mean is trained.
        data: `{"train": …, "validation": …, "test": …}`, arrays with a leading axis of examples.
        targets: names for sets of leaf paths that a study can adapt: `{"qv": r"layers/attn/(query|value)/kernel"}`.
        score: `(outputs, batch) -> float32 [B]` in [0, 1], higher is better; None: minus the loss.
        score_name: what the report calls the score; empty: accuracy, or minus the loss where there is no score.
        always: trained in every cell beside the method, such as `{r"classifier/.*": lorax.Full()}` for a new head.
        with_placeholders: makes the same problem with n positions in front of every example, which the loss
            ignores: what prompts and prefixes learn.
        placements: where methods go that are not put at `targets`: `bitfit`, `norm`, `prompt`, `prefix`,
            `bottleneck_houlsby`, `bottleneck_pfeiffer`, `ia3_output`, `ia3_input`.
        quantizable: the leaves that a quantised base stores in few bits; empty: those of the targets "all".
        retained: what the base could do before, for forgetting.
        tokens_per_example: positions that an example takes, for throughput.
        facts: what else the report says of the data and the model, `{heading: text}`.
    """

    name: str
    fn: Function
    params: Any
    loss: PerExample
    data: Mapping[str, Arrays]
    targets: Mapping[str, Patterns]
    score: PerExample | None = None
    score_name: str = ""
    always: Mapping[str, lorax.Method] = dataclasses.field(default_factory=dict)
    with_placeholders: Callable[[int], Problem] | None = None
    placements: Mapping[str, Patterns] = dataclasses.field(default_factory=dict)
    quantizable: Patterns = ()
    retained: Retained | None = None
    tokens_per_example: int = 1
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Name the score."""
        named = self.score_name or ("accuracy" if self.score else "minus the loss")
        object.__setattr__(self, "score_name", named)

    def digests(self) -> dict[str, dict[str, Any]]:
        """Return what tells whether two problems have the same parameters and data: digests of each part's arrays."""
        parts: dict[str, Any] = {"params": self.params, **self.data}
        parts |= {"retained": self.retained.data} if self.retained else {}
        return {name: fingerprint.digests(tree) for name, tree in parts.items()}


def examples(data: Arrays) -> int:
    """Return how many examples there are.

    Raises:
        ValueError: if there is no array, or two differ in length.

    >>> examples({"x": np.zeros((5, 2)), "y": np.zeros(5)})
    5
    """
    lengths = {name: len(array) for name, array in data.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"arrays of {lengths or 'no'} examples: wanted one or more arrays, all of one length")
    return next(iter(lengths.values()))
