"""Command lines with a configuration file: `--config=FILE --config.NAME=VALUE …`."""

import itertools
import runpy
import sys
from collections.abc import Sequence

from absl import flags, logging

from experiments.training.settings import check_overrides

EXIT_USAGE = 2


def parse(arguments: Sequence[str]) -> list[str]:
    """Parse the command line; an unknown setting ends the process with the nearest known one."""
    try:
        path = config_path(arguments)
        if path:
            # ml_collections would show a traceback and, for some names, nothing near
            check_overrides(arguments, runpy.run_path(path)["get_config"]())
        rest = flags.FLAGS(list(arguments))
    except (ValueError, TypeError, OSError, flags.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING  # absl.app would turn on INFO, which orbax fills pages with
    return rest


def config_path(arguments: Sequence[str]) -> str | None:
    """Return the configuration file that a command line names."""
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        name, has_value, value = argument.partition("=")
        if name in ("--config", "-config"):
            return value if has_value else following
    return None
