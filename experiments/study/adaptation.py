"""What the runs of a study adapt, how, and by which optimiser: from the values of a run's axes to lorax and optax."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import config_dict

import lorax
from experiments.study.problem import Patterns, Problem
from experiments.study.settings import alpha_at
from experiments.training import recipes
from experiments.training.optimiser import Rates
from experiments.training.recipes import RECIPES, Recipe

Config = config_dict.ConfigDict
Settings = Mapping[str, Any]  # a run's value on every axis; None where it means nothing to the method

STUDY_RECIPES: Mapping[str, Recipe] = {
    **{name: recipe for name, recipe in RECIPES.items() if not (recipe.is_quantising or recipe.reads_inputs)},
    "qlora": RECIPES["lora"],
    "head": Recipe(rules=lambda config, targets: {}, size=""),  # nothing but what the problem always trains
}
QUANTIZED = {"qlora": "nf4"}  # methods that say how the base is stored
_SECTIONS = ("lora", "adalora", "lora_plus", "vera", "lokr", "bottleneck", "ia3", "tuning", "train")
_PROBES = {"rank": (1000, 1001), "alpha": (1.0, 2.0), "initializer": ("uniform", "normal"), "dropout": (0.0, 0.5)}


def find(method: str) -> Recipe:
    """Return the recipe of a method.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if method not in STUDY_RECIPES:
        (nearest,) = difflib.get_close_matches(method, STUDY_RECIPES, n=1, cutoff=0)
        raise ValueError(
            f"config.axes.method: {method!r} is unknown to a study, the nearest is {nearest}; "
            f"there are {', '.join(STUDY_RECIPES)}"
        )
    return STUDY_RECIPES[method]


def patterns(given: Patterns) -> tuple[str, ...]:
    """Return one or several regular expressions as a tuple."""
    return (given,) if isinstance(given, str) else tuple(given)


@dataclasses.dataclass(frozen=True, eq=False)
class Base:
    """The frozen side of a program: the problem, with placeholders where a method learns them, and its parameters.

    Attributes:
        problem: what is trained; its `params` are not quantised.
        params: the frozen parameters on the device, quantised or not.
        sites: how the function uses them.
    """

    problem: Problem
    params: Any
    sites: lorax.Sites

    @functools.cached_property
    def forward(self) -> Callable[..., Any]:
        """The jitted function with an adapter, `(params, adapter, batch) -> outputs`, of None without one."""
        return jax.jit(lorax.adapt(self.problem.fn))


