"""An append-only file of frames, each of which ends with a SHA-256 of every byte before it.

The format (``docs/reference/formats.md``):

    magic   8 bytes: ``HiSoLog`` and the format's version
    frame   length  uint32, little-endian: bytes of payload
            kind    4 ASCII characters
            check   uint32: CRC-32 of the eight bytes before it
            payload
            digest  32 bytes: SHA-256 of every byte of the file before it

The check distinguishes an altered length from a frame that was cut short. Each frame is on disk before the next one
begins, so a kill or a power failure can damage only the last frame.
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
    """A frame of a file.

    Attributes:
      kind: its kind, four characters.
      payload: the bytes of its payload.
      digest: SHA-256 of every byte before it, 32 bytes.
      end: the byte offset at which the frame ends.
    """

    kind: bytes
    payload: memoryview
    digest: bytes
    end: int


class Altered(ValueError):
    """A frame was altered after it was written.

    Attributes:
      at: the byte offset at which it begins.
      kind: its kind, four characters; None if they are not reliable.
      length: bytes of its payload; 0 if ``kind`` is None.
    """

    def __init__(self, reason: str, at: int, kind: bytes | None = None, length: int = 0) -> None:
        """``reason`` is a clause that follows the name of the frame."""
        super().__init__(reason)
        self.at, self.kind, self.length = at, kind, length


def read_frames(content: bytes) -> Iterator[Frame]:
    """The frames of a file, one by one, up to the first that is cut short, as a kill leaves the last frame.

    Raises:
      Altered: a complete frame was altered. An altered last frame does not raise: it cannot be distinguished from a
        frame that a power failure left half written.
      ValueError: the file is not a ledger, or has another version.
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
                return  # blocks that the file system had allocated but not yet written
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
    """The bytes of a complete frame. ``chain``, the SHA-256 of the file before it, is updated with the frame."""
    head = struct.pack("<I4s", len(payload), kind)
    frame = head + struct.pack("<I", zlib.crc32(head)) + payload
    chain.update(frame)
    digest = chain.digest()
    chain.update(digest)
    return frame + digest


class Lost(OSError):
    """A run no longer owns the file that it writes: the rounds since then are only in memory."""


class FrameWriter:
    """A writer that appends frames to a file; a frame is on disk once :meth:`append` returns."""

    def __init__(self, path: Path, end: int, length: int) -> None:
        """Continue the file at ``path``. Its good frames are its first ``end`` bytes; the bytes after them are cut off.

        The file itself is locked while it is open, so no second process writes to it, even if other locks are lost.

        Args:
          path: the file.
          end: the byte offset at which the next frame begins.
          length: the length of the file when it was read.

        Raises:
          ValueError: another process writes to the file, or has written to it since it was read.
          OSError: the file cannot be opened.
        """
        self.path, self._end = path, end
        self._file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._file).st_size != length:
                raise ValueError(f"{path} was written by another process since it was read; nothing of it is touched")
            with path.open("rb") as file:
                self._chain = hashlib.sha256(file.read(end))
            # Drop the incomplete frame that a kill left.
            self._cut()
        except BlockingIOError:
            self.close()
            raise ValueError(f"{path} is being written by another process, and a run has one writer") from None
        except BaseException:
            self.close()
            raise

    @staticmethod
    def create(path: Path, kind: bytes, payload: bytes) -> None:
        """Create a file with one frame; a failed write leaves no file.

        Raises:
          FileExistsError: the file exists already.
        """
        if path.exists():
            raise FileExistsError(path)
        write_file(path, MAGIC + frame_bytes(kind, payload, hashlib.sha256(MAGIC)))

    def append(self, kind: bytes, payload: bytes) -> bytes:
        """Append a frame, wait until it is on disk, and return its digest.

        Raises:
          Lost: the file was removed or replaced, or another process has written to it; nothing is written then.
          OSError: the frame cannot be written; the file is then unchanged, as it is after an interrupt.
        """
        chain = self._chain.copy()
        frame = frame_bytes(kind, payload, chain)
        self._check_ours()
        with naming(self.path):
            self._write(frame)
        self._chain, self._end = chain, self._end + len(frame)
        return frame[-DIGEST:]

    def _check_ours(self) -> None:
        """Refuse to write to a file that was removed or replaced, or that has frames of another process.

        Raises:
          Lost: the name belongs to no file or to another file, or the file has another length.
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
        """Drop the bytes after the last complete frame."""
        if os.fstat(self._file).st_size != self._end:
            os.ftruncate(self._file, self._end)

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
