"""The numbers in the head of a GGUF file, held against the file before a reader loops or allocates by them.

The head is what comes before the data: counts, metadata fields, a record for each tensor. The `gguf` package makes an array
object of every entry of every metadata array and takes sizes as they are, in arithmetic that wraps.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, Final, NamedTuple

from .layout import MAX_ENTRIES

MAX_FIELDS: Final = 1 << 16
MAX_ARRAY_ENTRIES: Final = 1 << 22
"""Entries of all metadata arrays together; the largest vocabularies with their merges have a third of it."""

MAX_ARRAY_DEPTH: Final = 4
MAX_DIMENSIONS: Final = 4
"""What ggml has."""

_MAX_ENTRIES_OF_A_TENSOR: Final = 1 << 63
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")


class _Record(NamedTuple):
    name: str
    offset: int
    nbytes: int


def check_head(path: Path) -> None:
    """Walks the head of a GGUF file of this machine's byte order; says nothing where all is well.

    Raises:
        EOFError: a count, a length or a tensor lies past the end of the file.
        ValueError: a type is unknown, a count or nesting beyond the limits above, tensors overlap or leave holes, or a shape
            is impossible.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        head = _Head(data)
        tensors, fields = head.start()
        if tensors > MAX_ENTRIES or fields > MAX_FIELDS:
            raise EOFError(f"{tensors} tensors and {fields} fields lie past its end or the limits")
        for _ in range(fields):
            head.field()
        records = [head.tensor() for _ in range(tensors)]
        _check_places(records, _aligned(head.place, head.alignment), head.alignment, len(data))


class _Head:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.place = 0
        self.alignment = 32
        self._array_entries = 0

    def start(self) -> tuple[int, int]:
        """How many tensors and fields there are."""
        self._skip(4)
        self._number(_U32)  # the version, which the package looks at
        return self._number(_U64), self._number(_U64)

    def field(self) -> None:
        """Passes a metadata field."""
        key = self._text()
        kind = self._number(_U32)
        place = self.place
        self._value(kind, 0)
        if key == b"general.alignment" and self.place - place == 4:
            self.alignment = _U32.unpack_from(self._data, place)[0]
            if self.alignment.bit_count() != 1:
                raise ValueError(f"Invalid alignment: {self.alignment} is no power of two")

    def tensor(self) -> _Record:
        """Reads a tensor's record."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._text().decode()
        count = self._number(_U32)
        if count > MAX_DIMENSIONS:
            self._skip(8 * count)
            raise ValueError(f"tensor {name!r:.80} has {count} dimensions, more than {MAX_DIMENSIONS}")
        shape = [self._number(_U64) for _ in range(count)]
        block, block_nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(self._number(_U32))]
        offset = self._number(_U64)
        if not shape or math.prod(max(size, 1) for size in shape) >= _MAX_ENTRIES_OF_A_TENSOR or shape[0] % block:
            raise ValueError(f"tensor {name!r:.80} cannot have the shape {shape} in blocks of {block}")
        return _Record(name, offset, math.prod(shape) // block * block_nbytes)

    def _value(self, kind: int, depth: int) -> None:
        from gguf import GGUFValueType

        match GGUFValueType(kind):
            case GGUFValueType.STRING:
                self._strings(1)
            case GGUFValueType.ARRAY:
                inner, count = self._number(_U32), self._number(_U64)
                if depth == MAX_ARRAY_DEPTH:
                    raise ValueError(f"arrays within arrays, over {MAX_ARRAY_DEPTH} levels")
                self._array(GGUFValueType(inner), count, depth)
            case scalar:
                self._skip(_scalar_nbytes(scalar))

    def _array(self, kind: Any, count: int, depth: int) -> None:
        from gguf import GGUFValueType

        if count > len(self._data) - self.place:  # each entry has a byte at least
            raise EOFError(f"an array of {count} at {self.place} lies past its end")
        self._array_entries += count
        if self._array_entries > MAX_ARRAY_ENTRIES:
            raise ValueError(f"arrays of more than {MAX_ARRAY_ENTRIES} entries together")
        if kind == GGUFValueType.STRING:
            self._strings(count)
        elif kind == GGUFValueType.ARRAY:
            for _ in range(count):
                self._value(kind, depth + 1)
        else:
            self._skip(count * _scalar_nbytes(kind))

    def _strings(self, count: int) -> None:
        data, place, last = self._data, self.place, len(self._data) - 8
        for _ in range(count):  # a vocabulary has 10^5 of them
            if place > last:
                raise EOFError(f"a string at {place} lies past its end")
            place += 8 + _U64.unpack_from(data, place)[0]
        self._skip(place - self.place)

    def _text(self) -> bytes:
        length = self._number(_U64)
        place = self._skip(length)
        return self._data[place : place + length]

    def _number(self, kind: struct.Struct) -> int:
        number: int = kind.unpack_from(self._data, self._skip(kind.size))[0]
        return number

    def _skip(self, nbytes: int) -> int:
        """Moves on by some bytes, and returns where they begin."""
        place = self.place
        if nbytes > len(self._data) - place:
            raise EOFError(f"{nbytes} bytes at {place} lie past its end")
        self.place += nbytes
        return place


def _check_places(records: list[_Record], start: int, alignment: int, size: int) -> None:
    """Each tensor begins where the one before it ends, aligned, as llama.cpp demands too."""
    expected = 0
    for record in sorted(records, key=lambda record: (record.offset, record.nbytes)):
        if start + record.offset + record.nbytes > size:
            end = start + record.offset + record.nbytes
            raise EOFError(f"tensor {record.name!r:.80} ends at {end}, past its end")
        if record.offset != expected:
            raise ValueError(
                f"tensor {record.name!r:.80} begins at {record.offset} of the data, not at {expected}: overlap or hole"
            )
        expected = _aligned(record.offset + record.nbytes, alignment)


def _aligned(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment


def _scalar_nbytes(kind: Any) -> int:
    from gguf import GGUFReader

    return int(GGUFReader.gguf_scalar_to_np[kind]().nbytes)
