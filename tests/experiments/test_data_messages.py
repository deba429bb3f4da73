"""Chat samples: the sentiment task, and the user's JSONL with its bad lines."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data.messages import BadLine, read_jsonl, read_sentiment, sentiment_sample
from experiments.data.sentiment import parse_ratings

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def write(path, *lines):
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))
    return path


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_the_sentiment_task_is_asked_as_chat_and_answered_as_json():
    (example,) = parse_ratings(b"7\t-2\tA dull film.", "movies")
    sample = sentiment_sample(example)
    assert [m["role"] for m in sample.messages] == ["system", "user", "assistant"]
    assert sample.prompt == sample.messages[:2] and "A dull film." in sample.prompt[1]["content"]
    assert sample.answer == '{"sentiment": "negative"}'
    assert read_sentiment(sample.answer) == example.label == sample.meta["label"]
    # The right answer must not follow from the prompt's form.
    (other,) = parse_ratings(b"7\t2\tA dull film.", "movies")
    assert sentiment_sample(other).prompt == sample.prompt


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ('{"sentiment": "positive"}', "positive"),
        ('\n{ "sentiment" : "negative" } ', "negative"),
        ('{"sentiment": "neutral"}', None),
        ('{"sentiment": ["positive"]}', None),
        ('{"sentiment": "positive", "confidence": 1}', None),
        ('{"Sentiment": "positive"}', None),
        ('{"sentiment": "positive"', None),
        ('Sure! {"sentiment": "positive"}', None),
        ('"positive"', None),
        ("[" * 100_000, None),
        ("", None),
    ],
)
def test_only_the_json_that_was_asked_for_counts(answer, label):
    assert read_sentiment(answer) == label


def test_both_forms_are_read(tmp_path):
    pair = {"prompt": "Hi", "completion": "Hello", "source": "mine"}
    samples, bad = read_jsonl(write(tmp_path / "a.jsonl", CHAT, b"", pair, b" \r"))
    assert samples[0].messages == samples[1].messages == tuple(CHAT["messages"])
    assert [dict(s.meta) for s in samples] == [{"line": 1}, {"source": "mine", "line": 3}]
    assert bad == []


def test_a_system_message_and_several_turns_are_read(tmp_path):
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    ((sample,), _) = read_jsonl(write(tmp_path / "a.jsonl", chat(*turns)))
    assert [m["content"] for m in sample.messages] == list("sabcd") and sample.answer == "d"


def test_windows_files_are_read(tmp_path):
    line = json.dumps(CHAT).encode()
    ((first, second), _) = read_jsonl(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + line + b"\r", line))
    assert first.messages == second.messages


def test_line_separators_within_a_text_do_not_end_a_line(tmp_path):
    text = "one\u2028two\x85three\x0bfour"
    raw = json.dumps(chat(("user", text), ("assistant", "b")), ensure_ascii=False).replace("\x0b", "\\u000b")
    samples, _ = read_jsonl(write(tmp_path / "a.jsonl", raw.encode(), CHAT))
    assert samples[0].messages[0]["content"] == text and samples[1].meta["line"] == 2


BAD = [
    (b'{"messages": [', "not JSON"),
    (b"\xff\xfe{}", "not UTF-8"),
    (b"[1]", "JSON list, wanted an object"),
    (b"[" * 100_000, "not readable JSON|not JSON"),
    ({"text": "x"}, r"keys \['text'\]"),
    ({**CHAT, "prompt": "x"}, "either messages, or prompt and completion"),
    ({"prompt": "x"}, "completion: got the content None"),
    ({"prompt": "", "completion": "y"}, "prompt: got the content ''"),
    ({"prompt": 3, "completion": "y"}, "prompt: got the content 3"),
    ({"messages": []}, "at least a user's"),
    ({"messages": "Hi"}, "wanted a list"),
    ({"messages": ["Hi"]}, r"messages\[0\]: got str"),
    ({"messages": [{"role": "user", "content": "x", "weight": 0}]}, r"messages\[0\]: got .*weight"),
    (chat(("user", "x"), ("model", "y")), r"messages\[1\]: got the role 'model'"),
    (chat(("user", "x"), ("assistant", " ")), r"messages\[1\]: got the content"),
    (chat(("user", "x"), ("system", "y"), ("assistant", "z")), r"messages\[1\]: a system message"),
    (chat(("assistant", "x")), "first message"),
    (chat(("system", "x")), "first message"),
    (chat(("user", "x"), ("assistant", "y"), ("user", "z")), "last message is the user's"),
    (chat(("user", "\ud83d"), ("assistant", "y")), r"messages\[0\]: half of a surrogate"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_line_is_reported_with_its_number(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", CHAT, line, CHAT)
    with pytest.raises(ValueError, match=rf"a\.jsonl: 1 bad line\(s\)[^\n]*\n  line 2: .*({reason})"):
        read_jsonl(path)
    samples, [(number, why)] = read_jsonl(path, on_bad="skip")
    assert [s.meta["line"] for s in samples] == [1, 3] and number == 2 and why


def test_all_bad_lines_are_reported_at_once(tmp_path):
    path = write(tmp_path / "a.jsonl", *[line for pair in [(CHAT, {})] * 30 for line in pair])
    with pytest.raises(ValueError, match="30 bad line") as error:
        read_jsonl(path)
    assert "line 2: " in str(error.value) and "line 40: " in str(error.value)
    assert str(error.value).endswith("and lines 42, 44, 46, 48, 50, 52, 54, 56, 58, 60")


def test_a_file_without_a_sample_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"empty\.jsonl: no sample in the file$"):
        read_jsonl(write(tmp_path / "empty.jsonl", b"\n"))
    with pytest.raises(ValueError, match=r"(?s)no sample in the file; .*line 1: "):
        read_jsonl(write(tmp_path / "bad.jsonl", {}), on_bad="skip")
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        read_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="on_bad: got 'ignore'"):
        read_jsonl(tmp_path / "empty.jsonl", on_bad="ignore")  # pyright: ignore[reportArgumentType]


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.sampled_from(["user", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["messages", "role", "content", "prompt", "completion"]), inner)
    ),
)


@given(line=json_values | st.binary().filter(lambda b: b.strip() and b"\n" not in b))
def test_any_line_is_a_sample_or_a_bad_line(tmp_path_factory, line):
    path = write(tmp_path_factory.mktemp("any") / "a.jsonl", CHAT, line)
    samples, bad = read_jsonl(path, on_bad="skip")
    assert len(samples) + len(bad) == 2 or not str(line.decode(errors="replace")).strip()
    assert all(isinstance(b, BadLine) and b.line == 2 for b in bad)
