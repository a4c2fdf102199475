"""Rebuild the model from a delta, its base checkpoint and its optimizer."""

import jax
import optax
from jaxtyping import PyTree

from hiso_jax.checks import ParameterError
from hiso_jax.fed.algorithm import Algorithm
from hiso_jax.fed.ledger.delta import Delta
from hiso_jax.fed.ledger.fingerprint import base_fingerprints, fingerprint
from hiso_jax.fed.ledger.replay import replay


def apply_delta(
    delta: Delta,
    params: PyTree,
    tx: Algorithm | optax.GradientTransformation,
    *,
    frozen: PyTree | None = None,
    accept_difference: bool = False,
) -> PyTree:
    """The fine-tuned parameters of a delta.

    Args:
      delta: the delta, from :func:`load_delta`.
      params: the run's initial parameters.
      tx: its optimizer, or its algorithm.
      frozen: the parameters that the run did not train, if its task has any.
      accept_difference: also accept parameters that differ from the run's in their bits, for example on another
        processor.

    Raises:
      ValueError: the base checkpoint is not the run's, or the rebuilt parameters are not.

    Example:
      >>> import tempfile, hiso_jax
      >>> from hiso_jax import fed, tasks
      >>> task, tx = tasks.digits(), hiso_jax.hiso(1e-2)
      >>> population = fed.dirichlet(task.train["label"], 20, alpha=0.5)
      >>> folder = tempfile.mkdtemp()
      >>> config = fed.SimulationConfig(rounds=10, cohort=4, eval_every=5)
      >>> result = fed.Simulation(task, tx, population, config, storage=fed.Storage(f"{folder}/run")).run()
      >>> size = fed.save_delta(fed.delta_of(fed.load(f"{folder}/run")), f"{folder}/delta.safetensors")
      >>> params = fed.apply_delta(fed.load_delta(f"{folder}/delta.safetensors"), result.initial_params, tx)
      >>> fed.fingerprint(params) == fed.fingerprint(result.params)
      True
    """
    if base_fingerprints(params, frozen) != dict(delta.header["base"]):
        raise ParameterError(
            "params", "must be those that the run began with; their fingerprint differs from the delta's"
        )
    rebuilt, _ = jax.block_until_ready(replay(params, tx, delta.updates))
    known = delta.header["params_sha256"]
    if known not in (None, fingerprint(rebuilt)) and not accept_difference:
        raise ParameterError(
            "tx",
            "must be the run's optimizer, on a processor and by a jaxlib like its own: the parameters that come out "
            "are not the run's to the last bit; `accept_difference` accepts them anyway",
        )
    return rebuilt
