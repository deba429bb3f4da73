"""Names for the leaves of a transformer whose parameters are called as those of `experiments.models.llama`."""

from experiments.study.problem import Patterns
from experiments.training.recipes import HOULSBY, KEY_VALUE, PFEIFFER
from experiments.training.settings import EVERY_LINEAR, QUERY_VALUE

ATTENTION, FEED_FORWARD = EVERY_LINEAR

TARGETS: dict[str, Patterns] = {
    "q": r"layers/attn/query/kernel",
    "k": r"layers/attn/key/kernel",
    "v": r"layers/attn/value/kernel",
    "o": r"layers/attn/out/kernel",
    "qk": r"layers/attn/(query|key)/kernel",
    "qv": QUERY_VALUE,
    "attention": ATTENTION,
    "mlp": FEED_FORWARD,
    "all": EVERY_LINEAR,
}

PLACEMENTS: dict[str, Patterns] = {  # what depends on the kind of norm and on biases is the model's own
    "prefix": KEY_VALUE,
    "bottleneck_houlsby": HOULSBY,
    "bottleneck_pfeiffer": PFEIFFER,
    "ia3_output": KEY_VALUE,
    "ia3_input": PFEIFFER,  # the second feed-forward weight
}
