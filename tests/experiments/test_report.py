"""The report: complete, self-contained, safe whatever the model says, and there while the run goes on."""

import html.parser
import json
import re

import pytest

from experiments.report import __main__ as command
from experiments.report import charts, logs, outcome, page
from experiments.report.markup import element
from experiments.training import recipes, settings

RATE = {"value": 0.25, "low": 0.2, "high": 0.3}
VOID = {"meta", "br", "line", "link", "img", "input"}


def write_logs(directory, **changes):
    """Write the logs of a finished run; a name given as None is left out."""
    config = settings.defaults()
    config.name, config.run_dir = "a <run>", "runs/here"
    answers = [{"id": "1", "question": "Is <b>it</b>?", "reference": "{}", "valid": True, "correct": True}]
    steps = [
        {"step": 0, "heldout_loss": 2.0, "answered": 4, "accuracy": 0.0, "valid_json": 0.5},
        {"step": 1, "loss": 1.5, "learning_rate": 1e-3, "gradient_norm": 0.5, "tokens": 10, "elapsed_s": 1.0},
        {
            "step": 2,
            "loss": "nan",
            "learning_rate": 1e-3,
            "gradient_norm": 0.5,
            "tokens": 20,
            "tokens_per_s": 9.5,
        },
    ]
    measure = {"title": "Accuracy", "meaning": "is right", "before": RATE, "after": RATE, "difference": RATE}
    files = {
        "config.json": json.loads(settings.to_json(config)),
        "environment.json": {
            "model": "Tiny",
            "command": "python -m x --y='</script>'",
            "versions": {"jax": "0.10.2"},
        },
        "sites.json": {
            "sites": [
                {"path": "layers/query/kernel", "kind": "linear", "shape": [2, 8, 4], "dtype": "float32"}
                | {"method": "LoRA, rank 2", "trainable": 48, "how": "materialised", "reason": "norm of it"}
            ]
        },
        "budget.json": {"trainable_parameters": 48, "trainable_bytes": 192, "frozen_parameters": 952}
        | {"frozen_bytes": 3808, "optimiser_bytes": 392, "adapter_file_bytes": 5000},
        "evaluation/before.json": {"answers": [a | {"answer": "<script>alert(1)</script>"} for a in answers]},
        "evaluation/after.json": {"answers": [a | {"answer": ""} for a in answers]},
        "result.json": {
            "status": "finished",
            "evaluation": {"examples": 4, "measures": [measure], "samples": ["1"]}
            | {"loss": {"before": 2.345, "after": 0.1234, "tokens": 32, "examples": 4}},
            "training": {"steps": 2, "tokens": 20, "seconds": 61.0},
            "merge_check": {
                "largest_difference": 2e-5,
                "largest_logit": 12.0,
                "same_token": 9,
                "positions": 9,
            },
            "data": {"Left out": "3 examples longer than 64 tokens"},
            "seconds": {"loading": 2.0},
        },
    } | changes
    (directory / "evaluation").mkdir()
    for name, value in files.items():
        if value is not None:
            (directory / name).write_text(json.dumps(value))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return directory


