"""Encoded samples as batches of few fixed shapes, in an order that a resumed run finds again.

Axes: B rows, T positions of a row, K loss positions of a row.

A batch is a dict of arrays:

| name           | shape, dtype   |                                                       |
|----------------|----------------|-------------------------------------------------------|
| tokens         | (B, T) int32   | what the model reads                                  |
| targets        | (B, T) int32   | the token after it                                    |
| loss_mask      | (B, T) float32 | 1 where the target belongs to an answer               |
| positions      | (B, T) int32   | counted from 0 in each sample                         |
| segment_ids    | (B, T) int32   | 1, 2, ... for the samples of a row, 0 for padding     |
| loss_positions | (B, K) int32   | where in the row the loss mask is 1, filled up with 0 |
| loss_targets   | (B, K) int32   | the targets there                                     |
| loss_weights   | (B, K) float32 | 1 for each of these, 0 for the fill                   |

The last three say the same as the mask, and let a loss compute logits only where it needs them
(`gather_loss_positions`): an answer is a few tokens of a long row, and a vocabulary is large.

Every epoch holds every sample exactly once; what does not fill its last batch is filled up with padding rows.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.encoding import Encoded

Batch = dict[str, np.ndarray]


class Shape(NamedTuple):
    """Shape of a batch: rows, positions of a row, loss positions of a row."""

    rows: int
    length: int
    loss_slots: int


class PlannedBatch(NamedTuple):
    """A batch before it is built: for each row, the samples (as indices) that stand in it, in order."""

    shape: Shape
    rows: list[list[int]]

    def part(self, rows: Sequence[int]) -> "PlannedBatch":
        """The batch of some of the rows; the last rows of a batch may be empty."""
        chosen = [self.rows[row] if row < len(self.rows) else [] for row in rows]
        return PlannedBatch(self.shape._replace(rows=len(rows)), chosen)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Several samples in a row, B x T always the same: nearly no padding, needs attention by segment.

    A sample goes into the first of the `open_rows` rows under way where it fits. A row has `loss_slots` loss
    positions; by default a quarter more than the samples have on average, and enough for each of them.
    """

    rows: int
    length: int
    loss_slots: int | None = None
    open_rows: int = 32

    @property
    def max_positions(self) -> int:
        """The longest sample that fits, in positions."""
        return self.length

    def shapes(self, examples: Sequence[Encoded]) -> list[Shape]:
        """The one shape of all batches of these samples."""
        largest = max(e.answer_tokens for e in examples)
        share = sum(e.answer_tokens for e in examples) / sum(e.positions for e in examples)
        slots = self.loss_slots or min(_rounded(max(largest, 1.25 * share * self.length)), self.length)
        if largest > slots:
            raise ValueError(f"loss_slots: got {slots}, wanted {largest} or more (longest answer)")
        return [Shape(self.rows, self.length, slots)]

    def plan(self, examples: Sequence[Encoded], order: Sequence[int]) -> list[PlannedBatch]:
        """Puts the samples, taken in the given order, into rows and the rows into batches."""
        (shape,) = self.shapes(examples)
        rows: list[list[int]] = []
        room: dict[int, tuple[int, int]] = {}  # open row -> free positions, free loss positions
        for index in order:
            positions, answer = examples[index].positions, examples[index].answer_tokens
            row = next((r for r, (p, k) in room.items() if positions <= p and answer <= k), None)
            if row is None:
                row = len(rows)
                rows.append([])
                room[row] = (shape.length, shape.loss_slots)
                if len(room) > self.open_rows:
                    room.pop(min(room))  # the oldest
            rows[row].append(index)
            room[row] = (room[row][0] - positions, room[row][1] - answer)
        return [PlannedBatch(shape, rows[i : i + self.rows]) for i in range(0, len(rows), self.rows)]


