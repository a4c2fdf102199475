"""The evaluations and the state of a resumed run: the state from a snapshot and the ledger's rounds after it."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, PyTree

from hiso_jax.checks import ParameterError
from hiso_jax.fed.algorithm import Senders
from hiso_jax.fed.keys import channel_key
from hiso_jax.fed.ledger import Evaluation, Records, RunStore, fingerprint, replay
from hiso_jax.fed.population import ABSENT, state_of
from hiso_jax.fed.round import Channel, groups_of
from hiso_jax.fed.run import monitor as monitoring
from hiso_jax.fed.run.prepared import PreparedRun
from hiso_jax.fed.run.state import AtWork, RunState
from hiso_jax.fed.run.traffic import last_synced_rounds
from hiso_jax.fed.task import metric_of
from hiso_jax.fed.update import ServerState

logger = logging.getLogger("hiso_jax")


def regular_evaluations(prepared: PreparedRun, store: RunStore) -> list[Evaluation]:
    """The evaluations of the run that ``store`` found, as an uninterrupted run would have them.

    A run that stopped between evaluations and was resumed has more. Beside the regular evaluations, only that of the
    last round is kept.

    Raises:
      ValueError: an evaluation lacks the task's metric.
    """
    found, config, last = store.found, prepared.config, store.ledger.rounds
    assert found is not None
    over = last >= config.rounds or found.seal is not None
    kept = [row for row in found.evaluations if row.round % config.eval_every == 0 or (over and row.round == last)]
    if kept:
        # Checked although the digests match: a forged ledger may have new digests.
        name = metric_of(prepared.task, kept[0].metrics).name
        for row in kept:
            if name not in row.metrics:
                raise ValueError(f"{found.path} is refused: its evaluation after round {row.round} has no {name}")
    return kept


def restored(prepared: PreparedRun, store: RunStore, carry: RunState) -> RunState:
    """The state of the run that ``store`` found; ``carry`` is the state at its beginning.

    Raises:
      ValueError: the rounds name clients that do not exist; or lead to other parameters than those that the run had,
        in the environment in which it was made; or a snapshot that is needed does not verify.
    """
    records = store.ledger.records
    if records.cohort.max() >= prepared.clients:
        raise ValueError(
            f"the run cannot be continued: a round of it names client {records.cohort.max()} of {prepared.clients}"
        )
    server, start, at_work = carry.server, 0, carry.at_work
    for candidate in store.snapshots(prepared.placement):
        kept = carry.kept
        tree = store.restore(candidate, kept)
        if tree is not None:
            placed = prepared.placement.like(tree, kept)
            server, start = ServerState(*placed[:3]), candidate
            if at_work is not None:
                at_work = placed[3]
            break
    if store.elsewhere and not start:
        raise ParameterError(
            "from_snapshot",
            "needs a snapshot, and the run has none that verifies: only a processor and a jaxlib like "
            "those that it began with can continue it",
        )
    if prepared.needs_snapshots and start != len(records.round):
        raise ParameterError(
            "resume",
            f"must name a run whose newest snapshot is whole: that after {len(records.round)} rounds does not "
            "verify, and the ledger of this run cannot continue it alone",
        )
    if prepared.algorithm.has_scalars:
        server = _replayed(prepared, store, server, start)
        groups = groups_of(prepared.algorithm, server.params, prepared.config.answers)
        server = server._replace(memory=_remembered(prepared, records, server.memory, start, groups))
    rest = (
        monitoring.rebuilt(records, server.params, server.state, prepared.algorithm.needs_secret),
        _synced_to(records, at_work, prepared.clients),
        None
        if carry.selection is None
        else state_of(records.round, records.cohort, records.valid, records.loss, prepared.clients),
        # Summed one by one, as the rounds did.
        None if carry.clock is None else np.add.accumulate(records.seconds.astype(np.float32))[-1],
    )
    monitor, synced_to, selection, clock = prepared.placement.replicate(rest)
    return RunState(server, monitor, synced_to, selection, at_work, clock)


def _synced_to(records: Records, at_work: AtWork | None, clients: int) -> Int[np.ndarray, "N"]:
    """The round at which each client was last synced."""
    begun = records.round if records.version is None else records.version
    synced_to = last_synced_rounds(begun, records.cohort, records.attendance, clients)[1]
    if at_work is not None:
        # Those that are still at work were synced, too; the first B have ended.
        ended = records.cohort.shape[1]
        ids, version, status = (np.asarray(a)[ended:] for a in (at_work.clients, at_work.version, at_work.status))
        synced_to[ids[status != ABSENT]] = version[status != ABSENT]
    return synced_to


def _replayed(prepared: PreparedRun, store: RunStore, server: ServerState, start: int) -> ServerState:
    """The server after all rounds found; ``server`` is the server after the first ``start`` rounds."""
    found, placement, tx = store.found, prepared.placement, prepared.algorithm.optimizer
    assert found is not None
    updates = store.ledger.records.updates_with_losses
    known = max((rounds for rounds in found.checks if rounds > start), default=start)
    params, state = replay(server.params, tx, updates.between(start, known), state=server.state, mesh=placement.mesh)
    if known > start and fingerprint(placement.to_host(params)) != found.checks[known]:
        other = f"its first {known} rounds lead to other parameters here"
        if not (store.differs or store.elsewhere):
            raise ValueError(
                f"{found.path.parent} cannot be continued: {other}; its optimizer or its processor was another"
            )
        if jax.process_index() == 0:
            why = "; ".join(store.differs) or "the processor is another"
            logger.warning("%s goes on, but %s: %s", found.path.parent, other, why)
    params, state = replay(params, tx, updates.between(known), state=state, mesh=placement.mesh)
    return server._replace(params=params, state=state)


def _remembered(prepared: PreparedRun, records: Records, memory: PyTree, start: int, groups: int) -> PyTree:
    """The server's memory after all rounds, from their messages; ``memory`` is that after ``start`` rounds."""
    if not jax.tree.leaves(memory) or start == len(records.round):
        return memory
    sizes = np.ones(records.cohort.shape, np.float32)
    if prepared.config.weighting == "examples":
        held = jax.vmap(prepared.inputs.population.sizes_of)(jnp.asarray(records.cohort))
        sizes = np.asarray(held, np.float32)

    probing = prepared.probing if prepared.estimator.is_balanced else None

    def one(memory: PyTree, row: tuple[Array, Array, Array, Array, PyTree]) -> tuple[PyTree, PyTree]:
        number, cohort, sizes, valid, messages = row
        limited = None if probing is None else probing(cohort)
        senders = Senders(cohort, jnp.arange(len(cohort)), groups=groups, probing=limited)
        channel = Channel(prepared.algorithm, senders, channel_key(prepared.inputs.seed_key, number))
        combined = channel.combine(messages, jnp.where(valid, sizes, 0), memory)
        advanced = jax.tree.map(lambda new, old: jnp.where(valid.any(), new, old), combined.memory, memory)
        return advanced, combined.aggregate

    rows = records.round, records.cohort, sizes, records.valid, records.scalars
    block = jax.tree.map(lambda column: jnp.asarray(column[start:]), rows)
    # The aggregates are outputs, too: without them the combiner would be another program, with other last bits.
    return jax.jit(lambda memory, block: lax.scan(one, memory, block))(memory, block)[0]
