"""The pieces of a fine-tuning run: intervals, settings, logs, answers, the update and the signals."""

import doctest
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from configs import quickstart
from experiments import data, models
from experiments.report import charts, markup, text
from experiments.training import intervals, metrics, preparation, settings, step, task
from experiments.training.stopping import Stopped, StopSignals
from tests.experiments.finetune_tiny import Inputs, get_config

SUM_TOLERANCE = 1e-5


# Intervals: hand-worked and published numbers.


def test_wilson_interval_of_published_examples():
    # Newcombe 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20
    for successes, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
    ):
        found = intervals.wilson(successes, trials)
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def test_wilson_interval_at_certainty_stays_inside_and_has_width():
    found = intervals.wilson(50, 50)
    assert found.value == found.high == 1
    assert 0.9 < found.low < 1


def test_wilson_without_trials_is_an_error():
    with pytest.raises(ValueError, match="0 successes of 0 trials"):
        intervals.wilson(0, 0)


def test_paired_bootstrap_agrees_with_the_normal_interval_and_its_seed():
    before, after = [False] * 400 + [True] * 600, [True] * 300 + [False] * 100 + [True] * 500 + [False] * 100
    found = intervals.paired_bootstrap(before, after, seed=1)
    assert found.value == pytest.approx(0.2)
    half = 1.96 * np.std(np.array(after, float) - np.array(before, float)) / np.sqrt(1000)
    assert found.low == pytest.approx(0.2 - half, abs=0.005)
    assert found.high == pytest.approx(0.2 + half, abs=0.005)
    assert found == intervals.paired_bootstrap(before, after, seed=1)


def test_paired_bootstrap_is_narrower_than_one_without_pairs():
    before = [True, False] * 200
    after = [True, False] * 190 + [True, True] * 10
    found = intervals.paired_bootstrap(before, after, seed=0)
    assert found.high - found.low < 0.05 < 2 * 1.96 * np.sqrt(2 * 0.25 / 400)


# Settings.


def test_quickstart_settings_are_right():
    settings.check(quickstart.get_config())


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("--config.lora.rnk=3", "lora.rank"),
        ("--config.learning_rate=1", "train.learning_rate"),
        ("-config.trian.steps", "train.steps"),
        ("--config.data.domain[0]=a", "data.domains"),
    ],
)
def test_unknown_setting_names_the_nearest(argument, nearest):
    with pytest.raises(ValueError, match=rf"the nearest is config\.{nearest}$"):
        settings.check_overrides([argument], settings.defaults())


def test_unknown_setting_in_a_file_names_the_nearest():
    with pytest.raises(AttributeError, match='Did you mean "rank"'):
        settings.defaults().lora.rnk = 3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train.steps", 0, "at least 1"),
        ("train.warmup_steps", 100, "fewer than train.steps"),
        ("train.accumulate", 3, "a divisor of train.rows"),
        ("model.dtype", "float16", "float32 or bfloat16"),
        ("lora.dropout", 1.0, "a probability below 1"),
        ("train.learning_rate", float("nan"), "a positive number"),
        ("data.batching", "sorted", "packed or bucketed"),
    ],
)
def test_wrong_value_is_an_error_with_name_value_and_remedy(name, value, message):
    config = settings.defaults()
    config.update_from_flattened_dict({name: value})
    with pytest.raises(ValueError, match=rf"config\.{name} = {value!r}: expected {message}"):
        settings.check(config)


def test_differences_name_old_and_new():
    config = settings.defaults()
    old = json.loads(settings.to_json(config))
    config.lora.rank = 3
    assert settings.differences(old, json.loads(settings.to_json(config))) == ["config.lora.rank: was 8, now 3"]


# Logs.


def write_steps(directory, steps, resumed_step=0):
    log = metrics.MetricsLog(directory, resumed_step=resumed_step)
    for at in steps:
        log.write(at, {"loss": 1.0 / at})
    log.close()


def test_log_of_a_resumed_run_has_every_step_once(tmp_path):
    write_steps(tmp_path, range(1, 8))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "los')  # torn by a kill
    write_steps(tmp_path, range(5, 10), resumed_step=4)
    assert [row["step"] for row in metrics.read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 10))


