"""A client of a federation: bytes in, bytes out. It keeps its data, and sends scalars.

A client keeps its parameters, its optimizer state and the number of the round that it stands at. It needs no trust in
what the server believes of it: an invitation that begins at another round, or at another history, is answered by where
the client stands, and the server sends what is missing. A new client, a lost disk, a torn file, a server that was
resumed from an older ledger and a client that is ahead of it are this one case.
"""

import logging
import struct
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from hiso_jax.checks import ParameterError
from hiso_jax.fed.devices import ExecutionSettings, memory_budget
from hiso_jax.fed.keys import channel_key, data_key, round_key
from hiso_jax.fed.ledger import fingerprint, sample
from hiso_jax.fed.measure import Keys
from hiso_jax.fed.population import draw_own
from hiso_jax.fed.round import Message, Visit, client_round
from hiso_jax.fed.run import as_key, fresh, make_evaluate
from hiso_jax.fed.task import at_precision, frozen_of, mean_metrics, perturbed_as_of
from hiso_jax.fed.task_checks import check_examples, example_shapes
from hiso_jax.fed.update import ServerState
from hiso_jax.network.catch_up import (
    CHECKPOINT,
    HEADER,
    SUMS,
    BadMessage,
    catch_up,
    content_of,
)
from hiso_jax.network.client_files import ClientFiles, Standing
from hiso_jax.network.description import are_near, read_description, run_of
from hiso_jax.network.envelope import NO_RUN, Envelope, Kind, opened, refusal, sealed
from hiso_jax.network.history import BEGIN, HISTORY_BYTES, after
from hiso_jax.network.parts import Parts
from hiso_jax.program_cache import compiled, keep_compiled

logger = logging.getLogger("hiso_jax")
# Flags of an invitation and of an answer.
HAS_FINGERPRINT, DIFFERS = 1, 1
FINGERPRINT_BYTES = 8
STANDING = struct.Struct("<If8s")
GREETING = struct.Struct("<If")


Build = Callable[[Mapping[str, Any]], Parts]
"""The options of a run's description → its parts, made from this machine's own code."""


