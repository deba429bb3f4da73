"""The README's examples run as they stand."""

import doctest
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_examples_run():
    result = doctest.testfile(str(README), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 30
    assert result.failed == 0
