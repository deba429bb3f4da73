"""Write `report.html` again from the logs of a run: `python -m experiments.report RUN_DIR`."""

import argparse
import pathlib
import sys

from experiments.report import page


def main(arguments: list[str] | None = None) -> int:
    """Write the page and print where it is; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__)
    parser.add_argument("run_dir", type=pathlib.Path, help="the directory of a run, such as runs/quickstart")
    try:
        print(page.write(parser.parse_args(arguments).run_dir))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
