"""Write the reports of runs and studies again from their logs: `python -m experiments.report RUN_DIR…`.

A fine-tuning run's page is `report.html`; of a study there are `results.csv` and `figures/` as well. Several studies
are joined into one report.
"""

import argparse
import pathlib
import sys

from experiments.report import page, study
from experiments.report.study.reading import is_study


def main(arguments: list[str] | None = None) -> int:
    """Write the pages and print where they are; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__)
    parser.add_argument(
        "run_dir",
        type=pathlib.Path,
        nargs="+",
        help="the directories of runs and studies, such as runs/quickstart",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        help="where the report of studies goes; one study's own directory, for several A+B beside the first",
    )
    parser.add_argument(
        "--reference",
        default="",
        help='what configurations are compared with at first, such as "rank 8, qv"; the best on validation',
    )
    given = parser.parse_args(arguments)
    studies = [directory for directory in given.run_dir if is_study(directory)]
    try:
        for directory in given.run_dir:
            if directory not in studies:
                print(page.write(directory))
        if studies:
            print(study.write(studies, given.out, reference=given.reference))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
