"""Runs trained together learn what each learns by itself, and a run by itself what a loop written by hand does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from experiments.study import axes, order
from experiments.study.adaptation import Adaptations, schedule
from experiments.study.evaluation import Evaluator
from experiments.study.problem import Retained
from experiments.study.program import Programs
from experiments.study.store import StudyDirectory
from experiments.study.training import GroupTraining
from experiments.training.stopping import StopSignals
from tests.experiments import toy_problem, toy_study

SAME_LOSS = 1e-3  # relative: a stack's products are added up in another order
SAME_BY_HAND = 1e-5
STEPS = toy_study.STEPS
TOGETHER = {"lr": (1e-2, 1e-1), "dropout": (0.0, 0.3), "examples": (0, 20)}


@pytest.fixture(scope="module", autouse=True)
def _compiled_in_a_hurry():
    """The programs are tiny and run a few times: time goes into compiling them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


class Setting:
    """Trains runs of the toy problem in memory."""

    def __init__(self, tmp_path, **changes):
        self.config = toy_study.resolved(**changes)
        self.adaptations = Adaptations(self.config, toy_problem.make())
        self.programs = Programs(self.adaptations, self.config.train.batch)
        self.directory = StudyDirectory(tmp_path / "study")
        self.cells = axes.cells(self.config, self.adaptations)

    def group(self, cells, **how):
        problem = self.adaptations.base(cells[0].settings).problem
        validation = Evaluator(problem, problem.data["validation"], batch=16)
        how = {"chunk": 4, "checkpoint_seconds": 1e9} | how
        return GroupTraining("g", cells, self.programs, self.directory, validation, **how)

    def train(self, cells):
        return self.group(cells).to_the_end(StopSignals(), lambda updates: None)


METHODS = ["lora", "dora", "adalora", "lora_plus", "full", "bottleneck", "prompt", "prefix", "vera", "qlora", "loha"]


@pytest.mark.parametrize(
    "method", [name if name == "lora" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_a_run_learns_in_a_group_what_it_learns_alone(tmp_path, method):
    setting = Setting(tmp_path, method=(method,), targets=("up", "all"), **TOGETHER)
    cells, last = setting.cells, setting.cells[-1]
    if method == "vera":  # its projections follow from the seed, and those of two seeds are no program
        cells = [cell for cell in cells if cell.settings["seed"] == last.settings["seed"]]
    together = setting.train(cells)
    for cell in (cells[0], last):  # the smallest with the most data, the largest with the least
        alone = setting.train([cell])
        place = cells.index(cell)
        np.testing.assert_allclose(together.curves.log.loss[:, place], alone.curves.log.loss[:, 0], rtol=SAME_LOSS)
        np.testing.assert_allclose(together.curves.loss[:, place], alone.curves.loss[:, 0], rtol=SAME_LOSS)
        assert len(set(alone.curves.log.loss[:, 0].tolist())) == STEPS  # it has learned something


def test_a_run_learns_what_a_loop_by_hand_learns(tmp_path):
    setting = Setting(tmp_path, rank=(3,), lr=(3e-2, 1e-1), seed=(1,), weight_decay=(0.2,), dropout=(0.3,))
    trained, cell = setting.train(setting.cells), setting.cells[1]
    problem = toy_problem.make()
    adapter = setting.adaptations.adapter(cell.settings)
    rates = [min((step + 1) / 2, (STEPS - step) / (STEPS - 1)) for step in range(STEPS)]  # one update of warm-up
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(lambda step: 0.1 * jnp.asarray(rates)[step], weight_decay=0.2)
    )
    state, data = tx.init(adapter.params), problem.data["train"]

    @jax.jit
    @jax.value_and_grad
    def loss(trainable, batch, rng):
        own = adapter.replace(params=trainable)
        return toy_problem.loss(lorax.adapt(problem.fn)(problem.params, own, batch, rng=rng), batch).mean()

    for step, rows in enumerate(order.rows(96, 96, steps=STEPS, batch=8, seed=1)):
        rng = jax.random.fold_in(setting.adaptations.keys(1)[1], step)
        value, gradient = loss(adapter.params, {name: x[rows] for name, x in data.items()}, rng)
        np.testing.assert_allclose(trained.curves.log.loss[step, 1], value, rtol=SAME_BY_HAND)
        norm = trained.curves.log.gradient_norm[step, 1]
        np.testing.assert_allclose(norm, optax.tree.norm(gradient), rtol=SAME_BY_HAND)
        updates, state = tx.update(gradient, state, adapter.params)
        adapter = adapter.replace(params=optax.apply_updates(adapter.params, updates))
    ours = lorax.select(trained.stack, 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours.params, adapter.params)


def test_a_run_that_diverges_stops_and_the_others_do_not_notice(tmp_path):
    setting = Setting(tmp_path, rank=(1,), lr=(1e-2, 1e38), seed=(0,))
    trained = setting.train(setting.cells)
    alone = setting.train(setting.cells[:1])
    np.testing.assert_allclose(trained.curves.log.loss[:, 0], alone.curves.log.loss[:, 0], rtol=SAME_LOSS)
    assert trained.curves.diverged_at(0) is None
    at = trained.curves.diverged_at(1)
    assert at is not None and 1 <= at < STEPS
    assert trained.curves.log.diverged[:, 1].tolist() == [False] * (at - 1) + [True] * (STEPS - at + 1)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(trained.stack.params))


