"""The models of the golden PEFT directories: a decoder, one with a tied head, and a small bag of layers."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorax
from experiments import models
from lorax import peft
from tests.agreement import run

GOLDEN = pathlib.Path(__file__).parent / "golden"
PEFT_TOL = 1e-4  # float32 logits of two frameworks
TOY_CASES = ("bias", "conv", "experts", "toy")


@dataclasses.dataclass(frozen=True, eq=False)
class Base:
    """A function, its params, an input, its sites and the names of its modules."""

    fn: Callable[..., Any]
    params: Any
    x: Any
    sites: Any
    names: dict[str, Any]

    def __call__(self, adapter: Any) -> np.ndarray:
        """The output with an adapter."""
        return np.asarray(run(lorax.adapt(self.fn), self.params, adapter, self.x))

    def load(self, directory: Any) -> Any:
        """An adapter from a directory."""
        return peft.load(directory, self.params, self.sites, names=self.names)

    def save(self, directory: Any, adapter: Any, **kwargs: Any) -> None:
        """An adapter into a directory."""
        peft.save(directory, adapter, self.params, names=self.names, **kwargs)

    def init(self, spec: dict[str, Any], seed: int = 0, scale: float = 0.2) -> Any:
        """A new adapter with random numbers added to all that is trained."""
        adapter = lorax.init(jax.random.key(seed), lorax.Spec(spec), self.sites, self.params)
        rng = np.random.default_rng(seed)
        add = lambda x: x + jnp.asarray(scale * rng.normal(size=x.shape), x.dtype) if x.ndim else x + 1
        return adapter.replace(params=jax.tree.map(add, adapter.params))


def base_of(case: str) -> Base:
    """The base that a case of `golden/peft_more` was made on."""
    return tied() if case.startswith("tied") else toy() if case.startswith(TOY_CASES) else decoder()


def _decoder(directory: pathlib.Path, inputs: pathlib.Path) -> Base:
    model = models.load(directory)
    tokens = jnp.asarray(np.load(inputs)["input_ids"])
    return Base(model.apply, model.params, tokens, lorax.trace(model.apply, model.params, tokens), model.peft_names)


@functools.cache
def decoder() -> Base:
    """The scanned Llama of `golden/peft`."""
    return _decoder(GOLDEN / "peft/base", GOLDEN / "peft/inputs.npz")


@functools.cache
def tied() -> Base:
    """A scanned Llama whose token table is its head."""
    return _decoder(GOLDEN / "peft_more/tied_base", GOLDEN / "peft_more/tied_inputs.npz")


TOY_NAMES = {
    "embed": "embed",
    "conv1/kernel": "conv1",
    "conv1/bias": "conv1.bias",
    "conv2/kernel": "conv2",
    "conv2/bias": "conv2.bias",
    "norm/scale": "norm",
    "norm/bias": "norm.bias",
    "experts/up": peft.Module("experts.up", kind="parameter"),
    "experts/down": peft.Module("experts.down", kind="parameter"),
    "blocks/up/kernel": "blocks.{layer}.0",
    "blocks/up/bias": "blocks.{layer}.0.bias",
    "blocks/down/kernel": "blocks.{layer}.2",
    "blocks/down/bias": "blocks.{layer}.2.bias",
    "head/kernel": "head",
    "head/bias": "head.bias",
}


@functools.cache
def toy() -> Base:
    """The bag of layers, its blocks stacked for a scan, its convolutions channels-last."""
    z = np.load(GOLDEN / "peft_more/toy.npz")
    get = lambda name, *order: jnp.asarray(z[name].transpose(*order) if order else z[name])
    stack = lambda name, *order: jnp.stack([get(f"blocks.{i}.{name}", *order) for i in range(2)])
    params = {
        "embed": get("embed.weight"),
        "conv1": {"kernel": get("conv1.weight", 2, 1, 0), "bias": get("conv1.bias")},
        "conv2": {"kernel": get("conv2.weight", 2, 3, 1, 0), "bias": get("conv2.bias")},
        "norm": {"scale": get("norm.weight"), "bias": get("norm.bias")},
        "experts": {"up": get("experts.up", 0, 2, 1), "down": get("experts.down", 0, 2, 1)},
        "blocks": {
            "up": {"kernel": stack("0.weight", 1, 0), "bias": stack("0.bias")},
            "down": {"kernel": stack("2.weight", 1, 0), "bias": stack("2.bias")},
        },
        "head": {"kernel": get("head.weight", 1, 0), "bias": get("head.bias")},
    }
    tokens = jnp.asarray(z["tokens"])
    np.testing.assert_allclose(run(_toy, params, tokens), z["base"], atol=1e-5)
    return Base(_toy, params, tokens, lorax.trace(_toy, params, tokens), TOY_NAMES)


def _toy(p: Any, tokens: jax.Array) -> jax.Array:
    def conv(x: jax.Array, layer: Any, padding: Any, dims: tuple[str, str, str]) -> jax.Array:
        y = jax.lax.conv_general_dilated(x, layer["kernel"], (1,) * len(padding), padding, dimension_numbers=dims)
        return jnp.tanh(y + layer["bias"])

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        h = jnp.tanh(x @ layer["up"]["kernel"] + layer["up"]["bias"])
        return x + h @ layer["down"]["kernel"] + layer["down"]["bias"], None

    x = jnp.take(p["embed"], tokens, axis=0)
    c = conv(x, p["conv1"], [(1, 1)], ("NWC", "WIO", "NWC"))
    c = conv(c[:, None], p["conv2"], [(0, 0), (1, 1)], ("NHWC", "HWIO", "NHWC"))[:, 0]
    x = x.mean(1)
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * p["norm"]["scale"] + p["norm"]["bias"]
    h = jnp.tanh(jnp.einsum("ebi,eio->ebo", jnp.broadcast_to(x, (4, *x.shape)), p["experts"]["up"]))
    x = x + jnp.einsum("ebi,eio->ebo", h, p["experts"]["down"]).sum(0)
    x, _ = jax.lax.scan(block, x, p["blocks"])
    return jnp.concatenate([x, c.mean(1)], -1) @ p["head"]["kernel"] + p["head"]["bias"]


def config_of(directory: Any) -> dict[str, Any]:
    """A directory's config."""
    return json.loads((pathlib.Path(directory) / "adapter_config.json").read_text())


def tensors_of(directory: Any) -> dict[str, np.ndarray]:
    """A directory's tensors."""
    return peft.tensors.read(pathlib.Path(directory) / "adapter_model.safetensors")


def write(directory: pathlib.Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> pathlib.Path:
    """A directory made by hand."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "adapter_model.safetensors").write_bytes(peft.tensors.encode(tensors))
    return directory
