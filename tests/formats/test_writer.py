import hashlib
import itertools
import json

import ml_dtypes
import numpy as np
import pytest
import xxhash

from sctconv.formats import writer as writer_module
from sctconv.formats.dtypes import DTYPES
from sctconv.formats.errors import (
    DTypeError,
    DuplicateNameError,
    ForbiddenNameError,
    IndexSyntaxError,
    LayerError,
    LimitError,
    ShapeError,
)
from sctconv.formats.index import LayerRecord
from sctconv.formats.reader import SctFile
from sctconv.formats.writer import SctWriter

RECORD = LayerRecord("l", 4, 3, 2, energy=0.875, error=0.25, bias=None, dtype="F32")


def values(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Any bits at all; 0 and 1 where the dtype has no others."""
    rng = np.random.default_rng(3)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(rng.bytes(size), dtype).reshape(shape)


def add_factors(writer, name="l"):
    writer.add_tensor(f"{name}.U", np.eye(4, 2, dtype="<f4"))
    writer.add_tensor(f"{name}.s", np.array([2, 1], "<f4"))
    writer.add_tensor(f"{name}.V", np.eye(3, 2, dtype="<f4"))


@pytest.mark.parametrize("shape", [(3, 5), (), (0,), (2, 0, 3), (1,), (1, 1, 1, 1, 1, 1, 1, 1), (1000,)], ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path, name, shape):
    array = values(DTYPES[name], shape)
    with SctWriter(tmp_path / "a.sct") as writer:
        writer.add_tensor("x", array)
        writer.commit()
    with SctFile(tmp_path / "a.sct") as file:
        back = file.tensor("x")
        assert (back.dtype, back.shape, file.entry("x").dtype) == (array.dtype, shape, name)
        assert back.tobytes() == array.tobytes()
        file.verify(file.entry("x"))
        file.verify_padding()


@pytest.mark.parametrize("name", ["w", "модель.层.é😀", " ", "a/b\\c", "a" * 1024, "'\"{}", "\u202e"], ids=ascii)
def test_names_are_free_text(tmp_path, name):
    with SctWriter(tmp_path / "a.sct") as writer:
        writer.add_tensor(name, np.ones(2))
        writer.commit()
    with SctFile(tmp_path / "a.sct") as file:
        assert file.tensor(name).tolist() == [1.0, 1.0]


def test_layers_files_and_metadata_come_back(tmp_path):
    with SctWriter(tmp_path / "a.sct", metadata={"source": {"é": [1, 2.5, None, True]}}) as writer:
        add_factors(writer)
        writer.add_layer(RECORD)
        writer.add_file("config.json", b"{}\r\n\xff")
        writer.add_file("empty", b"")
        writer.metadata["later"] = 1
        writer.commit()
    with SctFile(tmp_path / "a.sct") as file:
        assert file.index.layers == {"l": RECORD}
        assert (file.file("config.json"), file.file("empty")) == (b"{}\r\n\xff", b"")
        assert file.index.metadata == {"source": {"é": [1, 2.5, None, True]}, "later": 1}
        assert file.index.complete and file.index.required_features == ()
        file.verify_padding()


def test_the_same_calls_give_the_same_bytes_and_always_have(tmp_path):
    """The hash is of version 1.0 for good: a change here is a change of the format."""

    def write(path, metadata):
        with SctWriter(path, metadata=metadata) as writer:
            add_factors(writer)
            writer.add_tensor("b", np.arange(5, dtype=np.int8), extra={"z": 1, "a": 2})
            writer.add_layer(RECORD)
            writer.add_file("config.json", b"{}")
            writer.commit()
        return path.read_bytes()

    first = write(tmp_path / "a.sct", {"x": 1, "é": 0.1})
    assert first == write(tmp_path / "b.sct", {"é": 0.1, "x": 1})
    assert hashlib.sha256(first).hexdigest() == "59f49b15d8381c920e006ba40e52adc82f83cc14d3ba6a0b4e3673d1946954be"


def test_the_bytes_are_those_of_the_specification(tmp_path, parts):
    """The writer's file and the one that the tests put together by hand are the same."""
    with SctWriter(tmp_path / "a.sct", metadata={"made": "by hand"}) as writer, SctFile(save(tmp_path, parts)) as file:
        for name in file.index.tensors:
            writer.add_tensor(name, file.tensor(name))
        writer.add_layer(file.index.layers["l"])
        writer.add_file("config.json", file.file("config.json"))
        writer.commit()
    assert (tmp_path / "a.sct").read_bytes() == parts.build()


def save(directory, parts):
    (directory / "hand.sct").write_bytes(parts.build())
    return directory / "hand.sct"


def test_the_index_is_canonical_json(tmp_path):
    with SctWriter(tmp_path / "a.sct", metadata={"é": 1}) as writer:
        writer.commit()
    with SctFile(tmp_path / "a.sct") as file:
        data = (tmp_path / "a.sct").read_bytes()[file.tail.index_offset : -64]
    assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@pytest.mark.parametrize("chunk", [8, 24, 1 << 20])
def test_pieces_and_strides_make_the_same_tensor(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(writer_module, "CHUNK_BYTES", chunk)
    array = np.arange(35, dtype="<f4").reshape(5, 7)
    with SctWriter(tmp_path / "a.sct") as writer:
        entries = [
            writer.add_tensor("whole", array, dtype="F64"),
            writer.add_tensor("rows", iter(array), dtype="F64", shape=[5, 7]),
            writer.add_tensor("odd", [array.reshape(-1)[:3], array.reshape(-1)[3:]], dtype="F64", shape=(5, 7)),
            writer.add_tensor("strided", np.asfortranarray(array), dtype="F64"),
            writer.add_tensor("big-endian", array.astype(">f4"), dtype="F64"),
        ]
        writer.commit()
    assert {entry.offset for entry in entries} == {64}  # equal content is stored once
    with SctFile(tmp_path / "a.sct") as file:
        assert file.tensor("strided").dtype == np.float64
        assert np.array_equal(file.tensor("strided"), array)


def test_a_cast_is_numpys(tmp_path):
    array = np.array([1.0, 1 / 3, 1e-8, 3e38], "<f4")
    with SctWriter(tmp_path / "a.sct") as writer:
        writer.add_tensor("x", array, dtype="BF16")
        writer.commit()
    with SctFile(tmp_path / "a.sct") as file:
        assert file.tensor("x").tobytes() == array.astype(ml_dtypes.bfloat16).tobytes()


def test_equal_tensors_share_one_blob_by_value(tmp_path):
    array = np.arange(1000, dtype="<i4")
    with SctWriter(tmp_path / "a.sct") as writer:
        a = writer.add_tensor("a", array)
        before = writer.nbytes
        b = writer.add_tensor("b", array.copy())
        assert writer.nbytes - before < 64
        c = writer.add_tensor("c", array.reshape(10, 100))  # another shape, another blob
        d = writer.add_tensor("d", array.astype("<u4"))  # another dtype, another blob
        for number in range(3):
            writer.add_tensor(f"empty {number}", array[:0])
        writer.commit()
    assert a.offset == b.offset and len({a.offset, c.offset, d.offset}) == 3
    with SctFile(tmp_path / "a.sct") as file:
        assert np.shares_memory(file.tensor("a"), file.tensor("b"))
        assert all(np.array_equal(file.tensor(name).reshape(-1), array) for name in "abcd")
        assert all(file.tensor(f"empty {number}").shape == (0,) for number in range(3))
        file.verify_padding()


def test_a_twin_in_hash_alone_is_not_merged(tmp_path, monkeypatch):
    class Colliding:
        def __init__(self):
            self.update = lambda data: None
            self.hexdigest = lambda: "0" * 16

    monkeypatch.setattr(xxhash, "xxh3_64", Colliding)
    monkeypatch.setattr(writer_module, "CHUNK_BYTES", 64)
    array = np.arange(100, dtype="<i4")
    other = array.copy()
    other[-1] += 1
    with SctWriter(tmp_path / "a.sct") as writer:
        offsets = [writer.add_tensor(f"{i}", item).offset for i, item in enumerate((array, other, array, other))]
        writer.commit()
    assert offsets[0] == offsets[2] != offsets[1]
    with SctFile(tmp_path / "a.sct") as file:
        assert [file.tensor(f"{i}")[-1] for i in range(4)] == [99, 100, 99, 100]


@pytest.mark.parametrize(
    ("add", "error", "message"),
    [
        (lambda w: w.add_tensor("a", np.ones(1)), DuplicateNameError, "the tensor a was written already"),
        (lambda w: w.add_file("f", b"2"), DuplicateNameError, "the file f was embedded already"),
        (lambda w: (w.add_layer(RECORD), w.add_layer(RECORD)), DuplicateNameError, "layer l was recorded already"),
        (lambda w: w.add_tensor("", np.ones(1)), ForbiddenNameError, "empty"),
        (lambda w: w.add_tensor("a" * 1025, np.ones(1)), LimitError, "over 1024"),
        (lambda w: w.add_file("../f", b""), ForbiddenNameError, r"may not be called '\.\./f'"),
        (lambda w: w.add_tensor("b", np.ones(1, "c8")), DTypeError, "complex64 cannot be stored"),
        (lambda w: w.add_tensor("b", np.ones(1), dtype="Q4"), DTypeError, "unknown dtype 'Q4'"),
        (lambda w: w.add_tensor("b", [np.ones(3)], dtype="F32", shape=[4]), ShapeError, r"12 bytes do not make \[4\]"),
        (lambda w: w.add_tensor("b", [], dtype="F32", shape=[1 << 40, 1 << 40]), ShapeError, "0 bytes do not make"),
    ],
)
def test_what_must_not_be_added_is_refused_at_once(tmp_path, add, error, message):
    with pytest.raises(error, match=message), SctWriter(tmp_path / "a.sct") as writer:
        writer.add_tensor("a", np.ones(1))
        writer.add_file("f", b"1")
        add(writer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("add", "error", "message"),
    [
        (lambda w: w.add_layer(RECORD), LayerError, r"l\.U should be F32 \[4, 2\], but is missing"),
        (lambda w: w.metadata.update(x=float("nan")), IndexSyntaxError, "not to be written as JSON"),
        (lambda w: w.metadata.update(x="\ud800"), IndexSyntaxError, "not to be written as JSON"),
        (lambda w: w.metadata.update(x=1 << 64), IndexSyntaxError, "beyond 64 bits"),
        (lambda w: w.metadata.update(x="x" * (64 << 20)), LimitError, "at most 67108864 are allowed"),
        (lambda w: w.add_tensor("9d", np.ones([1] * 9)), LimitError, "9 dim"),
    ],
)
def test_a_file_that_the_reader_would_refuse_is_never_committed(tmp_path, add, error, message):
    with pytest.raises(error, match=message), SctWriter(tmp_path / "a.sct") as writer:
        add(writer)
        writer.commit()
    assert list(tmp_path.iterdir()) == []


def test_a_layers_tensors_may_come_before_or_after_it(tmp_path):
    with SctWriter(tmp_path / "a.sct") as writer:
        writer.add_layer(RECORD)
        add_factors(writer)
        writer.commit()
    with SctFile(tmp_path / "a.sct") as file:
        assert file.index.layers["l"].factors == {"l.U": (4, 2), "l.s": (2,), "l.V": (3, 2)}


def test_a_tensor_that_failed_halfway_leaves_no_trace(tmp_path):
    with SctWriter(tmp_path / "a.sct") as writer:
        with pytest.raises(ShapeError):
            writer.add_tensor("short", [np.ones(100)], dtype="F64", shape=[101])
        with pytest.raises(ShapeError):
            writer.add_tensor("long", [np.ones(100)], dtype="F64", shape=[99])
        writer.add_tensor("x", np.ones(1))
        writer.commit()
    with SctWriter(tmp_path / "b.sct") as writer:
        writer.add_tensor("x", np.ones(1))
        writer.commit()
    assert (tmp_path / "a.sct").read_bytes() == (tmp_path / "b.sct").read_bytes()


@pytest.mark.parametrize("given", [{}, {"dtype": "F32"}, {"shape": [1]}])
def test_pieces_need_a_dtype_and_a_shape(tmp_path, given):
    with (
        pytest.raises(AssertionError, match="pieces need a dtype and a shape"),
        SctWriter(tmp_path / "a.sct") as writer,
    ):
        writer.add_tensor("x", [np.ones(1)], **given)


@pytest.mark.parametrize("add", [lambda w: w.add_tensor("b", np.ones(1)), lambda w: w.add_file("f", b"")])
def test_nothing_is_added_after_commit(tmp_path, add):
    with pytest.raises(AssertionError, match="nothing can be added after commit"), SctWriter(tmp_path / "a.sct") as w:
        w.commit()
        add(w)
    assert list(tmp_path.iterdir()) == []


def test_memory_is_one_piece_of_one_tensor(tmp_path, monkeypatch):
    """Pieces are asked for one at a time, and each is written before the next is asked for."""
    monkeypatch.setattr(writer_module, "CHUNK_BYTES", 64)
    written = []
    with SctWriter(tmp_path / "a.sct") as writer:

        def pieces():
            for _ in itertools.repeat(None, 5):
                written.append(writer.nbytes)
                yield np.ones(100, "<f4")

        writer.add_tensor("x", pieces(), dtype="F16", shape=[500])
        writer.commit()
    assert written == [64, 264, 464, 664, 864]
