"""A whole run: evaluate, train, evaluate again, save, check and report.

Each part is done once, however often the run is killed and started again.
"""

import dataclasses
import time
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import config_dict
from tqdm import tqdm

import lorax
from experiments import data, models
from experiments.report import page
from experiments.training import devices, evaluation, loop, preparation, recipes, result, settings, step, subject, task
from experiments.training.evaluation import Evaluator
from experiments.training.run_directory import RunDirectory, environment
from experiments.training.stopping import StopSignals

MERGE_CHECK_EXAMPLES = 4


def finetune(config: config_dict.ConfigDict, *, command: str, stop: StopSignals) -> dict[str, Any]:
    """Do what `config` says in `config.run_dir`, or what is left of it to do.

    Args:
        config: the settings.
        command: what was typed, for the report.
        stop: installed signal handlers.

    Returns:
        The contents of `result.json`.

    Raises:
        ValueError: for wrong settings or data, before any training.
        NonFiniteLossError: an update was not finite; the last good state is saved.
        Stopped: by a signal; the state is saved.
    """
    settings.check(config)
    recipes.check(config)
    mesh = devices.mesh(config.mesh)
    directory = RunDirectory(config)
    with directory.locked():
        found = directory.read("result.json")
        if found and found["status"] == "finished":
            print(f"{directory.path}: finished before; delete it, or give another run_dir, to train again")
            outcome = found
        else:
            model = preparation.model_name(config.model)
            directory.write("environment.json", environment(config, command=command, model=model))
            try:
                started = time.perf_counter()
                samples, model = task.load(config), preparation.load_model(config, mesh)
                with jax.set_mesh(mesh):
                    outcome = _run(config, directory, mesh, stop, samples, model, started)
            except loop.NonFiniteLossError as error:
                directory.write("result.json", {"status": f"stopped: step {error.step} was not finite"})
                devices.from_main(lambda: str(page.write(directory.path)))
                raise
            directory.write("result.json", outcome)
        print(f"report: {devices.from_main(lambda: str(page.write(directory.path)))}")
    return outcome


def _run(
    config: config_dict.ConfigDict,
    directory: RunDirectory,
    mesh: Mesh,
    stop: StopSignals,
    samples: task.Task,
    model: models.Model,
    started: float,
) -> dict[str, Any]:
    tokenizer = model.tokenizer
    assert tokenizer is not None  # load_model
    # the model keeps no parameters, since a method may quantise them
    params, model = model.params, dataclasses.replace(model, params={})
    layout = preparation.batch_layout(config)
    placeholders = recipes.placeholders(config, model.config.vocab_size)
    encoded = data.encode_samples(
        samples.train, tokenizer, max_positions=layout.max_positions, placeholders=placeholders
    )
    batches = data.Batches(encoded.examples, layout, seed=config.seed, pad_id=tokenizer.pad_id)
    facts = samples.facts | _describe_training_data(encoded, layout)

    loss = step.summed_loss(model, config.train.loss_chunk)
    example = next(batches.one_epoch())
    params, adapter = preparation.adapt(config, loss, params, batches.one_epoch())
    directory.write("sites.json", {"sites": preparation.describe_sites(loss, params, adapter, example)})
    loaded = time.perf_counter() - started

    unmerged = subject.why_not_merged(params, adapter)
    how = {name: config.evaluation[name] for name in ("max_new_tokens", "batch_size")}
    how |= {"is_merged": unmerged is None, "placeholders": placeholders}
    test = Evaluator(model, loss, samples.test, layout, **how)
    validation = Evaluator(model, loss, samples.validation, layout, **how)

    def watch(at_step: int, current: lorax.Adapter) -> dict[str, Any]:
        count, evaluated = config.evaluation.progress_examples, subject.of(params, current)
        return _watched(directory, at_step, validation.answers(evaluated, count), validation.loss(evaluated, count))

    # a prompt or prefix, and LoftQ's factors, are there before training; what is merged starts as no change
    untrained = (params, adapter) if unmerged else params
    before = _evaluate_once(directory, "before", test, untrained, config)
    trained = loop.train(config, directory, params, adapter, loss, batches, mesh, watch=watch, stop=stop)
    evaluated = subject.of(params, trained.adapter)
    after = _evaluate_once(directory, "after", test, evaluated, config)

    print(f"saving the adapter{'' if unmerged else ', and comparing it merged and not'}")
    path = directory.path / "adapter"
    adapter = result.save_adapter(path, trained.adapter, params, {"name": config.name, "steps": config.train.steps})
    if recipes.find(config).has_peft_form:
        result.save_peft(directory.path / "adapter_peft", adapter, params, model, config.model)
    if unmerged:
        merge_check = {"skipped": unmerged}
    else:
        held_out = data.Batches(test.encoded[:MERGE_CHECK_EXAMPLES], layout, pad_id=tokenizer.pad_id, shuffle=False)
        merge_check = result.compare_merged(model, params, adapter, evaluated, next(held_out))
    directory.write("budget.json", devices.from_main(lambda: result.budget(params, adapter, trained, directory.path)))
    answered = before["answers"], after["answers"]
    loss_before, loss_after = before["loss"], after["loss"]
    return {
        "status": "finished",
        "name": config.name,
        "evaluation": {
            "examples": len(answered[0]),
            "measures": evaluation.compare(*answered, seed=config.seed),
            "loss": loss_before | {"before": loss_before["loss"], "after": loss_after["loss"]},
            "samples": [answer["id"] for answer in answered[0][: config.evaluation.samples]],
        },
        "training": {
            "steps": trained.last["step"],
            "tokens": trained.last["tokens"],
            "seconds": trained.last["elapsed_s"],
            "loss": trained.last["loss"],
        },
        "merge_check": merge_check,
        "data": facts,
        "seconds": {
            "loading": loaded,
            "evaluation before": before["seconds"],
            "training": trained.last["elapsed_s"],
            "evaluation after": after["seconds"],
        },
        "peak_memory_bytes": result.peak_memory_bytes(),
    }


