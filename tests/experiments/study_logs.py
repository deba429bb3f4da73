"""The directory of a study as the runner leaves it, with numbers drawn from a seed: for tests of the report.

Every example has a difficulty, every configuration a skill that grows with the rank and depends on what is adapted,
every learning rate a distance from the best one, every seed its luck: scores are right or wrong answers, paired over
examples and seeds as real ones are.
"""

import itertools
import json
import math

import numpy as np

DEFAULT_AXES = {
    "rank": [1, 4, 16],
    "targets": ["qv", "attention", "mlp"],
    "lr": [1e-4, 1e-3, 1e-2],
    "seed": [0, 1, 2],
}
SKILL = {"qv": 0.0, "attention": 0.25, "mlp": 0.9, "lora": 0.0, "dora": 0.1, "bitfit": -0.6, "full": 0.3}
PATHS = ("encoder/layers/attention/query/kernel", "encoder/layers/mlp/up/kernel")
LAYERS, STEPS = 6, 120


def write_study(
    directory, axes=None, *, seed=0, items=200, diverged=(), missing=(), retained=True, analysis=True, optimum=1e-3,
    name="a <study>",
):  # fmt: skip
    """Write a study over `axes` and return its directory.

    `diverged` and `missing` are the ids of cells that diverged or have not run; `optimum` is the best learning rate.
    """
    axes = DEFAULT_AXES if axes is None else axes
    cells = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    cells = [{"id": "_".join(f"{k}={v}" for k, v in cell.items()), "settings": cell} for cell in cells]
    world = np.random.default_rng(seed)
    difficulty = {"test": world.normal(0, 1.5, items), "validation": world.normal(0, 1.5, items)}
    problem = {
        "name": "sentences",
        "score_name": "accuracy",
        "facts": {"Examples": f"{items} test", "Base": "Tiny <b>"},
    }
    write(directory / "config.json", {
        "name": name, "run_dir": f"runs/{directory.name}", "steps": STEPS,
        "question": "Does rank matter, or where <the adapter> sits?",
    })  # fmt: skip
    write(directory / "environment.json", {
        "command": "python -m experiments.ablate --config=configs/x.py --y='</script>'",
        "versions": {"python": "3.11.2", "jax": "0.10.2", "lorax": "0.1"}, "devices": ["cpu:0"], "cores": 2, "seed": 0,
    })  # fmt: skip
    write(directory / "study.json", {"axes": axes, "problem": problem, "cells": cells})
    ran = [cell for cell in cells if cell["id"] not in missing]
    for cell in ran:
        write_cell(directory / "cells" / cell["id"], cell, difficulty, optimum, retained, cell["id"] in diverged)
    write(directory / "groups" / "0.json", {
        "id": "0", "cells": [cell["id"] for cell in ran], "members": len(ran), "compile_seconds": 8.0,
        "seconds": 60.0, "steps": STEPS, "flops": 1e9, "temporary_bytes": 10_000_000,
        "process": {"host": "h", "pid": 1},
    })  # fmt: skip
    if analysis:
        write(directory / "analysis.json", analysed(ran, axes))
    return directory


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def luck(*of):
    """A generator of its own for each thing that is drawn, whatever else is drawn."""
    return np.random.default_rng(list(" ".join(map(str, of)).encode()))


