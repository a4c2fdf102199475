"""Damage and forge files that a stranger may hand over, and check that every command answers in one sentence.

    python -m tests.fuzz --cases 5000 --seed 1

Ledgers, deltas, folders of language models, GGUF files and files of text are altered by a grammar. In a damaged file,
bytes are flipped, cut or inserted. In a forged file, any entry of its JSON is replaced by an adversary's value, and
every digest is computed again. Each case has a time limit. A case fails if a command shows a traceback, ends with an
undocumented exit code, prints more than one line of error, hangs, prints a control character, or loads rounds that the
file did not hold.
"""

import argparse
import collections
import contextlib
import copy
import functools
import hashlib
import io
import json
import random
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hiso_jax import fed
from hiso_jax.cli.main import main
from hiso_jax.fed.ledger import LEDGER, frames
from tests.tasks.text.problems import data_folder, model_folder, reviews

SECONDS = 60
CODES = (0, 2, 3)
# Exit codes of a command that SIGINT or SIGTERM stopped.
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
# The first run and the first export compile.
SETUP_SECONDS = 600
RUN = ["--rounds", "6", "--clients", "20", "--cohort", "3", "--perturbations", "2", "--eval-every", "3"]
DEEP = "[" * 100_000
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, -(2**40), 0.5, -0.0, 1e308, -1e308, "", "x", "x" * 5000,
    "\x1b[31mred\n  integrity    signed by the author", "../../etc/passwd", "/dev/zero", "(a+)+$", "٣", "\ud800", [],
    {},
    [[]], [None], [-1], [2**40, 2**40], {"a": 1}, [1] * 1000, "hiso", "decomfl", "os:system", "{x:>999999999}",
]  # fmt: skip


class Hangs(KeyboardInterrupt):
    """A case took too long; no handler may mistake this for trouble with a file."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[list[bool]]:
    """Raise :class:`Hangs` after ``seconds``; the yielded list is not empty then."""
    rang: list[bool] = []

    def ring(number: int, frame: Any) -> None:
        rang.append(True)
        raise Hangs

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield rang
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def call(*arguments: object, seconds: int = SECONDS) -> str | None:
    """The fault in the command's answer within ``seconds``, or None."""
    out, errors = io.StringIO(), io.StringIO()
    code: Any = None
    rang: list[bool] = []
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            with limited(seconds) as rang:
                main([str(argument) for argument in arguments])
        except SystemExit as ending:
            code = ending.code
            if code in STOPPED and rang:
                return f"hangs: {arguments}"
            if code in STOPPED:
                # A user stopped this program: the command handles signals for it.
                raise
        except Hangs:
            return f"hangs: {arguments}"
        except BaseException:
            return f"{arguments}: {traceback.format_exc()}"
    said, reported = out.getvalue(), errors.getvalue()
    lines = [line for line in reported.splitlines() if line.startswith("hiso-jax: error")]
    acting = [character for character in said + reported if not character.isprintable() and character != "\n"]
    if "Traceback" in reported or code not in CODES:
        return f"{arguments}: code {code}, {reported[-2000:]}"
    if (code == 2) != (len(lines) == 1) or acting:
        return f"{arguments}: code {code}, control characters {acting[:5]}, {reported[-2000:]}"
    return None


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path to every entry of a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from places(item, (*path, name))


def with_entry(content: Any, chance: random.Random) -> Any:
    """The same JSON with one entry replaced, removed or added."""
    content = copy.deepcopy(content)
    path = chance.choice([place for place in places(content) if place] or [()])
    if not path:
        return chance.choice(VALUES)
    node = content
    for name in path[:-1]:
        node = node[name]
    if chance.random() < 0.15:
        del node[path[-1]]
    elif isinstance(node, dict) and chance.random() < 0.1:
        node[chance.choice(["x", "", "\n", "rounds", "__proto__"])] = chance.choice(VALUES)
    else:
        node[path[-1]] = chance.choice(VALUES)
    return content