def test_log_of_a_run_that_starts_anew_forgets_the_old_lines(tmp_path):
    write_steps(tmp_path, range(1, 4))
    write_steps(tmp_path, range(1, 3))
    assert [row["step"] for row in metrics.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_last_line_is_where_a_resumed_run_goes_on(tmp_path):
    write_steps(tmp_path, range(1, 8))
    log = metrics.MetricsLog(tmp_path, resumed_step=5)
    log.close()
    assert log.last == {"step": 5, "loss": 0.2}


def test_number_that_is_not_finite_is_logged_as_json(tmp_path):
    log = metrics.MetricsLog(tmp_path)
    log.write(1, {"loss": float("nan"), "norm": float("inf")})
    log.close()
    (row,) = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert (row["loss"], row["norm"]) == ("nan", "inf")


def test_edited_log_is_an_error_with_its_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not JSON"):
        metrics.read_metrics(tmp_path / "metrics.jsonl")


# Answers and splits.


@pytest.mark.parametrize(
    ("answer", "valid", "correct"),
    [
        ('{"sentiment": "positive"}', True, True),
        ('{ "sentiment":"positive" }\n', True, True),
        ('{"sentiment": "neutral"}', True, False),
        ('{"feeling": "positive"}', False, False),
        ('{"sentiment": "positive"} because', False, False),
        ('"positive"', False, False),
        ("", False, False),
        ("[" * 100_000, False, False),
    ],
)
def test_json_answers_are_scored_whole(answer, valid, correct):
    assert task.score(answer, '{"sentiment": "positive"}') == task.Score(valid=valid, correct=correct)


def test_own_data_hold_out_copies_of_a_question_together(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i % 20}", "completion": str(i)}) + "\n" for i in range(80)))
    config = get_config()
    config.data.path = str(path)
    config.data.held_out_fraction = 0.3
    loaded = task.load(config)
    asked = [{sample.prompt[0]["content"] for sample in part} for part in (loaded.train, loaded.test)]
    assert asked[0].isdisjoint(asked[1])
    assert len(loaded.train) + len(loaded.test) == 80
    assert len(loaded.test) in range(24, 28)
    config.seed = 1
    assert [s.meta for s in task.load(config).test] != [s.meta for s in loaded.test]


def test_own_data_of_one_question_cannot_be_split(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "q", "completion": "a"}\n' * 3)
    config = get_config()
    config.data.path = str(path)
    with pytest.raises(ValueError, match=r"3 sample\(s\) with 1 different question"):
        task.load(config)


def test_missing_file_is_named(tmp_path):
    config = get_config()
    config.data.path = str(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"none\.jsonl: there is no such file"):
        task.load(config)


# The update.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model with an adapter that is not the initial one, and batches of four rows."""
    inputs = Inputs.write(tmp_path_factory.mktemp("tiny"))
    config = inputs.config(inputs.folder / "run")
    model = models.load(inputs.folder / "model")
    samples = data.read_jsonl(inputs.folder / "data.jsonl")[0]
    encoded = data.encode_samples(samples, model.tokenizer, max_positions=64).examples
    batches = list(data.Batches(encoded, data.Packed(rows=4, length=64)).one_epoch())
    loss = step.summed_loss(model)
    _, adapter = preparation.adapt(config, loss, model.params, batches)
    draw = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + jnp.float32(0.1) * draw.normal(size=x.shape).astype("f"), adapter.params)
    return model, loss, adapter.replace(params=moved), batches


def updated(tiny, parts, batch=None, optimiser=None):
    model, loss, adapter, batches = tiny
    optimiser = optimiser or optax.sgd(1.0)
    state = step.TrainState(jax.tree.map(jnp.copy, adapter), optimiser.init(adapter.params), jnp.bool_(False))
    return step.train_step(loss, optimiser)(model.params, state, step.split_batch(batch or batches[0], parts), None)


def test_loss_at_the_answers_is_that_of_full_logits(tiny):
    model, loss, _, batches = tiny
    batch = batches[0]

    @jax.jit
    def of_full_logits(params):
        inputs = {name: batch[name] for name in ("positions", "segment_ids")}
        logits = model.apply(params, batch["tokens"], **inputs)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return (nats * batch["loss_mask"]).sum()

    wanted = float(of_full_logits(model.params))
    assert float(jax.jit(loss)(model.params, step.loss_inputs(batch))) == pytest.approx(wanted, rel=SUM_TOLERANCE)


@pytest.mark.slow
def test_accumulated_update_is_that_of_the_whole_batch(tiny):
    whole, output = updated(tiny, 1)
    parted, parted_output = updated(tiny, 2)
    assert float(parted_output.loss) == pytest.approx(float(output.loss), rel=SUM_TOLERANCE)
    assert float(parted_output.gradient_norm) == pytest.approx(float(output.gradient_norm), rel=SUM_TOLERANCE)
    for a, b in zip(jax.tree.leaves(whole.adapter), jax.tree.leaves(parted.adapter), strict=True):
        np.testing.assert_allclose(a, b, rtol=SUM_TOLERANCE, atol=SUM_TOLERANCE)


