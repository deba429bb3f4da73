"""The top of the page: the question, how the study stands, and the answer in words that the intervals allow."""

import math
from collections.abc import Sequence

from experiments.report.markup import Markup, element, join, section
from experiments.report.study import tables
from experiments.report.study.findings import COMPARED, OPEN, SEPARATED, UNSEPARATED, Effect, Findings
from experiments.report.study.reading import NOT_RUN, WITHIN
from experiments.training.intervals import Interval

LISTED = 6  # how many names a sentence holds before it counts the rest


def header(found: Findings) -> Markup:
    """Return the title, the question, and how many of the cells have ended."""
    study, cells = found.study, found.study.cells
    waiting = sum(cell.status == NOT_RUN for cell in cells)
    status = f"not finished: {len(cells) - waiting:,} of {len(cells):,} runs have ended" if waiting else "finished"
    counts = {axis: len(study.axes[axis]) for axis in [*study.several, *WITHIN] if len(study.axes.get(axis, ())) > 1}
    axes = [f"{count} {axis.replace('_', ' ')}" for axis, count in counts.items()]
    grid = (" × " if math.prod(counts.values()) == len(cells) else ", ").join(axes)
    size = f"{len(cells):,} runs, {len(found.configurations):,} configurations"
    facts = [f"{name}: {value}" for name, value in study.problem.get("facts", {}).items()]
    questions = dict.fromkeys(question for config in study.configs if (question := config.get("question")))
    return element(
        "header",
        element("p", status, class_="status"),
        element("h1", study.name),
        *(element("p", question, class_="question") for question in questions),
        element("p", size, f" ({grid})" if grid else None, f", on {study.problem['name']}."),
        element("p", "; ".join(facts)) if facts else None,
    )


def answer(found: Findings) -> Markup:
    """Return what the comparisons say, what they cannot, and the table of results."""
    if not found.judged:
        ended = [cell for cell in found.study.cells if cell.status != NOT_RUN]
        said = (
            f"All {len(ended):,} runs that have ended diverged: lower the rates." if ended else "No run has ended yet."
        )
        return section("answer", "Answer", element("p", said, class_="lead"))
    said = [_best(found), *(_effect(found, effect) for effect in found.effects)]
    about = (
        f"Each configuration is judged on the test examples, at the learning rate that had the best validation "
        f"{found.score_name}. Intervals are of 95 %. Those of the {len(found.comparisons):,} differences behind the "
        "table hold all at once, and so do those between the values of one axis. The ranks are those that they allow."
    )
    if any(found.verdict(one) == SEPARATED for one in found.comparisons):
        about += " Blue ones are separated from zero."
    return section(
        "answer",
        "Answer",
        element("ul", *(element("li", one) for one in said), class_="answer"),
        _warnings(found),
        element("p", about, class_="lead") if found.comparisons else None,
        tables.results(found),
    )


def _best(found: Findings) -> Markup:
    """The sentences on the configuration that the others are compared with."""
    best = found.reference
    if best is None or best.interval is None:
        return Markup("No configuration has ended yet with all its runs.")
    before = next((v for cell in best.chosen if (v := cell.number("base", "test", "score")) == v), None)
    lead = join(
        "Compared with: " if best is not found.best else "Best on validation: ",
        element("b", best.label),
        f". Test {found.score_name} {found.scale.between(best.interval)}",
        "" if before is None else f"; before training {found.scale.written(before)}",
        ". ",
    )
    against = [one for one in found.comparisons if best.label in (one.a, one.b)]
    if not against:
        return lead
    if found.seeds < 2:
        return join(lead, "With one seed, whether it is better than another is not answered.")
    named: dict[tuple[str, bool], list[str]] = {}
    for one in against:
        other, gain = (one.b, one.difference.value) if one.a == best.label else (one.a, -one.difference.value)
        named.setdefault((found.verdict(one), gain > 0), []).append(other)
    halves = sorted((one.difference.high - one.difference.low) / 2 for one in against)
    level = named.get((UNSEPARATED, True), []) + named.get((UNSEPARATED, False), [])
    undecided = named.get((OPEN, True), []) + named.get((OPEN, False), [])
    parts = [
        (named.get((SEPARATED, True)), "all", "It is separated from {}, with lower scores."),
        (named.get((SEPARATED, False)), "all", "It is separated from {}, with higher scores."),
        (level, "any", "It cannot be told apart from {}."),
        (undecided, "all", "Open, because the worse one’s rate lies on the edge of its grid: {}."),
    ]
    said = [sentence.format(_some(found, names, every)) for names, every, sentence in parts if names]
    said.append(f"Differences of {_points(found, halves[len(halves) // 2])} or less can hardly be seen in this study.")
    return join(lead, " ".join(said))