@dataclass(frozen=True, kw_only=True)
class Bucketed:
    """One sample a row, in the shortest length that holds it; `batch_tokens` // length rows a batch."""

    lengths: tuple[int, ...]
    batch_tokens: int

    @property
    def max_positions(self) -> int:
        """The longest sample that fits, in positions."""
        return max(self.lengths)

    def shapes(self, examples: Sequence[Encoded]) -> list[Shape]:
        """The shapes of the batches of these samples, one for each length that is used."""
        largest: dict[int, int] = {}
        for example in examples:
            length = self._length(example)
            largest[length] = max(largest.get(length, 0), example.answer_tokens)
        return [
            Shape(self.batch_tokens // length, length, min(_rounded(largest[length]), length))
            for length in sorted(largest)
        ]

    def plan(self, examples: Sequence[Encoded], order: Sequence[int]) -> list[PlannedBatch]:
        """Puts the samples, taken in the given order, into batches; each comes when its last row is full."""
        shapes = {shape.length: shape for shape in self.shapes(examples)}
        waiting: dict[int, list[list[int]]] = defaultdict(list)
        batches = []
        for index in order:
            length = self._length(examples[index])
            waiting[length].append([index])
            if len(waiting[length]) == shapes[length].rows:
                batches.append(PlannedBatch(shapes[length], waiting.pop(length)))
        return batches + [PlannedBatch(shapes[length], rows) for length, rows in waiting.items()]

    def _length(self, example: Encoded) -> int:
        return min(length for length in self.lengths if length >= example.positions)


class Batches:
    """Batches of one epoch after the other, without end; a resumed run continues them with `restore(state)`.

    The order of an epoch depends on the samples, the layout, the seed and the epoch's number alone.

    Args:
        examples: the samples; at least one.
        layout: how they are put into batches.
        seed: of the order.
        pad_id: the token of padding positions.
        shuffle: take the samples in a new random order each epoch, or always as they come.

    Raises:
        ValueError: no sample, one that does not fit the layout, or a layout without room.
    """

    def __init__(
        self,
        examples: Sequence[Encoded],
        layout: Packed | Bucketed,
        *,
        seed: int = 0,
        pad_id: int = 0,
        shuffle: bool = True,
    ) -> None:
        """Checks the samples and plans the first epoch."""
        _check(examples, layout)
        self.examples, self.layout, self.seed, self.pad_id = list(examples), layout, seed, pad_id
        self.shuffle = shuffle
        self.shapes = layout.shapes(self.examples)
        self._digest = _digest(self.examples, f"{layout} {pad_id} {shuffle}")
        self._epoch, self._batch = 0, 0
        self._plan = self.plan(0)

    def __iter__(self) -> Iterator[Batch]:
        """Goes on from the present position."""
        return self

    def __next__(self) -> Batch:
        """Builds the next batch, of the next epoch where this one ends."""
        return self.build(self.next_plan())

    def next_plan(self) -> PlannedBatch:
        """Goes to the next batch without building it."""
        if self._batch == len(self._plan):
            self._epoch, self._batch = self._epoch + 1, 0
            self._plan = self.plan(self._epoch)
        self._batch += 1
        return self._plan[self._batch - 1]

    def plan(self, epoch: int) -> list[PlannedBatch]:
        """Which samples stand in which rows of an epoch's batches."""
        order = shuffled(len(self.examples), self.seed, epoch) if self.shuffle else range(len(self.examples))
        return self.layout.plan(self.examples, [int(i) for i in order])

    def one_epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch (an evaluation); the position of the endless iteration stays as it is."""
        return map(self.build, self.plan(epoch))

    def state(self) -> dict[str, int | str]:
        """The position: what the next batch is. JSON can hold it."""
        return {"epoch": self._epoch, "batch": self._batch, "seed": self.seed, "digest": self._digest}

    def restore(self, state: dict[str, int | str]) -> None:
        """Goes to the position that `state` returned, perhaps in another process.

        Raises:
            ValueError: the position is of other samples, another layout or another seed.
        """
        if missing := self.state().keys() - state.keys():
            raise ValueError(f"data position: got {state}, which lacks {', '.join(sorted(missing))}")
        for key, now in {"seed": self.seed, "digest": self._digest}.items():
            if state[key] != now:
                raise ValueError(
                    f"data position: saved with the {key} {state[key]}, now it is {now} (the digest covers "
                    "samples, tokens and layout). Use the data and settings of then, or start the run anew."
                )
        epoch, batch = int(state["epoch"]), int(state["batch"])
        plan = self.plan(epoch)
        if not 0 <= batch <= len(plan):
            raise ValueError(f"data position: got batch {batch} of an epoch of {len(plan)} batches")
        self._epoch, self._batch, self._plan = epoch, batch, plan

    def fill(self, epoch: int = 0) -> float:
        """Which part of an epoch's positions is not padding."""
        positions = sum(shape.rows * shape.length for shape, _ in self.plan(epoch))
        return sum(example.positions for example in self.examples) / positions

    def positions(self, planned: PlannedBatch) -> int:
        """How many positions of a batch are not padding."""
        return sum(self.examples[index].positions for row in planned.rows for index in row)

    def build(self, planned: PlannedBatch, rows: Sequence[int] | None = None) -> Batch:
        """Builds the arrays of a batch, or of some of its rows: of several processes each builds its own."""
        return build_batch(self.examples, planned if rows is None else planned.part(rows), pad_id=self.pad_id)


def build_batch(examples: Sequence[Encoded], planned: PlannedBatch, *, pad_id: int = 0) -> Batch:
    """Builds the arrays of a planned batch (see the module's table)."""
    (rows, length, slots), contents = planned
    batch: Batch = {
        "tokens": np.full((rows, length), pad_id, np.int32),
        "targets": np.full((rows, length), pad_id, np.int32),
        "loss_mask": np.zeros((rows, length), np.float32),
        "positions": np.zeros((rows, length), np.int32),
        "segment_ids": np.zeros((rows, length), np.int32),
        "loss_positions": np.zeros((rows, slots), np.int32),
        "loss_targets": np.full((rows, slots), pad_id, np.int32),
        "loss_weights": np.zeros((rows, slots), np.float32),
    }
    for row, indices in enumerate(contents):
        start = 0
        for segment, index in enumerate(indices, start=1):
            example = examples[index]
            place = (row, slice(start, start + example.positions))
            batch["tokens"][place] = example.tokens[:-1]
            batch["targets"][place] = example.tokens[1:]
            batch["loss_mask"][place] = example.is_answer[1:]
            batch["positions"][place] = np.arange(example.positions)
            batch["segment_ids"][place] = segment
            start += example.positions
        (where,) = np.nonzero(batch["loss_mask"][row])
        batch["loss_positions"][row, : len(where)] = where
        batch["loss_targets"][row, : len(where)] = batch["targets"][row, where]
        batch["loss_weights"][row, : len(where)] = 1
    return batch


def gather_loss_positions(values_BxTxD: jax.Array, loss_positions_BxK: jax.Array) -> jax.Array:
    """Picks the positions of each row that carry loss: (B, T, D) to (B, K, D), differentiable."""
    return jnp.take_along_axis(values_BxTxD, loss_positions_BxK[:, :, None], axis=1)


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `range(count)` from seed and epoch, the same on any platform and NumPy release.

    >>> shuffled(5, seed=0, epoch=0).tolist() == shuffled(5, seed=0, epoch=0).tolist()
    True
    """
    # NumPy promises that the raw output of a bit generator stays as it is, not that of Generator.permutation.
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(keys, kind="stable")


def _rounded(slots: float) -> int:
    """The next multiple of 8, so that slightly different data give the same shapes."""
    return 8 * math.ceil(slots / 8)


def _check(examples: Sequence[Encoded], layout: Packed | Bucketed) -> None:
    if isinstance(layout, Packed):
        if min(layout.rows, layout.length, layout.open_rows, layout.loss_slots or 1) < 1:
            raise ValueError(f"{layout}: wanted numbers of at least 1")
    elif not layout.lengths or min(layout.lengths) < 1 or max(layout.lengths) > layout.batch_tokens:
        raise ValueError(f"{layout}: wanted lengths of at least 1 and at most batch_tokens")
    if not examples:
        raise ValueError("no sample to make batches of (were all of them too long?)")
    for example in examples:
        if example.is_answer[0] or not example.answer_tokens:
            raise ValueError(f"sample {example.sample}: wanted a prompt and an answer of a token or more")
        if example.positions > layout.max_positions:
            raise ValueError(
                f"sample {example.sample}: got {example.positions} positions, wanted {layout.max_positions} "
                "or less; encode_samples(max_positions=layout.max_positions) leaves such samples out"
            )


def _digest(examples: Sequence[Encoded], settings: str) -> str:
    digest = hashlib.sha256(settings.encode())
    for example in examples:
        digest.update(len(example.tokens).to_bytes(8, "big"))
        digest.update(example.tokens.tobytes() + example.is_answer.tobytes())
    return digest.hexdigest()[:16]