class Client:
    """A client: :meth:`answer` takes the server's messages and returns its own. It never raises for a message.

    Args:
      folder: where it keeps its state and its secret; None keeps them in memory.
      data: its examples, a tree of arrays as the task's training examples; None takes the training examples of the task
        that ``build`` makes, from files of this machine.
      build: makes the parts of a run from the options in its description.
      number: its number in the population, if it may answer for no other.

    Raises:
      ParameterError: the data are no examples, or the folder cannot be used.
    """

    def __init__(self, folder: Path | None, data: PyTree | None, build: Build, number: int | None = None) -> None:
        """Check the data; nothing is compiled before the server describes its run."""
        keep_compiled()
        if data is not None:
            check_examples("data", data)
        self._folder, self._data, self._build, self._number = folder, data, build, number
        self._run: _Run | None = None
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ParameterError("folder", f"must be a folder that can be written: {error.strerror}") from error

    @property
    def examples(self) -> int:
        """The number of examples that it holds; 0 if they are a task's, before it was described."""
        return 0 if self._data is None else jax.tree.leaves(self._data)[0].shape[0]

    @property
    def standing(self) -> Standing | None:
        """Where it stands; None before a run was described to it."""
        return None if self._run is None else self._run.standing

    def save(self) -> None:
        """Write where it stands, before its process ends; a client without a folder has no state to keep."""
        if self._run is not None:
            self._run.save()

    def answer(self, message: bytes) -> bytes:
        """The answer to a message of the server: a refusal in one sentence if it is not one that this client obeys."""
        run, number, client = NO_RUN, 0, self._number or 0
        try:
            envelope = opened(message)
            run, number, client = envelope.run, envelope.round, envelope.client
            return self._answered(envelope)
        except (BadMessage, ParameterError) as error:
            return refusal(str(error), run, number, client)
        except Exception as error:  # a bug here must not end a client that others wait for
            logger.exception("a message of round %d could not be answered", number)
            return refusal(f"this client failed: {type(error).__name__}", run, number, client)

    def _answered(self, envelope: Envelope) -> bytes:
        if self._number is not None and envelope.client != self._number:
            raise BadMessage(f"this is client {self._number}, and the message is for client {envelope.client}")
        if envelope.kind is Kind.DESCRIBE:
            self._take_up(envelope)
            assert self._run is not None
            greeting = GREETING.pack(self._run.examples, self._run.seconds_a_direction)
            return sealed(envelope._replace(kind=Kind.HELLO, content=greeting + self._run.where()))
        if self._run is None or self._run.name != envelope.run:
            raise BadMessage("this client was not told of the run; the server describes it first")
        if envelope.kind is Kind.INVITE:
            return self._run.invited(envelope)
        if envelope.kind is Kind.EVALUATE:
            return self._run.asked_to_evaluate(envelope)
        raise BadMessage(f"a client takes no message of kind {envelope.kind.name}")

    def _take_up(self, envelope: Envelope) -> None:
        described = read_description(envelope.content)
        if run_of(envelope.content) != envelope.run:
            raise BadMessage("the description is of another run than its envelope says")
        if self._run is not None and self._run.name == envelope.run:
            return
        parts = self._build(described["about"])
        params = parts.initial()
        # The number of rounds and other options that move no bit may differ from those here.
        own = read_description(parts.description(params))
        for name, words in (
            ("parts", "its method is another than this machine's code makes"),
            ("params", "its model is another than this machine's code makes"),
            ("config", "its settings are others than this machine's code makes of them"),
            ("prng_impl", "its generator of random numbers is another"),
        ):
            if own[name] != described[name]:
                raise BadMessage(f"the run is refused: {words}")
        if not are_near(params, described["sample"]):
            raise BadMessage("the run is refused: its initial parameters are others than this machine makes")
        if self._data is None:
            check_examples("data", parts.task.train)
            self._data = parts.task.train
        _check_alike(self._data, parts.task.train)
        train, held_out = _split(self._data, described["held_out"])
        self._run = _Run(envelope.run, parts, params, train, held_out, self._folder, envelope.client)


def _check_alike(data: PyTree, like: PyTree) -> None:
    """Refuse examples that the run's task cannot read.

    Raises:
      ParameterError: an array is missing, unknown, or of another shape.
    """
    own, wanted = example_shapes(data), example_shapes(like)
    if own != wanted:
        raise ParameterError("data", f"must have arrays of examples of these shapes, {wanted}; got {own}")


def _split(data: PyTree, share: float) -> tuple[PyTree, PyTree | None]:
    """The examples to train on, and those held out for evaluation, the same at every start; None if none are.

    Raises:
      ParameterError: there are fewer than two examples to split.
    """
    count = jax.tree.leaves(data)[0].shape[0]
    if not share:
        return data, None
    if count < 2:
        raise ParameterError("data", f"must have two examples or more where some are held out, got {count}")
    order = np.random.default_rng(count).permutation(count)
    kept = min(max(1, round(share * count)), count - 1)
    train, held_out = np.sort(order[kept:]), np.sort(order[:kept])
    return jax.tree.map(lambda a: a[train], data), jax.tree.map(lambda a: a[held_out], data)


