"""Seeded mutations of head, index and tail: whatever comes in, only `FormatError`s come out."""

from __future__ import annotations

import json
import random

import pytest

from sctconv.formats.errors import FormatError
from sctconv.formats.reader import SctFile

NUMBERS = [0, 1, -1, 2, 63, 64, 65, 127, 128, 255, 1 << 16, (1 << 31) - 1, 1 << 32, 1 << 60, (1 << 63) - 1, 1 << 63]
NUMBERS += [(1 << 64) - 64, (1 << 64) - 1, 10**4290 * 64]
VALUES: list[object] = [
    *NUMBERS,
    None,
    True,
    0.5,
    1e308,
    "",
    "l",
    "l.U",
    "F32",
    "I8",
    "\x1b",
    "\ud800",
    [],
    [0],
    [1 << 60] * 8,
    {},
]
SNIPPETS = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"NaN", b"1e999", b"-", b"\\", b"\\ud800", b"\0", b"\xff"]


def read_all(path) -> None:
    """Opens a file and does with it what its readers do."""
    with SctFile(path, allow_incomplete=True) as file:
        file.index.pack()
        for name in file.index.tensors:
            file.tensor(name).sum()
        for name in file.index.files:
            file.file(name)
        for blob in file.index.blobs:
            file.verify(blob)
        file.verify_padding()


def survives(path, data: bytes) -> bool:
    """Whether a file still reads; if not, it must be refused with one line."""
    path.write_bytes(data)
    try:
        read_all(path)
    except FormatError as error:
        text = str(error)
        assert text.startswith(f"{path}: ") and text.isprintable() and len(text) < 2000, text
        return False
    return True


def spots(item, path=()):
    """The paths to all values in a JSON object."""
    inner = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
    for key, value in inner:
        yield (*path, key)
        yield from spots(value, (*path, key))


@pytest.mark.parametrize("seed", range(4))
def test_bytes_of_head_and_tail(parts, tmp_path, seed):
    rng = random.Random(seed)
    whole = parts.build()
    positions = [*range(64), *range(len(whole) - 64, len(whole))]
    for _ in range(400):
        spoiled = bytearray(whole)
        if rng.random() < 0.5:
            for position in rng.choices(positions, k=rng.randint(1, 4)):
                spoiled[position] = rng.randrange(256)
        else:
            number = (rng.choice(NUMBERS) % (1 << 64)).to_bytes(8, "little")
            place = rng.choice([8, 16, 24, len(whole) - 64, len(whole) - 56])
            spoiled[place : place + 8] = number
        survives(tmp_path / "a.sct", bytes(spoiled))


@pytest.mark.parametrize("seed", range(4))
def test_text_of_the_index_with_a_right_hash(parts, tmp_path, seed):
    rng = random.Random(seed)
    text = json.dumps(parts.index, sort_keys=True, separators=(",", ":")).encode()
    for _ in range(400):
        spoiled = bytearray(text)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(spoiled))
            match rng.randrange(4):
                case 0:
                    spoiled[place] = rng.randrange(256)
                case 1:
                    spoiled[place:place] = rng.choice(SNIPPETS)
                case 2:
                    del spoiled[place : place + rng.randint(1, 20)]
                case 3:
                    spoiled[place:place] = spoiled[place : place + rng.randint(1, 60)]
        parts.index_text = bytes(spoiled)
        survives(tmp_path / "a.sct", parts.build())


@pytest.mark.parametrize("seed", range(4))
def test_values_of_the_index_with_a_right_hash(parts, tmp_path, seed):
    rng = random.Random(seed)
    text = json.dumps(parts.index)
    survived = 0
    for _ in range(500):
        parts.index = json.loads(text)
        for _ in range(rng.randint(1, 2)):
            path = rng.choice(list(spots(parts.index)))
            holder = parts.at(*path[:-1])
            match rng.randrange(4):
                case 0 | 1:
                    holder[path[-1]] = rng.choice(VALUES)
                case 2:
                    del holder[path[-1]]
                case 3:
                    other = rng.choice(list(spots(parts.index)))
                    holder[path[-1]] = json.loads(json.dumps(parts.at(*other)))
        parts.index_text = json.dumps(parts.index).encode()
        survived += survives(tmp_path / "a.sct", parts.build())
    assert 0 < survived < 450  # the mutations neither all break the file nor all leave it whole


def test_the_file_survives_unchanged(parts, tmp_path):
    assert survives(tmp_path / "a.sct", parts.build())
