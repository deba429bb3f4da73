"""Byte-level BPE worked out by hand, chat templates, tokenizers of Hugging Face directories."""

import json
import pathlib
import shutil

import pytest

from experiments import models
from experiments.models.tokenizer import Tokenizer, byte_level_bpe

BASE = pathlib.Path(__file__).parents[1] / "golden" / "peft" / "base"
TEMPLATE = (
    "{% for message in messages %}\n{{ '<s>' + message['role'] + ':' + message['content'] + eos_token }}\n"
    "{% endfor %}\n{% if add_generation_prompt %}\n{{ '<s>assistant:' }}\n{% endif %}"
)


def bytes_as_printable() -> list[str]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others follow from code point 256."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in kept]
    return [chr(b) for b in kept] + [chr(256 + i) for i in range(len(others))]


def build(pre: str = "smollm") -> Tokenizer:
    tokens = ["<s>", "</s>", *bytes_as_printable(), "ab", "abc", "Ġab", "12", "Ġ1"]
    merges = [("a", "b"), ("ab", "c"), ("Ġ", "ab"), ("1", "2"), ("Ġ", "1")]
    backend = byte_level_bpe(tokens, merges, ["<s>", "</s>"], pre=pre)
    return Tokenizer(backend, eos_id=1, pad_id=1, chat_template=TEMPLATE, template_names={"eos_token": "</s>"})


def written(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


def test_merges_apply_in_order():
    assert written(build(), "abcab ab") == ["abc", "ab", " ab"]


def test_smollm_splits_digits_and_gpt2_does_not():
    assert written(build("smollm"), "ab12 12") == ["ab", "1", "2", " ", "1", "2"]
    assert written(build("gpt-2"), "ab12 12") == ["ab", "12", " ", "12"]


def test_special_tokens_are_matched_whole_and_none_is_added():
    assert build().encode("<s>ab</s>")[::2] == [0, 1]
    assert build().encode("") == []


@pytest.mark.parametrize("text", ["naïve café ½ 世界 🙂", " leading", "a\n\n\tb  c ", "x=3.14;</s><s>", "\x00\x7f\xa0"])
def test_decode_inverts_encode(text):
    tokenizer = build()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unknown_pre_tokenizer_is_refused():
    with pytest.raises(ValueError, match="pre='other'"):
        build("other")


def test_chat_template_lays_out_turns():
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ab"}]
    assert build().apply_chat_template(messages) == "<s>user:hi</s>\n<s>assistant:ab</s>\n"
    prompt = build().apply_chat_template(messages[:1], add_generation_prompt=True)
    assert prompt == "<s>user:hi</s>\n<s>assistant:\n"


def test_missing_template_is_refused():
    backend = build()._backend
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer(backend, eos_id=0, pad_id=0).apply_chat_template([])


def test_template_can_refuse():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="roles must alternate"):
        Tokenizer(build()._backend, eos_id=0, pad_id=0, chat_template=template).apply_chat_template([])


def test_directory_without_tokenizer_has_none():
    assert models.load(BASE).tokenizer is None


def test_directory_with_tokenizer(tmp_path):
    shutil.copytree(BASE, tmp_path, dirs_exist_ok=True)
    build()._backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"eos_token": {"content": "</s>"}, "bos_token": "<s>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = models.load(tmp_path).tokenizer
    assert tokenizer is not None
    assert tokenizer.encode("ab12</s>") == build().encode("ab12</s>")
    assert (tokenizer.eos_id, tokenizer.pad_id) == (1, 1)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}]) == "<s>user:ab</s>\n"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    tokenizer = models.load(tmp_path).tokenizer
    assert tokenizer is not None
    assert tokenizer.eos_id == 2  # from config.json
    assert tokenizer.apply_chat_template([]) == "<s>"