def test_groups_of_other_seeds_and_rates_share_a_compiled_program(tmp_path):
    setting = Setting(tmp_path, rank=(1, 3))
    first = [cell for cell in setting.cells if cell.settings["seed"] == 0]
    second = [cell for cell in setting.cells if cell.settings["seed"] == 1]
    assert setting.group(first).program is setting.group(second).program
    assert setting.group(first).program is not setting.group(first[:2]).program


def test_a_group_goes_on_after_its_checkpoint_bit_for_bit(tmp_path):
    chunk = 3
    setting = Setting(tmp_path, rank=(1, 3), dropout=(0.3,))
    uninterrupted = setting.group(setting.cells, chunk=chunk).to_the_end(StopSignals(), lambda updates: None)

    class Killed(Exception):
        pass

    def killed_at(updates):
        if updates == 6:
            raise Killed

    with pytest.raises(Killed):
        setting.group(setting.cells, chunk=chunk, checkpoint_seconds=0).to_the_end(StopSignals(), killed_at)
    left = setting.group(setting.cells, chunk=chunk, checkpoint_seconds=0)
    assert len(left.curves.log.loss) == 6 - chunk  # the chunk that ended with the kill was not saved
    finished = left.to_the_end(StopSignals(), lambda updates: None)
    jax.tree.map(np.testing.assert_array_equal, finished.stack, uninterrupted.stack)
    jax.tree.map(np.testing.assert_array_equal, finished.curves.log, uninterrupted.curves.log)
    assert finished.curves.steps == uninterrupted.curves.steps
    np.testing.assert_array_equal(finished.curves.score, uninterrupted.curves.score)
    left.forget()
    assert not len(setting.group(setting.cells, chunk=chunk).curves.log.loss)


def test_the_order_of_the_data_follows_from_the_seed_alone():
    few, many = (order.rows(50, count, steps=10, batch=4, seed=3) for count in (20, 50))
    assert set(few.ravel()) <= set(order.rows(50, 30, steps=30, batch=1, seed=3).ravel())
    assert sorted(few.ravel()[:20]) == sorted(few.ravel()[20:40])  # an epoch has each example once
    assert few.ravel()[:20].tolist() != few.ravel()[20:40].tolist()
    assert len(set(many.ravel())) == 40
    assert set(order.rows(50, 20, steps=10, batch=4, seed=4).ravel()) != set(few.ravel())
    longer = order.rows(50, 20, steps=15, batch=4, seed=3)
    np.testing.assert_array_equal(longer[:10], few)


@pytest.mark.parametrize(
    "kind, at_end, middle",
    [("linear", 1 / 8, 0.5), ("cosine", (1 - np.cos(np.pi / 8)) / 2, 0.5), ("constant", 1.0, 1.0)],
)
def test_the_rate_rises_and_falls(kind, at_end, middle):
    config = toy_study.resolved()
    config.train.update(warmup=0.2, schedule=kind)
    config.train.steps = 10
    rate = schedule(config)
    np.testing.assert_allclose([rate(step) for step in (0, 1, 2)], [1 / 3, 2 / 3, 1], rtol=1e-6)
    np.testing.assert_allclose([rate(6), rate(9)], [middle, at_end], rtol=1e-5)


@pytest.mark.parametrize("batch", [7, 50, 64])
def test_every_held_out_example_is_scored_once_whatever_the_batch(tmp_path, batch):
    problem = toy_problem.make()
    data = problem.data["test"]
    scores = Evaluator(problem, data, batch=batch).base(problem.params)
    logits = toy_problem.forward(problem.params, data)
    np.testing.assert_allclose(scores.loss, toy_problem.loss(logits, data), rtol=1e-6)
    np.testing.assert_array_equal(scores.score, np.asarray(logits.argmax(-1) == data["label"], np.float32))
    assert scores.means() == {"loss": pytest.approx(scores.loss.mean()), "score": pytest.approx(scores.score.mean())}


def test_without_a_score_it_is_minus_the_loss():
    problem = toy_problem.make()
    task = Retained(fn=problem.fn, loss=problem.loss, data=problem.data["test"])
    scores = Evaluator(task, task.data, batch=50).base(problem.params)
    np.testing.assert_array_equal(scores.score, -scores.loss)