class _Run:
    """A client's part in a run."""

    def __init__(
        self,
        name: bytes,
        parts: Parts,
        params: PyTree,
        data: PyTree,
        held_out: PyTree | None,
        folder: Path | None,
        client: int,
    ) -> None:
        """Compile the client's program, and take up the state in the folder, if it is of this run."""
        self.name, self._parts, self._client = name, parts, client
        self._files = None if folder is None else ClientFiles(folder)
        self._forms = parts.forms(params)
        self._seed_key = jax.random.key(parts.config.seed)
        state = parts.algorithm.optimizer.init(params)
        self._start = Standing(0, BEGIN, params, state)
        self.standing = (self._files and self._files.found(name, self._start)) or self._start
        self.examples = jax.tree.leaves(data)[0].shape[0]
        # Padded to a power of two, so that clients of one machine share a compiled program.
        size = 1 << (self.examples - 1).bit_length()
        self._data = jax.tree.map(
            lambda a: jnp.pad(jnp.asarray(a), [(0, size - len(a))] + [(0, 0)] * (a.ndim - 1)), data
        )
        self._held_out = None if held_out is None else jax.tree.map(jnp.asarray, held_out)
        self._secret = None
        if parts.algorithm.needs_secret:
            # The key of this client's own noise, which it made and which never leaves it.
            self._secret = as_key(fresh()) if self._files is None else self._files.secret()
        self._warm_up()

    @cached_property
    def _measure(self) -> Callable[..., Message]:
        parts, config = self._parts, self._parts.config
        settings = ExecutionSettings(
            config.client_chunk, memory_budget(), config.directions, None, perturbed_as_of(parts.task)
        )
        loss = at_precision(parts.task.loss, config.matmul_precision)
        local = config.local_learning_rate
        shape = config.local_steps or 1, config.batch_size

        def measure(
            standing: tuple[PyTree, Any], number: Any, client: Any, place: Any, data: PyTree, count: Any, rate: Any,
            frozen: PyTree, secret: Any,
        ) -> Message:  # fmt: skip
            estimator = parts.estimator if rate is None else parts.estimator._replace(local_learning_rate=rate)
            run = client_round(loss, parts.algorithm, estimator, settings, config.answers)

            rows = draw_own(data_key(self._seed_key, number), client, count, shape)
            batches = jax.tree.map(lambda a: a[rows], data)
            own = None if secret is None else channel_key(secret, number)
            keys = Keys(round_key(self._seed_key, number), channel_key(self._seed_key, number), number, own)
            return run(ServerState(*standing), keys, Visit(client, place, batches), frozen)

        rate = None if callable(local) or local is None else float(local)
        frozen = frozen_of(parts.task)

        def arguments(standing: Standing, number: int, place: int) -> tuple[Any, ...]:
            numbers = jnp.int32(number), jnp.int32(self._client), jnp.int32(place)
            own = self._data, jnp.int32(self.examples)
            return (standing.params, standing.state), *numbers, *own, rate, frozen, self._secret

        # Clients of one process whose programs are equal share them.
        program = compiled(jax.jit(measure).lower(*arguments(self._start, 0, 0)), None)
        return lambda *given: jax.block_until_ready(program(*arguments(*given)))

    @cached_property
    def _metrics(self) -> Callable[[PyTree], Mapping[str, Any]]:
        """Parameters → the metrics of every example held out."""
        task, frozen = self._parts.task, frozen_of(self._parts.task)
        evaluate = jax.jit(make_evaluate(at_precision(task.metrics, self._parts.config.matmul_precision)))
        return lambda params: jax.block_until_ready(evaluate(params, self._held_out, frozen))

    def asked_to_evaluate(self, envelope: Envelope) -> bytes:
        """The sums of the metrics over the examples held out, in the order of their names, and their number."""
        if self._held_out is None:
            raise BadMessage("this run holds no examples out, so a client evaluates nothing")
        stands = self._moved(envelope)
        if stands is not None:
            return stands
        values = mean_metrics(self._parts.task, self._metrics(self.standing.params))
        sums = [float(np.sum(np.asarray(each), dtype=np.float64)) for each in values.values()]
        count = jax.tree.leaves(self._held_out)[0].shape[0]
        self._save_if_cheap()
        content = struct.pack(f"<I{len(sums)}d", count, *sums)
        return sealed(envelope._replace(kind=Kind.METRICS, flags=0, content=content))

    def _warm_up(self) -> None:
        """Compile everything before the first deadline runs, and time a direction."""
        self._measure(self._start, 0, 0)
        if self._held_out is not None:
            self._metrics(self._start.params)
        form, config = self._forms.down, self._parts.config
        row = bytes(form.round_bytes(b"", 0))
        begin = HEADER.pack(0, 1) + row

        def once() -> float:
            before = time.perf_counter()
            self._caught_up(begin, self._start)
            return time.perf_counter() - before

        once()
        directions = self._parts.estimator.measure.directions(config.local_steps or 1, form.perturbations)
        self.seconds_a_direction = once() / max(directions, 1)

    def _caught_up(self, message: bytes, standing: Standing) -> tuple[PyTree, Any]:
        params, state, _ = catch_up(
            message, standing.params, standing.state, self._parts.algorithm,
            form=self._forms.down, clients=self._parts.config.answers, seed_key=self._seed_key,
        )  # fmt: skip
        return params, state

    def where(self) -> bytes:
        """Where the client stands, as bytes."""
        return STANDING.pack(self.standing.round, self.seconds_a_direction, self.standing.history)

    def _moved(self, envelope: Envelope) -> bytes | None:
        """Catch up by a message of the server; its answer if the client stands elsewhere than the message begins."""
        content, own = envelope.content, envelope.flags & HAS_FINGERPRINT
        head = 2 * HISTORY_BYTES + FINGERPRINT_BYTES * own + HEADER.size
        if len(content) < head:
            raise BadMessage(f"an invitation has at least {head} bytes inside, got {len(content)}")
        begin, end = content[:HISTORY_BYTES], content[HISTORY_BYTES : 2 * HISTORY_BYTES]
        body = content[head - HEADER.size :]
        first, count = HEADER.unpack_from(body)
        if envelope.place >= self._parts.config.cohort:
            raise BadMessage(f"place {envelope.place} is outside a cohort of {self._parts.config.cohort}")
        if count != CHECKPOINT and (first != self.standing.round or begin != self.standing.history):
            return sealed(envelope._replace(kind=Kind.STANDS, flags=0, content=self.where()))
        if count not in (CHECKPOINT, SUMS) and first + count != envelope.round:
            raise BadMessage(f"the rounds end at {first + count}, and the invitation is to round {envelope.round}")
        if count not in (CHECKPOINT, SUMS):
            made = after(self.standing.history, body[HEADER.size :], count, self._forms.down)
            if made != end:
                raise BadMessage("the rounds lead to another history than the invitation says")
        if count == 0 and len(body) == HEADER.size:
            params, state = self.standing.params, self.standing.state
        else:
            params, state = self._caught_up(body, self.standing)
        self.standing = Standing(envelope.round, end, params, state)
        return None

    def invited(self, envelope: Envelope) -> bytes:
        """The answer to an invitation: the client's scalars, or where it stands."""
        stands = self._moved(envelope)
        if stands is not None:
            return stands
        own, params = envelope.flags & HAS_FINGERPRINT, self.standing.params
        mark = slice(2 * HISTORY_BYTES, 2 * HISTORY_BYTES + FINGERPRINT_BYTES)
        expected = envelope.content[mark] if own else None
        flags, differing = 0, b""
        if expected is not None and bytes.fromhex(fingerprint(jax.tree.map(np.asarray, params)))[:8] != expected:
            flags, differing = DIFFERS, np.asarray(sample(params), "<f4").tobytes()
        message = self._measure(self.standing, envelope.round, envelope.place)
        self._save_if_cheap()
        loss = b"" if self._parts.algorithm.needs_secret else struct.pack("<f", float(message.loss))
        answer = loss + content_of(jax.tree.map(np.asarray, message.content)) + differing
        return sealed(envelope._replace(kind=Kind.ANSWER, flags=flags, content=answer))

    def _save_if_cheap(self) -> None:
        if self._files is not None and self._files.is_cheap:
            self.save()

    def save(self) -> None:
        """Write where the client stands, as one file that is replaced whole."""
        if self._files is not None:
            self._files.save(self.name, self.standing)
