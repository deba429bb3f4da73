"""The report of a study: what the numbers allow and no more, complete, self-contained, and fluent when it is large."""

import csv
import io
import itertools
import json
import math
import re
import shutil
import subprocess

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from experiments.report import __main__ as command
from experiments.report.study import (
    answer,
    colours,
    embedded,
    figures,
    forgetting,
    heat,
    lines,
    page,
    reading,
    tables,
    tidy,
)
from experiments.report.study.configurations import Scale, words
from experiments.report.study.findings import OPEN, SEPARATED, UNSEPARATED, find
from experiments.training.intervals import Interval
from tests.experiments.study_logs import DEFAULT_AXES, write_study
from tests.experiments.test_report import Outline, write_logs

DIVERGED = "rank=16_targets=mlp_lr=0.001_seed=1"
SMALL = {"rank": [1, 16], "lr": [1e-4, 1e-3, 1e-2], "seed": [0, 1]}


def found_in(*directories, **how):
    return find(reading.read(directories), resamples=500, **how)


def rendered(*directories, **how):
    return page.render(found_in(*directories, **how), "python -m experiments.report runs/x")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("runs") / "study", diverged=(DIVERGED,))


@pytest.fixture(scope="module")
def found(directory):
    return found_in(directory)


@pytest.fixture(scope="module")
def written(found):
    return page.render(found, "python -m experiments.report runs/study")


def test_cells_of_all_rates_and_seeds_are_one_configuration(found):
    labels = [one.label for one in found.configurations]
    assert labels[:4] == ["rank 1, qv", "rank 1, attention", "rank 1, mlp", "rank 4, qv"]
    assert {len(one.cells) for one in found.configurations} == {9}
    assert found.seeds == 3
    assert len(found.comparisons) == 36


def test_rate_is_chosen_on_validation_and_scored_on_test(found):
    one = found.named["rank 4, mlp"]
    assert one.choice.rate == 1e-3
    scores = [cell.number("test", "score") for cell in one.cells if cell.settings["lr"] == 1e-3]
    assert one.interval.value == pytest.approx(np.mean(scores))
    assert one.interval.low < one.interval.value < one.interval.high


def test_diverged_run_counts_as_the_worst_score_in_the_choice(found):
    one = found.named["rank 16, mlp"]
    assert min(one.validation(1e-3)) == 0.0
    assert one.choice.rate != 1e-3  # without the diverged run it would be the best by far
    assert one.diverged[0].id == DIVERGED


def test_diverged_run_at_the_only_rate_counts_as_the_worst_score_on_test(tmp_path):
    axes = SMALL | {"lr": [1e-3]}
    one = found_in(write_study(tmp_path, axes, diverged=("rank=16_lr=0.001_seed=1",))).named["rank 16"]
    rows_SxI = one.test([0, 1])
    assert rows_SxI[0].mean() > 0.3
    assert (rows_SxI[1] == 0).all()


def test_scores_that_are_no_fractions_have_the_worst_score_of_any_example(tmp_path):
    write_study(tmp_path, SMALL, diverged=("rank=1_lr=0.001_seed=0",))
    for path in (tmp_path / "cells").iterdir():
        with np.load(path / "items.npz") as items:
            np.savez(path / "items.npz", test_score=-items["test_loss"])
    found = found_in(tmp_path)
    lowest = min(cell.items["test_score"].min() for cell in found.study.cells if cell.status == "finished")
    assert not found.scale.fraction
    assert found.scale.worst == lowest < -1
    assert found.scale.failed == -math.inf
    assert " %" not in found.scale.between(Interval(value=-0.5, low=-0.6, high=-0.4))


def test_separated_needs_a_fair_chance_for_the_worse_one(found):
    on_edge = found.named["rank 16, mlp"]
    assert on_edge.on_edge
    assert {found.verdict(one) for one in found.comparisons} >= {SEPARATED, UNSEPARATED}
    for one in found.comparisons:
        worse = one.a if one.difference.value < 0 else one.b
        expected = UNSEPARATED if not one.separated else OPEN if found.named[worse].on_edge else SEPARATED
        assert found.verdict(one) == expected


