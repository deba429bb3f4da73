"""Whole runs in this process: what a finished run leaves, wrong input, and a loss that is not finite."""

import json
import math

import numpy as np
import pytest

import lorax
from experiments import models
from experiments.report import page
from experiments.training import loop, run
from experiments.training.stopping import StopSignals
from lorax.checkpoint import TrainCheckpoints
from tests.experiments.finetune_tiny import Inputs

MERGE_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs.write(tmp_path_factory.mktemp("tiny"))


def finetune(config):
    return run.finetune(config, command="python -m experiments.finetune --config=tiny.py", stop=StopSignals())


@pytest.fixture(scope="module")
def finished(inputs):
    run_dir = inputs.folder / "finished"
    changes = {"train.steps": 60, "train.learning_rate": 3e-2, "evaluation.every": 20}
    return run_dir, finetune(inputs.config(run_dir, **changes))


def test_a_run_learns_and_leaves_what_it_says(finished):
    run_dir, result = finished
    assert result == json.loads((run_dir / "result.json").read_text())
    loss = result["evaluation"]["loss"]
    assert loss["after"] < loss["before"] / 3
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(61))
    assert rows[-1]["loss"] == result["training"]["loss"] < rows[1]["loss"]
    assert [row["step"] for row in rows if "heldout_loss" in row] == [0, 20, 40, 60]
    assert list((run_dir / "tensorboard").glob("events.*"))
    assert {path.name for path in run_dir.iterdir()} >= {"config.json", "environment.json", "report.html"}


def test_answers_are_compared_in_pairs(finished):
    run_dir, result = finished
    before, after = (json.loads((run_dir / f"evaluation/{w}.json").read_text()) for w in ("before", "after"))
    assert [a["id"] for a in before["answers"]] == [a["id"] for a in after["answers"]]
    for measure, field in zip(result["evaluation"]["measures"], ("valid", "correct"), strict=True):
        rates = [sum(a[field] for a in found["answers"]) / 4 for found in (before, after)]
        assert [measure[when]["value"] for when in ("before", "after")] == rates
        assert measure["difference"]["value"] == rates[1] - rates[0]


def test_merged_weights_do_what_the_adapter_does(finished):
    check = finished[1]["merge_check"]
    assert check["largest_logit"] > 1
    assert check["largest_difference"] < MERGE_TOLERANCE * check["largest_logit"]
    assert check["same_token"] == check["positions"] > 0


def test_budget_counts_parameters_and_bytes(finished, inputs):
    run_dir, _ = finished
    budget = json.loads((run_dir / "budget.json").read_text())
    params = models.load(inputs.folder / "model").params
    adapter = lorax.restore(run_dir / "adapter", base=params)
    # rank 2, two layers: 2 × (fan-in + fan-out) × 2 for q, k, v, o and gate, up, down of width 32 and 48
    assert budget["trainable_parameters"] == 4 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 48) * 3)
    assert budget["trainable_bytes"] == 4 * budget["trainable_parameters"]
    assert budget["optimiser_bytes"] == 2 * budget["trainable_bytes"] + 8  # two moments and two counters
    assert budget["adapter_file_bytes"] == sum(
        f.stat().st_size for f in (run_dir / "adapter").rglob("*") if f.is_file()
    )
    assert {row["path"] for row in json.loads((run_dir / "sites.json").read_text())["sites"]} == set(adapter.params)


def test_report_comes_again_from_the_logs_with_the_numbers_of_the_result(finished):
    run_dir, result = finished
    written = (run_dir / "report.html").read_text()
    (run_dir / "report.html").unlink()
    assert page.write(run_dir).read_text() == written
    loss = result["evaluation"]["loss"]
    for number in (
        f"{loss['before']:.2f}",
        f"{result['training']['tokens']:,} tokens",
        "layers/attn/query/kernel",
    ):
        assert number in written


def test_other_settings_for_the_same_directory_are_refused_with_their_names(finished, inputs):
    run_dir, _ = finished
    with pytest.raises(ValueError, match=r"config\.lora\.rank: was 2, now 4"):
        finetune(inputs.config(run_dir, **{"lora.rank": 4}))


def test_a_directory_that_is_no_run_is_left_alone(inputs):
    run_dir = inputs.folder / "letters"
    run_dir.mkdir()
    (run_dir / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="not empty, and no run"):
        finetune(inputs.config(run_dir))
    assert [path.name for path in run_dir.iterdir()] == ["letter.txt"]


def test_bad_line_of_the_users_file_is_named_by_its_number(inputs):
    path = inputs.folder / "bad.jsonl"
    path.write_text('{"prompt": "1", "completion": "2"}\n{"prompt": "1"}\n')
    with pytest.raises(ValueError, match=r"(?s)bad\.jsonl.*line 2"):
        finetune(inputs.config(inputs.folder / "bad", **{"data.path": str(path)}))


def test_pattern_without_a_leaf_is_refused_before_training(inputs):
    with pytest.raises(ValueError, match="selects no parameter"):
        finetune(inputs.config(inputs.folder / "pattern", **{"lora.targets": ("layers/attention/.*",)}))
    assert not (inputs.folder / "pattern" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(inputs):
    run_dir = inputs.folder / "burst"
    changes = {
        "train.learning_rate": 1e25,
        "train.warmup_steps": 0,
        "evaluation.every": 0,
        "checkpoint.every": 100,
    }
    with pytest.raises(loop.NonFiniteLossError, match=r"step \d+: the loss is") as raised:
        finetune(inputs.config(run_dir, **changes))
    good = raised.value.step - 1
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, good + 1))
    assert all(math.isfinite(row["loss"]) for row in rows)
    checkpoints = TrainCheckpoints(run_dir / "checkpoints")
    assert checkpoints.latest_step() == good
    document = json.loads((run_dir / "checkpoints" / str(good) / "lorax" / "metadata").read_text())
    checkpoints.close()
    assert document["step"] == good
    assert document["data_state"]["batch"] == good  # the batch that failed comes first again
    assert "not finite" in json.loads((run_dir / "result.json").read_text())["status"]
    assert np.char.find((run_dir / "report.html").read_text(), "not finite") >= 0