def _some(found: Findings, names: Sequence[str], every: str) -> str:
    """The names, or how many of the compared configurations they are where they are many."""
    others = len(found.compared) - 1
    if len(names) == others > 1:
        return f"{every} of the {others} others"
    return "; ".join(names) if len(names) <= LISTED else f"{len(names)} of the {others} others"


def _points(found: Findings, value: float) -> str:
    """A difference of scores with its unit."""
    return found.scale.plain(value) + (" points" if found.scale.fraction else "")


def _effect(found: Findings, effect: Effect) -> Markup:
    """The sentences on one axis: which of its values are separated, on average over the other axes."""
    title = element("b", effect.axis.replace("_", " ").capitalize())
    ranked = sorted(effect.means, key=effect.means.__getitem__, reverse=True)
    means = ", ".join(f"{name} ({found.scale.written(effect.means[name])})" for name in ranked)
    over = f", over {effect.combinations} combinations of the other axes" if effect.combinations > 1 else ""
    over += f": {means}. "
    if found.seeds < 2:
        return join(title, over, "One seed orders nothing.")
    ahead: dict[str, list[str]] = {name: [] for name in ranked}
    undecided, level = [], []
    for one in effect.comparisons:
        d = one.difference
        better, worse = (one.a, one.b) if d.value > 0 else (one.b, one.a)
        gain = _gain(found, d if d.value > 0 else Interval(value=-d.value, low=-d.high, high=-d.low))
        if not one.separated:
            level.append(f"{better} and {worse}")
        elif effect.on_edge[worse]:
            undecided.append(f"{better} over {worse} by {gain}")
        else:
            ahead[better].append(f"{worse} by {gain}")
    separated = [f"{better} over {' and '.join(worse)}" for better, worse in ahead.items() if worse]
    if len(level) == len(effect.comparisons):
        return join(title, over, "None of these are told apart.")
    parts = [
        (separated, "Separated: {}."),
        (undecided, "Open, because rates of the worse one lie on the edge of their grid: {}."),
        (level, "Not told apart: {}."),
    ]
    return join(title, over, " ".join(sentence.format(_listed(said)) for said, sentence in parts if said))


def _gain(found: Findings, difference: Interval) -> str:
    ends = f"{found.scale.plain(difference.low)} to {found.scale.plain(difference.high)}"
    return f"{_points(found, difference.value)} ({ends})"


def _listed(said: Sequence[str]) -> str:
    return "; ".join(said[:LISTED]) + (f"; and {len(said) - LISTED} more" if len(said) > LISTED else "")


def _warnings(found: Findings) -> Markup | None:
    """What stands between the numbers and a conclusion."""
    cells = found.study.cells
    on_edge = [one.label for one in found.judged if one.on_edge]
    diverged = [one.name(cell) for one in found.configurations for cell in one.diverged]
    waiting = sum(cell.status == NOT_RUN for cell in cells)
    left = len(found.configurations) - len(found.compared)
    many = len(found.compared) == COMPARED
    of_all = f"of {len(cells):,} runs"
    said = [
        (
            found.seeds == 1,
            "One seed is not a result. The intervals cover the draw of the examples, not that of the seed, and nothing "
            "is ranked.",
        ),
        (
            all(len(one.rates) < 2 for one in found.judged),
            "The learning rate was not swept: a configuration may be worse only because this rate suits it less.",
        ),
        (
            on_edge,
            f"The chosen rate lies on the edge of its grid: {_listed(on_edge)}. A better one may lie beyond, so that "
            "such a configuration is worse than another is not established.",
        ),
        (
            diverged,
            f"{len(diverged)} {of_all} diverged, and count as the worst score: {_listed(diverged)}.",
        ),
        (waiting, f"{waiting:,} {of_all} have not ended, and {left} configurations are not compared yet."),
        (left and many, f"Only the {COMPARED} configurations that are best on validation are compared."),
        (not waiting and found.judged and not found.compared, "The configurations have no seed in common to compare."),
    ]
    shown = [element("li", sentence) for holds, sentence in said if holds]
    return element("ul", *shown, class_="warnings") if shown else None