def test_ranks_leave_open_what_lies_on_the_edge(tmp_path):
    # the best rate is beyond the grid for all: nothing is separated, whatever the scores are
    found = found_in(write_study(tmp_path, optimum=1.0))
    assert all(one.on_edge for one in found.configurations)
    assert any(one.separated for one in found.comparisons)
    assert set(found.ranks.values()) == {(1, 9)}
    said = answer.answer(found)
    assert "lies on the edge of its grid: rank 1, qv" in said
    assert "is separated from" not in said
    assert "Separated" not in said


def test_ranks_allow_what_is_not_separated(found):
    assert all(best <= worst for best, worst in found.ranks.values())
    assert found.ranks["rank 1, qv"][0] > 1
    assert any(best < worst for best, worst in found.ranks.values())


def test_answer_names_what_is_separated_and_what_is_not(found):
    said = answer.answer(found)
    assert "Best on validation: <b>rank 4, mlp</b>" in said
    assert "It is separated from" in said and "It cannot be told apart from" in said
    assert "<b>Targets</b>, over 3 combinations of the other axes: mlp (" in said
    assert "mlp over " in said
    assert "1 of 81 runs diverged, and count as the worst score: rank 16, mlp, rate 1e-3, seed 1." in said
    assert "not swept" not in said and "One seed" not in said


def test_axis_effect_is_the_mean_over_the_others(found):
    (effect,) = [one for one in found.effects if one.axis == "targets"]
    of_mlp = [one.interval.value for one in found.configurations if one.settings["targets"] == "mlp"]
    assert effect.means["mlp"] == pytest.approx(np.mean(of_mlp))
    assert effect.combinations == 3
    assert effect.on_edge == {"qv": 0, "attention": 0, "mlp": 1}


def test_one_seed_orders_nothing(tmp_path):
    found = found_in(write_study(tmp_path, DEFAULT_AXES | {"seed": [7]}))
    assert any(one.separated for one in found.comparisons)  # over the examples
    assert {found.verdict(one) for one in found.comparisons} == {UNSEPARATED}
    assert found.ranks == {}
    said = answer.answer(found)
    assert "One seed is not a result" in said
    assert "Separated" not in said and "separated from" not in said


def test_rate_that_was_not_swept_is_said(tmp_path):
    found = found_in(write_study(tmp_path, SMALL | {"lr": [1e-3]}))
    assert not any(one.on_edge for one in found.configurations)
    assert "was not swept" in answer.answer(found)
    assert 'id="sweeps"' not in rendered(tmp_path)


def test_unfinished_study_has_a_page_of_what_there_is(tmp_path):
    rank_16 = [f"rank=16_lr={rate}_seed={seed}" for rate in (0.0001, 0.001, 0.01) for seed in (0, 1)]
    missing = ["rank=1_lr=0.001_seed=1", *rank_16]
    write_study(tmp_path, SMALL, missing=missing, analysis=False, retained=False)
    found = found_in(tmp_path)
    assert [one.waiting for one in found.configurations] == [1, 6]
    assert found.compared == []
    text = rendered(tmp_path)
    headings = {a["id"] for a in Outline(text).all("h2")}
    assert "not finished: 5 of 12 runs have ended" in text
    assert "7 of 12 runs have not ended, and 2 configurations are not compared yet" in text
    assert headings == {"answer", "heat", "sweeps", "curves", "costs", "cells", "reproduce"}


def test_study_whose_runs_all_diverged_says_so(tmp_path):
    every = [f"rank={rank}_lr={lr}_seed={seed}" for rank in (1, 16) for lr in SMALL["lr"] for seed in (0, 1)]
    page_of = rendered(write_study(tmp_path / "a", SMALL, diverged=every))
    assert "All 12 runs that have ended diverged" in page_of and "No run has ended" not in page_of


