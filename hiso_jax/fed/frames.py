"""A file that only grows, by frames, each sealed by a SHA-256 over every byte before it (``docs/formats.md``).

    magic   8 bytes: ``HiSoLog`` and the format's version
    frame   length  uint32, little-endian: bytes of payload
            kind    4 ASCII characters
            check   uint32: CRC-32 of the eight bytes before it
            payload
            digest  32 bytes: SHA-256 of every byte of the file before it

The check tells a length that was altered from a frame that was cut short.
"""

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path
from typing import Any, NamedTuple

VERSION = 1
MAGIC = b"HiSoLog" + bytes([VERSION])
HEAD = struct.Struct("<I4sI")
DIGEST = hashlib.sha256().digest_size


class Frame(NamedTuple):
    """One frame as it was read.

    Attributes:
      kind: four characters.
      payload: its bytes.
      digest: SHA-256 of every byte before it, 32 bytes.
      end: where in the file it ends.
    """

    kind: bytes
    payload: memoryview
    digest: bytes
    end: int


class Altered(ValueError):
    """A frame is not what was written; ``at`` is where it begins."""

    def __init__(self, reason: str, at: int) -> None:
        """``reason`` as a clause that follows the name of the frame."""
        super().__init__(reason)
        self.at = at


def read_frames(content: bytes) -> Iterator[Frame]:
    """The frames of a file, one by one, up to the first that is cut short: what a kill leaves of the last one.

    Raises:
      Altered: a frame whose bytes are all there is not what was written. The last frame of a file is not told from
        one that a power failure left half written.
      ValueError: the file is no such file, or of another version.
    """
    if content[: len(MAGIC) - 1] != MAGIC[:-1]:
        raise ValueError("it does not begin as a ledger does")
    if content[: len(MAGIC)] != MAGIC:
        raise ValueError(f"it has another format than version {VERSION}, which this release reads")
    view, chain, begin = memoryview(content), hashlib.sha256(MAGIC), len(MAGIC)
    while begin + HEAD.size <= len(content):
        length, kind, check = HEAD.unpack_from(content, begin)
        if check != zlib.crc32(view[begin : begin + 8]):
            if not any(view[begin:]):
                return  # blocks that the file system had set aside, not yet written
            raise Altered("has an altered beginning", begin)
        body, end = begin + HEAD.size, begin + HEAD.size + length + DIGEST
        if end > len(content):
            return
        chain.update(view[begin : end - DIGEST])
        digest = chain.digest()
        if digest != content[end - DIGEST : end]:
            if end == len(content):
                return
            raise Altered("was altered: its SHA-256 is not that of the bytes before it", begin)
        yield Frame(kind, view[body : end - DIGEST], digest, end)
        chain.update(digest)
        begin = end


def write(file: RawIOBase, data: memoryview) -> int:
    """Write some of ``data``; how many bytes it was."""
    return file.write(data) or 0


class FrameWriter:
    """Appends frames to a file; what :meth:`add` was given is on disk once :meth:`sync` returns."""

    def __init__(self, path: Path, content: bytes) -> None:
        """Continue the file at ``path``, whose good frames are ``content``; what follows them is cut off."""
        self._file = path.open("r+b", buffering=0)
        self._chain, self._end = hashlib.sha256(content), len(content)
        self._synced_chain, self._pending = self._chain.copy(), bytearray()
        self._file.truncate(self._end)
        self._file.seek(self._end)

    @staticmethod
    def create(path: Path, kind: bytes, payload: bytes) -> None:
        """Make a file with one frame, or none at all: it appears under its name once it is on disk.

        Raises:
          FileExistsError: there is one.
        """
        if path.exists():
            raise FileExistsError(path)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(MAGIC)
        writer = FrameWriter(temporary, MAGIC)
        writer.add(kind, payload)
        writer.close()
        os.replace(temporary, path)
        sync_directory(path.parent)

    def add(self, kind: bytes, payload: bytes) -> bytes:
        """Add a frame and return its digest."""
        head = struct.pack("<I4s", len(payload), kind)
        frame = head + struct.pack("<I", zlib.crc32(head)) + payload
        self._chain.update(frame)
        digest = self._chain.digest()
        self._chain.update(digest)
        self._pending += frame + digest
        return digest

    def sync(self) -> None:
        """Write what was added and wait until it is on disk.

        Raises:
          OSError: it cannot be written; the file then is as it was after the last sync.
        """
        if not self._pending:
            return
        rest = memoryview(bytes(self._pending))
        try:
            while rest:
                rest = rest[write(self._file, rest) :]
            os.fsync(self._file.fileno())
        except OSError:
            self._pending.clear()
            self._chain = self._synced_chain.copy()
            self._file.truncate(self._end)
            self._file.seek(self._end)
            raise
        self._end += len(self._pending)
        self._pending.clear()
        self._synced_chain = self._chain.copy()

    def close(self) -> None:
        """Sync and close."""
        try:
            self.sync()
        finally:
            self._file.close()

    def __enter__(self) -> "FrameWriter":
        """The writer itself."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Sync and close."""
        self.close()


def sync_directory(folder: Path) -> None:
    """Wait until the names in ``folder`` are on disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
