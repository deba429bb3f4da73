"""Where each parameter of an encoder lives in Hugging Face directories: one table for each architecture."""

import dataclasses
import re
from collections.abc import Iterable, Mapping

from experiments.models.names import ModuleName

# Module of the parameters -> module there; `{layer}` runs along the leading axis of the leaves, `{base}` is the prefix
# of the encoder in a model with a head, such as `roberta.`.
_BERT = {
    "embed/tokens": "{base}embeddings.word_embeddings",
    "embed/positions": "{base}embeddings.position_embeddings",
    "embed/types": "{base}embeddings.token_type_embeddings",
    "embed/norm": "{base}embeddings.LayerNorm",
    "layers/attn/query": "{base}encoder.layer.{layer}.attention.self.query",
    "layers/attn/key": "{base}encoder.layer.{layer}.attention.self.key",
    "layers/attn/value": "{base}encoder.layer.{layer}.attention.self.value",
    "layers/attn/out": "{base}encoder.layer.{layer}.attention.output.dense",
    "layers/attn_norm": "{base}encoder.layer.{layer}.attention.output.LayerNorm",
    "layers/mlp/up": "{base}encoder.layer.{layer}.intermediate.dense",
    "layers/mlp/down": "{base}encoder.layer.{layer}.output.dense",
    "layers/mlp_norm": "{base}encoder.layer.{layer}.output.LayerNorm",
}
_VIT = {
    "patches": "{base}embeddings.patch_embeddings.projection",
    "layers/attn_norm": "{base}encoder.layer.{layer}.layernorm_before",
    "layers/attn/query": "{base}encoder.layer.{layer}.attention.attention.query",
    "layers/attn/key": "{base}encoder.layer.{layer}.attention.attention.key",
    "layers/attn/value": "{base}encoder.layer.{layer}.attention.attention.value",
    "layers/attn/out": "{base}encoder.layer.{layer}.attention.output.dense",
    "layers/mlp_norm": "{base}encoder.layer.{layer}.layernorm_after",
    "layers/mlp/up": "{base}encoder.layer.{layer}.intermediate.dense",
    "layers/mlp/down": "{base}encoder.layer.{layer}.output.dense",
    "final_norm": "{base}layernorm",
    "head": "classifier",
}
_CLIP_LAYERS = {
    "layers/attn_norm": "encoder.layers.{layer}.layer_norm1",
    "layers/attn/query": "encoder.layers.{layer}.self_attn.q_proj",
    "layers/attn/key": "encoder.layers.{layer}.self_attn.k_proj",
    "layers/attn/value": "encoder.layers.{layer}.self_attn.v_proj",
    "layers/attn/out": "encoder.layers.{layer}.self_attn.out_proj",
    "layers/mlp_norm": "encoder.layers.{layer}.layer_norm2",
    "layers/mlp/up": "encoder.layers.{layer}.mlp.fc1",
    "layers/mlp/down": "encoder.layers.{layer}.mlp.fc2",
}
_CLIP = {
    **{f"text/{path}": f"text_model.{module}" for path, module in _CLIP_LAYERS.items()},
    **{f"vision/{path}": f"vision_model.{module}" for path, module in _CLIP_LAYERS.items()},
    "text/tokens": "text_model.embeddings.token_embedding",
    "text/positions": "text_model.embeddings.position_embedding",
    "text/final_norm": "text_model.final_layer_norm",
    "vision/patches": "vision_model.embeddings.patch_embedding",
    "vision/positions": "vision_model.embeddings.position_embedding",
    "vision/pre_norm": "vision_model.pre_layrnorm",
    "vision/final_norm": "vision_model.post_layernorm",
    "text_projection": "text_projection",
    "vision_projection": "visual_projection",
}
# Leaf -> tensor, where it is no module's weight or bias.
_VIT_TENSORS = {
    "class_token": "{base}embeddings.cls_token",
    "positions/embedding": "{base}embeddings.position_embeddings",
}
_CLIP_TENSORS = {"vision/class_token": "vision_model.embeddings.class_embedding", "logit_scale": "logit_scale"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What the tensors of an architecture are called.

    Args:
        modules: module of the parameters -> module there.
        tensors: leaf of the parameters -> tensor, where it is no module's weight or bias.
        prefix: under which models with a head keep the encoder; the bare model has none.
        heads: what models with a head hold beside the encoder, and the parameters lack: beginnings of names.
        unused: what the encoder holds there, and the parameters lack: beginnings of names, behind the prefix.
    """

    modules: Mapping[str, str]
    tensors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prefix: str = ""
    heads: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def base(self, tensors: Iterable[str]) -> str:
        """The prefix, if the tensors have it, or nothing."""
        return self.prefix if any(tensor.startswith(self.prefix) for tensor in tensors) else ""

    def redundant(self, base: str) -> list[str]:
        """Patterns of the tensors of heads and poolers, and of what follows from the config."""
        beginnings = (*(self.heads if base else ()), *(f"{base}{name}" for name in self.unused))
        return [f"{re.escape(beginning)}.*" for beginning in beginnings]

    def names(self, leaves: Iterable[str], base: str) -> dict[str, ModuleName]:
        """The row of each leaf."""
        return {leaf: self._name(leaf, base) for leaf in leaves}

    def _name(self, leaf: str, base: str) -> ModuleName:
        if leaf in self.tensors:
            return ModuleName(module=self.tensors[leaf].replace("{base}", base), kind="parameter")
        module, part = leaf.rsplit("/", 1)
        path = self.modules[module].replace("{base}", base)
        if part == "bias":
            return ModuleName(module=f"{path}.bias", kind="bias")
        kind = {"embedding": "embedding", "scale": "norm", "kernel": "linear"}[part]
        if module.endswith("patches"):
            kind = "conv"
        return ModuleName(module=path, kind=kind, fan_in=2 if module.endswith("attn/out") else 1)


_BERT_HEADS = ("cls.", "lm_head.", "classifier.", "qa_outputs.")
_BERT_UNUSED = ("pooler.", "embeddings.position_ids", "embeddings.token_type_ids")

# By the model_type in config.json.
ARCHITECTURES = {
    "bert": Architecture(modules=_BERT, prefix="bert.", heads=_BERT_HEADS, unused=_BERT_UNUSED),
    "roberta": Architecture(modules=_BERT, prefix="roberta.", heads=_BERT_HEADS, unused=_BERT_UNUSED),
    "xlm-roberta": Architecture(modules=_BERT, prefix="roberta.", heads=_BERT_HEADS, unused=_BERT_UNUSED),
    "vit": Architecture(
        modules=_VIT,
        tensors=_VIT_TENSORS,
        prefix="vit.",
        heads=("decoder.",),
        unused=("pooler.", "embeddings.mask_token"),
    ),
    "clip": Architecture(
        modules=_CLIP,
        tensors=_CLIP_TENSORS,
        unused=("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
    ),
}
