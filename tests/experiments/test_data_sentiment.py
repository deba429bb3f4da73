"""Rated sentences: the real files, their labels and splits, and what goes wrong on the way to them."""

import collections
import dataclasses
import subprocess
import sys
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data import sentiment, splits
from experiments.data.sentiment import DOMAINS, Example, load_sentiment, parse_ratings, take_examples

PUBLISHED = {"movies": 10_605, "amazon": 3_708, "tweets": 4_200, "editorials": 5_190}
# of "text 0", "text 1", ...: published results would not compare with those after a change of these
FIXED_SPLITS = ["train", "test", "train", "validation", "train", "train", "validation"] + ["train"] * 5
WITHOUT_NEUTRAL = {"movies": 10_072, "amazon": 2_985, "tweets": 3_432, "editorials": 2_970}


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache directory with the archive; skips only where pip cannot download anything at all."""
    folder = tmp_path_factory.mktemp("cache")
    try:
        sentiment.fetch_archive(folder)
    except sentiment.DownloadError:
        probe = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(folder),
            "wheel",
        ]
        if subprocess.run(probe, capture_output=True, check=False).returncode:
            pytest.skip("pip cannot reach a package index")
        raise
    return folder


def test_the_files_hold_the_published_number_of_sentences(cache):
    with tarfile.open(sentiment.fetch_archive(cache)) as archive:
        lines = {d: list(archive.extractfile(f"hutto_ICWSM_2014/{name}") or ()) for d, name in DOMAINS.items()}
    assert {domain: len(of_domain) for domain, of_domain in lines.items()} == PUBLISHED


def test_neutral_sentences_are_dropped_and_the_sign_is_the_label(cache):
    examples = load_sentiment(cache)
    assert collections.Counter(e.domain for e in examples) == WITHOUT_NEUTRAL
    assert all(abs(e.score) >= 0.5 for e in examples)
    assert all((e.score > 0) == (e.label == "positive") for e in examples)
    assert len({e.id for e in examples}) == len(examples)
    first = next(e for e in examples if e.id == "movies/1")
    assert first.text.startswith("The Rock is destined to be the 21st Century's new ''Conan''")
    assert (first.score, first.label) == (2.26666666667, "positive")


def test_texts_are_clean(cache):
    texts = [e.text for e in load_sentiment(cache)]
    assert "Absorbing character study by André Turpin." in texts  # the files are UTF-8, not latin-1
    assert not [t for t in texts if "Ã" in t or "&amp;" in t or "  " in t or "\t" in t or "\r" in t or t != t.strip()]


def test_splits_are_disjoint_even_for_near_copies(cache):
    examples = load_sentiment(cache)
    seen = collections.defaultdict(set)
    for example in examples:
        seen[splits.normalised(example.text)].add(example.split)
    assert len(seen) < len(examples) - 100  # there are copies
    assert all(len(found) == 1 for found in seen.values())


def test_splits_are_fixed(cache):
    counts = sentiment.count_examples(load_sentiment(cache))
    totals = {
        domain: tuple(sum(of_domain[split].values()) for split in splits.SPLITS) for domain, of_domain in counts.items()
    }
    assert totals == {
        "movies": (8482, 527, 1063),
        "amazon": (2551, 137, 297),
        "tweets": (2892, 181, 359),
        "editorials": (2484, 148, 338),
    }
    only = load_sentiment(cache, ["tweets"])
    assert only == [e for e in load_sentiment(cache) if e.domain == "tweets"]


def test_a_cached_archive_is_not_downloaded_again(cache, monkeypatch):
    monkeypatch.setattr(sentiment, "_download_sdist", lambda _: pytest.fail("downloaded again"))
    assert load_sentiment(cache, ["amazon"])


def test_a_changed_archive_is_an_error_that_names_it(cache, tmp_path):
    good = sentiment.fetch_archive(cache)
    bad = tmp_path / good.relative_to(cache)
    bad.parent.mkdir(parents=True)
    bad.write_bytes(good.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"hutto_ICWSM_2014.*delete it and run again"):
        load_sentiment(tmp_path)
    assert bad.exists()


def test_a_download_that_fails_leaves_nothing_and_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(sentiment.DownloadError, match=r"(?s)Check the network.*pip said: .*No matching") as error:
        load_sentiment(tmp_path)
    assert str(tmp_path) in str(error.value)  # where to put the archive by hand
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_process_killed_while_it_writes_leaves_no_archive(tmp_path, monkeypatch):
    target = tmp_path / "archive"
    monkeypatch.setattr(sentiment.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sentiment._write_atomically(target, b"content")
    assert not list(tmp_path.iterdir())


def test_arguments_are_checked_before_anything_is_downloaded(tmp_path):
    with pytest.raises(ValueError, match=r"got \['films'\], wanted one or more of \['movies'"):
        load_sentiment(tmp_path, ["films"])
    with pytest.raises(ValueError, match="wanted one or more"):
        load_sentiment(tmp_path, [])
    with pytest.raises(ValueError, match="neutral_below: got 0"):
        load_sentiment(tmp_path, neutral_below=0)
    assert not list(tmp_path.iterdir())


def test_parsing_by_hand():
    content = "1_1\t0.5\tGood  &amp;amp; cheap.\r\n1_2\t-0.49\tMeh.\r\n1_3\t-0.5\tUgh\u2028!".encode()
    examples = parse_ratings(content, "amazon")
    assert [(e.id, e.text, e.label) for e in examples] == [
        ("amazon/1_1", "Good & cheap.", "positive"),
        ("amazon/1_3", "Ugh !", "negative"),
    ]


@pytest.mark.parametrize(
    "line", ["2\t0.5", "2\thigh\tText", "2\t0.5\tText\tmore", "2\t7\tText", "2\t1\t ", "2\tnan\tx"]
)
def test_a_line_that_is_no_rating_is_named(line):
    with pytest.raises(ValueError, match="tweets line 2: got .*wanted"):
        parse_ratings(f"1\t1\tText\n{line}\n".encode(), "tweets")


def test_a_smaller_part_is_contained_in_a_larger_one():
    examples = parse_ratings("\n".join(f"{i}\t1\ttext {i}" for i in range(100)).encode(), "tweets")
    ten, fifty = take_examples(examples, 10), take_examples(list(reversed(examples)), 50)
    assert ten == fifty[:10] and len(fifty) == 50
    assert ten != examples[:10] and ten != take_examples(examples, 10, seed=1)
    assert all(isinstance(e, Example) for e in ten)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ten[0].text = ""  # pyright: ignore[reportAttributeAccessIssue]


def test_the_split_of_a_text_never_changes():
    assert [splits.split_of(f"text {i}") for i in range(12)] == FIXED_SPLITS
    shares = collections.Counter(splits.split_of(f"text {i}") for i in range(20_000))
    assert shares["test"] / 20_000 == pytest.approx(0.10, abs=0.01)
    assert shares["validation"] / 20_000 == pytest.approx(0.05, abs=0.01)


@given(st.text(), st.sampled_from([" ", "  ", "!", "...", "\n"]))
def test_case_spacing_and_punctuation_do_not_change_the_split(text, noise):
    if any(map(str.isalnum, splits.normalised(text))):
        assert splits.split_of(noise + text + noise) == splits.split_of(text)
    assert splits.split_of(text) in splits.SPLITS
    assert splits.split_of("Straße AND Co.") == splits.split_of("STRASSE and co")
