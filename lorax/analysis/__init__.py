"""What an adapter has learned, and what it takes: spectra, subspaces, interference, budgets.

All of it works on the factors where a method has them: nothing as large as a weight is built. A stack's layers, experts
and the groups of axes of multi-head or convolution kernels are matrices of their own, [S, I, O].

| function | of |
|---|---|
| `factors`, `delta`, `svd` | what an adapter adds to a weight |
| `spectra`, `effective_rank`, `stable_rank`, `amplification` | its singular values |
| `subspace_similarity`, `subspace_map`, `directions` | LoRA's φ, of matrices or of two adapters' updates |
| `inner_product`, `cosine`, `cosines`, `overlap`, `o_lora_penalty` | two adapters of one base |
| `parameters`, `rank_for_budget`, `flops` | what it takes |

>>> import jax, jax.numpy as jnp, lorax
>>> from lorax import analysis
>>> fn, params = lambda p, x: x @ p["kernel"], {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
>>> sites = lorax.trace(fn, params, jnp.ones((1, 16)))
>>> adapter = lorax.init(jax.random.key(0), lorax.Spec({"kernel": lorax.LoRA(rank=2)}), sites, params)
>>> trained = adapter.replace(params=jax.tree.map(lambda x: x + 0.1, adapter.params))
>>> {path: analysis.effective_rank(values).shape for path, values in analysis.spectra(trained).items()}
{'kernel': (1,)}
>>> analysis.parameters(adapter), analysis.flops(lorax.adapt(fn), params, adapter, jnp.ones((1, 16)))
({'kernel': 48}, 352)
"""

from lorax.analysis.budget import parameters, rank_for_budget
from lorax.analysis.flops import flops
from lorax.analysis.interference import cosine, cosines, inner_product, o_lora_penalty, overlap
from lorax.analysis.spectra import amplification, effective_rank, spectra, stable_rank, svd
from lorax.analysis.subspaces import directions, subspace_map, subspace_similarity
from lorax.analysis.updates import delta, factors

__all__ = [
    "amplification",
    "cosine",
    "cosines",
    "delta",
    "directions",
    "effective_rank",
    "factors",
    "flops",
    "inner_product",
    "o_lora_penalty",
    "overlap",
    "parameters",
    "rank_for_budget",
    "spectra",
    "stable_rank",
    "subspace_map",
    "subspace_similarity",
    "svd",
]