class Outline(html.parser.HTMLParser):
    """Collects tags with their attributes, and fails on one that is closed twice or never."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def written(tmp_path):
    return page.write(write_logs(tmp_path)).read_text()


def test_page_has_the_numbers_of_the_run(written):
    for wanted in (
        "25 %",
        "+25.0 points",
        "2.35",
        "0.123",
        "4.8 % of 1.0 k",
        "5 kB",
        "3.81 kB",
        "9 of 9 positions",
    ):
        assert wanted in written, wanted
    for wanted in (
        "1 min 1 s",
        "3 examples longer than 64 tokens",
        "materialised: norm of it",
        "0.10.2",
        "2 × 8 × 4",
    ):
        assert wanted in written, wanted


def config_with(**changes):
    config = settings.defaults()
    config.update_from_flattened_dict(changes)
    return json.loads(settings.to_json(config))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "Tiny fine-tuned with LoRA of rank 8."),
        ({"method": "dora", "lora.rank": 3, "model.quantize": "nf4"}, "DoRA of rank 3 over a base in NF4."),
        ({"method": "prompt"}, "Tiny fine-tuned with prompt tuning."),
    ],
)
def test_page_says_what_was_done(tmp_path, changes, said):
    assert said in page.write(write_logs(tmp_path, **{"config.json": config_with(**changes)})).read_text()


def test_logs_from_before_there_were_other_methods_are_of_lora(tmp_path):
    config = config_with()
    del config["method"], config["model"]["quantize"]
    assert "fine-tuned with LoRA of rank 8." in page.write(write_logs(tmp_path, **{"config.json": config})).read_text()


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_method_has_a_name_in_the_report(name):
    assert outcome._method(config_with(method=name)) != name


def test_page_says_why_nothing_was_merged(tmp_path):
    result = json.loads((write_logs(tmp_path) / "result.json").read_text())
    result["merge_check"] = {"skipped": "Prompt has no merged weight"}
    (tmp_path / "result.json").write_text(json.dumps(result))
    shown = page.write(tmp_path).read_text()
    assert "adapted at each use, not merged: Prompt has no merged weight" in shown
    assert "positions" not in shown


def test_page_refers_to_nothing_outside_itself(written):
    outline = Outline(written)
    assert not any({"src", "href"} & attributes.keys() for _, attributes in outline.tags)
    assert not re.search(r"https?://|@import|url\(", written)
    (policy,) = [a["content"] for a in outline.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")


def test_what_a_model_says_is_text(written):
    outline = Outline(written)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in written
    assert "Is &lt;b&gt;it&lt;/b&gt;?" in written
    assert not outline.all("b") or "it</b>" not in written
    assert len([a for a in outline.all("script") if "type" not in a]) == 1


def test_page_can_be_read_without_seeing_it(written):
    outline = Outline(written)
    assert outline.all("html") == [{"lang": "en"}]
    headings = {a["id"] for a in outline.all("h2")}
    assert {a["aria-labelledby"] for a in outline.all("section")} == headings
    assert all("scope" in a for a in outline.all("th"))
    assert all(a.get("aria-label") for name, a in outline.tags if a.get("role") in ("img", "region"))
    assert len({a["id"] for _, a in outline.tags if "id" in a}) == sum("id" in a for _, a in outline.tags)


def test_charts_carry_the_values_that_they_draw(written):
    embedded = re.findall(r'<script type="application/json">(.*?)</script>', written)
    shown = {one["name"]: one for chart in embedded for one in json.loads(chart)["series"]}
    assert shown["held out"]["text"] == ["2"]
    assert shown["each step"]["x"] == [1]  # the value that is not finite is left out
    assert shown["accuracy"]["text"] == ["0 %"]


def test_run_under_way_has_a_page_of_what_there_is(tmp_path):
    names = (
        "environment.json",
        "sites.json",
        "budget.json",
        "evaluation/before.json",
        "evaluation/after.json",
    )
    text = page.write(write_logs(tmp_path, **dict.fromkeys((*names, "result.json")))).read_text()
    outline = Outline(text)
    assert {a["id"] for a in outline.all("h2")} == {"training", "reproduce"}
    assert "not finished" in text


def test_run_that_failed_says_so(tmp_path):
    text = page.write(write_logs(tmp_path, **{"result.json": {"status": "stopped: step 7 was not finite"}})).read_text()
    assert "stopped: step 7 was not finite" in text


def test_command_writes_the_page_and_refuses_other_directories(tmp_path, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert command.main([str(run_dir)]) == 1
    assert "no config.json here" in capsys.readouterr().err
    write_logs(run_dir)
    assert command.main([str(run_dir)]) == 0
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")


def test_damaged_log_is_named(tmp_path):
    write_logs(tmp_path)
    (tmp_path / "budget.json").write_text('{"trainable')
    with pytest.raises(ValueError, match=r"budget\.json: not JSON"):
        logs.read(tmp_path)


def test_line_is_drawn_where_its_values_are():
    drawn = charts.line_chart("c", "C", [charts.Series(name="s", x=[0, 5, 10], y=[0.0, 1.0, 0.5])], y_from=0.0)
    assert 'points="0.0,100.0 50.0,0.0 100.0,50.0"' in drawn


def test_chart_of_one_point_and_of_none():
    one = charts.line_chart("c", "C", [charts.Series(name="s", x=[3], y=[2.0])])
    assert "M50.0 50.0h0" in one
    assert charts.line_chart("c", "C", [charts.Series(name="s", x=[3], y=[float("nan")])]) == ""


def test_attributes_are_escaped():
    assert element("p", "<", title='"&') == '<p title="&quot;&amp;">&lt;</p>'
