"""Where each parameter of the decoder lives in Hugging Face and GGUF checkpoints: one table.

The loaders read it to fill the parameters (`weights.fill_params`); an exchange of adapters reads the same rows
(`Model.peft_names`) to name a site's factors and to lay them out.
"""

import dataclasses
import math
import re

import numpy as np

from experiments.models.decoder_config import LlamaConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleName:
    """One row: a leaf of the parameters and the module it is in other stacks.

    Args:
        module: module path in Hugging Face models, whose weight is meant, or with `.bias` at its end, its bias;
            `{layer}` stands for the index on the leading axis.
        gguf: the same in GGUF files; none: those have no such leaf.
        kind: "linear" (stored there as out x in, so transposed), "conv" (out x in x height x width), "embedding" (rows
            x width), "norm", "bias" (a flat vector), or "parameter" (`module` is the tensor itself, which may have more
            axes in front, of size 1).
        fan_in: how many of the leaf's axes, after the layer axis, are fan-in; the rest are fan-out. Other
            stacks hold each group flattened.
        rotary: whether GGUF stores the output rows interleaved for rotary positions.
    """

    module: str
    gguf: str = ""
    kind: str
    fan_in: int = 1
    rotary: bool = False

    @property
    def stacked(self) -> bool:
        """Whether the leaf's leading axis runs over layers."""
        return "{layer}" in self.module

    @property
    def tensor(self) -> str:
        """Name of the tensor, with `{layer}` in a row of a stack."""
        return self._tensor(self.module)

    @property
    def gguf_tensor(self) -> str:
        """Likewise, in GGUF files."""
        return self._tensor(self.gguf)

    def _tensor(self, module: str) -> str:
        return module if self.kind in ("bias", "parameter") else f"{module}.weight"

    def tensors(self, shape: tuple[int, ...]) -> list[str]:
        """Names of the tensors that fill a leaf of `shape`: one for each layer, if it is a stack of them."""
        return [self.tensor.format(layer=i) for i in range(shape[0] if self.stacked else 1)]

    @property
    def transposed(self) -> bool:
        """Whether the other stack stores the weight as out x in."""
        return self.kind == "linear"

    def to_leaf(self, weight: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Turns a module's weight into one layer of the leaf.

        Args:
            weight: the tensor as Hugging Face stores it, see `kind`.
            shape: of the leaf, without the layer axis.

        Returns:
            A view of `weight` where possible.

        Raises:
            ValueError: if the weight's shape is not what `shape` flattens to.
        """
        wanted, more = self.weight_shape(shape), weight.ndim - len(shape)
        if self.kind == "parameter" and weight.shape[:more] == (1,) * more:
            weight = weight.reshape(weight.shape[more:])
        if weight.shape != wanted:
            raise ValueError(f"it has shape {weight.shape}, the config asks for {wanted}")
        if self.kind == "conv":
            return weight.transpose(2, 3, 1, 0)
        return (weight.T if self.transposed else weight).reshape(shape)

    def from_leaf(self, leaf: np.ndarray) -> np.ndarray:
        """Inverse of `to_leaf`."""
        if self.kind == "conv":
            return leaf.transpose(3, 2, 0, 1)
        if not self.transposed:
            return leaf.reshape(self.weight_shape(leaf.shape))
        return leaf.reshape(math.prod(leaf.shape[: self.fan_in]), -1).T

    def weight_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the Hugging Face weight for a leaf of `shape` (without the layer axis)."""
        if self.kind == "bias":
            return (math.prod(shape),)
        if self.kind == "conv":
            height, width, channels, features = shape
            return (features, channels, height, width)
        if not self.transposed:
            return shape
        return (math.prod(shape[self.fan_in :]), math.prod(shape[: self.fan_in]))


# The rows of Llama.
NAMES = {
    "embed/embedding": ModuleName(module="model.embed_tokens", gguf="token_embd", kind="embedding"),
    "layers/attn_norm/scale": ModuleName(
        module="model.layers.{layer}.input_layernorm", gguf="blk.{layer}.attn_norm", kind="norm"
    ),
    "layers/attn/query/kernel": ModuleName(
        module="model.layers.{layer}.self_attn.q_proj", gguf="blk.{layer}.attn_q", kind="linear", rotary=True
    ),
    "layers/attn/key/kernel": ModuleName(
        module="model.layers.{layer}.self_attn.k_proj", gguf="blk.{layer}.attn_k", kind="linear", rotary=True
    ),
    "layers/attn/value/kernel": ModuleName(
        module="model.layers.{layer}.self_attn.v_proj", gguf="blk.{layer}.attn_v", kind="linear"
    ),
    "layers/attn/out/kernel": ModuleName(
        module="model.layers.{layer}.self_attn.o_proj",
        gguf="blk.{layer}.attn_output",
        kind="linear",
        fan_in=2,
    ),
    "layers/mlp_norm/scale": ModuleName(
        module="model.layers.{layer}.post_attention_layernorm", gguf="blk.{layer}.ffn_norm", kind="norm"
    ),
    "layers/mlp/gate/kernel": ModuleName(
        module="model.layers.{layer}.mlp.gate_proj", gguf="blk.{layer}.ffn_gate", kind="linear"
    ),
    "layers/mlp/up/kernel": ModuleName(
        module="model.layers.{layer}.mlp.up_proj", gguf="blk.{layer}.ffn_up", kind="linear"
    ),
    "layers/mlp/down/kernel": ModuleName(
        module="model.layers.{layer}.mlp.down_proj", gguf="blk.{layer}.ffn_down", kind="linear"
    ),
    "final_norm/scale": ModuleName(module="model.norm", gguf="output_norm", kind="norm"),
    "head/kernel": ModuleName(module="lm_head", gguf="output", kind="linear"),
}


# Rows of decoders with more leaves than Llama.
_BIASES = {
    f"layers/attn/{name}/bias": ModuleName(module=f"model.layers.{{layer}}.self_attn.{module}_proj.bias", kind="bias")
    for name, module in {"query": "q", "key": "k", "value": "v"}.items()
}
_HEAD_NORMS = {
    f"layers/attn/{name}_norm/scale": ModuleName(module=f"model.layers.{{layer}}.self_attn.{module}_norm", kind="norm")
    for name, module in {"query": "q", "key": "k"}.items()
}
_POST_NORMS = {
    f"layers/{name}/scale": ModuleName(module=f"model.layers.{{layer}}.{module}_layernorm", kind="norm")
    for name, module in {
        "attn_post_norm": "post_attention",
        "mlp_norm": "pre_feedforward",
        "mlp_post_norm": "post_feedforward",
    }.items()
}


def names_for(config: LlamaConfig) -> dict[str, ModuleName]:
    """The rows that a decoder of this config has."""
    rows = {path: name for path, name in NAMES.items() if not (config.tied and path == "head/kernel")}
    for has, more in ((config.qkv_bias, _BIASES), (config.qk_norm, _HEAD_NORMS), (config.post_norms, _POST_NORMS)):
        rows |= more if has else {}
    return rows


def redundant(config: LlamaConfig) -> tuple[str, ...]:
    """Patterns of tensors that checkpoints may hold and the decoder of this config does without."""
    # Old exports hold the rotary frequencies, which follow from the config; a tied head repeats the embedding; models
    # of text and images hold the part that sees.
    aside = (r".*\.rotary_emb\.inv_freq", r"(model\.)?(vision_tower|multi_modal_projector)\..*")
    return (*aside, *([r"lm_head\.weight"] if config.tied else []))


def of_text(tensor: str) -> str:
    """Name that a tensor of a model of text and images has in its language model alone; others keep theirs.

    >>> of_text("language_model.model.norm.weight"), of_text("model.language_model.norm.weight")
    ('model.norm.weight', 'model.norm.weight')
    """
    if tensor.startswith("language_model."):
        return tensor.removeprefix("language_model.")
    return re.sub(r"^model\.language_model\.", "model.", tensor)