class Adaptations:
    """Makes the adapters and optimisers of a study's runs.

    Args:
        config: the resolved settings.
        problem: what the runs train on.
    """

    def __init__(self, config: Config, problem: Problem):
        self.config, self.problem = config, problem
        self._sections = {name: config[name].to_dict() for name in _SECTIONS}
        self._targets: dict[str, Patterns] = {**problem.targets, **config.targets.to_dict()}
        self._params = jax.device_put(problem.params)
        self._bases: dict[tuple[str, int], Base] = {}
        self._makers: dict[Any, Callable[..., lorax.Adapter]] = {}
        self.axes_used = functools.cache(self._axes_used)

    def is_always_trained(self, path: str) -> bool:
        """Return whether a leaf is trained in every run, whatever the method."""
        return any(re.fullmatch(pattern, path) for pattern in self.problem.always)

    def _axes_used(self, method: str) -> frozenset[str]:
        """Return which of the axes that describe an adapter mean anything to a method: they change its rules."""
        recipe, used = find(method), set()
        for axis, values in _PROBES.items():
            rules = [recipe.rules(self._config({"method": method, axis: value}), ("x",)) for value in values]
            used |= {axis} if rules[0] != rules[1] else set()
        rules = recipe.rules(self._config({"method": method}), ("x",))
        return frozenset(used | ({"targets"} if rules and not recipe.placement else set()))

    def size(self, method: str) -> int | None:
        """Return how large a method is by the settings beside the axes: a bottleneck's width, a prompt's length."""
        section, _, name = find(method).size.rpartition(".")
        return self._sections[section][name] if section else None

    def spec(self, settings: Settings) -> lorax.Spec:
        """Return which leaves a run adapts how, and what it trains besides.

        Raises:
            ValueError: the problem has no such targets, or no place for the method.
        """
        return lorax.Spec([*self.problem.always.items(), *self.rules(settings).items()])

    def rules(self, settings: Settings) -> recipes.Rules:
        """Return the same without what the problem trains in every run.

        Raises:
            ValueError: as `spec`.
        """
        recipe = find(settings["method"])
        targets = self._placement(recipe.placement) if recipe.placement else self._named(settings)
        return recipe.rules(self._config(settings), targets)

    def placeholders(self, settings: Settings) -> int:
        """Return how many positions in front of every example a run learns."""
        return self._config(settings).tuning.length if find(settings["method"]).has_placeholders else 0

    def base(self, settings: Settings) -> Base:
        """Return the frozen side of a run, made once for all runs that share it.

        Raises:
            ValueError: the problem has no placeholders, or none of its leaves can be quantised.
        """
        key = settings["quantize"], self.placeholders(settings)
        if key not in self._bases:
            self._bases[key] = self._make_base(*key)
        return self._bases[key]

    def adapter(self, settings: Settings) -> lorax.Adapter:
        """Return a run's adapter as it starts.

        Raises:
            ValueError: a pattern selects no leaf that the method can adapt.
        """
        return self._maker(settings)(self.keys(settings["seed"])[0], self.base(settings).params)

    def abstract(self, settings: Settings) -> lorax.Adapter:
        """Return the shapes of a run's adapter.

        Raises:
            ValueError: as `adapter`.
        """
        return jax.eval_shape(self._maker(settings), self.keys(settings["seed"])[0], self.base(settings).params)

    def _maker(self, settings: Settings) -> Callable[..., lorax.Adapter]:
        spec, base = self.spec(settings), self.base(settings)
        key = spec, id(base)
        if key not in self._makers:
            self._makers[key] = jax.jit(functools.partial(_fresh, spec, base))  # one program, not one an array
        return self._makers[key]

    @staticmethod
    def keys(seed: int) -> jax.Array:
        """Return the keys of a run: of its adapter, and of its dropout."""
        return jax.random.split(jax.random.key(seed))

    def optimiser(self, settings: Settings) -> Callable[..., optax.GradientTransformation]:
        """Return `(adapter, learning_rate, weight_decay) -> optimiser`, for `lorax.optim.stacked` or a single run."""
        config, recipe = self._config(settings), find(settings["method"])
        shape = schedule(config)

        def make(adapter: lorax.Adapter, learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
            return recipe.optimiser(config, adapter, Rates(lambda step: learning_rate * shape(step), weight_decay))

        return make

    def program(self, settings: Settings) -> tuple[Any, ...]:
        """Return what has to be equal in runs that one program trains, besides what a stack allows."""
        optimiser = find(settings["method"]).optimiser.__name__
        return optimiser, settings["quantize"], self.placeholders(settings), settings["steps"]

    def _config(self, settings: Settings) -> Config:
        """Return the sections that a recipe reads, with a run's values in them."""
        sections = {name: dict(section) for name, section in self._sections.items()}
        rank, alpha = settings.get("rank") or 1, settings.get("alpha")
        sections["lora"] |= {"rank": rank, "alpha": 1.0 if alpha is None else alpha_at(alpha, rank)}
        for axis, otherwise in (("dropout", 0.0), ("initializer", "uniform")):
            value = settings.get(axis)
            sections["lora"][axis] = otherwise if value is None else value
        section, _, name = find(settings["method"]).size.rpartition(".")
        if section and settings.get("rank"):
            sections[section][name] = settings["rank"]
        sections["ia3"]["feedforward"] = patterns(self.problem.placements.get("ia3_input", ()))
        sections["train"]["steps"] = settings.get("steps") or 1
        return Config(sections | {"seed": settings.get("seed", 0)}, type_safe=False)

    def _named(self, settings: Settings) -> tuple[str, ...]:
        name = settings["targets"]
        if name is None:
            return ()
        if name not in self._targets:
            (nearest,) = difflib.get_close_matches(name, self._targets, n=1, cutoff=0) or ["none"]
            raise ValueError(
                f"config.axes.targets: {name!r} is no target of the problem {self.problem.name}; the nearest is "
                f"{nearest}, there are {', '.join(self._targets)}; config.targets takes your own, {{name: patterns}}"
            )
        return patterns(self._targets[name])

    def _placement(self, name: str) -> tuple[str, ...]:
        if name == "full":
            return patterns(self.problem.placements.get(name, recipes.EVERYTHING))
        if name not in self.problem.placements:
            raise ValueError(
                f"config.axes.method: the problem {self.problem.name} has no placement {name!r}, which says where "
                f"the method goes; it has {', '.join(self.problem.placements) or 'none'}"
            )
        return patterns(self.problem.placements[name])

    def _make_base(self, quantize: str, placeholders: int) -> Base:
        problem = self.problem
        if placeholders:
            if problem.with_placeholders is None:
                raise ValueError(
                    f"config.axes.method: the problem {problem.name} has no with_placeholders, which prompts and "
                    "prefixes need; leave these methods out"
                )
            problem = problem.with_placeholders(placeholders)
        batch = {name: array[:1] for name, array in problem.data["train"].items()}
        sites, params = lorax.trace(problem.fn, self._params, batch), self._params
        if quantize != "none":
            where = patterns(problem.quantizable) or patterns(self._targets.get("all", ()))
            if not where:
                raise ValueError(
                    f"config.axes.quantize = {quantize}: the problem {problem.name} names no leaves that can be "
                    'quantised; it has neither `quantizable` nor targets called "all"'
                )
            params = lorax.quantize(params, recipes.quantized_as(where, quantize), sites=sites)
        return Base(problem, params, sites)


def _fresh(spec: lorax.Spec, base: Base, key: jax.Array, params: Any) -> lorax.Adapter:
    adapter = lorax.init(key, spec, base.sites, params)
    if any(isinstance(method, lorax.Prefix) for method in adapter.methods.values()):
        first = {name: jnp.asarray(array[:1]) for name, array in base.problem.data["train"].items()}
        adapter = lorax.prefix_from(base.problem.fn, params, adapter, first)
    return adapter


def schedule(config: Config) -> Callable[[Any], Any]:
    """Return the learning rate over the updates done, as a part of its peak: up in a line, then down.

    The first update has a rate above zero already, and so has the last: in a short run every update counts.

    >>> train = {"steps": 10, "warmup": 0.2, "schedule": "linear"}
    >>> rate = schedule(Config({"train": train}))
    >>> [round(float(rate(step)), 3) for step in (0, 1, 2, 3, 9)]
    [0.333, 0.667, 1.0, 0.875, 0.125]
    """
    train = config.train
    steps, kind = train.steps, train.schedule
    warmup = round(train.warmup * steps)

    def at(step: Any) -> Any:
        left = jnp.clip((steps - step) / max(1, steps - warmup), 0, 1)
        falls = {"linear": left, "cosine": (1 - jnp.cos(jnp.pi * left)) / 2, "constant": jnp.ones_like(left)}
        return jnp.minimum((step + 1) / (warmup + 1), falls[kind])

    return at
