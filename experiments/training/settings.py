"""Every setting of a fine-tuning run with its default, and the checks a configuration passes before any work.

A file in `configs/` starts from `defaults()` and changes what its study needs. The names below are the only
ones there
are: setting another is an error that names the nearest, in the file as on the command line.
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import config_dict

EVERY_LINEAR = (r"layers/attn/(query|key|value|out)/kernel", r"layers/mlp/(gate|up|down)/kernel")
ATTENTION = ("plain", "flash")
REMAT = ("none", "full", "dots", "dots_no_batch")
QUANTIZE = ("none", "nf4", "fp4", "int8", "int4")
QUERY_VALUE = (r"layers/attn/(query|value)/kernel",)


def defaults() -> config_dict.ConfigDict:
    """Return a fresh configuration, locked against unknown names."""
    config = config_dict.ConfigDict(
        {
            "name": "finetune",
            "run_dir": "runs/finetune",  # one directory a run; started again, the run goes on from there
            "seed": 0,  # of the adapter's start, the dropout, the order of the data and the bootstrap
            "method": "lora",  # how the model is adapted: a name of experiments/training/recipes.py
            "model": {
                "source": "smollm2",  # "smollm2", a .gguf file, a Hugging Face directory, or owner/model on the Hub
                "dtype": "float32",  # of the frozen parameters and the activations: float32 or bfloat16
                "remat": "none",  # what the backward pass recomputes: none, full, dots or dots_no_batch
                "attention": "plain",  # plain: all scores of a row at once; flash: a block of them, by tokamax
                "quantize": "none",  # the frozen linear layers, while loading: none, nf4, fp4, int8 or int4
                "double_quantization": True,  # nf4 and fp4: their scales in eight bits too
            },
            "mesh": {  # devices along each axis, of all processes together; 0: all that the others leave
                "data": 0,  # each has all of the weights and a part of the rows
                "fsdp": 1,  # each has a part of the weights and of the rows
                "tensor": 1,  # each has a part of the weights, of heads and of inner widths, and all rows
            },
            "data": {
                "path": "",  # your own JSONL; empty: the sentiment sentences below
                "held_out_path": "",  # JSONL to test on; empty: a part of `path`, drawn by the seed
                "held_out_fraction": 0.1,  # of `path`, held out when there is no held_out_path
                "domains": ("movies", "amazon", "tweets", "editorials"),  # of the sentiment sentences
                "cache_dir": "",  # where downloads are kept; empty: the user's cache directory
                "batching": "packed",  # several examples a row; or bucketed: one, in the shortest row it fits
                "row_tokens": 256,  # packed: tokens in a row; bucketed: the longest example
                "buckets": (64, 128, 256),  # bucketed: the row lengths
            },
            "lora": {  # of all methods with factors; dtype and targets of the others, too
                "rank": 8,  # adalora: at the start
                "alpha": 16.0,
                "rank_stabilized": False,  # scale by alpha / sqrt(rank) instead of alpha / rank
                "dropout": 0.0,
                "dtype": "float32",  # of the factors
                "initializer": "uniform",  # uniform, normal, orthogonal, pissa, pissa_fast or olora
                "targets": (),  # regular expressions that match whole leaf paths; empty: what suits the method
            },
            "adalora": {
                "target_rank": 0,  # triplets a weight at the end, on average; 0: two thirds of lora.rank
                "warmup_steps": -1,  # before the budget falls; -1: a tenth of train.steps
                "final_steps": -1,  # after the last pruning; -1: a quarter of train.steps
                "interval": 1,  # steps from one pruning to the next
                "orthogonal_weight": 0.5,  # of the regulariser
            },
            "eva": {"batches": 8, "rho": 2.0},  # how many of the training data; the most that a layer's rank grows by
            "lora_plus": {"ratio": 16.0},  # the learning rate of B over that of A, which is train.learning_rate
            "vera": {"rank": 256, "initial": 0.1},  # of the shared projections; what the vector between them starts at
            "lokr": {"factor": -1},  # the largest side of the small matrix; -1: as near to the other's as it goes
            "bottleneck": {"rank": 64, "activation": "gelu"},
            "ia3": {"feedforward": (r"layers/mlp/down/kernel",)},  # gains on inputs here, on outputs of the targets
            "tuning": {"length": 8},  # prompt and prefix: learned positions in front of every example
            "train": {
                "steps": 100,  # optimiser updates
                "rows": 8,  # rows in one update
                "accumulate": 1,  # parts of an update's rows that are gone through one by one, to save memory
                "loss_chunk": 0,  # answer tokens of a row whose logits are there at a time, to save memory; 0: all
                "learning_rate": 1e-3,  # at the end of the warm-up
                "final_learning_rate": 0.0,  # at the end of the cosine
                "warmup_steps": 10,
                "weight_decay": 0.0,
                "beta1": 0.9,
                "beta2": 0.999,
                "clip_norm": 1.0,  # of the whole gradient
                "offload": False,  # keep the optimiser's state in host memory between updates
            },
            "evaluation": {
                "examples": 200,  # held-out examples answered before and after training; 0: none
                "every": 0,  # steps between evaluations while training; 0: only before and after
                "progress_examples": 32,  # other held-out examples, answered at each of those evaluations
                "loss_examples": 200,  # held-out examples that the loss is taken over before and after
                "max_new_tokens": 24,
                "batch_size": 32,  # examples generated together
                "samples": 8,  # answers shown side by side in the report
            },
            "checkpoint": {"every": 20, "keep": 3},  # steps between checkpoints; how many are kept
        },
        convert_dict=True,
    )
    return config.lock()


def dotted(config: Mapping[str, Any] | config_dict.ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Return the settings as {dotted name: value}."""
    flat = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, config_dict.ConfigDict | Mapping):
            flat |= dotted(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def unknown_setting(name: str, known: Iterable[str]) -> str:
    """Return what to tell someone who set `name`: the nearest known name, whole or by its last part."""
    known = sorted(known)
    last_parts: dict[str, str] = {}
    for other in known:
        last_parts.setdefault(other.rsplit(".", 1)[-1], other)
    whole = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    last = difflib.get_close_matches(name.rsplit(".", 1)[-1], last_parts, n=1, cutoff=0.6)
    nearest = whole or [last_parts[part] for part in last] or difflib.get_close_matches(name, known, n=1, cutoff=0)
    return f"unknown setting config.{name}: the nearest is config.{nearest[0]}"


def check_overrides(arguments: Iterable[str], config: config_dict.ConfigDict) -> None:
    """Check the names of `--config.…` command-line arguments.

    Raises:
        ValueError: for the first name that `config` lacks, with the nearest that it has.
    """
    known = dotted(config)
    for argument in arguments:
        match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        name = match and re.sub(r"\[.*", "", match[1])
        if name and name not in known:
            raise ValueError(unknown_setting(name, known))


def check(config: config_dict.ConfigDict) -> None:
    """Check names, types and values before any work.

    Raises:
        ValueError: that names the setting, what it is, what was expected.
    """
    wanted, given = dotted(defaults()), dotted(config)
    for name in given:
        if name not in wanted:
            raise ValueError(unknown_setting(name, wanted))
    for name, default in wanted.items():
        if name not in given:
            raise ValueError(f"config.{name} is missing: start the file from experiments.training.settings.defaults()")
        check_type(name, given[name], default)

    def want(name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"config.{name} = {given[name]!r}: expected {expected}")

    want("run_dir", bool(given["run_dir"]), "a directory")
    for name in ("model.dtype", "lora.dtype"):
        want(name, given[name] in ("float32", "bfloat16"), "float32 or bfloat16")
    want("model.remat", given["model.remat"] in REMAT, " or ".join(REMAT))
    want("model.attention", given["model.attention"] in ATTENTION, " or ".join(ATTENTION))
    want("model.quantize", given["model.quantize"] in QUANTIZE, " or ".join(QUANTIZE))
    want("data.batching", given["data.batching"] in ("packed", "bucketed"), "packed or bucketed")
    want("data.held_out_fraction", 0 < given["data.held_out_fraction"] < 1, "a fraction between 0 and 1")
    want("data.domains", bool(given["data.domains"]), "at least one domain")
    want("lora.dropout", 0 <= given["lora.dropout"] < 1, "a probability below 1")
    at_least_one = (
        "data.row_tokens lora.rank eva.batches eva.rho tuning.length train.steps train.rows train.accumulate "
        "evaluation.max_new_tokens evaluation.batch_size evaluation.loss_examples checkpoint.every checkpoint.keep"
    )
    for name in at_least_one.split():
        want(name, given[name] >= 1, "at least 1")
    for name in ("adalora.warmup_steps", "adalora.final_steps"):
        want(name, given[name] >= -1, "0 or more, or -1 for a part of train.steps")
    not_negative = (
        "train.warmup_steps train.loss_chunk adalora.target_rank evaluation.examples evaluation.every "
        "evaluation.samples"
    )
    for name in not_negative.split():
        want(name, given[name] >= 0, "0 or more")
    for name in ("train.learning_rate", "train.clip_norm"):
        want(name, given[name] > 0 and math.isfinite(given[name]), "a positive number")
    want("train.warmup_steps", given["train.warmup_steps"] < given["train.steps"], "fewer than train.steps")
    want("train.accumulate", given["train.rows"] % given["train.accumulate"] == 0, "a divisor of train.rows")


def check_type(name: str, value: Any, default: Any) -> None:
    """Check that a setting has the type of its default.

    Raises:
        ValueError: it has another; a whole number passes for a float, a list for a tuple.
    """
    number = isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool)
    sequence = isinstance(default, tuple) and isinstance(value, list)
    if not (number or sequence or type(value) is type(default)):
        raise ValueError(
            f"config.{name} = {value!r}: got {type(value).__name__}, expected {type(default).__name__} like {default!r}"
        )


def to_json(config: config_dict.ConfigDict) -> str:
    """Return the settings as JSON text that is the same for equal settings."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line for each setting in which two resolved configurations (parsed JSON) differ."""
    old, new = dotted(old), dotted(new)
    missing = object()
    return [
        f"config.{name}: was {old.get(name, 'absent')!r}, now {new.get(name, 'absent')!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, missing) != new.get(name, missing)
    ]
