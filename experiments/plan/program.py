"""The training step of a run, compiled for some devices from shapes alone, and what it takes there."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Var
from jax.sharding import Mesh
from ml_collections import config_dict

import lorax
from experiments import models
from experiments.models.llama import LlamaConfig
from experiments.plan import chips, hlo
from experiments.training import devices, recipes, settings, step, update

# What the TPU's compiler says where a program does not fit: what it takes, and what there is.
_TOO_LARGE = re.compile(
    r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"
    r"|HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a step takes of each device; all sizes in bytes.

    Args:
        devices: how many there are.
        kind: what they are.
        base, adapter, moments, batch: what is held between steps, and the batch.
        activations: what the forward pass keeps for the backward pass, at most: that of the rows of a device.
        temporaries: all that a step needs beside what it is given, activations included.
        peak: what is held at most while a step runs.
        costs: products, bytes moved and collectives; none where the step did not compile, being too large.
        limit: memory of a device, where that is known.
    """

    devices: int
    kind: str
    base: float
    adapter: float
    moments: float
    batch: float
    activations: float
    temporaries: float
    peak: float
    costs: hlo.Costs | None
    limit: float | None

    @property
    def fits(self) -> bool | None:
        """Whether the step fits; None where the memory is not known."""
        if self.costs is None:
            return False
        return None if self.limit is None else self.peak <= self.limit

    @property
    def seconds(self) -> dict[str, float] | None:
        """Times that no step can be faster than: of products, of main memory, of the network. None: unknown chip."""
        chip = chips.CHIPS.get(self.kind)
        if chip is None or self.costs is None:
            return None
        return {
            "products": self.costs.flops / chip.flops,
            "memory": self.costs.bytes / chip.bandwidth,
            "network": self.costs.wire_bytes / chip.network,
        }


def plan(
    config: config_dict.ConfigDict,
    on: Sequence[jax.Device],
    *,
    shape: LlamaConfig | None = None,
    answers: int | None = None,
    limit: float | None = None,
) -> Plan:
    """Compiles the training step of a run and says what it takes.

    Args:
        config: settings of `experiments.finetune`, of which the model's weights and the data are not read.
        on: the devices, of `topology.devices`.
        shape: the model, if not that of `config.model.source`.
        answers: loss positions of a row; none: every token bears loss, which is the most there can be.
        limit: memory of a device in bytes; none: that of `chips.CHIPS`.

    Raises:
        ValueError: for settings that cannot be.
    """
    settings.check(config)
    recipes.check(config)
    mesh = devices.mesh(config.mesh, on)
    program = Program(config, mesh, shape, answers)
    chip = chips.CHIPS.get(on[0].device_kind)
    limit = limit if limit is not None else chip and chip.memory
    parts = {name: _bytes_each(tree) for name, tree in program.roles().items()}
    about = {"devices": len(on), "kind": on[0].device_kind, "activations": program.activations(), "limit": limit}
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        found = _TOO_LARGE.search(str(error))
        if found is None:
            raise
        size, unit, of, of_unit = (group for group in found.groups() if group is not None)
        peak, limit = float(size) * _UNITS[unit], float(of) * _UNITS[of_unit]
        return Plan(**parts, **{**about, "limit": limit}, temporaries=peak - sum(parts.values()), peak=peak, costs=None)
    memory: Any = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporaries = memory.temp_size_in_bytes
    costs = hlo.costs(compiled.as_text())
    return Plan(**parts, **about, temporaries=temporaries, peak=held + temporaries, costs=costs)