def write_cell(directory, cell, difficulty, optimum, retained, diverged):
    settings = cell["settings"]
    rank, rate, draw = settings.get("rank") or 1, settings.get("lr", optimum), luck(cell["id"])
    off = math.log10(rate / optimum)
    skill = 0.3 + SKILL.get(settings.get("targets"), 0.1) + SKILL.get(settings.get("method"), 0.0)
    skill += 0.12 * math.log2(rank) - 0.5 * off**2 + luck("seed", settings.get("seed")).normal(0, 0.05)
    skill += draw.normal(0, 0.05)

    def split(name):
        sure = skill - difficulty[name]
        score = (sure + draw.logistic(0, 0.3, len(sure)) > 0).astype(np.float32)
        return score, np.logaddexp(0, -sure).astype(np.float32)

    test_score, test_loss = split("test")
    validation_score, validation_loss = split("validation")
    steps = list(range(1, STEPS + 1))
    ends = STEPS // 2 if diverged else STEPS
    train = [0.35 + 1.2 * math.exp(-s / (20 + 8 * off**2)) + draw.normal(0, 0.04) for s in steps[:ends]]
    train[-1:] = [float("nan")] if diverged else train[-1:]
    evaluated = [0, STEPS // 2, STEPS]
    curve = [(0.5, 0.8)] + [(float(np.mean(validation_score)), float(np.mean(validation_loss)))] * 2
    write(directory / "curve.json", {
        "train": {"step": steps[:ends], "loss": train, "gradient_norm": [1 / s for s in steps[:ends]]},
        "validation": {"step": evaluated, "score": [c[0] for c in curve], "loss": [c[1] for c in curve]},
    })  # fmt: skip
    np.savez(
        directory / "items.npz", test_loss=test_loss, test_score=test_score, validation_score=validation_score
    )  # fmt: skip

    def means(score, loss):
        return {"loss": float(np.mean(loss)), "score": float(np.mean(score))}  # of a diverged run, where it stopped

    forgotten = 0.02 * math.log2(rank + 1) * math.exp(off)
    kept = {"loss": 1.0 + forgotten + draw.normal(0, 0.005), "score": max(0.0, 0.8 - forgotten)}
    parameters = rank * 384 * 2 * LAYERS * {"qv": 2, "attention": 4}.get(settings.get("targets"), 5)
    result = {
        **cell,
        "status": "diverged" if diverged else "finished",
        "diverged_at": ends if diverged else None,
        "validation": means(validation_score, validation_loss),
        "test": means(test_score, test_loss),
        "retained": kept if retained else None,
        "base": {"validation": {"loss": 0.8, "score": 0.5}, "test": {"loss": 0.8, "score": 0.5},
                 "retained": {"loss": 1.0, "score": 0.8} if retained else None},
        "costs": {"trainable_parameters": parameters, "checkpoint_bytes": 4 * parameters + 20_000,
                  "peak_bytes": 200_000_000 + 90 * parameters, "flops": 4e9 + 6_000 * parameters,
                  "step_seconds": 0.1 + parameters * 1e-7, "wall_seconds": 20 + parameters * 1e-5,
                  "compile_seconds": 8.0, "merged_latency_seconds": 0.004,
                  "unmerged_latency_seconds": 0.004 + parameters * 1e-9},
        "tokens": 40_000, "steps": STEPS, "group": "0",
    }  # fmt: skip
    write(directory / "result.json", result)


def analysed(cells, axes):
    """Spectra and subspace maps of the first seed's cells at the middle rate."""
    rates, seeds = axes.get("lr", [None]), axes.get("seed", [None])
    rate = rates[len(rates) // 2]
    chosen = [c for c in cells if c["settings"].get("lr") == rate and c["settings"].get("seed") == seeds[0]]
    spectra, effective = {}, {}
    for cell in chosen:
        rank = cell["settings"].get("rank") or 1
        draw = luck("spectrum", cell["id"])
        spectra[cell["id"]] = {
            path: [sorted((draw.exponential(1, rank) / np.arange(1, rank + 1)).tolist(), reverse=True)] * LAYERS
            for path in PATHS
        }
        effective[cell["id"]] = {path: (1 + 0.6 * (rank - 1) * draw.uniform(0.5, 1, LAYERS)).tolist() for path in PATHS}
    subspaces = []
    for a, b in zip(chosen, chosen[1:], strict=False):
        size = [min(8, one["settings"].get("rank") or 1) for one in (a, b)]
        phi = luck("phi", a["id"]).uniform(0, 1, size).tolist()
        subspaces.append({"a": a["id"], "b": b["id"], "path": PATHS[0], "layer": 0, "side": "output", "phi": phi})
    return {"spectra": spectra, "effective_rank": effective, "subspaces": subspaces[:6]}
