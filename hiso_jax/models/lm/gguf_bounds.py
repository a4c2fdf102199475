"""A check that a GGUF file is long enough for the entries that it claims, before it is read.

The reader of the ``gguf`` package loops over as many entries as the file claims, even 2⁶⁰ entries in 49 bytes.
Layout: the specification of GGUF in ggml's repository (docs/gguf.md).
"""

import mmap
import struct
from pathlib import Path

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# The bytes of a value of each type, except strings (8) and arrays (9).
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
# The fewest bytes of a metadata field (an empty name, its type, a byte) and of a tensor's entry.
LEAST_FIELD, LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8
MOST_DIMENSIONS, MOST_NESTED = 4, 4


class _Reader:
    """A cursor in a file that never moves beyond the end."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.place = content, 0

    @property
    def left(self) -> int:
        """The number of bytes after the cursor."""
        return len(self.content) - self.place

    def skip(self, count: int) -> None:
        """Move the cursor by ``count`` bytes."""
        if count > self.left:
            raise ValueError(f"it claims {count:,} bytes where {self.left:,} are left")
        self.place += count

    def number(self, layout: str) -> int:
        """Read the next number."""
        begin = self.place
        self.skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self.content, begin)[0]

    def value(self, kind: int, nested: int = 0) -> None:
        """Move the cursor past a value."""
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
    """Refuse a GGUF file that is too short for the entries that it claims.

    Raises:
      ValueError: the file is too short, or is not a GGUF file of a supported version.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content[:4] != MAGIC:
                raise ValueError("it does not begin with GGUF")
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