class Program:
    """The step and the shapes of what it is given, which lie on a mesh.

    Args:
        config: the settings.
        mesh: over the devices to compile for.
        shape: the model, if not that of `config.model.source`.
        answers: loss positions of a row; none: all.
    """

    def __init__(
        self, config: config_dict.ConfigDict, mesh: Mesh, shape: LlamaConfig | None = None, answers: int | None = None
    ):
        """Trace the step."""
        self.mesh, self.config = mesh, config
        how = {
            "dtype": jnp.dtype(config.model.dtype),
            "remat": None if config.model.remat == "none" else config.model.remat,
            "attention": config.model.attention,
        }
        if shape is None:
            shape = models.read_config(config.model.source, **how)
        model = models.abstract(dataclasses.replace(shape, **how), formats=recipes.formats(config), mesh=mesh)
        self.params = model.params
        loss = step.summed_loss(model, config.train.loss_chunk)
        self.parts = self._parts(answers)
        first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self.parts)
        spec = recipes.spec(config)
        with jax.set_mesh(mesh):
            sites = lorax.trace(loss, self.params, first)
            make = lambda params: lorax.init(jax.random.key(0), spec, sites, params)
            adapter = jax.eval_shape(make, self.params)
            self.update = update.build(config, self.params, adapter, loss, mesh)
            opt_state = jax.eval_shape(self.update.transformation.init, adapter.params)
        halted = jax.ShapeDtypeStruct((), jnp.bool_)
        state = step.TrainState(adapter, opt_state, halted)
        place = lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to)
        self.state = jax.tree.map(place, state, self.update.places)
        self._loss, self._first = loss, first

    def roles(self) -> dict[str, Any]:
        """What the step is given, by what it is."""
        return {
            "base": self.params,
            "adapter": self.state.adapter,
            "moments": self.state.opt_state,
            "batch": self.parts,
        }

    def lower(self) -> Any:
        """Lower the step, as `experiments.finetune` runs it."""
        rng = None
        if self.config.lora.dropout:
            key = jax.eval_shape(lambda: jax.random.key(0))
            rng = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=devices.replicated(self.mesh))
        with jax.set_mesh(self.mesh):
            return self.update.step.lower(self.params, self.state, self.parts, rng)

    def activations(self) -> float:
        """Bytes of what the forward pass keeps, that it was not given, for the rows of a device."""
        adapted = lorax.adapt(self._loss)

        def kept(params: Any, adapter: lorax.Adapter, part: Any) -> Any:
            _, backward = jax.vjp(
                lambda trained: adapted(params, adapter.replace(params=trained), part), adapter.params
            )
            return jax.tree.leaves(backward)

        with jax.set_mesh(self.mesh):
            traced = jax.make_jaxpr(kept)(self.params, self.state.adapter, self._first).jaxpr
        given = {*map(id, traced.invars), *map(id, traced.constvars)}
        new: dict[int, Any] = {id(v): v.aval for v in traced.outvars if isinstance(v, Var) and id(v) not in given}
        ways = math.prod(self.mesh.shape[name] for name in ("data", "fsdp"))
        return sum(aval.size * aval.dtype.itemsize for aval in new.values() if aval.ndim) / ways

    def _parts(self, answers: int | None) -> dict[str, jax.ShapeDtypeStruct]:
        train, length = self.config.train, self.config.data.row_tokens
        rows, where = train.rows // train.accumulate, devices.parts_sharding(self.mesh)
        ways = math.prod(self.mesh.shape[name] for name in ("data", "fsdp"))
        if rows % ways:
            raise ValueError(
                f"config.train.rows / config.train.accumulate = {rows} rows do not divide over {ways} devices along "
                "data and fsdp; change these or config.mesh"
            )
        sizes = dict.fromkeys(("tokens", "positions", "segment_ids"), length)
        sizes |= dict.fromkeys(("loss_positions", "loss_targets", "loss_weights"), answers or length)
        of = lambda name: jnp.float32 if name == "loss_weights" else jnp.int32
        return {
            name: jax.ShapeDtypeStruct((train.accumulate, rows, size), of(name), sharding=where)
            for name, size in sizes.items()
        }


def _bytes_each(tree: Any) -> float:
    """Bytes of a tree of abstract arrays on each device."""
    part = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
    return sum(part(x) for x in jax.tree.leaves(tree))