def test_validation_that_is_not_finite_leaves_the_figures_that_there_are(tmp_path):
    directory = write_study(tmp_path / "a", SMALL)
    for path in directory.glob("cells/*/result.json"):
        result = json.loads(path.read_text())
        path.write_text(json.dumps(result | {"validation": {"loss": None, "score": None}}))
    for path in directory.glob("cells/*/items.npz"):
        with np.load(path) as arrays:
            np.savez(path, **{name: x - 10 for name, x in arrays.items()})  # no fractions: the worst is infinite
    written = figures.write(found_in(directory), tmp_path / "figures")
    names = {path.stem for path in written}
    assert "heat_rank" in names and "sweep" not in names


def test_study_without_any_result_has_a_page(tmp_path):
    write_study(tmp_path, {"rank": [1], "seed": [0]}, missing=("rank=1_seed=0",), analysis=False)
    headings = {a["id"] for a in Outline(rendered(tmp_path)).all("h2")}
    assert headings == {"answer", "cells", "reproduce"}
    assert "No run has ended yet." in rendered(tmp_path)


def test_study_of_one_configuration_has_a_page(tmp_path):
    text = rendered(write_study(tmp_path, {"seed": [0, 1]}))
    assert {"answer", "curves", "costs", "cells"} <= {a["id"] for a in Outline(text).all("h2")}
    assert 'id="heat"' not in text


def test_page_has_all_sections_and_can_be_read_without_seeing_it(written):
    outline = Outline(written)
    headings = [a["id"] for a in outline.all("h2")]
    assert headings == [
        "answer", "heat", "sweeps", "curves", "fronts", "forgetting", "costs", "cells", "spectra", "subspaces",
        "reproduce",
    ]  # fmt: skip
    assert [a["aria-labelledby"] for a in outline.all("section")] == headings
    assert all("scope" in a for a in outline.all("th"))
    assert all(a.get("aria-label") for _, a in outline.tags if a.get("role") in ("img", "region"))
    assert len({a["id"] for _, a in outline.tags if "id" in a}) == sum("id" in a for _, a in outline.tags)


def test_page_refers_to_nothing_outside_itself_and_escapes_what_it_is_told(written):
    outline = Outline(written)
    assert not any({"src", "href"} & attributes.keys() for _, attributes in outline.tags)
    assert not re.search(r"https?://|@import|url\(", written)
    assert "a &lt;study&gt;" in written and "where &lt;the adapter&gt; sits" in written and "Tiny &lt;b&gt;" in written
    assert len(outline.all("script")) == 2
    assert written.count("</script>") == 2  # the one in the command is text


def test_page_says_how_to_repeat_it(written):
    assert "--config=configs/x.py" in written
    assert "python -m experiments.report runs/study" in written
    assert "0.10.2" in written


def data_in(text):
    return json.loads(re.search(r'<script type="application/json" id="study">(.*?)</script>', text)[1])


def test_embedded_curves_are_those_of_the_cells(written, found):
    data = data_in(written)
    assert len(data["cells"]) == 81
    curve, cell = data["cells"][40], found.study.cells[40]
    steps = data["grids"][curve["train"]]
    assert len(steps) == len(curve["loss"]) == 60
    assert steps[0] == 1.5
    assert curve["loss"][0] == pytest.approx(np.mean(cell.curve["train"]["loss"][:2]), rel=1e-3)
    assert curve["validation_score"][-1] == pytest.approx(cell.number("validation", "score"), rel=1e-3)
    assert len(data["grids"]) == 3  # of training, of training that diverged, of validation


def test_embedded_sweep_marks_the_chosen_rate(written, found):
    sweeps = data_in(written)["lines"]["sweep"]["lines"]
    for line, one in zip(sweeps, found.configurations, strict=True):
        assert line["x"][line["marked"]] == one.choice.rate
        assert line["low"] <= line["y"] <= line["high"]
        assert max(line["y"]) == line["y"][line["marked"]]


def test_embedded_differences_are_those_of_all_pairs_in_order(written, found):
    pairs = data_in(written)["pairs"]
    means = [found.configurations[c].interval.value for c in pairs["members"]]
    wanted = [means[i] - means[j] for i in range(9) for j in range(i + 1, 9)]
    assert [row[0] for row in pairs["rows"]] == pytest.approx(wanted, abs=1e-4)
    assert found.configurations[pairs["members"][pairs["reference"]]].label == "rank 4, mlp"