def _describe_training_data(encoded: data.Encodings, layout: data.Packed | data.Bucketed) -> dict[str, str]:
    tokens = sum(example.positions for example in encoded.examples)
    count = len(encoded.examples)
    facts = {"Training examples": f"{count:,}, of {tokens / count:.0f} tokens on average"}
    if encoded.overlong:
        longest = max(overlong.positions for overlong in encoded.overlong)
        limit, count = layout.max_positions, len(encoded.overlong)
        facts["Left out"] = f"{count:,} examples longer than {limit} tokens (up to {longest:,})"
        print(f"left out {facts['Left out']}; config.data.row_tokens sets the limit")
    return facts


def _evaluate_once(
    directory: RunDirectory, when: str, evaluator: Evaluator, evaluated: Any, config: config_dict.ConfigDict
) -> dict[str, Any]:
    """Evaluate, or return what an earlier process of this run found."""
    name = f"evaluation/{when}.json"
    found = directory.read(name)
    if found is not None:
        return found
    started = time.perf_counter()
    print(f"evaluating {when} training: {min(config.evaluation.examples, evaluator.count)} held-out answers")
    answers = evaluator.answers(evaluated, config.evaluation.examples)
    found = {
        "loss": evaluator.loss(evaluated, config.evaluation.loss_examples),
        "answers": [dataclasses.asdict(answer) for answer in answers],
        "seconds": round(time.perf_counter() - started, 3),
    }
    rates = ", ".join(f"{key} {100 * rate:.1f} %" for key, rate in evaluation.rates(found["answers"]).items())
    print(f"{when} training: held-out loss {found['loss']['loss']:.4f}{', ' if rates else ''}{rates}")
    directory.write(name, found)
    return found


def _watched(
    directory: RunDirectory, at_step: int, answers: list[evaluation.Answer], loss: dict[str, float]
) -> dict[str, Any]:
    """Keep the answers given at a step, show one, and return the numbers for the log."""
    rows = [dataclasses.asdict(answer) for answer in answers]
    directory.write(f"evaluation/step_{at_step:06d}.json", {"loss": loss, "answers": rows})
    if rows:
        tqdm.write(f"step {at_step}: {rows[0]['question']!r} -> {rows[0]['answer']!r}")
    return {"heldout_loss": loss["loss"], "answered": len(rows), **evaluation.rates(rows)}
