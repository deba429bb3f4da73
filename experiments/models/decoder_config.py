"""What a decoder computes, as data: shape, numerics, and what differs between families and between layers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
ACTIVATIONS = ("silu", "gelu_tanh")
ATTENTION = ("plain", "flash")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Shape and numerics of a decoder; the defaults are those of the Llama family.

    Args:
        vocab_size: rows of the embedding.
        layers: blocks in the stack.
        dim: width of the residual stream.
        heads: query heads.
        kv_heads: key and value heads; each serves `heads / kv_heads` query heads.
        head_dim: width of one head, even.
        ffn_dim: width inside the gated feed-forward.
        max_positions: the longest sequence the weights were trained for, in tokens.
        norm_eps: added to the mean square in RMSNorm.
        norm_offset: added to the scale of every RMSNorm (Gemma: 1).
        post_norms: whether attention and feed-forward also have a norm behind them, inside the residual connection.
        qk_norm: whether each head of queries and keys is normalised, before it is turned.
        qkv_bias: whether the projections to queries, keys and values have biases.
        activation: of the feed-forward's gate, "silu" or "gelu_tanh".
        embed_scale: multiplies the embeddings, rounded to `dtype` before.
        query_scale: multiplies the scores; none: `head_dim ** -0.5`.
        attn_softcap: bounds the scores smoothly, `c tanh(x / c)`; none: no bound.
        final_softcap: likewise the logits.
        rope_theta: base of the rotary frequencies.
        rope_divisors: `head_dim / 2` numbers dividing the frequencies (context extension); none: all ones.
        local_rope_theta: the base in layers with a window, whose frequencies are not divided; none: as everywhere.
        rope_layers: whether each layer turns its queries and keys at all; none: all do.
        windows: how many tokens back each layer looks, itself included, 0 for all; none: all layers see all.
        tied: whether the embedding is also the output head.
        dtype: dtype of the computation; norms, softmax and logits are float32 in any case.
        remat: activations to recompute in the backward pass. None keeps all, "full" keeps only each block's
            input, "dots" keeps the products, "dots_no_batch" the products with weights but not the scores.
        attention: of whole sequences: "plain" holds the scores of all queries at once, "flash" those of a block of
            them, by the best kernel that tokamax has for the device (on a CPU a loop over blocks).
    """

    vocab_size: int
    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    max_positions: int
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    post_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    activation: str = "silu"
    embed_scale: float = 1.0
    query_scale: float | None = None
    attn_softcap: float | None = None
    final_softcap: float | None = None
    rope_theta: float = 10000.0
    rope_divisors: tuple[float, ...] | None = None
    local_rope_theta: float | None = None
    rope_layers: tuple[bool, ...] | None = None
    windows: tuple[int, ...] | None = None
    tied: bool = False
    dtype: Any = jnp.float32
    remat: str | None = None
    attention: str = "plain"

    def __post_init__(self) -> None:
        """Checks what the shapes of the model depend on, and the names of choices."""
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary positions need an even width")
        if self.rope_divisors is not None and len(self.rope_divisors) != self.head_dim // 2:
            raise ValueError(f"rope_divisors has {len(self.rope_divisors)} numbers, wanted {self.head_dim // 2}")
        for name in ("rope_layers", "windows"):
            value = getattr(self, name)
            if value is not None and len(value) != self.layers:
                raise ValueError(f"{name} has {len(value)} entries, wanted one for each of the {self.layers} layers")
        if self.windows is not None and min(self.windows) < 0:
            raise ValueError(f"windows={self.windows}: wanted numbers of tokens, 0 for no window")
        if self.remat is not None and self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat={self.remat!r} is unknown; choose None or {sorted(REMAT_POLICIES)}")
        for name, known in (("activation", ACTIVATIONS), ("attention", ATTENTION)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {list(known)}")

    def rotary_frequencies(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The angles that a token turns by, and which layer turns by which of them.

        Returns:
            float32 F x H/2, the distinct rows of frequencies, and int32 L, the row of each layer; None where there
            is one row. A layer without rotary positions has frequencies of 0.
        """
        half = self.head_dim // 2
        exponents = -np.arange(half) / half
        rows = {"global": self.rope_theta**exponents, "none": np.zeros(half)}
        if self.rope_divisors is not None:
            rows["global"] = rows["global"] / np.asarray(self.rope_divisors)
        if self.local_rope_theta is not None:
            rows["local"] = self.local_rope_theta**exponents
        windows = self.windows or (0,) * self.layers
        turns = self.rope_layers or (True,) * self.layers
        kinds = [
            "none" if not turned else "local" if window and "local" in rows else "global"
            for window, turned in zip(windows, turns, strict=True)
        ]
        used = list(dict.fromkeys(kinds))
        by_layer = None if len(used) == 1 else np.array([used.index(kind) for kind in kinds], np.int32)
        return np.stack([rows[kind] for kind in used]).astype(np.float32), by_layer
