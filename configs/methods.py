r"""Which method of fine-tuning learns most, and at what cost?

    python -m experiments.ablate --config=configs/methods.py

MiniLM (22.7 M parameters) with a new head learns whether sentences from movie reviews are positive, by full
fine-tuning, BitFit, bottleneck adapters, prompt and prefix tuning, LoRA, DoRA, AdaLoRA and QLoRA; five learning rates
and three seeds each, 135 runs of 20 updates. It took 40 minutes on two CPU cores.

Measured (test accuracy on 473 sentences, per cent, with 95 % intervals over seeds and sentences; trained numbers,
bytes of a checkpoint, FLOPs and peak bytes of one run's step, milliseconds of a forward pass of one sentence, merged
and not):

                 accuracy               rate      trained   kB    GFLOP  MB    ms
    full         80.3 (76.1 to 84.4)    3e-4 ◂     22.6 M  82,881  49    605   9 / 9
    bitfit       81.3 (77.5 to 85.2)    3e-3       26 k       115  33    280  17 / 17
    bottleneck   80.5 (76.6 to 84.3)    1e-3      596 k     2,212  36    318   - / 14
    prompt       80.5 (76.5 to 84.5)    1e-2 ▸      4 k        23  44    353   - / 14
    prefix       79.9 (73.8 to 86.1)    1e-2 ▸     38 k       149  44    347   - / 16
    lora         81.9 (77.0 to 86.8)    3e-3      333 k     1,251  35    340  11 / 11
    dora         82.2 (78.2 to 86.3)    3e-3      353 k     1,408  35    280  10 / 24
    adalora      78.4 (74.2 to 82.6)    1e-2 ▸    333 k     1,247  35    346  23 / 22
    qlora        80.8 (76.9 to 84.5)    1e-3      333 k     1,250  35    303  11 / 65

None of the 36 differences is told apart from zero, so none of the orders that papers give is confirmed or denied.
Four of the rates lie on the edge of the grid (◂ ▸): full fine-tuning, prompts, prefixes and AdaLoRA may do better
beyond it, and that they lose to LoRA would not count if it were separated. What is told apart is what they cost, and
what they forget of sentence similarity where they learn the same (79 to 80 %): full fine-tuning adds 7.3 nats more
than LoRA (2.2 to 12.4). Latencies are of a busy machine; a quantised base dequantises its weights at every pass.
"""

from ml_collections import config_dict

from experiments import problems
from experiments.study import settings


def get_config() -> config_dict.ConfigDict:
    """Return the settings of the study."""
    config = settings.defaults()
    config.name = "methods"
    config.run_dir = "runs/methods"
    config.problem.update(problems.defaults("sentences"))
    config.problem.retained_examples = 16
    config.axes.update(
        method=("full", "bitfit", "bottleneck", "prompt", "prefix", "lora", "dora", "adalora", "qlora"),
        rank=(8,),
        lr=(5e-5, 3e-4, 2e-3, 1e-2, 5e-2),
        seed=(0, 1, 2),
        steps=(20,),
    )
    config.evaluation.points = 2
    return config
