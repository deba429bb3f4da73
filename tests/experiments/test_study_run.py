"""A whole study in one process: the files it leaves, and what it refuses to go on with."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import lorax
from experiments.study import axes, costs, outcome
from experiments.study.adaptation import Adaptations
from experiments.study.store import StudyDirectory
from tests.experiments import toy_problem, toy_study

STEPS = toy_study.STEPS


@pytest.fixture(scope="module", autouse=True)
def _compiled_in_a_hurry():
    """The programs are tiny and run a few times: time goes into compiling them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of eight runs, one of which diverges."""
    run_dir = tmp_path_factory.mktemp("runs") / "toy"
    config = toy_study.resolved(run_dir, lr=(3e-2, 1e38))
    assert toy_study.run(config)
    return config, run_dir


def read(run_dir, name):
    return json.loads((run_dir / name).read_text())


def cells(run_dir):
    return read(run_dir, "study.json")["cells"]


def results(run_dir):
    return [read(run_dir, f"cells/{cell['id']}/result.json") for cell in cells(run_dir)]


def contents(run_dir):
    """The bytes of everything but what is made anew: the report."""
    made = ("report.html", "results.csv", "figures", "locks")
    files = [p for p in run_dir.rglob("*") if p.is_file() and p.relative_to(run_dir).parts[0] not in made]
    return {str(p.relative_to(run_dir)): p.read_bytes() for p in files}


def test_the_directory_says_what_was_studied(study):
    config, run_dir = study
    stored = read(run_dir, "config.json")
    assert stored["question"] == "Does it work?"
    assert stored["axes"]["rank"] == [1, 3]
    assert read(run_dir, "environment.json")["command"] == "python -m experiments.ablate"
    described = read(run_dir, "study.json")
    assert described["axes"]["lr"] == [3e-2, 1e38] and described["axes"]["dropout"] == [0.0]
    assert list(described["axes"]) == list(described["cells"][0]["settings"])
    assert described["problem"]["name"] == "toy" and described["problem"]["score_name"] == "accuracy"
    assert described["problem"]["facts"]["Examples"] == "96 train, 40 validation, 50 test"
    assert len(described["cells"]) == 8
    assert sorted(sum((group["cells"] for group in described["groups"]), [])) == sorted(c["id"] for c in cells(run_dir))
    (group,) = described["groups"]
    trained = read(run_dir, f"groups/{group['id']}.json")
    assert (trained["members"], trained["steps"]) == (8, STEPS)
    assert trained["flops"] > 0 and trained["temporary_bytes"] > 0 and trained["process"]["pid"] > 0
    assert not list(run_dir.rglob("*.tmp")) and not list(run_dir.glob("groups/*.npz"))


def test_every_run_has_its_outcome(study):
    config, run_dir = study
    problem = toy_problem.make()
    for result in results(run_dir):
        settings = result["settings"]
        folder = run_dir / "cells" / result["id"]
        items = np.load(folder / "items.npz")
        for split, count in (("validation", 40), ("test", 50), ("retained", 30)):
            assert items[f"{split}_score"].shape == (count,) and items[f"{split}_score"].dtype == np.float32
            if settings["lr"] < 1:
                assert result[split]["score"] == pytest.approx(items[f"{split}_score"].mean(), abs=1e-6)
                assert result[split]["loss"] == pytest.approx(items[f"{split}_loss"].mean(), abs=1e-6)
        logits = toy_problem.forward(problem.params, problem.data["test"])
        before = np.mean(np.asarray(logits.argmax(-1)) == problem.data["test"]["label"])
        assert result["base"]["test"]["score"] == pytest.approx(before)
        assert result["base"]["retained"]["loss"] == pytest.approx(0, abs=1e-6)
        assert (result["tokens"], result["steps"]) == (STEPS * 8 * 2, STEPS)
        curve = read(run_dir, f"cells/{result['id']}/curve.json")
        assert curve["train"]["step"] == list(range(1, STEPS + 1))
        assert curve["validation"]["step"] == [4, 8, 12]
        assert curve["validation"]["score"][-1] == result["validation"]["score"]


def test_what_diverged_is_told(study):
    _, run_dir = study
    for result in results(run_dir):
        has_diverged = result["settings"]["lr"] > 1
        assert result["status"] == ("diverged" if has_diverged else "finished")
        assert (result["diverged_at"] is None) != has_diverged


def test_costs_are_those_of_a_run_by_itself(study):
    _, run_dir = study
    for result in results(run_dir):
        rank, found = result["settings"]["rank"], result["costs"]
        assert found["trainable_parameters"] == rank * 2 * 22 + 21  # two layers of 6 × 16, and the head
        # products of an update: forwards; to the inputs of all but the first layer; to the factors and the head
        rows, up, down, head = 8 * 2, 6 * 16, 16 * 6, 6 * 3
        thin = rank * 22
        forwards = rows * (up + down + 2 * thin) + 8 * head
        inputs = rows * (down + thin + 16 * rank) + 8 * head
        factors = rows * 2 * thin + 8 * head
        assert found["flops"] == pytest.approx(2 * (forwards + inputs + factors), rel=0.1)
        assert found["peak_bytes"] > 4 * sum(x.size for x in jax.tree.leaves(toy_problem.make_params()))
        assert found["merged_latency_seconds"] > 0 and found["unmerged_latency_seconds"] > 0
        assert found["step_seconds"] > 0 and found["wall_seconds"] > found["compile_seconds"] / 2
        assert found["checkpoint_bytes"] > 4 * found["trainable_parameters"]
    assert len(list((run_dir / "costs").iterdir())) == 2


def test_the_best_adapters_are_kept_and_give_what_was_stored(study):
    config, run_dir = study
    problem = toy_problem.make()
    kept = sorted(path.parent.name for path in run_dir.glob("cells/*/adapter"))
    assert kept == sorted(r["id"] for r in results(run_dir) if r["settings"]["lr"] < 1)
    for name in kept:
        adapter = lorax.restore(run_dir / "cells" / name / "adapter", base=problem.params)
        logits = lorax.adapt(problem.fn)(problem.params, adapter, problem.data["test"])
        loss = np.load(run_dir / "cells" / name / "items.npz")["test_loss"]
        np.testing.assert_allclose(toy_problem.loss(logits, problem.data["test"]), loss, rtol=1e-4, atol=1e-5)


def test_the_analysis_has_spectra_and_subspaces_of_what_was_chosen(study):
    _, run_dir = study
    found = read(run_dir, "analysis.json")
    names = ["rank=1,lr=0.03,seed=0", "rank=3,lr=0.03,seed=0"]
    assert sorted(found["spectra"]) == names
    paths = ["layers/down/kernel", "layers/up/kernel"]
    for name, rank in zip(names, (1, 3), strict=True):
        assert sorted(found["spectra"][name]) == paths  # and not the head
        for path in paths:
            (values,) = found["spectra"][name][path]
            assert len(values) == rank and values == sorted(values, reverse=True)
            assert 1 <= found["effective_rank"][name][path][0] <= rank + 1e-4
    pairs = [(one["a"], one["b"], one["path"]) for one in found["subspaces"]]
    seeds = [(name, name.replace("seed=0", "seed=1")) for name in names]
    assert pairs == [(a, b, path) for a, b in [tuple(names), *seeds] for path in paths]
    phi = np.asarray(found["subspaces"][0]["phi"])
    assert phi.shape == (1, 3) and (phi >= 0).all() and (phi <= 1.001).all()


def test_started_again_it_changes_nothing(study):
    config, run_dir = study
    before = contents(run_dir)
    assert toy_study.run(config)
    assert contents(run_dir) == before


def test_it_does_not_go_on_with_other_settings(study):
    config, run_dir = study
    changed = toy_study.resolved(run_dir, lr=(3e-2,))
    with pytest.raises(
        ValueError, match=r"holds a study with other settings.*\n.*config.axes.lr: was \[0.03, 1e\+38\]"
    ):
        toy_study.run(changed)


def test_it_does_not_go_on_with_another_problem(study, tmp_path):
    config, run_dir = study
    shutil.copytree(run_dir, tmp_path / "copy")
    moved = toy_study.resolved(tmp_path / "copy", lr=(3e-2, 1e38))
    problem = toy_problem.make()
    other = {**problem.data, "test": {name: x[::-1] for name, x in problem.data["test"].items()}}
    with pytest.raises(ValueError, match="began with other numbers in its problem's test, and its runs would not"):
        toy_study.run(moved, dataclasses.replace(problem, data=other))
    scaled = {**problem.params, "embed": 2 * problem.params["embed"]}
    with pytest.raises(ValueError, match="other numbers in its problem's params, and"):
        toy_study.run(moved, dataclasses.replace(problem, params=scaled))
    stored = json.loads((tmp_path / "copy" / "study.json").read_text())
    del stored["problem"]["digests"]  # as before they were stored
    (tmp_path / "copy" / "study.json").write_text(json.dumps(stored))
    fewer = {**problem.data, "train": {name: x[:90] for name, x in problem.data["train"].items()}}
    with pytest.raises(ValueError, match="its runs are others than the problem toy gives now"):
        toy_study.run(moved, dataclasses.replace(problem, data=fewer))


def test_a_score_has_a_name():
    problem = toy_problem.make()
    assert problem.score_name == "accuracy"
    assert dataclasses.replace(problem, score=None, score_name="").score_name == "minus the loss"
    assert dataclasses.replace(problem, score_name="right").score_name == "right"


def test_a_directory_that_is_no_study_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty, and no study"):
        toy_study.run(toy_study.resolved(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_claim_is_held_by_one_until_it_ends(tmp_path):
    directory = StudyDirectory(tmp_path)
    with directory.claimed("g0") as first, StudyDirectory(tmp_path).claimed("g0") as second:
        assert (first, second) == (True, False)
    with StudyDirectory(tmp_path).claimed("g0") as again:
        assert again


def test_a_group_of_another_process_is_left_to_it(tmp_path, capsys):
    config = toy_study.resolved(tmp_path / "shared", rank=(1,), lr=(1e-2,), seed=(0,))
    directory = StudyDirectory(tmp_path / "shared")
    with directory.claimed("g0"):
        assert not toy_study.run(config)
    assert not list(directory.path.glob("cells/*"))
    assert toy_study.run(config)
    assert len(results(directory.path)) == 1


@pytest.mark.parametrize("keep, count", [("all", 8), ("best", 4), ("none", 0)])
def test_adapters_are_kept_as_the_settings_say(study, tmp_path, keep, count):
    config, run_dir = study
    shutil.copytree(run_dir, tmp_path / "copy")
    for cell in cells(tmp_path / "copy"):
        (tmp_path / "copy/cells" / cell["id"] / "adapter").mkdir(exist_ok=True)
    config = toy_study.resolved(tmp_path / "copy", lr=(3e-2, 1e38))
    config.keep = keep
    adaptations = Adaptations(config, toy_problem.make())
    outcome.write(StudyDirectory(tmp_path / "copy"), axes.cells(config, adaptations), adaptations)
    assert len(list(tmp_path.glob("copy/cells/*/adapter"))) == count


@pytest.mark.parametrize("method, is_mergeable", [("bottleneck", False), ("qlora", True)])
def test_latency_is_merged_where_the_method_can_be(method, is_mergeable):
    config = toy_study.resolved(method=(method,), rank=(2,), lr=(1e-2,), seed=(0,))
    adaptations = Adaptations(config, toy_problem.make())
    (cell,) = axes.cells(config, adaptations)
    found = costs.measure(adaptations, cell.settings)
    assert (found["merged_latency_seconds"] is not None) == is_mergeable
    assert found["unmerged_latency_seconds"] > 0


@pytest.mark.slow
def test_a_study_of_every_method_ends(tmp_path):
    from experiments.study.adaptation import STUDY_RECIPES

    config = toy_study.resolved(tmp_path / "all", method=tuple(STUDY_RECIPES), rank=(2,), lr=(1e-2,), seed=(0, 1))
    assert toy_study.run(config)
    assert {r["settings"]["method"] for r in results(tmp_path / "all")} == set(STUDY_RECIPES)
    assert all(result["status"] == "finished" for result in results(tmp_path / "all"))
