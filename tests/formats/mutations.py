"""Seeded mutants of .sct files, and what a reader may do with one: read it truthfully, or refuse it as the format says.

A mutant of the index is signed again (sha256, tail, head), so that it is met by the checks behind the hashes.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import xxhash

from sctconv.formats.errors import FormatError, IncompleteError
from sctconv.formats.reader import SctFile
from tests.formats.parts import Parts

NUMBERS = [0, 1, -1, 2, 63, 64, 65, 127, 128, 255, 1 << 16, (1 << 31) - 1, 1 << 32, 1 << 60, (1 << 63) - 1, 1 << 63]
NUMBERS += [(1 << 60) + 1, (1 << 64) - 64, (1 << 64) - 1, 1 << 64, -(1 << 63), -(1 << 63) - 1, 10**4290 * 64]
NAMES = ["", "l", "l.U", "empty", "F32", "I8", "BF16", "config.json", "../a", "/etc/passwd", "a\\b", "\x1b", "\x9b"]
NAMES += ["\u2028", "\ud800", "\U0010ffff", "n" * 1024, "n" * 1025, "é" * 512, "é" * 513, "0" * 16, "f" * 64, "." * 9]
VALUES: list[Any] = [*NUMBERS, *NAMES, None, True, False, 0.5, -0.0, 1e308, [], [0], [1 << 60] * 8, [0] * 9, {}, [{}]]
SNIPPETS = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"NaN", b"1e999", b"-", b"\\", b"\\ud800", b"\0", b"\xff"]
SNIPPETS += [b'"name":"l.U",', b'"offset":64,', b'"nbytes":0,', b'"complete":true,', b"null", b"\xef\xbb\xbf"]
LISTS = ("tensors", "layers", "files")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # none in a line on a terminal
REACH = 256  # how often one mutant in so many is a costly one: huge lists and nesting


@dataclass(frozen=True)
class Base:
    """A valid file in parts: what stands between head and index, the index as JSON, and what follows the tail."""

    data: bytes
    index: str
    trailing: bytes = b""

    def signed(self, text: bytes | None = None) -> bytes:
        """The whole file with this text as its index, and hash, places and sizes that fit it."""
        text = self.index.encode() if text is None else text
        offset = 64 + len(self.data)
        end = offset + len(text) + 64
        head = struct.pack("<8sHHIQ40s", b"\x93SCT\r\n\x1a\n", 1, 0, 0, end, b"")
        tail = struct.pack("<QQ32s8s8s", offset, len(text), hashlib.sha256(text).digest(), b"", b"SCT-TAIL")
        return b"".join((head, self.data, text, tail, self.trailing))


def whole() -> Base:
    """The sample of `Parts`: factors, a bias, tensors that share a blob, an empty one, a scalar and a file."""
    parts = Parts()
    return Base(parts.data, json.dumps(parts.index))


def incomplete() -> Base:
    """The same while its conversion is under way: older indexes between the blobs, half a blob after the tail."""
    parts = Parts()
    parts.append(b"an older index and its tail")
    entry = {**parts.at("tensors", "scalar"), "name": "later", "offset": parts.append(struct.pack("<d", 0.5))}
    parts.append(b"another, after the last blob")
    parts.edit({("complete",): False, ("tensors", "+"): entry, ("new",): {"kept": [1]}})
    return Base(parts.data, json.dumps(parts.index), b"half a blob")


def head_or_tail(rng: Random, base: Base) -> bytes:
    """Random bytes in head and tail, or a number at a boundary in one of their fields."""
    file = bytearray(base.signed())
    tail = len(file) - len(base.trailing) - 64
    if rng.random() < 0.5:
        for _ in range(rng.randint(1, 4)):
            file[rng.choice((0, tail)) + rng.randrange(64)] = rng.randrange(256)
    else:
        place = rng.choice([8, 16, 24, tail, tail + 8, tail + 48])
        number = rng.choice([*NUMBERS, tail, tail + 64, len(file), len(file) - rng.randrange(256)])
        file[place : place + 8] = (number % (1 << 64)).to_bytes(8, "little")
    return bytes(file)


def blobs(rng: Random, base: Base) -> bytes:
    """Random bytes anywhere between head and index, padding included."""
    data = bytearray(base.data)
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return replace(base, data=bytes(data)).signed()


def length(rng: Random, base: Base) -> bytes:
    """A cut, bytes too many at the end or in the middle, a piece missing or moved; now and then signed afterwards."""
    file = rng.choice((base.signed(), base.data))
    size = rng.choice((1, 8, 63, 64, 65, rng.randrange(len(file))))
    place = rng.choice((0, 8, 64, len(file) - 64, len(file), rng.randrange(len(file))))
    changed = rng.choice(
        (
            file[:place],
            file[:place] + rng.randbytes(size) + file[place:],
            file[:place] + bytes(size) + file[place:],
            file[:place] + file[place + size :],
            file + file[-size:],
        )
    )
    return changed if len(file) != len(base.data) else replace(base, data=changed).signed()


def text(rng: Random, base: Base) -> bytes:
    """The index as bytes: some replaced, put in, left out or doubled."""
    spoiled = bytearray(base.index.encode())
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(spoiled))
        match rng.randrange(5):
            case 0:
                spoiled[place] = rng.randrange(256)
            case 1:
                spoiled[place:place] = rng.choice(SNIPPETS)
            case 2:
                del spoiled[place : place + rng.randint(1, 20)]
            case 3:
                spoiled[place:place] = spoiled[place : place + rng.randint(1, 60)]
            case 4:  # a key twice, or one key more
                place = spoiled.find(b"{", place) + 1
                spoiled[place:place] = rng.choice(SNIPPETS)
    return base.signed(bytes(spoiled))


def values(rng: Random, base: Base) -> bytes:
    """The index as JSON: values, names, types, entries and lists changed."""
    index = json.loads(base.index)
    for _ in range(rng.randint(1, 2)):
        path = spot(rng, index)
        holder, key = at(index, path[:-1]), path[-1]
        match rng.randrange(12):
            case 0:
                holder[key] = _copy(rng.choice(VALUES))
            case 1 | 2:
                same = [value for value in VALUES if type(value) is type(holder[key])]
                holder[key] = _copy(rng.choice(same or VALUES))
            case 3 | 4 | 5:
                holder[key] = _near(rng, holder[key])
            case 6:
                holder[key] = _copy(at(index, spot(rng, index)))
            case 7:
                holder[key] = _large(rng, holder[key])
            case 8:
                _rename(rng, holder, key)
            case _:
                _shuffle(rng, index.get(rng.choice(LISTS)))
    return base.signed(json.dumps(index).encode())


KINDS: dict[str, Callable[[Random, Base], bytes]] = {
    "head and tail": head_or_tail,
    "blobs": blobs,
    "length": length,
    "text of the index": text,
    "values of the index": values,
}
BASES: dict[str, Callable[[], Base]] = {"complete": whole, "incomplete": incomplete}


def spot(rng: Random, item: Any) -> tuple[Any, ...]:
    """The path to some value in an index; mostly of an entry in one of its lists."""
    path: tuple[Any, ...] = ()
    while isinstance(item, dict | list) and item and (not path or rng.random() < 0.95):
        keys = list(item) if isinstance(item, dict) else range(len(item))
        lists = [key for key in keys if key in LISTS] if not path and rng.random() < 0.8 else []
        path = (*path, rng.choice(lists or keys))
        item = item[path[-1]]
    return path


def at(item: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        item = item[key]
    return item


def _copy(item: Any) -> Any:
    return json.loads(json.dumps(item))


def _near(rng: Random, value: Any) -> Any:
    """A neighbour of a value, which the more lenient checks let through."""
    match value:
        case bool():
            return not value
        case int():
            return rng.choice((value + 1, value - 1, value + 64, value - 64, -value, value * 2, float(value % 997)))
        case str():
            return rng.choice((value + ".", value[:-1], value.upper(), value[::-1], value + "\0", value + "é"))
        case list():
            return rng.choice(([*value, 1], [1, *value], value[::-1], value[:-1], value * 2, [value]))
        case _:
            return [value]


def _rename(rng: Random, holder: Any, key: Any) -> None:
    """Takes a value out, or puts it under another name or place."""
    value = holder.pop(key)
    if rng.random() < 0.5:
        if isinstance(holder, dict):
            holder[rng.choice(NAMES)] = value
        else:
            holder.insert(rng.randrange(len(holder) + 1), value)


def _shuffle(rng: Random, entries: Any) -> None:
    """An entry twice, left out or under another name; or two of them exchange a value."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and entry for entry in entries) or not entries:
        return
    one, other = rng.choice(entries), rng.choice(entries)
    match rng.randrange(4):
        case 0:
            entries.append(_copy(one) | {"name": rng.choice(NAMES)})
        case 1:
            entries.append(_copy(one))
        case 2:
            entries.remove(one)
        case 3:
            for key in rng.sample(sorted(one), rng.randint(1, min(2, len(one)))):
                one[key], other[key] = other.get(key), one[key]


