"""Batches: nothing lost, nothing twice, fixed shapes, and an order that a resumed run finds again."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data.batches import Batches, Bucketed, Packed, gather_loss_positions, shuffled
from experiments.data.encoding import Encoded

PACKED = Packed(rows=3, length=40)
BUCKETED = Bucketed(lengths=(12, 24, 40), batch_tokens=80)
PAD = 9


def examples_of(sizes):
    """Samples of (prompt tokens, answer tokens); a token says which sample (thousands) and where."""
    return [
        Encoded(
            tokens=(1000 * (i + 1) + np.arange(p + a)).astype(np.int32),
            is_answer=np.arange(p + a) >= p,
            sample=i,
        )
        for i, (p, a) in enumerate(sizes)
    ]


def random_examples(count, seed=0):
    rng = np.random.default_rng(seed)
    return examples_of([(rng.integers(1, 30), rng.integers(1, 12)) for _ in range(count)])


def contents(batches):
    """What the arrays of the batches hold, sample by sample: (tokens, which of them are answers)."""
    found = []
    for batch in batches:
        for row, segments in enumerate(batch["segment_ids"]):
            for segment in range(1, segments.max() + 1):
                (at,) = np.nonzero(segments == segment)
                assert (np.diff(at) == 1).all()
                assert batch["positions"][row, at].tolist() == list(range(len(at)))
                tokens, targets = batch["tokens"][row, at].tolist(), batch["targets"][row, at].tolist()
                assert tokens[1:] == targets[:-1]
                answer = [t for t, m in zip(targets, batch["loss_mask"][row, at], strict=True) if m]
                found.append((tokens + targets[-1:], answer))
    return found


def expected(examples):
    return [(e.tokens.tolist(), e.tokens[e.is_answer].tolist()) for e in examples]


def check_padding_and_loss_positions(batch):
    padding = batch["segment_ids"] == 0
    assert (batch["tokens"][padding] == PAD).all() and (batch["targets"][padding] == PAD).all()
    assert not batch["loss_mask"][padding].any() and not batch["positions"][padding].any()
    for row in range(len(padding)):
        used = batch["loss_weights"][row] == 1
        where = batch["loss_positions"][row, used]
        assert where.tolist() == np.nonzero(batch["loss_mask"][row])[0].tolist()
        assert batch["loss_targets"][row, used].tolist() == batch["targets"][row, where].tolist()
        assert not batch["loss_weights"][row, ~used].any() and not batch["loss_positions"][row, ~used].any()


def test_a_packed_batch_by_hand():
    examples = examples_of([(2, 1), (1, 2), (3, 2)])
    batches = Batches(examples, Packed(rows=2, length=5, loss_slots=3), pad_id=PAD, shuffle=False)
    (batch,) = batches.one_epoch()
    wanted = {
        "tokens": [[1000, 1001, 2000, 2001, PAD], [3000, 3001, 3002, 3003, PAD]],
        "targets": [[1001, 1002, 2001, 2002, PAD], [3001, 3002, 3003, 3004, PAD]],
        "loss_mask": [[0, 1, 1, 1, 0], [0, 0, 1, 1, 0]],
        "positions": [[0, 1, 0, 1, 0], [0, 1, 2, 3, 0]],
        "segment_ids": [[1, 1, 2, 2, 0], [1, 1, 1, 1, 0]],
        "loss_positions": [[1, 2, 3], [2, 3, 0]],
        "loss_targets": [[1002, 2001, 2002], [3003, 3004, PAD]],
        "loss_weights": [[1, 1, 1], [1, 1, 0]],
    }
    assert {name: array.tolist() for name, array in batch.items()} == wanted
    kinds = {name: array.dtype for name, array in batch.items()}
    floats = {"loss_mask", "loss_weights"}
    assert kinds == {name: np.float32 if name in floats else np.int32 for name in wanted}
    assert batches.fill() == 8 / 10


def test_a_row_takes_no_more_answers_than_it_has_loss_slots():
    examples = examples_of([(2, 2)] * 3)
    roomy, narrow = (Packed(rows=1, length=9, loss_slots=k) for k in (6, 4))
    assert len(Batches(examples, roomy).plan(0)) == 1
    assert len(Batches(examples, narrow).plan(0)) == 2


def test_buckets_by_hand():
    examples = examples_of([(2, 1), (9, 8), (3, 2), (1, 1), (4, 1)])
    layout = Bucketed(lengths=(4, 16, 64), batch_tokens=64)
    batches = Batches(examples, layout, shuffle=False)
    assert batches.shapes == [(16, 4, 4), (4, 16, 8)]  # no sample needs the length 64
    assert [b["tokens"].shape for b in batches.one_epoch()] == [(16, 4), (4, 16)]
    assert [rows for _, rows in batches.plan(0)] == [[[0], [2], [3], [4]], [[1]]]


sizes = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 11)), min_size=1, max_size=60)
layouts = st.one_of(
    st.builds(Packed, rows=st.integers(1, 4), length=st.integers(40, 90), open_rows=st.integers(1, 5)),
    st.builds(Packed, rows=st.just(2), length=st.just(64), loss_slots=st.integers(11, 30)),
    st.builds(Bucketed, lengths=st.just((8, 20, 40)), batch_tokens=st.integers(40, 200)),
)


@settings(deadline=None)
@given(sizes, layouts, st.integers(0, 3), st.booleans())
def test_an_epoch_holds_every_sample_once_and_whole(sizes, layout, epoch, shuffle):
    examples = examples_of(sizes)
    batches = Batches(examples, layout, seed=3, pad_id=PAD, shuffle=shuffle)
    built = list(batches.one_epoch(epoch))
    assert sorted(contents(built)) == sorted(expected(examples))
    shapes = {(*b["tokens"].shape, b["loss_positions"].shape[1]) for b in built}
    assert shapes == set(batches.shapes)
    assert 0 < batches.fill(epoch) <= 1
    for batch in built:
        check_padding_and_loss_positions(batch)


def test_packing_fills_the_rows():
    assert Batches(random_examples(500), Packed(rows=4, length=256)).fill() > 0.9


@pytest.mark.parametrize("layout", [PACKED, BUCKETED])
def test_epochs_are_shuffled_differently_and_repeatably(layout):
    examples = random_examples(50)
    first, again, other = (Batches(examples, layout, seed=s) for s in (0, 0, 1))
    assert first.plan(0) == again.plan(0) and first.plan(1) == again.plan(1)
    assert first.plan(0) != first.plan(1) and first.plan(0) != other.plan(0)
    in_order = Batches(examples, layout, shuffle=False)
    assert in_order.plan(0) == in_order.plan(1)


def test_the_endless_iteration_is_one_epoch_after_the_other():
    batches = Batches(random_examples(50), PACKED)
    epochs = [list(batches.one_epoch(epoch)) for epoch in range(3)]
    list(batches.one_epoch(5))  # an evaluation in between does not move the position
    for got, wanted in zip(batches, itertools.chain(*epochs), strict=False):
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
        if batches.state()["epoch"] == 2 and batches.state()["batch"] == len(epochs[2]):
            break
    assert batches.state()["epoch"] == 2


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 40), st.sampled_from([PACKED, BUCKETED]))
def test_a_resumed_run_sees_exactly_the_same_batches(steps, layout):
    straight = Batches(random_examples(50), layout, seed=7)
    for _ in range(steps):
        next(straight)
    saved = json.loads(json.dumps(straight.state()))
    resumed = Batches(random_examples(50), layout, seed=7)
    resumed.restore(saved)
    assert resumed.state() == straight.state()
    for _ in range(20):
        jax.tree.map(np.testing.assert_array_equal, next(straight), next(resumed))
    assert resumed.state() == straight.state() != saved


def test_a_position_of_other_data_or_settings_is_refused():
    examples = random_examples(50)
    state = Batches(examples, PACKED, seed=1).state()
    changed = [*examples[:-1], examples_of([(5, 5)])[0]]
    marked = Encoded(tokens=examples[0].tokens, is_answer=np.arange(examples[0].positions + 1) > 0, sample=0)
    for other in (
        Batches(changed, PACKED, seed=1),
        Batches([marked, *examples[1:]], PACKED, seed=1),
        Batches(examples[::-1], PACKED, seed=1),
        Batches(examples, BUCKETED, seed=1),
        Batches(examples, PACKED, seed=1, shuffle=False),
    ):
        before = other.state()
        with pytest.raises(ValueError, match="data position: saved with the digest"):
            other.restore(state)
        assert other.state() == before
    with pytest.raises(ValueError, match="data position: saved with the seed 1, now it is 2"):
        Batches(examples, PACKED, seed=2).restore(state)
    same = Batches(examples, PACKED, seed=1)
    with pytest.raises(ValueError, match="which lacks batch, epoch"):
        same.restore({"seed": 1, "digest": state["digest"]})
    with pytest.raises(ValueError, match=r"got batch 999 of an epoch of \d+ batches"):
        same.restore({**state, "batch": 999})


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="no sample to make batches of"):
        Batches([], PACKED)
    with pytest.raises(ValueError, match="sample 1: got 44 positions, wanted 40 or less"):
        Batches(examples_of([(4, 4), (40, 5)]), PACKED)
    with pytest.raises(ValueError, match="loss_slots: got 3, wanted 5 or more"):
        Batches(examples_of([(5, 5)]), Packed(rows=1, length=40, loss_slots=3))
    for layout in (
        Packed(rows=0, length=4),
        Bucketed(lengths=(), batch_tokens=4),
        Bucketed(lengths=(8,), batch_tokens=4),
    ):
        with pytest.raises(ValueError, match="wanted"):
            Batches(examples_of([(1, 1)]), layout)
    no_answer = Encoded(tokens=np.arange(4, dtype=np.int32), is_answer=np.zeros(4, bool), sample=6)
    with pytest.raises(ValueError, match="sample 6: wanted a prompt and an answer"):
        Batches([no_answer], PACKED)


def test_gathered_positions_give_the_loss_and_gradient_of_the_mask():
    batch = next(Batches(random_examples(20), PACKED))
    hidden_BxTxD = jax.random.normal(jax.random.key(0), (*batch["tokens"].shape, 4))

    def masked(hidden_BxTxD):
        return (jnp.sin(hidden_BxTxD).sum(-1) * batch["targets"] * batch["loss_mask"]).sum()

    def gathered(hidden_BxTxD):
        picked_BxKxD = gather_loss_positions(hidden_BxTxD, jnp.asarray(batch["loss_positions"]))
        return (jnp.sin(picked_BxKxD).sum(-1) * batch["loss_targets"] * batch["loss_weights"]).sum()

    wanted, got = (jax.jit(jax.value_and_grad(f))(hidden_BxTxD) for f in (masked, gathered))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, wanted)


def test_the_shuffle_is_the_same_on_every_numpy():
    assert shuffled(10, seed=1, epoch=2).tolist() == [5, 6, 9, 3, 2, 1, 0, 8, 4, 7]
    assert sorted(shuffled(1000, seed=0, epoch=0).tolist()) == list(range(1000))
