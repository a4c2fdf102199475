"""``hiso-jax join``: a client of a federation over a network."""

import importlib.util
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from rich.console import Console

from hiso_jax import network
from hiso_jax.checks import ParameterError
from hiso_jax.choices import is_foreign
from hiso_jax.cli import errors
from hiso_jax.cli.arguments import Positional
from hiso_jax.cli.restore import options_of
from hiso_jax.cli.serve import dying_with_this_process, ended, environment, program
from hiso_jax.experiment import KINDS, choice_of, is_language_model
from hiso_jax.network.study import remote_experiment

# The SuperNode's log, and seconds before it is started again.
LOG, AGAIN = "supernode.log", 3.0


@dataclass(frozen=True, kw_only=True)
class Join:
    """Join a federation with this machine's data: a client of hiso-jax serve. Only scalars and counts leave it.

    Attributes:
      server: HOST:PORT of the server.
      data: examples of this client: an .npz file with the arrays of the task's training examples (input and label,
        say), or FILE.py:FUNCTION, which returns them; without it the task reads its training examples from --data-dir.
      client: this client's number, 0 to N − 1.
      folder: where it keeps its state; by default hiso-client-NUMBER.
      task: this machine's own task, FILE:NAME, for a run whose task is the server's own code.
      algorithm: this machine's own method, FILE:NAME, for a run whose method is the server's own code.
      model: the language model's file or folder on this machine.
      data_dir: folder of files that the run's task reads.
      certificates: file with the server's root certificate, for TLS.
      key: file with this node's private key, if the server admits known keys only.
    """

    server: Annotated[str, Positional]
    data: str | None = None
    client: int = 0
    folder: Path | None = None
    task: str | None = None
    algorithm: str | None = None
    model: str | None = None
    data_dir: Path | None = None
    certificates: Path | None = None
    key: Path | None = None


def builder(options: Join) -> Callable[[Mapping[str, Any]], network.Parts]:
    """The function that makes a run's parts from the options in its description, with this machine's own code."""

    def build(about: Mapping[str, Any]) -> network.Parts:
        again = {
            name: given for name in ("task", "algorithm") if (given := getattr(options, name)) and is_foreign(given)
        }
        for name in ("task", "algorithm", "schedule"):
            if isinstance(about.get(name), str) and is_foreign(about[name]) and name not in again:
                raise ParameterError(name, f"is {about[name]} in this run, the server's own code: join with --{name}")
        made = options_of(about, again, tuple(KINDS))
        moved = {"model": options.model, "data_dir": options.data_dir}
        moved = {name: value for name, value in moved.items() if value is not None and hasattr(made, name)}
        made = replace(made, **moved)
        if options.data is None:
            return network.parts_of(remote_experiment(made, ("train",)))
        if is_language_model(choice_of("task", made)):
            raise ParameterError(
                "data", f"is for arrays; {made.task} reads text: join with --data-dir, a folder of files"
            )
        return network.parts_of(remote_experiment(made, ()))

    return build


def data_of(given: str) -> dict[str, np.ndarray]:
    """The examples that ``--data`` names.

    Raises:
      ParameterError: they cannot be read.
    """
    name, colon, function = given.rpartition(":")
    if colon and name.endswith(".py"):
        spec = importlib.util.spec_from_file_location("hiso_client_data", name)
        if spec is None or spec.loader is None or not Path(name).exists():
            raise ParameterError("data", f"must name a Python file, {name} is none")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            raise ParameterError("data", f"must name a function of {name}; it has no {function}")
        return getattr(module, function)()
    try:
        with np.load(given, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except (OSError, ValueError, AttributeError) as error:
        raise ParameterError("data", f"must be an .npz file of arrays or FILE.py:FUNCTION; {given}: {error}") from error


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def join(options: Join, console: Console) -> int:
    """Answer the server until Ctrl-C, and return the exit code.

    Raises:
      UsageError: the data or the folder cannot be used, or Flower is missing.
    """
    folder = options.folder or Path(f"hiso-client-{options.client}")
    with errors.refusing():
        if ":" not in options.server:
            raise ParameterError("server", f"must be HOST:PORT, got {options.server}")
        if options.data is None and options.data_dir is None:
            raise ParameterError("data", "must be given, or `data_dir`, from which the task reads its examples")
        data = None if options.data is None else data_of(options.data)
        client = network.Client(folder, data, builder(options), options.client)
    stopping: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.append(1))
    with tempfile.TemporaryDirectory(prefix="hiso-join-") as place:
        path = Path(place) / "worker"
        node: list[subprocess.Popen] = []

        def notify(line: str) -> None:
            console.print(f"client {options.client}, {line}", soft_wrap=True, highlight=False, markup=False)

        def is_over() -> bool:
            # A SuperNode that ended is started again: it and the worker live together.
            if not stopping and (not node or node[-1].poll() is not None):
                if node:
                    log = (Path(place) / LOG).read_text(errors="replace").strip().splitlines()
                    notify(f"its SuperNode ended and is started again: {log[-1] if log else 'it said nothing'}")
                    time.sleep(AGAIN)
                node[:] = [_supernode(options, path, Path(place))]
            return bool(stopping)

        held = f"{client.examples:,} examples" if options.data else f"what the task reads from {options.data_dir}"
        console.print(
            f"client {options.client} joins {options.server} with {held}; its state is in {folder}",
            soft_wrap=True,
            highlight=False,
        )
        try:
            network.work(client, path, notify, is_over)
        finally:
            for each in node[-1:]:
                ended(each)
    client.save()
    return errors.DONE


def _supernode(options: Join, path: Path, place: Path) -> subprocess.Popen:
    command = [program("flower-supernode"), "--superlink", options.server, "--port", str(_free_port())]
    command += ["--node-config", f'socket="{path}" client={options.client}']
    command += ["--insecure"] if options.certificates is None else ["--root-certificates", str(options.certificates)]
    command += [] if options.key is None else ["--auth-supernode-private-key", str(options.key)]
    home = place / "flower"
    home.mkdir(exist_ok=True)
    with (place / LOG).open("ab") as log:
        return subprocess.Popen(
            command,
            env=environment(home),
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=dying_with_this_process(),
        )
