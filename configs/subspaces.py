r"""Do adapters of other ranks and seeds learn the same directions?

    python -m experiments.ablate --config=configs/subspaces.py

MiniLM (22.7 M parameters) with a new head learns whether sentences from movie reviews are positive, by LoRA of ranks
8 and 64 at query and value; three learning rates and three seeds, 18 runs of 40 updates, 9 minutes on two busy CPU
cores. Compared are the output sides of the updates, since the input side is mostly what it started as. Where two runs
have the same seed they saw the same sentences in the same order. The report has the maps of the runs at the chosen
rates; what follows is of the adapters that the study keeps, at the same rate:

    config = get_config()
    params = problems.load(config).params
    runs = [f"runs/subspaces/cells/rank={r},lr=0.002,seed=0/adapter" for r in (8, 64)]
    a, b = (analysis.directions(lorax.restore(run, base=params), "layers/attn/value/kernel") for run in runs)
    analysis.subspace_similarity(a, b, 1, 1)  # of lorax.analysis: φ of the top directions, a number a layer

Measured (φ of the top directions, the mean over six layers, and in brackets the least and the largest of the pairs of
seeds; 0.003 is chance):

    value, at the rate            7e-4                  2e-3                  6e-3
    8 and 64, the same seed  0.95 (0.94 to 0.95)   0.92 (0.91 to 0.92)   0.82 (0.80 to 0.84)
    8 and 64, other seeds    0.69 (0.67 to 0.72)   0.45 (0.40 to 0.50)   0.18 (0.16 to 0.19)
    8, two seeds             0.67 (0.66 to 0.68)   0.44 (0.41 to 0.46)   0.17 (0.16 to 0.18)
    64, two seeds            0.72 (0.71 to 0.72)   0.46 (0.43 to 0.51)   0.18 (0.17 to 0.19)

    query
    8 and 64, the same seed  0.83 (0.79 to 0.88)   0.74 (0.72 to 0.76)   0.70 (0.65 to 0.75)
    8 and 64, other seeds    0.60 (0.55 to 0.69)   0.29 (0.21 to 0.38)   0.06 (0.04 to 0.08)
    8, two seeds             0.57 (0.55 to 0.58)   0.27 (0.24 to 0.29)   0.06 (0.04 to 0.08)
    64, two seeds            0.66 (0.59 to 0.71)   0.30 (0.23 to 0.35)   0.08 (0.08 to 0.08)

That ranks 8 and 64 share their top direction with φ above 0.5 (Hu et al. 2021, arXiv:2106.09685, section 7.2) holds
at every rate, for the same seed. That two seeds share it as well holds at the lowest rate only: at 6e-3, where
validation is as good, a seed's top direction is its own. The directions after the first have less in common, as in
the paper: φ of the first eight is 0.35 to 0.46 for the same seed and 0.08 to 0.40 for two. On the input side φ of two
seeds is 0.03 to 0.10 at rank 8 and 0.06 to 0.50 at rank 64. Accuracies are 81.5 % (77.3 to 85.4) at rank 8 and 80.4 %
(76.4 to 84.3) at rank 64, not told apart; the chosen rates, 6e-3 and 7e-4, lie on the edges of a grid on which
validation is flat (82.0 to 83.1), so that the report's own maps of the two ranks compare two rates.
"""

from ml_collections import config_dict

from experiments import problems
from experiments.study import settings


def get_config() -> config_dict.ConfigDict:
    """Return the settings of the study."""
    config = settings.defaults()
    config.name = "subspaces"
    config.run_dir = "runs/subspaces"
    config.problem.update(problems.defaults("sentences"))
    config.problem.retained_examples = 0
    config.axes.update(
        targets=("qv",),
        rank=(8, 64),
        lr=(7e-4, 2e-3, 6e-3),
        seed=(0, 1, 2),
        steps=(40,),
    )
    config.keep = "all"  # adapters, so that subspaces can be compared at the same rate
    return config
