"""Whether a GGUF file can hold what it says it holds, before a reader believes it.

The reader of the ``gguf`` package counts up to what the file names, also if that is 2⁶⁰ entries in 49 bytes.
Layout: the specification of GGUF in ggml's repository (docs/gguf.md).
"""

import mmap
import struct
from pathlib import Path

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Bytes of a value of each type but strings (8) and arrays (9).
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
# The least that an entry of metadata takes (an empty name, its type, a byte), and a tensor's.
LEAST_FIELD, LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8
MOST_DIMENSIONS, MOST_NESTED = 4, 4


class _Reader:
    """A place in a file that moves on, and never beyond its end."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.place = content, 0

    @property
    def left(self) -> int:
        """Bytes behind the place."""
        return len(self.content) - self.place

    def skip(self, count: int) -> None:
        """Move on."""
        if count > self.left:
            raise ValueError(f"it claims {count:,} bytes where {self.left:,} are left")
        self.place += count

    def number(self, layout: str) -> int:
        """The next number."""
        begin = self.place
        self.skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self.content, begin)[0]

    def value(self, kind: int, nested: int = 0) -> None:
        """Move on behind a value."""
        if kind in WIDTHS:
            self.skip(WIDTHS[kind])
        elif kind == STRING:
            self.skip(self.number("<Q"))
        elif kind == ARRAY and nested < MOST_NESTED:
            own, count = self.number("<I"), self.number("<Q")
            if own in WIDTHS:
                self.skip(count * WIDTHS[own])
                return
            if 8 * count > self.left:
                raise ValueError(f"it claims {count:,} entries where {self.left:,} bytes are left")
            for _ in range(count):
                self.value(own, nested + 1)
        else:
            raise ValueError(f"it has a value of the unknown type {kind}")


def check_claims(path: Path) -> None:
    """Refuse a GGUF file that is shorter than what it claims to hold.

    Raises:
      ValueError: it is, or is no GGUF file of a known version.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content[:4] != MAGIC:
                raise ValueError("it does not begin as one does")
            reader = _Reader(content)
            reader.skip(4)
            version, tensors, fields = reader.number("<I"), reader.number("<Q"), reader.number("<Q")
            if version not in VERSIONS:
                raise ValueError(f"it has version {version}, and {' and '.join(map(str, VERSIONS))} are read here")
            if fields * LEAST_FIELD + tensors * LEAST_TENSOR > reader.left:
                raise ValueError(f"it claims {fields:,} fields and {tensors:,} tensors in {reader.left:,} bytes")
            for _ in range(fields):
                reader.skip(reader.number("<Q"))
                reader.value(reader.number("<I"))
            for _ in range(tensors):
                reader.skip(reader.number("<Q"))
                dimensions = reader.number("<I")
                if dimensions > MOST_DIMENSIONS:
                    raise ValueError(f"it has a tensor of {dimensions} dimensions")
                reader.skip(8 * dimensions + 4 + 8)
    except (OSError, ValueError, struct.error) as error:
        raise ValueError(f"{path} is no GGUF file, or a truncated one: {error}") from error