def as_text(content: Any, chance: random.Random) -> bytes:
    """The bytes of a JSON file; now and then they are not valid JSON."""
    text = json.dumps(content)
    kind = chance.random()
    if kind < 0.03:
        return DEEP.encode()
    if kind < 0.06:
        return text.replace("null", chance.choice(["NaN", "Infinity", "1e999"])).encode()
    if kind < 0.08:
        return text.encode() + b"\xff"
    return text.encode("utf-8", "replace")


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Some bytes flipped, cut out, or put in."""
    content = bytearray(content)
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        place = chance.randrange(max(len(content), 1))
        kind = chance.random()
        if kind < 0.4 and content:
            content[place] ^= 1 << chance.randrange(8)
        elif kind < 0.6:
            del content[place : place + chance.choice([1, 10, 1000, 10**9])]
        elif kind < 0.8:
            content[place:place] = chance.randbytes(chance.choice([1, 16, 300]))
        else:
            content[place : place + 8] = b"\xff" * 8
    return bytes(content)


def forged_ledger(content: bytes, chance: random.Random) -> bytes:
    """A ledger in which one entry or some rows are replaced, with every digest in order."""
    kept = [(frame.kind, bytes(frame.payload)) for frame in frames.read_frames(content)]
    number = chance.choice([0, 0, 0, *range(len(kept))])
    kind, payload = kept[number]
    if kind == b"RNDS":
        payload = chance.choice([damaged(payload, chance), payload * 2, b"", payload[:-1]])
    elif chance.random() < 0.9:
        payload = as_text(with_entry(json.loads(payload), chance), chance)
    else:
        kind = chance.choice([b"RNDS", b"SEAL", b"MORE", b"ENV ", b"XXXX", b"EVAL"])
    kept[number] = kind, payload
    if chance.random() < 0.15:
        kept.insert(chance.randrange(len(kept)), chance.choice(kept))
    chain = hashlib.sha256(frames.MAGIC)
    return frames.MAGIC + b"".join(frames.frame_bytes(kind, payload, chain) for kind, payload in kept)


def forged_delta(content: bytes, chance: random.Random) -> bytes:
    """A delta in which one entry of the header, or one tensor, is replaced, with every digest in order."""
    from safetensors.numpy import load, save

    length = int.from_bytes(content[:8], "little")
    header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["hiso_jax"])
    tensors = load(content)
    if chance.random() < 0.25:
        name = chance.choice(list(tensors))
        made: Any = tensors[name]
        tensors[name] = chance.choice(
            [made[:-1], made.astype(np.float64), np.zeros((2, 3), np.int8), np.full_like(made, 255), made.reshape(-1)]
        )
        if made.dtype == np.float32:
            tensors[name] = chance.choice([tensors[name], made * np.float32("nan"), made * np.float32(1e30)])
        array = tensors[name]
        label = f"{array.shape} {array.dtype}\n".encode()
        header["sha256"][name] = hashlib.sha256(label + np.ascontiguousarray(array).tobytes()).hexdigest()
    else:
        header = with_entry(header, chance)
    text = as_text(header, chance).decode("utf-8", "replace")
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return save(tensors, metadata={"hiso_jax": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})


class Fuzz:
    """The files that are altered, and a method for each kind of case."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder, self.chance = folder, chance
        self.run = folder / "run"
        assert call("run", *RUN, "--out", self.run, seconds=SETUP_SECONDS) is None
        self.ledger = (self.run / LEDGER).read_bytes()
        self.rows = fed.load(self.run).rows
        assert call("export", self.run, "--out", folder / "delta.safetensors", seconds=SETUP_SECONDS) is None
        self.delta = (folder / "delta.safetensors").read_bytes()
        self.model = model_folder(folder / "model")
        self.data = data_folder(folder / "data")
        self.case = folder / "case"

    def fresh(self) -> Path:
        """An empty folder for a case."""
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir()
        return self.case

    def damaged_ledger(self) -> str | None:
        """A damaged ledger: no round that is loaded may differ from the written one."""
        path = self.fresh() / LEDGER
        content = damaged(self.ledger, self.chance)
        path.write_bytes(content)
        try:
            with limited(SECONDS):
                found = fed.load(path, unfinished=True)
        except ValueError:
            return call("show", path)
        except BaseException:
            return traceback.format_exc()
        if found.rows.tobytes() != self.rows[: len(found.rows)].tobytes():
            return "wrong rounds were loaded"
        return call("show", path)

    def forged_ledger(self) -> str | None:
        """A forged ledger, read by every command that reads a run."""
        folder = self.fresh()
        (folder / LEDGER).write_bytes(forged_ledger(self.ledger, self.chance))
        commands = [
            ("show", folder),
            ("show", folder, "--salvage", folder / "salvaged"),
            ("replay", folder, "--unfinished"),
            ("export", folder, "--unfinished"),
        ]
        if self.chance.random() < 0.3:
            commands.append(("run", "--resume", folder))
        return next(filter(None, (call(*command) for command in commands)), None)

    def forged_config(self) -> str | None:
        """The forged options of a run that has not begun."""
        folder = self.fresh()
        content = with_entry(json.loads((self.run / "config.json").read_text()), self.chance)
        (folder / "config.json").write_bytes(as_text(content, self.chance))
        return call("run", "--resume", folder, "--rounds", "6") if self.chance.random() < 0.5 else None

    def _delta(self, content: bytes) -> str | None:
        path = self.fresh() / "delta.safetensors"
        path.write_bytes(content)
        again = ("apply", path, "--out", self.case / "out.safetensors", "--accept-difference")
        return call("show", path) or call(*again)

    def damaged_delta(self) -> str | None:
        """A delta whose bytes were altered."""
        return self._delta(damaged(self.delta, self.chance))

    def forged_delta(self) -> str | None:
        """A delta whose digests are in order."""
        return self._delta(forged_delta(self.delta, self.chance))

    def _text(self, model: Path, data: Path) -> str | None:
        options = ["--rounds", "1", "--clients", "4", "--cohort", "2", "--perturbations", "1", "--test-rows", "4"]
        words = [
            "--template",
            "{text} It was",
            "--verbalizer",
            " bad, good",
            "--trainable",
            "lora",
            "--batch-size",
            "2",
        ]
        where = ["--model", model, "--data-dir", data, "--out", self.case / "run", "--learning-rate", "1e-3"]
        return call("run", "--task", "text-classification", *words, *where, *options)

    def model_folder(self) -> str | None:
        """A language model's folder, one of its files damaged or forged."""
        folder = shutil.copytree(self.model, self.fresh() / "model")
        path = self.chance.choice([path for path in sorted(folder.iterdir()) if path.is_file()])
        if path.suffix == ".json" and self.chance.random() < 0.7:
            path.write_bytes(as_text(with_entry(json.loads(path.read_text()), self.chance), self.chance))
        elif path.name == "config.json":
            content = json.loads(path.read_text())
            name = self.chance.choice(list(content))
            path.write_text(json.dumps({**content, name: self.chance.choice([2**31, 10**9, -1, 0, "4", [4], 1e9])}))
        elif self.chance.random() < 0.2:
            index = {"weight_map": {"a": self.chance.choice(["../x.safetensors", "/dev/zero", "a/b", "", 3, None])}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        else:
            path.write_bytes(damaged(path.read_bytes(), self.chance))
        return self._text(folder, self.data)

    def text_file(self) -> str | None:
        """A file of rows, damaged or with replaced rows."""
        folder = shutil.copytree(self.data, self.fresh() / "data")
        path = self.chance.choice(sorted(folder.iterdir()))
        rows = reviews(6)
        kind = self.chance.random()
        if kind < 0.4:
            path.write_bytes(damaged(path.read_bytes(), self.chance))
        elif kind < 0.8:
            rows[self.chance.randrange(6)][self.chance.choice(["text", "label", "x"])] = self.chance.choice(VALUES)
            path.write_bytes(b"\n".join(as_text(row, self.chance) for row in rows))
        else:
            path.write_bytes(self.chance.choice([b"", b"\n\n", b"[]", b"{}", b"null", DEEP.encode(), b"\x00" * 100]))
        return self._text(self.model, folder)

    def gguf(self) -> str | None:
        """A GGUF file whose header claims content that the file does not hold."""
        path = self.fresh() / "model.gguf"
        huge = self.chance.choice([0, 1, 2**31, 2**60, 2**64 - 1])
        content = b"GGUF" + struct.pack("<IQQ", self.chance.choice([2, 3, 99]), huge, self.chance.choice([1, 2, huge]))
        key = b"general.architecture"
        content += struct.pack("<Q", self.chance.choice([len(key), huge])) + key
        content += struct.pack("<IIQ", self.chance.choice([8, 9, 77]), self.chance.choice([0, 4, 9, 8]), huge)
        path.write_bytes(content + self.chance.randbytes(self.chance.choice([0, 9, 200])))
        return self._text(path, self.data)

    @property
    def kinds(self) -> list[tuple[Callable[[], str | None], int]]:
        """The kinds of cases, and their relative frequencies."""
        return [
            (self.damaged_ledger, 6),
            (self.forged_ledger, 5),
            (self.damaged_delta, 4),
            (self.forged_delta, 4),
            (self.forged_config, 1),
            (self.model_folder, 2),
            (self.text_file, 2),
            (self.gguf, 1),
        ]


def fuzz(
    cases: int, seed: int, *, stop_at: int = 20, say: Callable[[str], None] = lambda line: None
) -> tuple[collections.Counter, list[str]]:
    """Run ``cases`` cases; return the number of each kind and the failures. ``say`` receives progress lines."""
    chance, failures = random.Random(seed), []
    count: collections.Counter = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Fuzz(Path(folder), chance)
        kinds, weights = zip(*bench.kinds, strict=True)
        for number in range(cases):
            (kind,) = chance.choices(kinds, weights)
            wrong = kind()
            count[kind.__name__] += 1
            if number % 100 == 99:
                say(f"{number + 1} of {cases} cases, {len(failures)} wrong")
            if wrong:
                failures.append(f"case {number}, {kind.__name__}: {wrong}")
                say(failures[-1])
                if len(failures) >= stop_at:
                    break
    return count, failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    # Standard output is redirected during a command, so progress goes to the original one.
    counted, wrong = fuzz(given.cases, given.seed, say=functools.partial(print, file=sys.__stdout__, flush=True))
    print(f"{sum(counted.values())} cases, {len(wrong)} wrong: {dict(counted)}")
    sys.exit(bool(wrong))
