"""What an `adapter_config.json` says, and what in one cannot be honoured.

PEFT ignores keys it does not know. Here every key has to be understood: it is read, or has no effect on a trained
adapter, or stands at a value that means nothing; any other is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

PEFT_TYPES = ("LORA", "ADALORA")
BIASES = ("none", "all", "lora_only")

# Keys that say where an adapter comes from or how it was trained, and nothing about what it computes.
_IGNORED = frozenset({"auto_mapping", "eva_config", "inference_mode", "megatron_core", "peft_version"}) | frozenset(
    {"qalora_group_size", "runtime_config"}
)
# Keys that change what an adapter computes or how it is stored, with the reason why that is not read.
_UNSUPPORTED = {
    "alora_invocation_tokens": "activated LoRA switches on at a token",
    "arrow_config": "Arrow routes between adapters",
    "corda_config": "CorDA changes the base",
    "kasa_config": "KaSA changes the base",
    "layer_replication": "layers are replicated",
    "loftq_config": "LoftQ changes the base",
    "lora_ga_config": "LoRA-GA changes the base",
    "megatron_config": "layers are Megatron's",
    "monteclora_config": "MonteCLoRA samples its factors",
    "use_bdlora": "factors are block-diagonal",
    "use_qalora": "inputs are pooled in groups",
    "velora_config": "VeLoRA has a backward pass of its own",
    "enable_lora": "parts of fused weights are left out",
    "merge_weights": "weights were merged when the adapter was saved",
}
# PEFT changes the base by these again when it loads the directory; what `START` names is computed here too.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
START = ("pissa", "olora")
_ADALORA = {"target_r": 8, "init_r": 12, "tinit": 0, "tfinal": 0, "deltaT": 1, "beta1": 0.85, "beta2": 0.85}
SCHEDULE = (*_ADALORA, "orth_reg_weight", "total_step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The keys of a directory's config that say what the adapter computes; names and defaults are PEFT's."""

    peft_type: str
    r: int = 8
    lora_alpha: float = 8
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, Any] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    bias: str = "none"
    lora_bias: bool = False
    use_dora: bool = False
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    ensure_weight_tying: bool = False
    init_lora_weights: Any = True
    lora_dropout: float = 0.0
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    init_r: int = 12
    schedule: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def start(self) -> str | None:
        """How the factors started, where PEFT takes their start off the base: `pissa`, `olora` or None."""
        init = str(self.init_lora_weights).lower()
        return init if init in START else None

    @property
    def is_adalora(self) -> bool:
        """Whether the adapter is AdaLoRA's."""
        return self.peft_type == "ADALORA"


def parse(document: Mapping[str, Any]) -> tuple[Config | None, list[str]]:
    """Return what a config says, and what is wrong with it.

    Args:
      document: the JSON document.

    Returns:
      The config (None where it cannot be told what it says) and a list of complaints.

    >>> parse({"peft_type": "LORA", "r": 4, "use_qalora": True})[1]
    ['use_qalora=True: inputs are pooled in groups']
    >>> parse({"peft_type": "LORA", "r": 4, "sharpness": 3})[1]
    ["sharpness=3 is not known and may change the adapter's meaning"]
    """
    kind = document.get("peft_type")
    if kind not in PEFT_TYPES:
        return None, [f"peft_type={kind!r}: lorax reads {' and '.join(PEFT_TYPES)}"]
    problems = []
    fields = {f.name: f for f in dataclasses.fields(Config) if f.name != "schedule"}
    for key, value in document.items():
        if key in fields or key in _IGNORED or (kind == "ADALORA" and key in SCHEDULE):
            continue
        if key in _UNSUPPORTED:
            if value not in (None, False, {}, []):
                problems.append(f"{key}={value!r}: {_UNSUPPORTED[key]}")
        elif value is not None:
            problems.append(f"{key}={value!r} is not known and may change the adapter's meaning")
    given = {key: document[key] for key in fields if document.get(key) is not None}
    problems += [f"{key}=None, expected a number" for key in _NUMBERS if document.get(key, 0) is None]
    problems += _ill_typed(given)
    init = str(given.get("init_lora_weights", True)).lower()
    if init.startswith(_CHANGES_BASE) and (init not in START or kind == "ADALORA"):
        problems.append(
            f"init_lora_weights={init!r}: PEFT changes the base again when it loads this. Save it as plain LoRA, with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if problems:
        return None, problems
    config = Config(**given, schedule={k: document[k] for k in SCHEDULE if k in document} if kind == "ADALORA" else {})
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        problems.append("layers_to_transform works with a list of target_modules only")
    if config.layers_pattern and config.layers_to_transform is None:
        problems.append("layers_pattern needs layers_to_transform")
    if config.use_dora and config.lora_bias:
        problems.append("lora_bias with use_dora: PEFT adds the bias to the update before it takes the norm")
    if config.is_adalora and (config.use_dora or config.target_parameters or config.lora_bias):
        problems.append("AdaLoRA has neither DoRA, nor a bias on B, nor target_parameters")
    return config, problems


_TYPES: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "init_r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "target_modules": (str, list),
    "exclude_modules": (str, list),
    "layers_to_transform": (int, list),
    "layers_pattern": (str, list),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "target_parameters": (list,),
    "modules_to_save": (list,),
    "trainable_token_indices": (list, dict),
    "lora_bias": (bool,),
    "use_dora": (bool,),
    "use_rslora": (bool,),
    "fan_in_fan_out": (bool,),
    "ensure_weight_tying": (bool,),
}

_NUMBERS = ("r", "lora_alpha", "init_r", "lora_dropout")


def _items(pattern: Any) -> list[tuple[str, Any]]:
    return list(pattern.items()) if isinstance(pattern, dict) else []


def _ill_typed(given: Mapping[str, Any]) -> list[str]:
    problems = []
    for key, kinds in _TYPES.items():
        value = given.get(key)
        if value is None:
            continue
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(k.__name__ for k in kinds)
            problems.append(f"{key}={value!r} is a {type(value).__name__}, expected {wanted}")
        elif key in ("r", "init_r") and value < 1:
            problems.append(f"{key}={value}: a rank is at least 1")
    is_number = lambda x, *kinds: isinstance(x, kinds) and not isinstance(x, bool)
    if given["peft_type"] == "LORA":
        problems += [
            f"rank_pattern[{name!r}]={rank!r}, expected a whole number of at least 1"
            for name, rank in _items(given.get("rank_pattern"))
            if not is_number(rank, int) or rank < 1
        ]
    problems += [
        f"alpha_pattern[{name!r}]={alpha!r}, expected a number"
        for name, alpha in _items(given.get("alpha_pattern"))
        if not is_number(alpha, int, float)
    ]
    if given.get("bias", "none") not in BIASES:
        problems.append(f"bias={given['bias']!r}, expected one of {', '.join(BIASES)}")
    return problems