def _large(rng: Random, value: Any) -> Any:
    """A value inside many levels, or a list of many; the costly ones seldom."""
    if rng.randrange(REACH):
        for _ in range(rng.choice((1, 2, 60, 61, 62, 63, 64, 65))):
            value = [value]
        return value
    return [0] * rng.choice((1000, 1 << 18, (1 << 18) + 1))


def read_all(path: Path) -> None:
    """Opens a file and does with it what its readers do."""
    try:
        opened = SctFile(path)
    except IncompleteError:
        opened = SctFile(path, allow_incomplete=True)
    with opened as file:
        file.index.pack()
        for name in file.index.tensors:
            view, copy = file.tensor(name), file.read(name)
            assert view.shape == copy.shape and view.tobytes() == copy.tobytes()
        for name in file.index.files:
            file.file(name)
        for blob in file.index.blobs:
            file.verify(blob)
        file.verify_padding()


def outcome(path: Path, data: bytes) -> str:
    """What became of a mutant: "read", or the name of the `FormatError` that refused it in one line.

    Anything else that the reader raises passes through. What was read is what its own index says, by an account of
    the file that shares no code with the reader.
    """
    path.write_bytes(data)
    try:
        read_all(path)
    except FormatError as error:
        message = str(error)
        assert message.startswith(f"{path}: ") and not CONTROL.search(message) and len(message) < 4096, message
        return type(error).__name__
    assert_truthful(data)
    return "read"


def assert_truthful(data: bytes) -> None:
    """Holds the bytes of a file that was read against every checksum in it."""
    (committed,) = struct.unpack_from("<Q", data, 16)
    offset, nbytes, sha256 = struct.unpack_from("<QQ32s", data, committed - 64)
    text = data[offset : offset + nbytes]
    assert offset + nbytes + 64 == committed <= len(data) and hashlib.sha256(text).digest() == sha256
    index = json.loads(text)
    assert committed == len(data) or not index["complete"]
    for entry in index["tensors"]:
        blob = data[entry["offset"] : entry["offset"] + entry["nbytes"]]
        assert len(blob) == entry["nbytes"] and xxhash.xxh3_64_hexdigest(blob) == entry["xxh3"], entry
    for entry in index["files"]:
        blob = data[entry["offset"] : entry["offset"] + entry["nbytes"]]
        assert len(blob) == entry["nbytes"] and hashlib.sha256(blob).hexdigest() == entry["sha256"], entry
