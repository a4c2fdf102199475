"""A file that only grows, by frames, each sealed by a SHA-256 over every byte before it (``docs/formats.md``).

    magic   8 bytes: ``HiSoLog`` and the format's version
    frame   length  uint32, little-endian: bytes of payload
            kind    4 ASCII characters
            check   uint32: CRC-32 of the eight bytes before it
            payload
            digest  32 bytes: SHA-256 of every byte of the file before it

The check tells a length that was altered from a frame that was cut short. A frame is on disk before the next is begun,
so that a kill or a power failure can only spoil the last.
"""

import errno
import fcntl
import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hiso_jax.fed.ledger.files import naming, write_file

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
    """A frame is not what was written.

    Attributes:
      at: where it begins.
      kind: its four characters, if they can be relied on.
      length: bytes of its payload, if so.
    """

    def __init__(self, reason: str, at: int, kind: bytes | None = None, length: int = 0) -> None:
        """``reason`` as a clause that follows the name of the frame."""
        super().__init__(reason)
        self.at, self.kind, self.length = at, kind, length


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
            raise Altered("was altered: its SHA-256 is not that of the bytes before it", begin, kind, length)
        yield Frame(kind, view[body : end - DIGEST], digest, end)
        chain.update(digest)
        begin = end


def frame_bytes(kind: bytes, payload: bytes, chain: Any) -> bytes:
    """A whole frame; ``chain``, the SHA-256 of the file before it, takes it in."""
    head = struct.pack("<I4s", len(payload), kind)
    frame = head + struct.pack("<I", zlib.crc32(head)) + payload
    chain.update(frame)
    digest = chain.digest()
    chain.update(digest)
    return frame + digest


class Lost(OSError):
    """The file that a run writes is not its own any more: what the run has learned since is in memory alone."""


class FrameWriter:
    """Appends frames to a file; each is on disk once :meth:`append` returns."""

    def __init__(self, path: Path, end: int, length: int) -> None:
        """Continue the file at ``path``, whose good frames are its first ``end`` bytes; what follows is cut off.

        The file itself is locked while it is open, so that no second process writes there, whatever became of other
        locks.

        Args:
          path: the file.
          end: where its next frame is to begin.
          length: of the file when it was read.

        Raises:
          ValueError: another process writes there, or has since it was read.
          OSError: it cannot be opened.
        """
        self.path, self._end = path, end
        self._file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._file).st_size != length:
                raise ValueError(f"{path} was written by another process since it was read; nothing of it is touched")
            with path.open("rb") as file:
                self._chain = hashlib.sha256(file.read(end))
            # What a kill left of a frame.
            self._cut()
        except BlockingIOError:
            self.close()
            raise ValueError(f"{path} is being written by another process, and a run has one writer") from None
        except BaseException:
            self.close()
            raise

    @staticmethod
    def create(path: Path, kind: bytes, payload: bytes) -> None:
        """Make a file with one frame, or none at all.

        Raises:
          FileExistsError: there is one.
        """
        if path.exists():
            raise FileExistsError(path)
        write_file(path, MAGIC + frame_bytes(kind, payload, hashlib.sha256(MAGIC)))

    def append(self, kind: bytes, payload: bytes) -> bytes:
        """Append a frame, wait until it is on disk, and return its digest.

        Raises:
          Lost: the file is not the one that was opened any more, or another process has written there; nothing is
            written then.
          OSError: it cannot be written; the file then is as it was, as after an interrupt.
        """
        chain = self._chain.copy()
        frame = frame_bytes(kind, payload, chain)
        self._check_ours()
        with naming(self.path):
            self._write(frame)
        self._chain, self._end = chain, self._end + len(frame)
        return frame[-DIGEST:]

    def _check_ours(self) -> None:
        """Refuse to write where our frames are not, or others' are.

        Raises:
          Lost: the file lost its name or has another end.
        """
        own = os.fstat(self._file)
        try:
            named = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            raise Lost(errno.ENOENT, "it was removed while the run went on", str(self.path)) from None
        if (named.st_dev, named.st_ino) != (own.st_dev, own.st_ino):
            raise Lost(errno.ESTALE, "it was replaced by another file while the run went on", str(self.path))
        if own.st_size != self._end:
            raise Lost(errno.ESTALE, "another process has written to it", str(self.path))

    def _write(self, frame: bytes) -> None:
        try:
            rest, place = memoryview(frame), self._end
            while rest:
                count = os.pwrite(self._file, rest, place)
                rest, place = rest[count:], place + count
            os.fsync(self._file)
        except BaseException:
            self._cut()
            raise

    def _cut(self) -> None:
        """Drop what is behind the last frame that was appended."""
        if os.fstat(self._file).st_size != self._end:
            os.ftruncate(self._file, self._end)

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
