"""The marks on a sample's tokens: exactly the answer and its end token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data.encoding import encode_prompt, encode_samples
from experiments.data.messages import Sample

EOS = 257


class ByteTokenizer:
    """Bytes as tokens, ChatML's marks as special tokens 256 and 257; `style` varies the template."""

    eos_id = EOS
    pad_id = 0
    specials = ("<|im_start|>", "<|im_end|>")

    def __init__(self, style="chatml"):
        self.style = style

    def encode(self, text):
        ids, at = [], 0
        while at < len(text):
            special = next((i for i, s in enumerate(self.specials) if text.startswith(s, at)), None)
            ids += [256 + special] if special is not None else text[at].encode()
            at += len(self.specials[special]) if special is not None else 1
        return ids

    def decode(self, ids):
        return b"".join(bytes([i]) if i < 256 else self.specials[i - 256].encode() for i in ids).decode()

    def apply_chat_template(self, messages, add_generation_prompt=False):
        if self.style == "endless":  # ends no answer
            return "".join(f"[{m['role']}] {m['content']}\n" for m in messages) + (
                "[assistant] " if add_generation_prompt else ""
            )
        if self.style == "forgetful":  # earlier answers are shortened, as templates of thinking models do
            last = len(messages) - 1
            messages = [
                {**m, "content": "..."} if m["role"] == "assistant" and i < last else m for i, m in enumerate(messages)
            ]
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def conversation(*contents):
    roles = ["user", "assistant"] * len(contents)
    return Sample(messages=tuple({"role": r, "content": c} for r, c in zip(roles, contents, strict=False)))


def encode(sample, style="chatml", **options):
    (example,), overlong = encode_samples([sample], ByteTokenizer(style), max_positions=10_000, **options)
    assert not overlong
    return example


def answer_text(example):
    return ByteTokenizer().decode(example.tokens[example.is_answer].tolist())


def test_the_mark_covers_the_answer_and_its_end_token():
    example = encode(conversation("Hi", '{"a": 1}'))
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" + '{"a": 1}<|im_end|>'
    assert ByteTokenizer().decode(example.tokens.tolist()) == text
    answer = [*b'{"a": 1}', EOS]
    assert example.tokens[-len(answer) :].tolist() == answer
    assert example.is_answer.tolist() == [False] * (len(example.tokens) - len(answer)) + [True] * len(answer)
    assert (example.positions, example.answer_tokens) == (len(example.tokens) - 1, len(answer))
    assert example.tokens.dtype == np.int32 and example.is_answer.dtype == bool


def test_loss_is_on_the_last_answer_or_on_all():
    sample = conversation("a", "first", "b", "second")
    last, both = encode(sample), encode(sample, loss_on="all")
    assert answer_text(last) == "second<|im_end|>"
    assert answer_text(both) == "first<|im_end|>second<|im_end|>"
    assert last.tokens.tolist() == both.tokens.tolist()
    with pytest.raises(ValueError, match="loss_on: got 'first'"):
        encode(sample, loss_on="first")


def test_a_template_that_does_not_end_the_answer_gets_an_end_token():
    example = encode(conversation("a", "first", "b", "second"), "endless", loss_on="all")
    assert example.tokens[-1] == EOS and example.is_answer[-1]
    assert answer_text(example) == "first\nsecond\n<|im_end|>"


def test_a_template_that_changes_what_it_has_written_is_refused():
    sample = conversation("a", "first", "b", "second")
    assert answer_text(encode(sample, "forgetful")) == "second<|im_end|>"
    with pytest.raises(ValueError, match=r"(?s)sample 0: the chat template renders.*loss_on=\"last\""):
        encode(sample, "forgetful", loss_on="all")


def test_a_sample_without_an_answer_is_refused():
    with pytest.raises(ValueError, match="sample 0: wanted a conversation that ends with the assistant"):
        encode(conversation("a", "b", "c"))


def test_overlong_samples_are_listed_and_never_cut():
    samples = [conversation("x" * n, "y") for n in (5, 500, 6, 700)]
    lengths = [encode(s).positions for s in samples]
    examples, overlong = encode_samples(samples, ByteTokenizer(), max_positions=lengths[2])
    assert [(e.sample, e.positions) for e in examples] == [(0, lengths[0]), (2, lengths[2])]
    assert overlong == [(1, lengths[1]), (3, lengths[3])]
    assert not encode_samples(samples, ByteTokenizer(), max_positions=lengths[3]).overlong


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3), st.sampled_from(["last", "all"]))
def test_marks_for_any_conversation(pairs, loss_on):
    sample = conversation(*[text for pair in pairs for text in pair])
    example, tokenizer = encode(sample, loss_on=loss_on), ByteTokenizer()
    # All tokens, marked or not, are the rendered conversation without what follows the last end token.
    assert tokenizer.decode(example.tokens.tolist()) + "\n" == tokenizer.apply_chat_template(sample.messages)
    answers = [answer for _, answer in pairs][-1 if loss_on == "last" else 0 :]
    assert answer_text(example) == "".join(f"{answer}<|im_end|>" for answer in answers)
    prompt = encode_prompt(sample.prompt, tokenizer)
    assert example.tokens[: len(prompt)].tolist() == prompt


def test_placeholders_stand_in_front_carry_no_loss_and_count_as_positions():
    sample = conversation("What is it?", "A cat.")
    plain, led = encode(sample), encode(sample, placeholders=[4, 5])
    assert led.tokens.tolist() == [4, 5, *plain.tokens.tolist()]
    assert led.is_answer.tolist() == [False, False, *plain.is_answer.tolist()]
    assert led.positions == plain.positions + 2
    limit = {"max_positions": plain.positions + 1}
    assert encode_samples([sample], ByteTokenizer(), **limit).examples
    assert not encode_samples([sample], ByteTokenizer(), placeholders=[4, 5], **limit).examples
