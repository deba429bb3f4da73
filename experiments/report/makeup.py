"""The sections on what a run is made of: parameters and bytes, adapted leaves, and how to repeat it."""

from collections.abc import Mapping
from typing import Any

from experiments.report import text
from experiments.report.logs import RunLogs
from experiments.report.markup import Markup, element, key_values, section, table

MANY_ROWS = 14  # a longer table scrolls inside its card


def budget(run: RunLogs) -> Markup:
    """Return what is trained, held and stored, against full fine-tuning."""
    if not run.budget:
        return Markup()
    b = run.budget
    every = b["trainable_parameters"] + b["frozen_parameters"]
    moments = 8 * b["frozen_parameters"]  # AdamW holds two numbers a parameter, in float32
    cards = [_share("Trained", text.count(b["trainable_parameters"]), b["trainable_parameters"] / every,
                    f"of {text.count(every)} parameters")]  # fmt: skip
    if "adapter_file_bytes" in b:
        share = b["adapter_file_bytes"] / b["frozen_bytes"]
        whole = f"of the model’s {text.size(b['frozen_bytes'])}"
        cards.append(_share("Adapter on disk", text.size(b["adapter_file_bytes"]), share, whole))
    held = "of what AdamW on every parameter would hold"
    cards.append(_share("Optimiser state", text.size(b["optimiser_bytes"]), b["optimiser_bytes"] / moments, held))
    rows: list[list[Any]] = [
        ["Trainable", f"{b['trainable_parameters']:,}", b["trainable_bytes"]],
        ["Frozen", f"{b['frozen_parameters']:,}", b["frozen_bytes"]],
        ["Fixed arrays of the adapter: scales, projections", "", b.get("fixed_bytes")],
        ["Optimiser state", "", b["optimiser_bytes"]],
        ["Training checkpoint: factors, optimiser state, position", "", b.get("checkpoint_file_bytes")],
        ["Adapter directory", "", b.get("adapter_file_bytes")],
        ["Temporary arrays of an update, compiled", "", b.get("step_temporary_bytes")],
        ["Peak resident memory of the process", "", run.result.get("peak_memory_bytes")],
    ]
    known = [[name, parameters, text.size(size)] for name, parameters, size in rows if size is not None]
    return section(
        "budget",
        "Parameters and bytes",
        element("div", *cards, class_="shares"),
        element(
            "div",
            table(
                "Parameters and bytes",
                ["What", "Parameters", "Bytes"],
                known,
                numbers={"Parameters", "Bytes"},
            ),
            class_="card below",
        ),
    )


def _share(title: str, big: str, part: float, whole: str) -> Markup:
    filled = element("i", style=f"width:{100 * min(part, 1):.3f}%")
    return element(
        "article",
        element("h3", title),
        element("p", big, class_="big"),
        element("p", f"{text.percent(part, 2)} {whole}"),
        element("div", filled, class_="bar", aria_hidden="true"),
        class_="card share",
    )


def sites(run: RunLogs) -> Markup:
    """Return the table of adapted leaves: what the trace found, and how each is computed."""
    if not run.sites:
        return Markup()
    rows = [
        [
            element("code", row["path"]),
            row["kind"],
            " × ".join(f"{side:,}" for side in row["shape"]),
            row["dtype"],
            row["method"],
            f"{row['trainable']:,}",
            row["how"] if row["how"] == "factored" else f"{row['how']}: {row['reason']}",
        ]
        for row in run.sites
    ]
    columns = ["Leaf", "Kind", "Shape", "Base type", "Method", "Trained", "Computed"]
    factored = sum(row["how"] == "factored" for row in run.sites)
    lead = (
        f"Found by tracing the model’s loss, not by layer names. {factored} of {len(rows)} are factored: "
        "their merged weight is never built. A leaf of a scanned stack has a pair of factors for each layer."
    )
    shown = table("Adapted leaves", columns, rows, numbers={"Trained"}, tall=len(rows) > MANY_ROWS)
    return section(
        "sites", "Adapted leaves", element("p", lead, class_="lead"), element("div", shown, class_="card fit")
    )


def reproduce(run: RunLogs) -> Markup:
    """Return the command, what the run counted and checked, the versions and the settings."""
    facts = list(run.result.get("data", {}).items())
    check = run.result.get("merge_check", {})
    if reason := check.get("skipped"):
        facts.append(("Evaluated", f"adapted at each use, not merged: {reason}"))
    elif check:
        facts.append((
            "Merged against adapted",
            f"logits differ by at most {text.number(check['largest_difference'], 2)} (the largest is "
            f"{text.number(check['largest_logit'])}); same next token at {check['same_token']} of "
            f"{check['positions']} positions",
        ))  # fmt: skip
    facts += [(f"Time: {what}", text.duration(took)) for what, took in run.result.get("seconds", {}).items()]
    versions = list(run.environment.get("versions", {}).items())
    versions += [
        (name, run.environment[name]) for name in ("platform", "devices", "cores", "seed") if name in run.environment
    ]
    command = run.environment.get("command")
    every = element("pre", "\n".join(settings(run.config)))
    return section(
        "reproduce",
        "Reproduce",
        element("div", element("pre", element("code", command)), class_="card command") if command else None,
        element("div", key_values("This run", facts), key_values("Versions", versions), class_="two"),
        element("details", element("summary", "All settings"), element("div", every, class_="card below")),
    )


def settings(config: Mapping[str, Any], prefix: str = "config") -> list[str]:
    """Return a line for each setting, as the command line would name it.

    >>> settings({"lora": {"rank": 8}})
    ['config.lora.rank = 8']
    """
    lines = []
    for key, value in config.items():
        name = f"{prefix}.{key}"
        lines += settings(value, name) if isinstance(value, dict) else [f"{name} = {value!r}"]
    return lines
