"""The methods a run can train with: one table from `config.method` to what is adapted how, and by which optimiser."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from ml_collections import config_dict

import lorax
from experiments.data.batches import shuffled
from experiments.training import optimiser
from experiments.training.settings import EVERY_LINEAR

Config = config_dict.ConfigDict
Rules = dict[str, lorax.Method]
Optimiser = Callable[[Config, lorax.Adapter, optimiser.Rates], optax.GradientTransformation]

KEY_VALUE = (r"layers/attn/(key|value)/kernel",)
HOULSBY = (r"layers/attn/out/kernel", r"layers/mlp/down/kernel")
PFEIFFER = (r"layers/mlp/down/kernel",)
EMBEDDING = (r"embed/embedding",)
EVERYTHING = (r".*",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a run is set up for a method.

    Attributes:
        rules: makes the spec's rules of the settings and the patterns of the targets.
        targets: what is adapted in a model of the Llama family when `config.lora.targets` is empty.
        placement: what a study's problem calls the leaves of a method that is not put where others are.
        size: the setting that says how large the method is, where there is one.
        optimiser: makes the optimiser of the settings, the adapter, and the rates.
        terms: numbers of an adapter to log beside the loss, which has no part of them.
        has_placeholders: whether it learns the first positions of every example.
        is_quantising: whether it quantises the base itself, with a view to the adapter.
        reads_inputs: whether its factors start from the inputs that the layers see on the training data.
        has_peft_form: whether the adapter can be taken to PEFT.
    """

    rules: Callable[[Config, Sequence[str]], Rules]
    targets: tuple[str, ...] = EVERY_LINEAR
    placement: str = ""
    size: str = "lora.rank"
    optimiser: Optimiser = optimiser.adamw
    terms: Callable[[lorax.Adapter], dict[str, jax.Array]] = lambda adapter: {}
    has_placeholders: bool = False
    is_quantising: bool = False
    reads_inputs: bool = False
    has_peft_form: bool = False


def _low_rank(method: type[lorax.Method], *others: str, **fixed: Any) -> Callable[[Config, Sequence[str]], Rules]:
    """Rules of a method with LoRA's settings; `others` are those that it has besides, `fixed` settings win."""
    names = ("rank", "alpha", "rank_stabilized", "dropout", "dtype", *others)

    def rules(config: Config, targets: Sequence[str]) -> Rules:
        return dict.fromkeys(targets, method(**{name: config.lora[name] for name in names} | fixed))

    return rules


def _adalora(config: Config, targets: Sequence[str]) -> Rules:
    shared = {name: config.lora[name] for name in ("rank", "alpha", "dropout", "dtype")}
    return dict.fromkeys(targets, lorax.AdaLoRA(**shared, target_rank=config.adalora.target_rank or None))


def _adalora_terms(adapter: lorax.Adapter) -> dict[str, jax.Array]:
    live = sum(ranks.sum() for ranks in lorax.optim.live_ranks(adapter).values())
    return {"orthogonality": lorax.optim.orthogonality(adapter), "live_triplets": live}


def _vera(config: Config, targets: Sequence[str]) -> Rules:
    settings = {"dropout": config.lora.dropout, "dtype": config.lora.dtype, "projection_seed": config.seed}
    return dict.fromkeys(targets, lorax.VeRA(rank=config.vera.rank, d_initial=config.vera.initial, **settings))


def _lokr(config: Config, targets: Sequence[str]) -> Rules:
    return _low_rank(lorax.LoKr, factor=config.lokr.factor)(config, targets)


def _ia3(config: Config, targets: Sequence[str]) -> Rules:
    on_inputs = dict.fromkeys(config.ia3.feedforward, lorax.IA3(on="input", dtype=config.lora.dtype))
    return on_inputs | {p: lorax.IA3(dtype=config.lora.dtype) for p in targets if p not in on_inputs}


def _full(config: Config, targets: Sequence[str]) -> Rules:
    return dict.fromkeys(targets, lorax.Full(dtype=config.lora.dtype))


def _bottleneck(config: Config, targets: Sequence[str]) -> Rules:
    return dict.fromkeys(targets, lorax.Bottleneck(dtype=config.lora.dtype, **config.bottleneck))


def _prompt(config: Config, targets: Sequence[str]) -> Rules:
    return dict.fromkeys(targets, lorax.Prompt(length=config.tuning.length, dtype=config.lora.dtype))


def _prefix(config: Config, targets: Sequence[str]) -> Rules:
    return dict.fromkeys(targets, lorax.Prefix(length=config.tuning.length, dtype=config.lora.dtype))


_LORA = _low_rank(lorax.LoRA, "initializer")

