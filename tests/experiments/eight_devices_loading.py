"""Models loaded onto a mesh, leaf by leaf: `python -m tests.experiments.eight_devices_loading`, on eight devices.

With `PORT PROCESS` behind it, it is one of two processes with a few devices each. Prints a line for each check.
"""

import contextlib
import pathlib
import sys
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

import lorax
from experiments import models
from experiments.models import partition, placed, weights
from lorax.quant import NF4

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FORMATS = {"layers/.*kernel": NF4(block=8, double=True)}


def mesh(**sizes: int) -> Mesh:
    shape = [sizes.get(name, 1) for name in partition.AXES]
    return jax.make_mesh(shape, partition.AXES, axis_types=(AxisType.Auto,) * len(shape))


def own_parts(x: jax.Array) -> list[tuple[Any, np.ndarray]]:
    return [(part.index, np.asarray(part.data)) for part in x.addressable_shards]


def check_same(params: Any, whole: Any, to: Mesh) -> None:
    """Every device has its part of the same values, where the rules say."""

    def same(x: jax.Array, want: jax.Array, sharding: Any) -> None:
        assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.sharding, sharding)
        assert (x.dtype, x.shape) == (want.dtype, want.shape)
        for index, part in own_parts(x):
            np.testing.assert_array_equal(part, np.asarray(want)[index])

    jax.tree.map(same, params, whole, partition.shardings(whole, to))


def check_directories() -> None:
    to = mesh(data=2, fsdp=2, tensor=2)
    for folder in sorted((GOLDEN / "decoders").iterdir()):
        if folder.is_dir():
            model = models.load(folder, mesh=to)
            check_same(model.params, models.load(folder).params, to)
            assert any(not x.is_fully_replicated for x in jax.tree.leaves(model.params))
            stored = np.load(folder / "logits.npz")
            with jax.set_mesh(to):
                logits = jax.jit(model.apply)(model.params, jnp.asarray(stored["tokens"]))
            np.testing.assert_allclose(logits, stored["logits"], atol=1e-4, err_msg=folder.name)
    for name in ("roberta_classifier", "vit_classifier", "clip"):
        check_same(*(models.load_encoder(GOLDEN / "encoders" / name, mesh=on).params for on in (to, None)), to)
    print("ok directories")


def check_quantised() -> None:
    to = mesh(fsdp=4, tensor=2)
    params, whole = (models.load(GOLDEN / "decoders" / "qwen3", formats=FORMATS, mesh=on).params for on in (to, None))
    check_same(params, whole, to)
    codes = params["layers"]["mlp"]["up"]["kernel"].codes
    assert not codes.is_fully_replicated
    print("ok quantised")


def check_flash() -> None:
    """Attention by a kernel that XLA does not split, on a mesh: each device its rows and heads."""
    to, folder = mesh(data=2, fsdp=2, tensor=2), GOLDEN / "decoders" / "gemma2"
    tokens = np.random.default_rng(0).integers(3, 64, (8, 20))
    segments = np.repeat([[1, 2]], 10, axis=1).repeat(8, axis=0)

    def loss_and_gradient(attention: str, on: Mesh | None) -> Any:
        model = models.load(folder, attention=attention, mesh=on)
        loss = lambda params: jnp.sum(jnp.sin(model.apply(params, tokens, segment_ids=segments)))
        sites = lorax.trace(loss, model.params)
        adapter = lorax.init(jax.random.key(0), lorax.Spec({".*kernel": lorax.LoRA(rank=2)}), sites, model.params)
        start = jax.tree.map(lambda x: x + 0.05, adapter.params)
        with jax.set_mesh(on) if on else contextlib.nullcontext():
            adapted = lambda params, base: lorax.adapt(loss)(base, adapter.replace(params=params))
            return jax.jit(jax.value_and_grad(adapted))(start, model.params)

    want, got = loss_and_gradient("plain", None), loss_and_gradient("flash", to)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3), got[1], want[1])
    print("ok flash")


class Counted(placed.PlacedArray):
    """Keeps how many bytes a process allocated for each array."""

    allocated: ClassVar[list[int]] = []

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.allocated.append(sum(part.nbytes for part in self._parts.values()))


def check_processes(port: str, process: int) -> None:
    """A host holds, of a leaf, what its devices hold."""
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    to, folder = mesh(fsdp=2, tensor=jax.device_count() // 2), GOLDEN / "peft" / "base"
    whole = models.load(folder).params  # on the first device of this process
    weights.PlacedArray = Counted
    check_same(models.load(folder, mesh=to).params, whole, to)
    leaves, _ = jax.tree_util.tree_flatten_with_path(whole)
    sizes = [x.nbytes // (1 if "norm" in jax.tree_util.keystr(path) else 2) for path, x in leaves]
    assert sorted(Counted.allocated) == sorted(sizes), (Counted.allocated, sizes)
    quantised = [models.load(folder, formats=FORMATS, mesh=on).params for on in (to, None)]
    check_same(quantised[0], quantised[1], to)
    print("ok processes", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        check_processes(sys.argv[1], int(sys.argv[2]))
    else:
        check_directories()
        check_quantised()
        check_flash()
