import struct
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from sctconv.formats import gguf_file
from sctconv.formats.checkpoint import read_tensor
from sctconv.formats.errors import (
    CorruptShardError,
    LFSPointerError,
    MissingFileError,
    TruncatedShardError,
    UnsupportedCheckpointError,
)
from sctconv.formats.gguf_file import GgufTensors

QUANTISED = [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]
BY_BLOCKS = [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_NL]  # no quantiser in the package
W = np.random.default_rng(0).standard_normal((6, 256)).astype("<f4")


def write(path: Path, tensors: dict, **fields) -> Path:
    """A GGUF file of tensors, each an array or bytes of a quantised type; fields are unsigned integers."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        writer.add_uint32(key.replace("__", "."), value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def raw(tensors: int = 0, pairs: bytes = b"", count: int | None = None, rest: bytes = b"") -> bytes:
    """The beginning of a GGUF file by hand."""
    number = (1 if pairs else 0) if count is None else count
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, number) + pairs + rest


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def tensor(name: bytes, dims: list[int], kind: int = 0, offset: int = 0, n_dims: int | None = None) -> bytes:
    count = len(dims) if n_dims is None else n_dims
    return struct.pack(f"<Q{len(name)}sI{len(dims)}QIQ", len(name), name, count, *dims, kind, offset)


@pytest.mark.parametrize("dtype", ["<f8", "<f4", "<f2", "<i8", "<i4", "<i2", "i1"])
def test_plain_types_keep_their_dtype(tmp_path, dtype):
    array = np.arange(-10, 11).astype(dtype).reshape(3, 7)
    source = GgufTensors(write(tmp_path / "a.gguf", {"a": (W, None), "x": (array, None)}))
    assert list(source.tensors) == ["a", "x"]
    assert source.tensors["x"].shape == (3, 7)
    values = read_tensor(source, "x")
    assert values.dtype == np.dtype(dtype) and np.array_equal(values, array)


@pytest.mark.parametrize("chunk", [512, 1300, 64 << 20])
def test_bf16_stays_bf16(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(gguf_file, "CHUNK_BYTES", chunk)
    data = gguf.quantize(W, Kind.BF16)
    source = GgufTensors(write(tmp_path / "a.gguf", {"w": (data, Kind.BF16), "b": (data[0], Kind.BF16)}))
    assert (source.tensors["w"].dtype, source.tensors["w"].shape) == ("BF16", (6, 256))
    chunks = list(source.chunks("w"))
    assert all(piece.dtype == ml_dtypes.bfloat16 and piece.nbytes <= chunk for piece in chunks)
    assert np.concatenate(chunks).tobytes() == data.tobytes()
    assert np.array_equal(read_tensor(source, "w", np.float32), gguf.dequantize(data, Kind.BF16))
    assert read_tensor(source, "b").tobytes() == data[0].tobytes()


@pytest.mark.parametrize("chunk", [1024, 2500, 64 << 20])
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_types_are_as_gguf_dequantises_them(tmp_path, monkeypatch, kind, chunk):
    monkeypatch.setattr(gguf_file, "CHUNK_BYTES", chunk)
    data = gguf.quantize(W, kind)
    source = GgufTensors(write(tmp_path / "a.gguf", {"w": (data, kind)}))
    info = source.tensors["w"]
    assert (info.dtype, info.shape) == ("F32", (6, 256))
    chunks = list(source.chunks("w"))
    assert all(piece.dtype == np.float32 and piece.nbytes <= max(chunk, 1024) for piece in chunks)
    assert np.array_equal(np.concatenate(chunks).reshape(6, 256), gguf.dequantize(data, kind))
    assert np.allclose(read_tensor(source, "w"), W, atol=0.5)


@pytest.mark.parametrize("kind", BY_BLOCKS)
def test_types_that_the_package_only_reads(tmp_path, kind):
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(1).integers(0, 60, (5, 512 // block * nbytes), np.uint8)
    source = GgufTensors(write(tmp_path / "a.gguf", {"w": (data, kind)}))
    assert source.tensors["w"].shape == (5, 512)
    assert np.array_equal(read_tensor(source, "w"), gguf.dequantize(data, kind), equal_nan=True)


def test_shapes_of_every_number_of_dimensions(tmp_path):
    arrays = {f"{shape}": np.random.default_rng(2).random(shape) for shape in [(5,), (2, 3), (2, 3, 4), (1, 2, 3, 4)]}
    source = GgufTensors(write(tmp_path / "a.gguf", {name: (array, None) for name, array in arrays.items()}))
    for name, array in arrays.items():
        assert np.array_equal(read_tensor(source, name), array)


def test_a_tensor_of_no_entries(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(raw(1, rest=tensor(b"e", [0, 3])) + bytes(64))
    assert read_tensor(GgufTensors(path), "e").shape == (3, 0)


def test_fields_and_architecture(tmp_path):
    source = GgufTensors(write(tmp_path / "a.gguf", {"w": (W, None)}, llama__block_count=3))
    assert source.architecture == "llama"
    assert (source.field("llama.block_count"), source.field("nothing")) == (3, None)
    path = tmp_path / "b.gguf"
    path.write_bytes(raw(pairs=pair(b"a", 4, struct.pack("<I", 1))))
    with pytest.raises(CorruptShardError, match=r"lacks general\.architecture; not a model"):
        _ = GgufTensors(path).architecture


ENDLESS = pair(b"a", 9, struct.pack("<IQ", 0, 1 << 60))  # an array of 2^60 bytes
NESTED = pair(b"a", 9, struct.pack("<IQ", 9, 1) * 5000)
ALIGN_0 = pair(b"general.alignment", 4, struct.pack("<I", 0))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        pytest.param(b"", TruncatedShardError, "an empty file", id="empty"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", LFSPointerError, "git lfs pull", id="git-lfs"),
        pytest.param(b"PK\3\4" + bytes(60), CorruptShardError, "but a zip archive", id="zip"),
        pytest.param(b"<html></html>", CorruptShardError, "but an HTML page", id="html"),
        pytest.param(b"GGUF", TruncatedShardError, "cut after 4 bytes", id="magic alone"),
        pytest.param(b"GGUF" + bytes([9]) + bytes(40), CorruptShardError, "version 9", id="version"),
        pytest.param(raw(1 << 62), TruncatedShardError, "past its end", id="tensor count"),
        pytest.param(raw(count=1 << 62), TruncatedShardError, "past its end", id="field count"),
        pytest.param(raw(pairs=ENDLESS), TruncatedShardError, "past its end", id="array count"),
        pytest.param(raw(pairs=NESTED), CorruptShardError, "arrays within arrays", id="nesting"),
        pytest.param(
            raw(pairs=pair(b"a", 99, b"")), CorruptShardError, "is not a valid GGUFValueType", id="field type"
        ),
        pytest.param(raw(pairs=pair(b"a", 8, b"\xff" * 8)), TruncatedShardError, "past its end", id="string length"),
        pytest.param(raw(pairs=ALIGN_0), CorruptShardError, "alignment", id="alignment 0"),
        pytest.param(
            raw(pairs=2 * pair(b"a", 0, b"1"), count=2), CorruptShardError, "Duplicate a already", id="field twice"
        ),
        pytest.param(
            raw(1, rest=tensor(b"w", [2], n_dims=1 << 31)), TruncatedShardError, "past its end", id="dimensions"
        ),
        pytest.param(
            raw(1, rest=tensor(b"w", [8], offset=1 << 63) + bytes(99)), TruncatedShardError, "past its end", id="offset"
        ),
        pytest.param(
            raw(1, rest=tensor(b"w", [1 << 32, 1 << 32]) + bytes(99)), CorruptShardError, "damaged", id="product 2^64"
        ),
        pytest.param(raw(1, rest=tensor(b"w", [1 << 62]) + bytes(99)), TruncatedShardError, "past its end", id="size"),
        pytest.param(
            raw(2, rest=tensor(b"w", [1]) + tensor(b"w", [1], offset=32) + bytes(99)),
            CorruptShardError,
            "duplicated tensor",
            id="tensor twice",
        ),
        pytest.param(
            raw(1, rest=tensor(b"w", [1], kind=999) + bytes(99)),
            *(UnsupportedCheckpointError, "a tensor of unknown type .*999"),
            id="tensor type",
        ),
        pytest.param(
            b"GGUF" + struct.pack(">IQQ", 3, 0, 0), UnsupportedCheckpointError, "other byte order", id="big-endian"
        ),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content, error, message):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        GgufTensors(path)
    text = str(caught.value)
    assert caught.type is error
    assert text.startswith(f"{path}: ") and text.isprintable() and len(text) < 600


def test_an_undamaged_file_by_hand_opens(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(raw(1, pairs=pair(b"a", 9, struct.pack("<IQ", 0, 3) + b"123"), rest=tensor(b"w", [1])) + bytes(99))
    assert read_tensor(GgufTensors(path), "w").tolist() == [0]


def test_a_cut_at_any_length_is_refused(tmp_path):
    path = write(tmp_path / "a.gguf", {"w": (W, None), "b": (W[0], None)})
    whole = path.read_bytes()
    for length in [*range(4, len(whole), 97), len(whole) - 65]:  # the file may end in padding
        path.write_bytes(whole[:length])
        with pytest.raises((TruncatedShardError, CorruptShardError), match=r"a\.gguf: "):
            GgufTensors(path)


def test_a_file_cut_while_it_is_open(tmp_path):
    source = GgufTensors(write(tmp_path / "a.gguf", {"w": (W, None)}))
    with source.path.open("r+b") as file:
        file.truncate(source.path.stat().st_size - 4096)
    with pytest.raises(TruncatedShardError, match="ends within a tensor"):
        read_tensor(source, "w")


def test_a_part_of_a_split_file_is_refused(tmp_path):
    with pytest.raises(UnsupportedCheckpointError, match="one part of a split GGUF; join them"):
        GgufTensors(write(tmp_path / "a.gguf", {"w": (W, None)}, split__count=2))
    GgufTensors(write(tmp_path / "b.gguf", {"w": (W, None)}, split__count=1))


def test_a_type_that_cannot_be_dequantised_is_named(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(raw(1, rest=tensor(b"w", [256], kind=int(Kind.Q8_1))) + bytes(400))
    with pytest.raises(UnsupportedCheckpointError, match="tensor w is Q8_1, which cannot be dequantised"):
        read_tensor(GgufTensors(path), "w")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"a\.gguf: cannot be read \(No such file"):
        GgufTensors(tmp_path / "a.gguf")