def test_front_holds_what_nothing_beats_and_undercuts(written, found):
    fronts = data_in(written)["fronts"]
    assert [chart["x"]["label"] for chart in fronts["charts"]] == [
        "trained parameters", "peak memory of the step", "FLOPs a step", "wall time of a run", "latency, unmerged",
        "retained loss added",
    ]  # fmt: skip
    lost = [np.mean([c.number("retained", "loss") for c in one.chosen]) - 1.0 for one in found.configurations]
    assert fronts["charts"][-1]["values"] == pytest.approx(lost, rel=1e-3)
    for chart in fronts["charts"]:
        cost, score = chart["values"], fronts["y"]
        for c in range(9):
            as_good = [d for d in range(9) if score[d] >= score[c] and cost[d] <= cost[c]]
            beaten = any((score[d], cost[d]) != (score[c], cost[c]) for d in as_good)
            assert (c in chart["front"]) != beaten
        assert [cost[c] for c in chart["front"]] == sorted(cost[c] for c in chart["front"])


def test_reference_can_be_chosen(directory):
    found = found_in(directory, reference="rank 1, qv")
    assert "Compared with: <b>rank 1, qv</b>" in answer.answer(found)
    with pytest.raises(ValueError, match="no finished configuration is called 'rank 2'; there are: rank 1, qv; "):
        found_in(directory, reference="rank 2")


def test_of_many_configurations_the_best_on_validation_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.report.study.findings.COMPARED", 5)
    monkeypatch.setattr("experiments.report.study.answer.COMPARED", 5)
    found = found_in(write_study(tmp_path))
    assert len(found.comparisons) == 10
    assert len(found.ranks) == 5
    left = [one.choice.score for one in found.configurations if one.label not in found.ranks]
    assert max(left) <= min(one.choice.score for one in found.compared)
    assert "Only the 5 configurations that are best on validation are compared." in answer.answer(found)


def test_forgetting_is_compared_where_both_have_learned_the_same(tmp_path):
    axes = {"rank": [1, 16], "lr": [1e-4, 1e-3], "seed": [0, 1]}
    write_study(tmp_path, axes)
    learned = {1: {1e-4: 0.2, 1e-3: 0.6}, 16: {1e-4: 0.4, 1e-3: 0.8}}
    lost = {1: {1e-4: 0.0, 1e-3: 0.4}, 16: {1e-4: 0.3, 1e-3: 0.7}}
    for path in (tmp_path / "cells").glob("*/result.json"):
        result = json.loads(path.read_text())
        rank, rate, seed = result["settings"]["rank"], result["settings"]["lr"], result["settings"]["seed"]
        result["test"]["score"] = learned[rank][rate]
        result["retained"]["loss"] = 1.0 + lost[rank][rate] + 0.01 * seed * (rank == 1)
        path.write_text(json.dumps(result))
    found = found_in(tmp_path, reference="rank 1")
    # from 0.4 to 0.6, where both have learned so much, rank 1 has lost 0.2 to 0.4 and rank 16 0.3 to 0.5
    assert ">0.095 (" in (text := forgetting.forgetting(found))
    assert ">40.0 to 60.0<" in text
    for seed in (0, 1):
        result = json.loads((path := tmp_path / "cells" / f"rank=16_lr=0.0001_seed={seed}" / "result.json").read_text())
        path.write_text(json.dumps(result | {"test": {"score": 0.7, "loss": 1.0}}))
    assert "they share no amount of learning" in forgetting.forgetting(found_in(tmp_path, reference="rank 1"))


# heat maps


def test_every_configuration_has_one_square_for_each_pair_of_axes(tmp_path):
    axes = {"method": ["lora", "dora"], **DEFAULT_AXES, "seed": [0, 1], "lr": [1e-3]}
    found = found_in(write_study(tmp_path, axes))
    assert heat.pairs(found) == [("method", "rank"), ("method", "targets"), ("rank", "targets")]
    for down, across in heat.pairs(found):
        squares = [one.index for shown in heat.maps(found, down, across) for one in shown.squares.values()]
        assert sorted(squares) == list(range(18))
    assert [one.title for one in heat.maps(found, "rank", "targets")] == ["lora", "dora"]


