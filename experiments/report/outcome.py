"""The sections on what a run achieved: the title, the rates before and after, and the sample answers."""

from typing import Any

from experiments.report import text
from experiments.report.logs import RunLogs
from experiments.report.markup import Markup, element, join, section

_STATUS = {"finished": "finished", "running": "not finished"}
_FACTORS = {  # methods whose rank is `config.lora.rank`
    "lora": "LoRA",
    "rslora": "rank-stabilised LoRA",
    "lora_plus": "LoRA+",
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "loftq": "LoftQ",
    "eva": "EVA",
    "dora": "DoRA",
    "adalora": "AdaLoRA",
    "lorafa": "LoRA-FA",
    "loha": "LoHa",
    "lokr": "LoKr",
}
_OTHERS = {
    "vera": "VeRA",
    "ia3": "(IA)³",
    "bitfit": "BitFit",
    "norm": "norm tuning",
    "full": "full fine-tuning",
    "bottleneck": "bottleneck adapters",
    "bottleneck_pfeiffer": "bottleneck adapters in Pfeiffer’s places",
    "prompt": "prompt tuning",
    "prefix": "prefix tuning",
}


def header(run: RunLogs) -> Markup:
    """Return the title, what was done in a few sentences, and how the run stands."""
    status = run.result.get("status", "running")
    model = run.environment.get("model", run.config["model"]["source"])
    said = [f"{model} fine-tuned with {_method(run.config)}."]
    if run.budget:
        trained = run.budget["trainable_parameters"]
        every = trained + run.budget["frozen_parameters"]
        said.append(
            f"{text.count(trained)} of {text.count(every)} parameters were trained "
            f"({text.percent(trained / every, 2)}); the base stayed as it was."
        )
    if training := run.result.get("training"):
        said.append(
            f"{training['steps']:,} steps over {training['tokens']:,} tokens took {text.duration(training['seconds'])}."
        )
    return element(
        "header",
        element("p", _STATUS.get(status, status), class_="status" if status in _STATUS else "status failed"),
        element("h1", run.config["name"]),
        element("p", " ".join(said)),
    )


def _method(config: dict[str, Any]) -> str:
    name, stored = config.get("method", "lora"), config["model"].get("quantize", "none")
    shown = f"{_FACTORS[name]} of rank {config['lora']['rank']}" if name in _FACTORS else _OTHERS.get(name, name)
    return shown if stored == "none" else f"{shown} over a base in {stored.upper()}"


def headline(run: RunLogs) -> Markup:
    """Return the rates before and after training with their intervals, and the held-out loss."""
    evaluation = run.result.get("evaluation")
    if not evaluation:
        return Markup()
    about = (
        f"{evaluation['examples']} held-out examples, never trained on, answered greedily before and after. "
        "The marks span 95 % intervals: Wilson’s for each rate, a paired bootstrap for the difference."
    )
    loss = evaluation["loss"]
    loss_card = element(
        "article",
        element("h3", "Held-out loss"),
        element("p", "nats per token of the expected answer", class_="about"),
        _change(text.number(loss["before"]), text.number(loss["after"])),
        element("p", f"{loss['tokens']:,} tokens of {loss['examples']} held-out answers", class_="gain"),
        class_="card measure",
    )
    cards = element("div", *map(_measure, evaluation["measures"]), loss_card, class_="measures")
    lead = element("p", about, class_="lead") if evaluation["measures"] else None
    return section("held-out", "Before and after, on held-out text", lead, cards)


def _change(before: str, after: str) -> Markup:
    return element(
        "p",
        element("span", "before: ", class_="visually-hidden"),
        element("span", before, class_="before"),
        element("span", "→", class_="arrow", aria_hidden="true"),
        element("span", " after: ", class_="visually-hidden"),
        element("span", after, class_="after"),
        class_="numbers",
    )


def _measure(measure: dict[str, Any]) -> Markup:
    before, after, gain = measure["before"], measure["after"], measure["difference"]
    interval = f" (95 % interval {100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"
    spoken = ", ".join(
        f"{when} {text.percent(rate['value'])} with a 95 % interval from {text.percent(rate['low'])} to "
        f"{text.percent(rate['high'])}"
        for when, rate in (("before", before), ("after", after))
    )
    scale = [element("span", f"{at} %", class_="scale", style=f"left:{at}%") for at in (0, 50, 100)]
    return element(
        "article",
        element("h3", measure["title"]),
        element("p", measure["meaning"], class_="about"),
        _change(text.percent(before["value"]), text.percent(after["value"])),
        element("p", element("b", f"{100 * gain['value']:+.1f} points"), interval, class_="gain"),
        element(
            "div",
            element("i", class_="line"),
            _marks("before", before),
            _marks("after", after),
            *scale,
            class_="dumbbell",
            role="img",
            aria_label=f"{measure['title']}: {spoken}",
        ),
        class_="card measure",
    )


def _marks(which: str, rate: dict[str, float]) -> Markup:
    left, width = 100 * rate["low"], 100 * (rate["high"] - rate["low"])
    return join(
        element("i", class_=f"whisker {which}", style=f"left:{left:.2f}%;width:{width:.2f}%"),
        element("i", class_=f"dot {which}", style=f"left:{100 * rate['value']:.2f}%"),
    )


def answers(run: RunLogs) -> Markup:
    """Return some held-out examples with what was answered before and after training."""
    before = {row["id"]: row for row in run.before.get("answers", [])}
    after = {row["id"]: row for row in run.after.get("answers", [])}
    samples = run.result.get("evaluation", {}).get("samples", [])
    chosen = [key for key in samples if key in before and key in after]
    if not chosen:
        return Markup()
    # Roles are spelled out: a narrow page shows the rows as blocks, and a table loses its meaning by that.
    rows = [
        element(
            "tr",
            element("th", after[key]["question"], scope="row", role="rowheader"),
            element("td", element("code", after[key]["reference"]), role="cell", data_label="Expected"),
            _answer("Before", before[key]),
            _answer("After", after[key]),
            role="row",
        )
        for key in chosen
    ]
    titles = ("Question", "Expected", "Before", "After")
    columns = [element("th", title, scope="col", role="columnheader") for title in titles]
    table = element(
        "table",
        element("thead", element("tr", *columns, role="row"), role="rowgroup"),
        element("tbody", *rows, role="rowgroup"),
        role="table",
    )
    lead = element("p", "Drawn by the seed from the held-out examples: not picked by hand.", class_="lead")
    return section("answers", "Sample answers", lead, element("div", table, class_="card answers"))


def _answer(label: str, row: dict[str, Any]) -> Markup:
    kind, mark = ("right", "✓") if row["correct"] else ("wrong", "✗")
    return element(
        "td",
        element("span", mark, class_=f"mark {kind}", aria_hidden="true"),
        element("span", f"{kind}: ", class_="visually-hidden"),
        element("code", row["answer"] or "(nothing)"),
        role="cell",
        data_label=label,
    )
