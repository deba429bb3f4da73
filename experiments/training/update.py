"""The update of a run, from its settings: the jitted step, the optimiser in it, and where its state lies."""

from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh
from ml_collections import config_dict

import lorax
from experiments.training import devices, optimiser, recipes, step


class Update(NamedTuple):
    """What `build` returns.

    Attributes:
        step: of `step.train_step`.
        transformation: the optimiser, whose `init` makes the state.
        places: shardings in place of the arrays of a `step.TrainState`.
    """

    step: Any
    transformation: optax.GradientTransformation
    places: step.TrainState


def build(config: config_dict.ConfigDict, params: Any, adapter: lorax.Adapter, loss: step.LossFn, mesh: Mesh) -> Update:
    """Return the update of a run.

    Args:
        config: the settings.
        params: the base on the mesh, concrete or abstract with shardings.
        adapter: concrete or abstract.
        loss: of `step.summed_loss`.
        mesh: where all lies.
    """
    recipe = recipes.find(config)
    transformation = recipe.optimiser(config, adapter, optimiser.rates(config.train))
    where = lorax.shardings(params, adapter)
    state = jax.eval_shape(transformation.init, adapter.params)
    kind = "pinned_host" if config.train.offload else None
    of_state = lorax.optim.shardings(state, adapter, where, memory_kind=kind)
    places = step.TrainState(where, of_state, devices.replicated(mesh))
    offload = config.train.offload
    return Update(
        step.train_step(loss, transformation, offload=offload, terms=recipe.terms, places=places),
        transformation,
        places,
    )