def test_square_says_score_interval_edge_and_divergence(tmp_path):
    axes = SMALL | {"targets": ["mlp"], "lr": [1e-3, 1e-2]}
    text = heat.heat_maps(found_in(write_study(tmp_path, axes, diverged=("rank=1_lr=0.001_seed=0_targets=mlp",))))
    assert 'data-pair="rank"' in text  # one axis alone
    assert "<i>◂</i>" in text  # rank 16, at the lower of two rates
    only = SMALL | {"lr": [1e-3]}
    (tmp_path / "b").mkdir()
    text = heat.heat_maps(found_in(write_study(tmp_path / "b", only, diverged=("rank=1_lr=0.001_seed=0",))))
    assert "<i>✕1</i>" in text
    assert re.search(r"<b>\d\d\.\d</b>.*?<small>\d+\.\d–\d+\.\d</small>", text)


def test_colours_do_not_make_a_picture_of_noise(found):
    shown = heat.colour_range(found)
    widths = sorted(one.interval.high - one.interval.low for one in found.configurations)
    assert shown.high - shown.low >= 2 * widths[4] - 1e-9
    assert all(0 <= shown.share(one.interval.value) <= 1 for one in found.configurations)


def test_colours_get_lighter_and_their_ink_is_readable():
    lightness = []
    for share in np.linspace(0, 1, 50):
        channels = [int(colours.fill(share)[i : i + 2], 16) for i in (1, 3, 5)]
        lightness.append(np.dot(channels, [0.2126, 0.7152, 0.0722]))
        dark = colours.ink(share) == "#fff"
        assert dark == (share < 0.5) or 0.35 < share < 0.6
    assert (np.diff(lightness) > 0).all()


# joined studies


def test_joined_studies_keep_runs_of_the_same_settings_apart(tmp_path):
    a, b = (write_study(tmp_path / name, SMALL) for name in "ab")
    study = reading.read([a, b])
    assert study.axes["run"] == ["a", "b"]
    assert len(study.cells) == len({cell.id for cell in study.cells}) == 24
    labels = [one.label for one in find(study, resamples=200).configurations]
    assert labels == ["rank 1, a", "rank 16, a", "rank 1, b", "rank 16, b"]
    assert set(study.analysis["spectra"]) <= {cell.id for cell in study.cells}


def test_joined_studies_of_other_settings_are_one_grid(tmp_path):
    a = write_study(tmp_path / "a", SMALL)
    b = write_study(tmp_path / "b", {"rank": [4], "targets": ["mlp"], "lr": [1e-3], "seed": [0, 1]})
    study = reading.read([a, b])
    assert "run" not in study.axes
    assert study.axes["rank"] == [1, 4, 16]
    assert study.axes["targets"] == ["mlp", None]
    assert study.varied == ["rank"]  # the targets follow from it here


