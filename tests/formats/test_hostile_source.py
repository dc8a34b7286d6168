"""Dense checkpoints that lie about names, sizes and places, or are no files at all; each with a twin that opens."""

from __future__ import annotations

import json
import math
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sctconv.formats import gguf_head
from sctconv.formats.checkpoint import read_tensor
from sctconv.formats.dtypes import DTYPES
from sctconv.formats.errors import CheckpointError, CorruptShardError, MissingFileError, TruncatedShardError
from sctconv.formats.gguf_file import GgufTensors
from sctconv.formats.safetensors_dir import SafetensorsTensors, read_weight_map
from tests.formats.test_gguf_file import pair, raw, tensor
from tests.hostile_sources import DATA, HEADER, safetensors, sound_gguf

PLAIN = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
OPENERS: dict[str, Callable[[Path], Any]] = {
    "safetensors": lambda path: SafetensorsTensors([path]),
    "gguf": GgufTensors,
    "index": read_weight_map,
}


def refused(opener: str, path: Path, error: type[CheckpointError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        OPENERS[opener](path)
    text = str(caught.value)
    assert (
        caught.type is error
        and text.startswith(f"{path}: ")
        and text.isprintable()
        and len(text) < len(str(path)) + 300
    )


# --- safetensors


def shard(tmp_path: Path, header: Any, data: bytes) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(header if isinstance(header, bytes) else json.dumps(header).encode(), data))
    return path


def test_a_cut_safetensors_file_is_refused_at_any_length(tmp_path: Path) -> None:
    whole = safetensors(json.dumps(HEADER).encode())
    path = tmp_path / "model.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused("safetensors", path, TruncatedShardError, "cut|empty")
    path.write_bytes(whole)
    source = SafetensorsTensors([path])
    assert b"".join(read_tensor(source, name).tobytes() for name in source.tensors) == DATA


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [0, 1 << 62], "data_offsets": [0, 0]}, "cannot have the shape"),
        ({"shape": [0, 1 << 60], "data_offsets": [0, 0]}, "cannot have the shape"),
        ({"shape": [0, (1 << 57) + 1], "data_offsets": [0, 0]}, "cannot have the shape"),
        ({"shape": [0, 1 << 40, 1 << 40], "data_offsets": [0, 0]}, "cannot have the shape"),
        ({"shape": [1] * 8 + [2]}, "cannot have the shape"),
        ({"shape": [1] * 5000 + [2]}, "cannot have the shape"),
        ({"shape": [-2]}, "damaged"),
        ({"shape": [2.0]}, "damaged"),
        ({"shape": [3]}, "damaged"),
        ({"shape": [1 << 32, 1 << 32]}, "damaged"),
        ({"data_offsets": [-8, 0]}, "damaged"),
        ({"data_offsets": [8, 0]}, "damaged"),
        ({"data_offsets": [1, 9]}, "cut"),
        ({"data_offsets": [(1 << 64) - 8, 1 << 64]}, "cut"),
        ({"dtype": "\x1b[2J"}, "damaged"),
    ],
)
def test_an_impossible_safetensors_entry_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    error = TruncatedShardError if message == "cut" else CorruptShardError
    data = bytes(0 if changes.get("data_offsets") == [0, 0] else 8)
    refused("safetensors", shard(tmp_path, {"a": {**PLAIN, **changes}}, data), error, message)


@pytest.mark.parametrize("shape", [[2], [1, 2], [1] * 7 + [2], [0], [0, 1 << 57]])
@pytest.mark.parametrize("dtype", ["F32", "I64", "F64", "U8"])
def test_a_possible_one_is_not(dtype: str, shape: list[int], tmp_path: Path) -> None:
    size = math.prod(shape) * DTYPES[dtype].itemsize
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    source = SafetensorsTensors([shard(tmp_path, {"a": entry}, bytes(size))])
    assert read_tensor(source, "a").shape == tuple(shape)


def test_holes_and_overlaps_in_safetensors_are_refused(tmp_path: Path) -> None:
    for second in ([16, 24], [4, 12], [0, 8]):
        header = {"a": PLAIN, "b": {**PLAIN, "data_offsets": second}}
        refused("safetensors", shard(tmp_path, header, bytes(max(16, second[1]))), CorruptShardError, "damaged")
    SafetensorsTensors([shard(tmp_path, {"a": PLAIN, "b": {**PLAIN, "data_offsets": [8, 16]}}, bytes(16))])


def test_one_name_twice_in_a_safetensors_header_is_refused(tmp_path: Path) -> None:
    entry = json.dumps(PLAIN).encode()
    refused(
        "safetensors",
        shard(tmp_path, b'{"a":%b,"a":%b}' % (entry, entry), bytes(8)),
        CorruptShardError,
        "one name twice",
    )


NAMES = ["", "\x1b[2J", "a\nb", "a\x00", "\u2028", "x" * 1025]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_a_terminal_would_obey_is_refused(name: str, tmp_path: Path) -> None:
    refused("safetensors", shard(tmp_path, {name: PLAIN}, bytes(8)), CorruptShardError, "damaged .the name")
    path = tmp_path / "a.gguf"
    path.write_bytes(raw(1, rest=tensor(name.encode(), [1])) + bytes(99))
    refused("gguf", path, CorruptShardError, "damaged .the name")


@pytest.mark.parametrize("name", ["x" * 1024, "größe", "model.layers.0 (copy)"])
def test_any_other_name_is_a_name(name: str, tmp_path: Path) -> None:
    assert list(SafetensorsTensors([shard(tmp_path, {name: PLAIN}, bytes(8))]).tensors) == [name]
    path = tmp_path / "a.gguf"
    path.write_bytes(raw(1, rest=tensor(name.encode(), [1])) + bytes(99))
    assert list(GgufTensors(path).tensors) == [name]


# --- GGUF


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (raw(1, rest=tensor(b"w", [])), CorruptShardError, "cannot have the shape"),
        (raw(1, rest=tensor(b"w", [1] * 5)), CorruptShardError, "5 dimensions, more than 4"),
        (raw(1, rest=tensor(b"w", [0, 1 << 63, 2])), CorruptShardError, "cannot have the shape"),
        (raw(1, rest=tensor(b"w", [31], kind=2)), CorruptShardError, "in blocks of 32"),
        (raw(1, rest=tensor(b"w", [1 << 61], kind=0)), TruncatedShardError, "past its end"),
        (raw(2, rest=tensor(b"a", [8]) + tensor(b"b", [8])), CorruptShardError, "overlap or hole"),
        (raw(2, rest=tensor(b"a", [16]) + tensor(b"b", [8], offset=32)), CorruptShardError, "overlap or hole"),
        (raw(2, rest=tensor(b"a", [8]) + tensor(b"b", [8], offset=64)), CorruptShardError, "overlap or hole"),
        (raw(1, rest=tensor(b"a", [8], offset=32)), CorruptShardError, "overlap or hole"),
        (raw(1, rest=tensor(b"a", [8], offset=(1 << 64) - 32)), TruncatedShardError, "past its end"),
        (raw((1 << 18) + 1), TruncatedShardError, "past its end or the limits"),
        (raw(pairs=pair(b"general.alignment", 4, struct.pack("<I", 48))), CorruptShardError, "alignment"),
        (raw(pairs=pair(b"a", 9, struct.pack("<IQ", 12, 1 << 61))), TruncatedShardError, "past its end"),
        (raw(pairs=pair(b"a", 9, struct.pack("<IQ", 8, 3)) + bytes(16)), TruncatedShardError, "past its end"),
        (raw(pairs=pair(b"a\xff", 0, b"1")), CorruptShardError, "damaged"),
    ],
)
def test_an_impossible_gguf_head_is_refused(
    content: bytes, error: type[CheckpointError], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content + (bytes(160) if b"past" not in message.encode() else b""))
    refused("gguf", path, error, message)


def test_a_gguf_head_with_everything_opens(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(sound_gguf().build())
    source = GgufTensors(path)
    assert {name: info.shape for name, info in source.tensors.items()} == {
        "token_embd.weight": (3, 4),
        "blk.0.attn_q.weight": (2, 32),
        "b": (4,),
        "none": (2, 0),
    }
    assert source.field("tokenizer.ggml.tokens") == ["a", "bc", ""] and source.architecture == "llama"


def test_tensors_in_another_order_than_their_data_open(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(raw(2, rest=tensor(b"b", [8], offset=32) + tensor(b"a", [8])) + bytes(160))
    assert list(GgufTensors(path).tensors) == ["b", "a"]


def test_arrays_are_counted_before_they_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_head, "MAX_ARRAY_ENTRIES", 100)
    path = tmp_path / "a.gguf"
    for counts, opens in (([100], True), ([101], False), ([60, 40], True), ([60, 41], False)):
        pairs = b"".join(
            pair(b"k%d" % n, 9, struct.pack("<IQ", 0, count) + bytes(count)) for n, count in enumerate(counts)
        )
        path.write_bytes(raw(pairs=pairs, count=len(counts)) + bytes(64))
        if opens:
            GgufTensors(path)
        else:
            refused("gguf", path, CorruptShardError, "more than 100 entries")


def test_text_that_is_none_is_found_when_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(raw(pairs=pair(b"general.architecture", 8, struct.pack("<Q", 2) + b"\xff\xfe")) + bytes(64))
    with pytest.raises(CorruptShardError, match=r"general\.architecture is no text"):
        _ = GgufTensors(path).architecture


# --- an index


@pytest.mark.parametrize(
    "file",
    ["../1.safetensors", "/1.safetensors", "..\\1.safetensors", "a/1.safetensors", "x" * 256, "\x1b[2J/", "..", 7],
)
def test_a_shard_is_a_name_and_never_a_path(file: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": file}}))
    refused("index", path, CorruptShardError, "which is not a file beside it")


def test_a_shard_beside_the_index_is_found_even_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"x")
    (tmp_path / "1.safetensors").symlink_to("blob")  # as in the Hub's cache
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    assert read_weight_map(path) == {"a": "1.safetensors"}


# --- what is no file


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "directory", "loop", "dangling", "missing"])
def test_what_is_no_file_is_refused_and_not_waited_for(
    kind: str, opener: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "socket":
            monkeypatch.chdir(tmp_path)  # a socket's path must be short
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind("x")
        case "directory":
            path.mkdir()
        case "loop":
            path.symlink_to(path)
        case "dangling":
            path.symlink_to(tmp_path / "nothing")
    refused(opener, path, MissingFileError, "cannot be read")
