"""What comes out of a study: `report.html`, `results.csv` and figures, made from its logs alone."""

from experiments.report.study.page import write as write