def test_studies_that_cannot_be_compared_are_refused(tmp_path):
    a, b = write_study(tmp_path / "a", SMALL), write_study(tmp_path / "b", SMALL | {"rank": [2]}, items=100)
    with pytest.raises(ValueError, match="scored on 100 test examples, .* on 200"):
        found_in(a, b)
    stored = json.loads((b / "study.json").read_text())
    stored["problem"]["name"] = "digits"
    (b / "study.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="its problem is digits .* report them apart"):
        reading.read([a, b])
    for directory, digest in ((a, "1"), (b, "2")):
        stored = json.loads((directory / "study.json").read_text())
        stored["problem"] |= {"name": "sentences", "digests": {"train": digest, "test": digest, "retained": "0"}}
        (directory / "study.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="b: its test examples are not those of .*a; such scores do not compare"):
        reading.read([a, b])
    stored["problem"]["digests"] = {"test": "1"}  # nothing was retained
    (b / "study.json").write_text(json.dumps(stored))
    assert reading.read([a, b]).problem["name"] == "sentences"
    with pytest.raises(ValueError, match="named twice"):
        reading.read([a, a])


def test_axis_that_follows_from_others_is_not_in_the_names(tmp_path):
    write_study(tmp_path, {"targets": ["qv", "mlp"], "rank": [1], "seed": [0, 1]})
    for path in [tmp_path / "study.json"]:
        study = json.loads(path.read_text())
        study["axes"]["rank"] = [2, 5]
        for cell in study["cells"]:
            cell["settings"]["rank"] = {"qv": 5, "mlp": 2}[cell["settings"]["targets"]]
        path.write_text(json.dumps(study))
    found = found_in(tmp_path)
    assert found.study.varied == ["targets"]
    assert [one.label for one in found.configurations] == ["qv", "mlp"]
    assert '<td data-v="5">5</td>' in tables.results(found)


def test_settings_in_words():
    assert words("weight_decay", 0.01) == "weight decay 0.01"
    scale = Scale(fraction=True, worst=0.0, failed=0.0, best=1.0, examples=9)
    assert scale.between(Interval(value=0.79, low=0.7, high=0.8123)) == "79.0 % (70.0 to 81.2)"
    assert scale.written(float("nan")) == ""


def test_numbered_layers_are_one_leaf():
    by_path = {"l_10/up2/kernel": [10], "l_2/up2/kernel": [2], "head": [1]}
    assert lines.by_leaf(by_path) == {"head": [1], "l_*/up2/kernel": [2, 10]}


def test_band_of_a_run_that_ended_early_has_no_invented_values(found):
    one = found.named["rank 16, mlp"]
    assert lines._band(one, "train", "loss") is not None
    (diverged,) = one.diverged
    assert len(diverged.curve["train"]["loss"]) == 60
    assert np.isnan(diverged.curve["train"]["loss"][-1])
    assert embedded._rounded([float("nan"), 0.123456, 3.0]) == [None, 0.1235, 3]


# files


def test_results_are_one_row_a_run(found):
    rows = list(csv.DictReader(io.StringIO(tidy.results_csv(found))))
    assert len(rows) == 81
    header = tidy.results_csv(found).splitlines()[0].split(",")
    assert len(set(header)) == len(header)
    row = rows[0]
    cell = found.study.cells[0]
    assert (row["cell"], row["configuration"], row["rank"], row["lr"]) == (cell.id, "rank 1, qv", "1", "0.0001")
    assert float(row["test_score"]) == cell.number("test", "score")
    assert float(row["base_retained_loss"]) == 1.0
    assert sum(int(row["chosen_rate"]) for row in rows) == 27
    (diverged,) = [row for row in rows if row["status"] == "diverged"]
    assert (diverged["cell"], diverged["diverged_at"]) == (DIVERGED, "60")


def test_what_was_not_measured_is_an_empty_field(tmp_path):
    write_study(tmp_path, SMALL, retained=False, missing=("rank=1_lr=0.0001_seed=0",))
    first, second, *_ = csv.DictReader(io.StringIO(tidy.results_csv(found_in(tmp_path))))
    assert (first["status"], first["test_score"], first["base_test_loss"], first["flops"]) == ("not run", "", "", "")
    assert (second["status"], second["retained_loss"]) == ("finished", "")
    assert float(second["base_test_loss"]) == 0.8


def test_there_is_a_figure_for_whatever_the_study_has(directory):
    made = dict(figures.figures(found_in(directory)))
    assert list(made) == [
        "heat_rank_targets", "differences", "sweep", "train", "validation", "validation_loss", "forgetting",
        "effective_encoder-layers-attention-query-kernel", "spectra_encoder-layers-attention-query-kernel-layer-0",
        "front_trained-parameters", "front_peak-memory-of-the-step", "front_FLOPs-a-step", "front_wall-time-of-a-run",
        "front_latency-unmerged", "front_retained-loss-added", "subspaces",
    ]  # fmt: skip
    (panel, *_) = made["heat_rank_targets"].axes
    assert [text.get_text() for text in panel.get_xticklabels()] == ["qv", "attention", "mlp"]
    assert len(panel.texts) == 9
    sweep = made["sweep"].axes
    assert [panel.get_title() for panel in sweep] == ["qv", "attention", "mlp"]
    assert len(made["front_trained-parameters"].axes[0].containers) == 9


def test_command_writes_all_files_of_a_study_and_the_same_again(tmp_path, capsys):
    directory = write_study(tmp_path / "study", SMALL | {"lr": [1e-3]}, items=40, retained=False, analysis=False)
    shutil.rmtree(directory / "cells" / "rank=1_lr=0.001_seed=0")  # of a part that has ended there are fewer figures
    assert command.main([str(directory)]) == 0
    assert capsys.readouterr().out.strip() == str(directory / "report.html")
    figures_written = {path.name for path in (directory / "figures").iterdir()}
    assert {"heat_rank.png", "heat_rank.svg", "train.png", "train.svg"} <= figures_written
    assert (directory / "figures" / "train.png").read_bytes().startswith(b"\x89PNG")
    written = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    (directory / "figures" / "stale.png").write_bytes(b"of an earlier state")
    assert command.main([str(directory)]) == 0
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == written


def test_command_joins_studies_and_writes_runs_apart(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "write", lambda found, directory: [])
    run = tmp_path / "run"
    run.mkdir()
    write_logs(run)
    a, b = (write_study(tmp_path / name, SMALL, items=40) for name in "ab")
    assert command.main([str(a), str(run), str(b)]) == 0
    assert capsys.readouterr().out.split() == [str(run / "report.html"), str(tmp_path / "a+b" / "report.html")]
    assert not (a / "report.html").exists()
    assert "runs/a runs/b --out" in (tmp_path / "a+b" / "report.html").read_text()
    assert command.main([str(a), str(b), "--out", str(tmp_path / "c"), "--reference", "rank 1, b"]) == 0
    again = f"python -m experiments.report runs/a runs/b --out {tmp_path / 'c'} --reference &#x27;rank 1, b&#x27;"
    assert again in (tmp_path / "c" / "report.html").read_text()
    assert (tmp_path / "c" / "results.csv").read_text().count("\n") == 25


def test_command_names_what_is_wrong(tmp_path, capsys):
    assert command.main([str(tmp_path)]) == 1
    assert "no config.json here" in capsys.readouterr().err
    write_study(tmp_path, SMALL)
    (tmp_path / "cells" / "rank=1_lr=0.001_seed=0" / "result.json").write_text("{")
    assert command.main([str(tmp_path)]) == 1
    assert "result.json: not JSON" in capsys.readouterr().err


# in a browser


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    axes = {
        "method": ["lora", "dora", "bitfit", "full"], "rank": [1, 2, 4, 8, 64],
        "targets": ["q", "qv", "attention", "mlp", "all"], "lr": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], "seed": [0, 1],
    }  # fmt: skip
    directory = write_study(tmp_path_factory.mktemp("large") / "study", axes, items=30)
    path = directory / "report.html"
    path.write_text(rendered(directory))
    return path


def test_page_of_a_thousand_cells_stays_small(large):
    text = large.read_text()
    assert Outline(text).all("tr").__len__() > 1200
    assert len(data_in(text)["cells"]) == 1000
    assert len(text) < 4e6


CLICKS = """
const said = [], say = (name, value) => said.push([name, value]);
const rows = (table) => [...document.querySelectorAll(`${table} tbody tr`)].filter((row) => !row.hidden);
const heads = (table) => [...document.querySelector(`${table} thead tr`).cells];
const column = (table, title) => heads(table).findIndex((th) => th.textContent === title);
try {
  const at = column(".cells", "test accuracy"), head = heads(".cells")[at].firstChild;
  head.click();
  say("largest first", rows(".cells").slice(0, 50).map((row) => Number(row.cells[at].dataset.v)));
  head.click();
  say("smallest first", rows(".cells").slice(0, 50).map((row) => Number(row.cells[at].dataset.v)));
  const controls = document.querySelector(".cells").closest(".card").querySelector(".controls");
  const search = controls.querySelector("input");
  search.value = "DORA mlp";
  search.dispatchEvent(new Event("input"));
  say("filtered", controls.querySelector(".count").textContent);
  const select = controls.querySelector("select:nth-of-type(1)");
  select.value = "=lora";
  select.dispatchEvent(new Event("change"));
  say("nothing left", rows(".cells").length);
  search.value = "";
  search.dispatchEvent(new Event("input"));
  say("one method", rows(".cells").length);
  rows(".cells")[0].click();
  const dialog = document.querySelector("dialog");
  say("cell", [dialog.open, dialog.querySelectorAll("svg polyline").length, dialog.querySelector("h3").textContent]);
  dialog.querySelector(".close").click();
  const [first, second] = rows(".cells").map((row) => row.querySelector("button"));
  first.focus();
  first.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown", bubbles: true }));
  say("arrow", document.activeElement === second);
  const reference = document.querySelector(".results").closest(".card").querySelector("select");
  reference.value = "3";
  reference.dispatchEvent(new Event("change"));
  say("reference", document.querySelector("tr.reference").dataset.label);
  const difference = column(".results", "difference");
  const differences = () => rows(".results").map((row) => Number(row.cells[difference].dataset.v));
  heads(".results")[difference].firstChild.click();
  say("differences", differences());
  reference.value = "70";
  reference.dispatchEvent(new Event("change"));
  say("other differences", differences());
  heads(".results")[column(".results", "targets")].firstChild.click();
  say("targets", rows(".results").map((row) => row.cells[column(".results", "targets")].textContent));
  document.querySelector("td[data-configuration] button").click();
  say("square", dialog.querySelector("h3").textContent);
  say("facets", document.querySelectorAll("[data-lines=sweep] figure").length);
  document.querySelector("[data-lines=sweep] button.more").click();
  say("all facets", document.querySelectorAll("[data-lines=sweep] figure").length);
  say("maps", [...document.querySelectorAll(".maps")].map((maps) => maps.hidden));
} catch (error) { say("error", String(error.stack)); }
const out = document.createElement("pre");
out.id = "said";
out.textContent = JSON.stringify(Object.fromEntries(said));
document.body.replaceChildren(out);
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_tables_charts_and_details_work_in_a_browser(large, tmp_path):
    text = large.read_text()
    end = text.rindex("</body>")
    copy = tmp_path / "clicked.html"
    copy.write_text(f"{text[:end]}<script>{CLICKS}</script>{text[end:]}")
    dumped = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", copy.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    said = json.loads(re.search(r'<pre id="said">(.*?)</pre>', dumped)[1].replace("&gt;", ">").replace("&lt;", "<"))
    assert "error" not in said, said["error"]
    assert said["largest first"] == sorted(said["largest first"], reverse=True) != sorted(said["largest first"])
    assert said["smallest first"] == sorted(said["smallest first"])
    assert said["filtered"] == "50 of 1,000 rows"
    assert said["nothing left"] == 0
    assert said["one method"] == 250
    assert said["cell"][:2] == [True, 4]
    assert said["cell"][2].startswith("lora, rank ") and ", rate 1e-" in said["cell"][2]
    assert said["arrow"] is True
    assert said["reference"] == "lora, rank 1, mlp"
    for name in ("differences", "other differences"):
        assert said[name] == sorted(said[name], reverse=True)
    assert said["differences"] != said["other differences"]
    assert said["targets"] == [name for name in ("q", "qv", "attention", "mlp", "all") for _ in range(20)]
    assert said["square"] == "lora, rank 1, q"
    assert (said["facets"], said["all facets"]) == (12, 20)
    assert said["maps"] == [False, True, True]


@pytest.mark.parametrize("at", [(0.1, 0.11, 0.12), (0.88, 0.89, 0.9), (0.1, 0.5, 0.9)])
def test_names_of_a_front_stand_apart_and_within_the_panel(at):
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(figures.COLUMN, 2.6))
        panel = figure.subplots()
        panel.plot([0, *at, 1], [0.2, 0.5, 0.6, 0.55, 0.3], "o")
        figures._above_bars(panel, [(x, 0.65, f"attention, rank {x}") for x in at])
        figure.draw_without_rendering()
        boxes = [Text.get_window_extent(name) for name in panel.texts]  # without the lines to their bars
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
