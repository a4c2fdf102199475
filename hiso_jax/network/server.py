"""The server of a federation: it invites clients, takes their messages, and runs the same session as a simulation.

A network is a dispatch of one round: ledger, evaluations, warnings, snapshots and resuming are those of every run.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import jax

from hiso_jax import fed
from hiso_jax.checks import ParameterError
from hiso_jax.fed.ledger import Storage
from hiso_jax.fed.run import RemoteRun
from hiso_jax.network.buffered import BufferedExchange
from hiso_jax.network.exchange import MessageExchange
from hiso_jax.network.parts import Parts
from hiso_jax.network.settings import NetworkSettings
from hiso_jax.network.transport import Transport

logger = logging.getLogger("hiso_jax")


class Server:
    """A run whose clients are reached by a transport.

    Args:
      parts: the parts of the run; of its task only the test examples are read, and the shapes of training examples.
      transport: the way to the clients.
      clients: N, the number of clients, whose numbers are 0 to N − 1.
      network: settings of the rounds.
      storage: the directory that keeps the run; None keeps it in memory.
      callbacks: as those of :class:`hiso_jax.fed.Simulation`.
      notify: receives sentences about clients that come, are refused or differ.

    Raises:
      ParameterError: the method or a setting does not suit a network.
    """

    def __init__(
        self,
        parts: Parts,
        transport: Transport,
        *,
        clients: int,
        network: NetworkSettings | None = None,
        storage: Storage | Path | str | None = None,
        callbacks: fed.Callbacks = (),
        notify: Callable[[str], None] = logger.info,
    ) -> None:
        """Check the run; :meth:`run` compiles its programs."""
        network, self._parts = network or NetworkSettings(), parts
        check_server(parts, clients, network)
        self._run = RemoteRun(
            parts.task, parts.algorithm, parts.config, clients=clients, storage=storage, callbacks=callbacks
        )
        kind = MessageExchange if parts.config.buffer is None else BufferedExchange
        self._exchange = kind(self._run, parts, clients, transport, network, notify)

    def stop(self) -> None:
        """Ask a running :meth:`run` to end after the round in flight."""
        self._run.stop()

    def run(self) -> fed.Result:
        """Run to the last round, to divergence, or until :meth:`stop`; a storage with ``resume`` continues its run.

        Raises:
          ValueError: the directory holds another run, an altered run, or a run that is being written.
          NobodyCame: too few clients were online for too long; the rounds so far are kept.
          OSError: the directory cannot be written.
        """
        evaluate = self._exchange.evaluate if self._parts.held_out else None
        return self._run.run(self._exchange, (self._exchange,), evaluate)


def check_server(parts: Parts, clients: int, network: NetworkSettings) -> None:
    """Refuse a run that no server can run over a network.

    Raises:
      ParameterError: the method, the cohort or a setting does not suit.
    """
    for name, number in (("cohort", parts.config.cohort), ("quorum", network.quorum)):
        if number > clients:
            raise ParameterError(name, f"must be at most the number of clients, {clients}, got {number}")
    if parts.algorithm.is_private and not parts.config.public_cohorts:
        raise ParameterError("public_cohorts", "must be true over a network: clients know whom they meet there")
    parts.forms(jax.eval_shape(parts.task.init, jax.random.key(0)))
