"""``hiso-jax serve``: the server of a federation over a network."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from rich.console import Console

from hiso_jax import network
from hiso_jax.checks import ParameterError
from hiso_jax.cli import errors
from hiso_jax.cli.arguments import Positional
from hiso_jax.network.study import Study, experiment_of, key_files, read_study, rehearsed, run_study, whole_experiment
from hiso_jax.reports import create_directory

# Seconds for the SuperLink to listen, and for a process to end once it is asked to.
LISTENING, ENDING = 30.0, 10.0


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Run a study over a network: the server of a federation, whose clients join with hiso-jax join.

    Attributes:
      study: TOML file with the options of run, and a table [network].
      out: directory to write, which must not exist; by default a new one under runs/.
      resume: directory of a run to continue.
      dry_run: run clients in this process, with shares of the task's own training examples, and no network.
      host: address to listen at.
      port: port to listen at.
      certificates: folder with ca.crt, server.pem and server.key, for TLS.
    """

    study: Annotated[Path, Positional]
    out: Path | None = None
    resume: Path | None = None
    dry_run: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    certificates: Path | None = None


def serve(options: Serve, console: Console) -> int:
    """Serve a study, and return the exit code.

    Raises:
      UsageError: the study, the directory or the address cannot be used.
    """
    with errors.refusing():
        study = read_study(options.study)
        # Refuse options before anything listens.
        made = whole_experiment(study) if options.dry_run else experiment_of(study)
        network.check_server(network.parts_of(made), study.clients, study.network)
        if options.resume is not None and options.out is not None:
            raise ParameterError("out", "must not be given beside `resume`")
        out = options.resume or create_directory(options.out, study.title.replace(" ", "-"), made.about)
    if not options.dry_run:
        return _flower(options, study, out, console)
    with errors.refusing():
        try:
            result = run_study(
                study, rehearsed(made), out=out, resume=options.resume is not None,
                say=lambda line: console.print(line, soft_wrap=True, highlight=False), experiment=made,
            )  # fmt: skip
        except network.NobodyCame as error:
            raise errors.Stopped(str(error)) from error
    console.print(f"{result.rounds} rounds; written to {out}", soft_wrap=True, highlight=False)
    return errors.DIVERGED if result.diverged_at is not None else errors.DONE


def program(name: str) -> str:
    """A program of Flower, of this environment.

    Raises:
      UsageError: it is not installed.
    """
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise errors.UsageError(f"a network needs Flower, and {name} is not here; pip install '.[flower]' installs it")
    return found


def environment(home: Path) -> dict[str, str]:
    """The environment of Flower's programs: a home of their own, no telemetry, quick polling."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {
        **os.environ,
        "PATH": path,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
    }


def dying_with_this_process() -> Callable[[], None]:
    """A function for a new process, on Linux: by it the new process ends when this one dies."""
    parent = os.getpid()

    def prepare() -> None:
        try:
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        except (OSError, AttributeError):
            return
        # It may have died before.
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

    return prepare


def ended(process: subprocess.Popen) -> None:
    """End a process and what it started."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            break
        try:
            os.killpg(process.pid, number)
            process.wait(ENDING)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _flower(options: Serve, study: Study, out: Path, console: Console) -> int:
    with tempfile.TemporaryDirectory(prefix="hiso-serve-") as place:
        home, app = Path(place) / "flower", Path(place) / "app"
        home.mkdir()
        shutil.copytree(str(files("hiso_jax.network").joinpath("flower_app")), app)
        address, own = f"{options.host}:{options.port}", environment(home)
        link = [program("flower-superlink"), "--host", options.host, "--port", str(options.port)]
        link += ["--disable-runtime-dependency-installation"]
        if options.certificates is None:
            link, connection = [*link, "--insecure"], "insecure = true"
        else:
            ca, certificate, key = (options.certificates / name for name in ("ca.crt", "server.pem", "server.key"))
            link += ["--ssl-ca-certfile", str(ca), "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
            connection = f'root-certificates = "{ca.resolve()}"'
        if study.keys is not None:
            link.append("--enable-supernode-auth")
        _config(home, address, connection)
        log = home / "superlink.log"
        superlink = _started(link, own, log)
        try:
            _wait(options, superlink, log)
            _register(study, own)
            console.print(f"listening at {address}; clients join with: hiso-jax join {address} …", highlight=False)
            given = {"study": options.study.resolve(), "out": out.resolve()}
            given |= {"resume": options.resume.resolve()} if options.resume is not None else {}
            text = "\n".join(f'{name} = "{value}"' for name, value in given.items())
            (home / "run.toml").write_text(text + "\n")
            command = [program("flwr"), "run", str(app), "hiso", "--stream", "--run-config", str(home / "run.toml")]
            run = subprocess.Popen(
                command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                preexec_fn=dying_with_this_process(),
            )  # fmt: skip
            try:
                return _followed(run, out, console)
            finally:
                ended(run)
        finally:
            ended(superlink)


def _register(study: Study, own: Mapping[str, str]) -> None:
    """Tell the SuperLink the keys of the nodes that it admits.

    Raises:
      UsageError: a key is refused.
    """
    for file in [] if study.keys is None else key_files(study.keys):
        done = subprocess.run(
            [program("flwr"), "supernode", "register", str(file), "hiso"], env=dict(own), capture_output=True, text=True
        )
        if done.returncode:
            raise errors.UsageError(f"must name public keys that Flower takes; {file}: {done.stderr.strip()}", "keys")


def _config(home: Path, address: str, connection: str) -> None:
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "hiso"\n\n[superlink.hiso]\naddress = "{address}"\n{connection}\n'
    )


def _started(command: list[str], own: Mapping[str, str], log: Path) -> subprocess.Popen:
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            env=dict(own),
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=dying_with_this_process(),
        )


def _wait(options: Serve, superlink: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + LISTENING
    while time.monotonic() < until and superlink.poll() is None:
        try:
            socket.create_connection((options.host, options.port), 0.5).close()
            return
        except OSError:
            time.sleep(0.1)
    last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
    raise errors.UsageError(f"cannot be listened at: {last}", "port")


def _followed(run: subprocess.Popen, out: Path, console: Console) -> int:
    """Print what the run says until it ends; its directory tells how."""
    summary = out / "summary.json"
    # A run that is continued has the summary of its first part.
    before = summary.stat().st_mtime_ns if summary.exists() else 0
    assert run.stdout is not None
    for line in run.stdout:
        console.print(line.rstrip(), soft_wrap=True, highlight=False, markup=False)
        if summary.exists() and summary.stat().st_mtime_ns > before:
            break
    else:
        run.wait()
    if not summary.exists() or summary.stat().st_mtime_ns == before:
        raise errors.Stopped(f"the run did not end; hiso-jax serve … --resume {out} goes on with it")
    console.print(f"written to {out}; hiso-jax show, replay and export read it as any run", highlight=False)
    return errors.DONE
