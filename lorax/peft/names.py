"""Which module of a torch model each leaf of the parameters is: the table that an exchange needs.

`{leaf path: module path}`, such as `{"layers/attn/query/kernel": "model.layers.{layer}.self_attn.q_proj"}`. A field in
braces runs over a stacked axis of the leaf (fields in the order of the axes), or stands for a number in the leaf path:
`{"layers/{layer}/attn/query/kernel": "model.layers.{layer}.self_attn.q_proj"}` for layers that are not stacked.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
import string
from collections.abc import Iterable, Mapping
from typing import Any

from lorax import paths
from lorax.peft.layout import Layout
from lorax.sites import Site

_PARAMETERS = ("weight", "bias")  # a path that ends otherwise is a module, and its weight is meant
# What the parts of a decoder are called here and there: to guess a line of the table.
_ROLES = {
    "self_attn.q_proj": ("query", "q_proj", "wq", "q"),
    "self_attn.k_proj": ("key", "k_proj", "wk", "k"),
    "self_attn.v_proj": ("value", "v_proj", "wv", "v"),
    "self_attn.o_proj": ("out", "o_proj", "wo", "o"),
    "mlp.gate_proj": ("gate", "gate_proj", "w1"),
    "mlp.up_proj": ("up", "up_proj", "w3"),
    "mlp.down_proj": ("down", "down_proj", "w2"),
    "embed_tokens": ("embed", "embedder", "embedding", "wte", "embed_tokens"),
    "lm_head": ("head", "lm_head", "unembed", "output"),
}


@dataclasses.dataclass(frozen=True)
class Module:
    """A line of the table that says more than the module's path.

    Any object with these attributes will do; all but `module` may be missing.

    Attributes:
      module: the module's path, with fields in braces; `.bias` at its end names the module's bias.
      kind: `linear`, `embedding`, `conv`, `norm` (any vector), or `parameter`: a parameter without a module of its own,
        such as the weights of all experts, whose path is given in full. None: what the trace says.
      transposed: whether the other stack stores the weight as out × in, as `nn.Linear` does; False for GPT-2's
        `Conv1D` (PEFT's `fan_in_fan_out`). None: a linear layer does, and parameters of experts do.
      tied: the output layer that shares the table, of an embedding that also is one.
    """

    module: str
    kind: str | None = None
    transposed: bool | None = None
    tied: str = "lm_head"


Names = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Slot:
    """One parameter of the torch model and the slice of a leaf that it is."""

    module: str
    parameter: str
    path: str
    index: tuple[int, ...]


class Table:
    """The table worked out for one model: every named slice of every leaf.

    Attributes:
      layouts: how each named leaf is laid out there, by path.
      slots: `{(module, parameter): slot}`, in the table's order.
    """

    def __init__(self, names: Names, leaves: Mapping[str, Any], sites: Iterable[Site]) -> None:
        self.leaves = leaves
        self.sites = {site.path: site for site in sites}
        self.layouts: dict[str, Layout] = {}
        self.slots: dict[tuple[str, str], Slot] = {}
        self.by_path: dict[str, list[Slot]] = {}
        for pattern, entry in names.items():
            for path, bound in self._paths(pattern):
                self._add(path, entry if isinstance(entry, str) else getattr(entry, "module", None), entry, bound)

    def _paths(self, pattern: str) -> list[tuple[str, dict[str, str]]]:
        """Return the leaves that a line is about, with the values of the fields in its path."""
        if pattern in self.leaves:
            return [(pattern, {})]
        parts = list(string.Formatter().parse(pattern))
        if any(field for _, field, *_ in parts):
            regex = "".join(re.escape(text) + (rf"(?P<{field}>\d+)" if field else "") for text, field, *_ in parts)
            found = [(path, m.groupdict()) for path in self.leaves if (m := re.fullmatch(regex, path))]
            if found:
                return found
        near = ", ".join(paths.nearest(pattern, self.leaves))
        raise ValueError(f"names: the params have no leaf {pattern!r}. Nearest: {near}. Correct or remove that line")

    def _add(self, path: str, module: Any, entry: Any, bound: Mapping[str, str]) -> None:
        if not isinstance(module, str) or not module:
            raise ValueError(
                f"names[{path!r}] is {entry!r}; expected a module path such as "
                "'model.layers.{layer}.self_attn.q_proj', or a lorax.peft.Module"
            )
        fields = list(dict.fromkeys(f for _, f, *_ in string.Formatter().parse(module) if f and f not in bound))
        kind, transposed = getattr(entry, "kind", None), getattr(entry, "transposed", None)
        head, _, last = module.rpartition(".")
        named = kind == "parameter" or last in _PARAMETERS
        layout = Layout.of(
            path,
            tuple(self.leaves[path].shape),
            self.sites.get(path),
            fields=len(fields),
            kind="vector" if last == "bias" else kind,
            transposed=transposed,
            fan_in=getattr(entry, "fan_in", None),
            tied=getattr(entry, "tied", None) or "lm_head",
        )
        self.layouts[path] = layout
        for index in itertools.product(*(range(n) for n in layout.stack_shape)):
            values = {**bound, **dict(zip(fields, map(str, index), strict=True))}
            owner = (head if named else module).format(**values)
            slot = Slot(owner, (last if named else "weight").format(**values), path, index)
            other = self.slots.setdefault((slot.module, slot.parameter), slot)
            if other is not slot:
                raise ValueError(f"names: {other.path} and {path} are both {owner}.{slot.parameter}; correct one line")
            self.by_path.setdefault(path, []).append(slot)

    @property
    def modules(self) -> dict[str, None]:
        """All modules that the table knows: those of the leaves, those that share a tied table, and their parents."""
        own = dict.fromkeys(slot.module for slot in self.slots.values())
        tied = dict.fromkeys(layout.tied for layout in self.layouts.values() if layout.tied)
        parents = {}
        for module in (*own, *tied):
            parts = module.split(".")
            parents |= dict.fromkeys(".".join(parts[:n]) for n in range(1, len(parts)))
        return {**own, **tied, **parents}

    def targets(self) -> dict[str, Slot]:
        """Return the modules that may have factors, with the slot of their weight."""
        return {
            module: slot
            for (module, parameter), slot in self.slots.items()
            if parameter == "weight" and self.layouts[slot.path].kind in ("linear", "embedding", "conv")
        }

    def parameters(self) -> dict[str, Slot]:
        """Return the parameters without a module of their own, by their full path."""
        return {
            f"{slot.module}.{slot.parameter}": slot
            for slot in self.slots.values()
            if self.layouts[slot.path].kind == "parameter"
        }

    def parts(self, module: str) -> list[Slot]:
        """Return the parameters of a module."""
        return [slot for slot in self.slots.values() if slot.module == module]

    @property
    def is_complete(self) -> bool:
        """Whether every leaf is named that could have factors: none is unknown that a short name might match."""
        return all(path in self.layouts for path, leaf in self.leaves.items() if len(leaf.shape) > 1)

    @property
    def names_all(self) -> bool:
        """Whether every leaf is named."""
        return all(path in self.layouts for path in self.leaves)

    def suggest_module(self, path: str) -> str:
        """Return the line of the table that a leaf seems to lack."""
        site = self.sites.get(path)
        stacked = bool(site and site.stack) or any(
            len(layout.stack) for other, layout in self.layouts.items() if other.split("/")[0] == path.split("/")[0]
        )
        words = path.split("/")
        bias = words[-1] == "bias"
        if len(words) > 1 and words[-1] in ("kernel", "embedding", "scale", "weight", "w", "bias"):
            words = words[:-1]
        known = [slot.module for slots in self.by_path.values() for slot in slots[:1]]
        role = next((r for r, same in _ROLES.items() if words and words[-1] in same), None)
        head = [words[0]] if len(words) > 1 else []
        number = next((w for w in words if w.isdigit()), "{layer}" if stacked else None)
        if role in ("lm_head", "embed_tokens"):
            module = role if role == "lm_head" else f"model.{role}"
        elif role and number is not None:
            layers = next((m for k in known if (m := re.match(r"(.*?\.?[a-z_]+)\.\d+\.", k))), None)
            module = f"{layers[1] if layers else 'model.layers'}.{number}.{role}"
        else:
            rest = [w for w in words if not w.isdigit()]
            middle = [number] if number is not None else []
            module = ".".join([*head, *middle, *rest[len(head) :]]) or "module.path"
        return f"{path!r}: {module + ('.bias' if bias else '')!r}"

    def suggest_path(self, module: str) -> str:
        """Return the line of the table that a module of a directory seems to lack."""
        free = [p for p in self.leaves if p not in self.layouts]
        last = module.rpartition(".")[2]
        same = next((s for r, s in _ROLES.items() if r.rpartition(".")[2] == last), (last,))
        by_role = [p for p in free if set(p.split("/")) & set(same)]
        near = by_role or difflib.get_close_matches(module.replace(".", "/"), free, n=1, cutoff=0.0)
        path = near[0] if near else "path/of/the/leaf"
        digits = [w for w in path.split("/") if w.isdigit()]
        template = module if digits else re.sub(r"(?<=\.)\d+(?=\.|$)", "{layer}", module, count=1)
        return f"{path!r}: {template!r}"


def llama_names(
    *,
    embed: str = "embed/embedding",
    layers: str = "layers",
    query: str = "attn/query/kernel",
    key: str = "attn/key/kernel",
    value: str = "attn/value/kernel",
    out: str = "attn/out/kernel",
    gate: str = "mlp/gate/kernel",
    up: str = "mlp/up/kernel",
    down: str = "mlp/down/kernel",
    attention_norm: str = "attn_norm/scale",
    mlp_norm: str = "mlp_norm/scale",
    final_norm: str = "final_norm/scale",
    head: str | None = "head/kernel",
    prefix: str = "model.",
) -> dict[str, Module]:
    """Return the table of a decoder of the Llama family (Llama, Mistral, Qwen, SmolLM, …).

    Args:
      embed: leaf path of the token table.
      layers: path of the layers: of their stack, or `"layers/{layer}"` where every layer has leaves of its own.
      query: path within a layer, as are the following.
      key: likewise.
      value: likewise.
      out: likewise.
      gate: likewise.
      up: likewise.
      down: likewise.
      attention_norm: likewise.
      mlp_norm: likewise.
      final_norm: leaf path of the last norm's scale.
      head: leaf path of the output layer; None where the token table is the output layer too.
      prefix: what precedes `layers` in the torch model.

    >>> llama_names(layers="blocks/{layer}", query="q/w")["blocks/{layer}/q/w"].module
    'model.layers.{layer}.self_attn.q_proj'
    """
    inside = {
        query: "self_attn.q_proj",
        key: "self_attn.k_proj",
        value: "self_attn.v_proj",
        out: "self_attn.o_proj",
        gate: "mlp.gate_proj",
        up: "mlp.up_proj",
        down: "mlp.down_proj",
    }
    norms = {attention_norm: "input_layernorm", mlp_norm: "post_attention_layernorm"}
    block = prefix + "layers.{layer}."
    return {
        embed: Module(prefix + "embed_tokens", "embedding"),
        **{f"{layers}/{path}": Module(block + module, "linear") for path, module in inside.items()},
        **{f"{layers}/{path}": Module(block + module, "norm") for path, module in norms.items()},
        final_norm: Module(prefix + "norm", "norm"),
        **({} if head is None else {head: Module("lm_head", "linear")}),
    }