RECIPES: Mapping[str, Recipe] = {
    "lora": Recipe(rules=_LORA, has_peft_form=True),
    "rslora": Recipe(rules=_low_rank(lorax.LoRA, "initializer", rank_stabilized=True), has_peft_form=True),
    "lora_plus": Recipe(rules=_LORA, optimiser=optimiser.lora_plus, has_peft_form=True),
    "pissa": Recipe(rules=_low_rank(lorax.LoRA, initializer="pissa"), has_peft_form=True),
    "olora": Recipe(rules=_low_rank(lorax.LoRA, initializer="olora"), has_peft_form=True),
    "eva": Recipe(rules=_LORA, reads_inputs=True, has_peft_form=True),
    "loftq": Recipe(rules=_LORA, is_quantising=True, has_peft_form=True),
    "dora": Recipe(rules=_low_rank(lorax.DoRA, "initializer"), has_peft_form=True),
    "adalora": Recipe(rules=_adalora, optimiser=optimiser.adalora, terms=_adalora_terms, has_peft_form=True),
    "lorafa": Recipe(rules=_low_rank(lorax.LoRAFA, "initializer"), has_peft_form=True),
    "vera": Recipe(rules=_vera, size="vera.rank"),
    "loha": Recipe(rules=_low_rank(lorax.LoHa)),
    "lokr": Recipe(rules=_lokr),
    "ia3": Recipe(rules=_ia3, targets=KEY_VALUE, placement="ia3_output", size=""),
    "bitfit": Recipe(rules=_full, targets=(r".*/bias",), placement="bitfit", size=""),
    "norm": Recipe(rules=_full, targets=(r".*norm/scale",), placement="norm", size="", has_peft_form=True),
    "full": Recipe(rules=_full, targets=EVERYTHING, placement="full", size=""),
    "bottleneck": Recipe(rules=_bottleneck, targets=HOULSBY, placement="bottleneck_houlsby", size="bottleneck.rank"),
    "bottleneck_pfeiffer": Recipe(
        rules=_bottleneck, targets=PFEIFFER, placement="bottleneck_pfeiffer", size="bottleneck.rank"
    ),
    "prompt": Recipe(rules=_prompt, targets=EMBEDDING, placement="prompt", size="tuning.length", has_placeholders=True),
    "prefix": Recipe(rules=_prefix, targets=KEY_VALUE, placement="prefix", size="tuning.length", has_placeholders=True),
}


def find(config: Config) -> Recipe:
    """Return the recipe of `config.method`.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if config.method not in RECIPES:
        (nearest,) = difflib.get_close_matches(config.method, RECIPES, n=1, cutoff=0)
        raise ValueError(
            f"config.method = {config.method!r}: unknown, the nearest is {nearest}; there are {', '.join(RECIPES)}"
        )
    return RECIPES[config.method]


def spec(config: Config) -> lorax.Spec:
    """Return which leaves are adapted how.

    Raises:
        ValueError: a setting is not one that the method takes.
    """
    recipe = find(config)
    return lorax.Spec(recipe.rules(config, tuple(config.lora.targets) or recipe.targets))


def formats(config: Config) -> dict[str, lorax.quant.Format]:
    """Return how the base's linear layers are stored, `{pattern: format}`; not embedding, norms and head."""
    return quantized_as(EVERY_LINEAR, config.model.quantize, is_double=config.model.double_quantization)


def quantized_as(patterns: Sequence[str], name: str, *, is_double: bool = True) -> dict[str, lorax.quant.Format]:
    """Return `{pattern: format}` for the format's name in the settings; nothing for `none`."""
    made: dict[str, Callable[[], lorax.quant.Format]] = {
        "nf4": lambda: lorax.NF4(double=is_double),
        "fp4": lambda: lorax.FP4(double=is_double),
        "int8": lorax.Int8,
        "int4": lorax.Int4,
    }
    return {} if name == "none" else dict.fromkeys(patterns, made[name]())


def placeholders(config: Config, vocab_size: int) -> list[int]:
    """Return the tokens in front of every example: rows of the vocabulary drawn by the seed, or none."""
    if not find(config).has_placeholders:
        return []
    return [int(token) for token in shuffled(vocab_size, config.seed, 0)[: config.tuning.length]]


def check(config: Config) -> None:
    """Check the settings of the method before any work.

    Raises:
        ValueError: there is no such method, or its settings, or those of data and model, do not fit it.
    """
    recipe = find(config)
    spec(config)
    if recipe.has_placeholders and config.data.batching != "bucketed":
        raise ValueError(
            f"config.data.batching = {config.data.batching!r}: expected bucketed, because config.method = "
            f"{config.method} learns the first positions of a row, so that every example needs a row of its own"
        )
    if recipe.is_quantising and config.model.quantize == "none":
        raise ValueError(
            f"config.model.quantize = 'none': expected a format such as nf4, because config.method = {config.method} "
            "makes up for the error of a quantised base"
        )