@pytest.mark.slow
def test_update_follows_the_gradient_of_merged_weights(tiny):
    model, loss, adapter, batches = tiny
    batch = step.loss_inputs(batches[0])

    def merged_loss(trainable):
        merged = lorax.merge(model.params, adapter.replace(params=trainable))
        return loss(merged, batch) / batch["loss_weights"].sum()

    gradient = jax.jit(jax.grad(merged_loss))(adapter.params)
    state, output = updated(tiny, 1)
    wanted = jax.tree.map(lambda p, g: p - g, adapter.params, gradient)
    assert float(output.gradient_norm) == pytest.approx(float(optax.tree.norm(gradient)), rel=SUM_TOLERANCE)
    for a, b in zip(jax.tree.leaves(state.adapter.params), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=SUM_TOLERANCE, atol=SUM_TOLERANCE)


def test_frozen_weights_are_no_constants_and_have_no_gradient_or_moments(tiny):
    model, loss, adapter, batches = tiny
    optimiser = optax.adamw(1e-3)
    state = step.TrainState(adapter, optimiser.init(adapter.params), jnp.bool_(False))
    update = step.train_step(loss, optimiser)
    traced = jax.make_jaxpr(update)(model.params, state, step.split_batch(batches[0], 1), None)
    largest_factor = max(leaf.size for leaf in jax.tree.leaves(adapter.params))
    assert max((np.size(constant) for constant in traced.consts), default=0) <= 1
    assert max(leaf.size for leaf in jax.tree.leaves(state.opt_state)) == largest_factor
    assert max(np.prod(out.shape) for out in traced.out_avals) == largest_factor


def test_update_that_is_not_finite_and_those_after_it_change_nothing(tiny):
    model, loss, adapter, batches = tiny
    poisoned = batches[0] | {"loss_weights": np.full_like(batches[0]["loss_weights"], np.inf)}
    optimiser = optax.adamw(0.1)
    update = step.train_step(loss, optimiser)
    state = step.TrainState(jax.tree.map(jnp.copy, adapter), optimiser.init(adapter.params), jnp.bool_(False))
    good, _ = update(model.params, state, step.split_batch(batches[0], 1), None)
    wanted = jax.tree.map(np.array, (good.adapter, good.opt_state))
    bad, output = update(model.params, good, step.split_batch(poisoned, 1), None)
    assert not np.isfinite(float(output.loss))
    later, output = update(model.params, bad, step.split_batch(batches[0], 1), None)
    assert np.isfinite(float(output.loss))
    jax.tree.map(np.testing.assert_array_equal, (later.adapter, later.opt_state), wanted)


@pytest.mark.slow
def test_state_in_host_memory_changes_no_number_and_is_kept_when_an_update_is_not_finite(tiny):
    model, loss, adapter, batches = tiny
    optimiser = optax.adamw(0.1)
    poisoned = batches[0] | {"loss_weights": np.full_like(batches[0]["loss_weights"], np.inf)}

    def states(offload):
        update = step.train_step(loss, optimiser, offload=offload)
        opt_state = (lorax.optim.offload(optimiser) if offload else optimiser).init(adapter.params)
        state = step.TrainState(jax.tree.map(jnp.copy, adapter), opt_state, jnp.bool_(False))
        for batch in (batches[0], batches[1], poisoned):
            state, _ = update(model.params, state, step.split_batch(batch, 1), None)
            kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state)}
            assert kinds == ({"pinned_host"} if offload else {"device"})
            yield jax.tree.map(np.array, (state.adapter, state.opt_state))

    ours, theirs = list(states(True)), list(states(False))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    jax.tree.map(np.testing.assert_array_equal, ours[1], ours[2])
    assert not np.array_equal(*(jax.tree.leaves(x[1])[1] for x in ours[:2]))


def test_rows_that_do_not_divide_are_an_error(tiny):
    with pytest.raises(ValueError, match="4 rows of 64 tokens does not divide into config.train.accumulate = 3"):
        updated(tiny, 3)


# Signals.


def test_signal_outside_the_loop_stops_at_once():
    with StopSignals().installed(), pytest.raises(Stopped, match="SIGTERM") as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.exit_status == 143


def in_the_loop(stop, signals):
    """Send signals to this process inside the deferring block."""
    with stop.deferred():
        for number in signals:
            os.kill(os.getpid(), number)
        return stop.received


def test_signal_in_the_loop_waits_for_its_end():
    with StopSignals().installed() as stop:
        with pytest.raises(Stopped, match="SIGTERM"):
            in_the_loop(stop, [signal.SIGTERM])
        assert stop.received  # the block went on to where it looked
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_second_signal_in_the_loop_does_not_wait():
    with StopSignals().installed() as stop, pytest.raises(Stopped, match="SIGINT"):
        in_the_loop(stop, [signal.SIGTERM, signal.SIGINT])


@pytest.mark.parametrize("module", [charts, intervals, markup, task, text])
def test_examples_in_docstrings_hold(module):
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed
