import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors import deserialize, safe_open

from sctconv.formats import safetensors_dir
from sctconv.formats.checkpoint import read_tensor
from sctconv.formats.dtypes import DTYPES
from sctconv.formats.errors import (
    CorruptShardError,
    LFSPointerError,
    MissingFileError,
    TruncatedShardError,
    UnsupportedCheckpointError,
)
from sctconv.formats.safetensors_dir import SafetensorsTensors, read_weight_map

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4866\n"
HEADER = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file from its header, as JSON or as it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def save(path: Path, tensors: dict[str, np.ndarray], dtypes: dict[str, str] | None = None) -> Path:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in tensors.items():
        place = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": place}  # type: ignore
        data += array.tobytes()
    path.write_bytes(raw(header, data))
    return path


def index(directory: Path, weight_map: object) -> Path:
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


@pytest.fixture
def sharded(tmp_path):
    """Two shards and their index."""
    save(tmp_path / "1.safetensors", {"a": np.arange(3.0), "b": np.arange(4)})
    save(tmp_path / "2.safetensors", {"c": np.arange(5, dtype="i1")})
    return index(tmp_path, {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"})


def open_sharded(path: Path) -> SafetensorsTensors:
    weight_map = read_weight_map(path)
    return SafetensorsTensors([path.parent / file for file in sorted(set(weight_map.values()))], weight_map)


@pytest.mark.parametrize("shape", [(5, 7), (), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_as_safetensors_reads_it(tmp_path, name, shape):
    dtype = DTYPES[name]
    bits = np.random.default_rng(1).bytes(int(np.prod(shape)) * dtype.itemsize)
    array = np.frombuffer(bits, "u1").__mod__(2).astype("?") if name == "BOOL" else np.frombuffer(bits, dtype)
    path = save(tmp_path / "model.safetensors", {"first": np.ones(3), "x": array.reshape(shape)})
    source = SafetensorsTensors([path])
    assert list(source.tensors) == ["first", "x"]
    info, values = source.tensors["x"], read_tensor(source, "x")
    assert (info.dtype, info.shape, info.shard, info.size) == (name, shape, path, array.size)
    expected = dict(deserialize(path.read_bytes()))["x"]
    assert (expected["dtype"], tuple(expected["shape"])) == (name, shape) == (name, values.shape)
    assert values.tobytes() == array.tobytes() == bytes(expected["data"])
    if not name.startswith("F8"):  # of which its numpy interface knows nothing
        with safe_open(path, framework="numpy") as file:
            assert file.get_tensor("x").dtype == values.dtype == dtype
            assert file.get_tensor("x").tobytes() == values.tobytes()


@pytest.mark.parametrize("chunk", [8, 24, 40, 1 << 20])
def test_chunks_are_bounded_and_make_the_whole(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(safetensors_dir, "CHUNK_BYTES", chunk)
    array = np.arange(35, dtype="<f4").reshape(5, 7)
    source = SafetensorsTensors([save(tmp_path / "model.safetensors", {"x": array})])
    chunks = list(source.chunks("x"))
    assert all(piece.ndim == 1 and piece.nbytes <= chunk for piece in chunks)
    assert np.array_equal(np.concatenate(chunks).reshape(5, 7), array)
    wide = read_tensor(source, "x", np.float64)
    assert wide.dtype == np.float64 and np.array_equal(wide, array)


def test_shards_are_read_by_their_index(sharded):
    source = open_sharded(sharded)
    assert {name: info.shard.name[0] for name, info in source.tensors.items()} == {"a": "1", "b": "1", "c": "2"}
    assert [read_tensor(source, name).size for name in "abc"] == [3, 4, 5]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        pytest.param(b"", TruncatedShardError, "an empty file", id="empty"),
        pytest.param(LFS, LFSPointerError, r"a git-lfs pointer of \d+ bytes.*git lfs pull", id="git-lfs"),
        pytest.param(b"<html>404</html>", CorruptShardError, "not a safetensors file, but an HTML page", id="html"),
        pytest.param(b"Not Found, says this page", CorruptShardError, "but a text file", id="text"),
        pytest.param(b"GGUF\3\0\0\0" * 20, CorruptShardError, "but a GGUF file", id="gguf"),
        pytest.param(b"\1\2\3", TruncatedShardError, r"cut \(3 bytes", id="three bytes"),
        pytest.param(
            raw(HEADER, bytes(8))[:40], TruncatedShardError, r"cut \(40 bytes, a header of 61", id="cut header"
        ),
        pytest.param(raw(HEADER, bytes(7)), TruncatedShardError, "cut, 76 of 77 bytes are there", id="cut data"),
        pytest.param(raw(HEADER, bytes(9)), CorruptShardError, "damaged", id="trailing"),
        pytest.param(raw(b"{" * 9), CorruptShardError, "not a safetensors file", id="no json"),
        pytest.param(raw(b"[" * 200_000), CorruptShardError, "not a safetensors file", id="deep"),
        pytest.param(raw(b"\xff\xff"), CorruptShardError, "not a safetensors file", id="no text"),
        pytest.param(raw([]), CorruptShardError, "not a safetensors file", id="no object"),
        pytest.param(raw({"a": {}}), CorruptShardError, "not a safetensors file", id="no offsets"),
        pytest.param(raw({"a": {"data_offsets": [0]}}), CorruptShardError, "not a safetensors file", id="one offset"),
        pytest.param(
            raw({"a": {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 0]}}),
            *(CorruptShardError, "damaged"),
            id="product overflows",
        ),
        pytest.param(raw({"a": HEADER["a"], "b": HEADER["a"]}, bytes(8)), CorruptShardError, "damaged", id="overlap"),
        pytest.param(
            raw({"a": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}, bytes(8)),
            *(UnsupportedCheckpointError, "tensor a is F8_E8M0, which is not supported"),
            id="dtype",
        ),
    ],
)
def test_a_damaged_shard_is_refused(tmp_path, content, error, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        SafetensorsTensors([path])
    text = str(caught.value)
    assert caught.type is error
    assert text.startswith(f"{path}: ") and text.isprintable() and len(text) < 600


def test_an_undamaged_shard_opens(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw(HEADER, bytes(8)))
    assert read_tensor(SafetensorsTensors([path]), "a").tolist() == [0, 0]


@pytest.mark.parametrize("missing", ["directory", "file"])
def test_a_missing_shard_is_named(tmp_path, missing):
    path = tmp_path if missing == "directory" else tmp_path / "model.safetensors"
    with pytest.raises(MissingFileError, match="cannot be read"):
        SafetensorsTensors([path])


def test_shards_that_the_index_names_but_are_not_there(sharded):
    (sharded.parent / "2.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"1 of 2 shards are missing, first '2\.safetensors'; download"):
        open_sharded(sharded)


@pytest.mark.parametrize("file", ["../1.safetensors", "/etc/passwd", "a/b", "", ".", "..", "1\0", 5])
def test_an_index_that_names_a_path_is_refused(sharded, file):
    with pytest.raises((CorruptShardError, MissingFileError), match=r"not a file beside it|are missing"):
        read_weight_map(index(sharded.parent, {"a": file}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "not a checkpoint index .KeyError"),
        (b"[]", "not a checkpoint index .TypeError"),
        (b'{"weight_map": []}', "not a checkpoint index .AttributeError"),
        (b'{"weight_map": {"a": []}}', "not a checkpoint index .TypeError"),
        (b'{"weight_map": {"a": 1, "b": ""}}', "not a checkpoint index .TypeError"),
        (b"{", "not a checkpoint index .JSONDecodeError"),
        (b"[" * 100_000, "not a checkpoint index .RecursionError"),
        (b"\xff", "not a checkpoint index .UnicodeDecodeError"),
    ],
)
def test_an_index_of_the_wrong_kind_is_refused(sharded, content, message):
    sharded.write_bytes(content)
    with pytest.raises(CorruptShardError, match=message) as caught:
        read_weight_map(sharded)
    assert "\n" not in str(caught.value)


def test_an_index_that_is_an_lfs_pointer_is_refused(sharded):
    sharded.write_bytes(LFS)
    with pytest.raises(LFSPointerError):
        read_weight_map(sharded)


@pytest.mark.parametrize(
    "weight_map", [{"a": "2.safetensors", "b": "1.safetensors"}, {"a": "2.safetensors"}, {"d": "1.safetensors"}]
)
def test_an_index_that_contradicts_its_shards_is_refused(sharded, weight_map):
    index(sharded.parent, weight_map)
    with pytest.raises(CorruptShardError, match=r"lacks the tensor .[ad]. that the index puts there"):
        open_sharded(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    save(sharded.parent / "2.safetensors", {"c": np.arange(5), "a": np.arange(3.0)})
    with pytest.raises(CorruptShardError, match=r"2\.safetensors: tensor a is also in 1\.safetensors"):
        open_sharded(sharded)


def test_a_shard_that_changes_while_it_is_read(sharded):
    source = open_sharded(sharded)
    shard = sharded.parent / "1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(TruncatedShardError, match="ends within a tensor"):
        read_tensor(source, "b")
    shard.unlink()
    with pytest.raises(MissingFileError, match=r"1\.safetensors: cannot be read"):
        read_tensor(source, "b")
