"""Byte-level BPE tokenizers with chat templates."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

# Names of llama.cpp's pre-tokenizers; the value says whether digits are split singly before GPT-2's rule.
PRE_TOKENIZERS = {"gpt-2": False, "smollm": True}


class Tokenizer:
    """Text to token ids and back.

    Args:
        backend: a tokenizer of the `tokenizers` package.
        eos_id: id of the token that ends a turn.
        pad_id: id to fill batches with.
        chat_template: Jinja source that lays out a conversation; none: `apply_chat_template` raises.
        template_names: variables for the template, such as `bos_token`.
    """

    def __init__(
        self,
        backend: "Backend",
        *,
        eos_id: int,
        pad_id: int,
        chat_template: str | None = None,
        template_names: dict[str, str] | None = None,
    ) -> None:
        """See the class."""
        self._backend = backend
        self._template = chat_template
        self._template_names = dict(template_names or {})
        self.eos_id = eos_id
        self.pad_id = pad_id

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written out in it are recognised, none is added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens written out; the inverse of `encode`."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def apply_chat_template(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False) -> str:
        """Lays out a conversation as text, ready for `encode`.

        Args:
            messages: dicts with "role" and "content".
            add_generation_prompt: whether to open the assistant's turn.

        Raises:
            ValueError: if the model has no chat template, or its template refuses the messages.
        """
        if self._template is None:
            raise ValueError("this model has no chat template; lay the prompt out as plain text")
        return _compile(self._template).render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, **self._template_names
        )


@functools.cache
def _compile(template: str) -> Any:
    """Compiles a template as `transformers` does: sandboxed, block lines trimmed."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise ValueError(f"the chat template refuses these messages: {message}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


def byte_level_bpe(
    tokens: Sequence[str], merges: Sequence[tuple[str, str]], special: Sequence[str], *, pre: str
) -> "Backend":
    """Builds a GPT-2-style tokenizer.

    Args:
        tokens: the vocabulary in order of id, bytes written in GPT-2's printable alphabet.
        merges: pairs in order of priority.
        special: tokens matched as a whole, before anything else.
        pre: how text is cut before merging, a key of `PRE_TOKENIZERS`.

    Raises:
        ValueError: if `pre` is unknown.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"pre={pre!r} is unknown, choose one of {sorted(PRE_TOKENIZERS)}")
    backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges)))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if PRE_TOKENIZERS[pre] else []
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, words])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return backend


def special_text(entry: Any) -> str | None:
    """Text of a token as tokenizer_config.json writes it: a string, or a dict with "content"."""
    return entry["content"] if isinstance(entry, dict) else entry
