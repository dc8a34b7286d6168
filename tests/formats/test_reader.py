import builtins
import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sctconv.formats import reader as reader_module
from sctconv.formats.errors import MissingEntryError
from sctconv.formats.reader import SctFile
from sctconv.formats.writer import SctWriter


class CountingFile:
    """A raw file that counts the bytes that are read from it."""

    def __init__(self, file):
        self.file, self.count = file, 0

    def readinto(self, buffer):
        size = self.file.readinto(buffer)
        self.count += size
        return size

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.fixture
def counted(monkeypatch):
    """The files that the reader opens, as `CountingFile`s."""
    files: list[CountingFile] = []

    def open_(*args, **options):
        files.append(CountingFile(builtins.open(*args, **options)))  # noqa: SIM115
        return files[-1]

    monkeypatch.setattr(reader_module, "open", open_, raising=False)
    return files


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """10,000 tensors of 4 KiB."""
    path = tmp_path_factory.mktemp("large") / "large.sct"
    block = np.arange(1024, dtype="<i4")
    with SctWriter(path) as writer:
        for number in range(10_000):
            block[0] = -number
            writer.add_tensor(f"model.layers.{number}.weight", block)
        writer.commit()
    return path


def test_opening_10000_tensors_reads_head_tail_and_index_alone(large, counted):
    with SctFile(large) as file:
        assert len(file.index.tensors) == 10_000
        assert counted[0].count == 64 + 64 + file.tail.index_nbytes < file.nbytes / 10
        for name in file.index.tensors:
            assert file.tensor(name).shape == (1024,)
        assert counted[0].count == 128 + file.tail.index_nbytes
        file.verify(file.entry("model.layers.7.weight"))
        assert counted[0].count == 128 + file.tail.index_nbytes + 4096
        assert file.tensor("model.layers.9999.weight")[:3].tolist() == [-9999, 1, 2]


def test_a_tensor_is_a_view_of_one_mapping(save, parts):
    with SctFile(save(parts)) as file:
        first, second = file.tensor("l.U"), file.tensor("l.U")
        assert np.shares_memory(first, second)
        assert np.shares_memory(file.tensor("tied"), file.tensor("tied too"))
        whole = np.frombuffer(memoryview(file.buffer("l.U").obj), np.uint8)
        assert whole.size == file.nbytes and np.shares_memory(whole, first)


def test_a_tensor_is_read_only(save, parts):
    with SctFile(save(parts)) as file, pytest.raises(ValueError, match="read-only"):
        file.tensor("l.U")[0, 0] = 1


def test_writing_to_a_buffer_stays_in_the_process(save, parts):
    path = save(parts)
    with SctFile(path) as file:
        buffer = file.buffer("l.s")
        buffer[:] = bytes(8)
        assert file.tensor("l.s").tolist() == [0, 0]
        file.verify(file.entry("l.s"))  # what is on the disk
    assert path.read_bytes() == parts.build()
    with SctFile(path) as file:
        assert file.tensor("l.s").tolist() == [3, 1]


def test_a_view_outlives_the_file(save, parts):
    file = SctFile(save(parts))
    view, buffer = file.tensor("l.U"), file.buffer("l.s")
    file.close()
    del file
    gc.collect()
    assert view.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert np.frombuffer(buffer, "<f4").tolist() == [3, 1]


def test_the_mapping_outlives_the_file_and_keeps_writes_to_itself(save, parts):
    path = save(parts)
    with SctFile(path) as file:
        mapping, entry = file.mapping, file.entry("l.s")
        assert len(mapping) == file.nbytes
    array = np.ndarray(entry.shape, "<f4", mapping, entry.offset)
    del file, mapping
    gc.collect()
    assert array.tolist() == [3, 1]
    array[:] = 0
    assert array.tolist() == [0, 0] and path.read_bytes() == parts.build()


def test_a_closed_file_gives_no_more_tensors(save, parts):
    with SctFile(save(parts)) as file:
        file.tensor("l.U")
    with pytest.raises(ValueError, match="closed"):
        file.tensor("l.U")
    file.close()  # twice does no harm


def test_a_refused_file_is_closed(save, parts, counted):
    with pytest.raises(Exception, match="does not match its sha256"):
        SctFile(save(parts, {"sha256": bytes(range(32))}))
    assert counted[0].closed


def test_what_is_not_there_is_named(save, parts):
    path = save(parts)
    with SctFile(path) as file:
        for read in (file.entry, file.tensor, file.buffer):
            with pytest.raises(MissingEntryError, match=r"model\.sct: no tensor 'lm_head'; it has 8"):
                read("lm_head")
        with pytest.raises(MissingEntryError, match=r"model\.sct: no embedded file 'tokenizer\.json'"):
            file.file("tokenizer.json")


@pytest.mark.parametrize("chunk", [1, 8, 1 << 20])
def test_pieces_are_no_longer_than_asked(save, parts, monkeypatch, chunk):
    monkeypatch.setattr(reader_module, "CHUNK_BYTES", chunk)
    with SctFile(save(parts)) as file:
        for entry in file.index.blobs:
            pieces = list(file.pieces(entry))
            assert all(0 < len(piece) <= chunk for piece in pieces)
            assert sum(map(len, pieces)) == entry.nbytes
            file.verify(entry)
        assert b"".join(file.pieces(file.entry("l.U"))) == file.tensor("l.U").tobytes()


def test_a_tensor_is_read_by_many_threads_at_once(large):
    with SctFile(large) as file, ThreadPoolExecutor(8) as pool:
        names = [f"model.layers.{number}.weight" for number in range(0, 10_000, 7)]
        for name, array in zip(names, pool.map(file.read, names), strict=True):
            assert (array == file.tensor(name)).all()
        assert "mapping" in vars(file)  # by `tensor` alone
    with SctFile(large) as file:
        file.read(names[0])
        assert "mapping" not in vars(file)


def test_rows_are_read_alone(tmp_path):
    array = np.arange(60, dtype="<f4").reshape(12, 5)
    with SctWriter(tmp_path / "m.sct") as writer:
        writer.add_tensor("W", array)
        writer.add_tensor("b", array[0, :1].reshape(()))
        writer.commit()
    with SctFile(tmp_path / "m.sct") as file:
        for rows in (slice(None), slice(0, 3), slice(3, 40), slice(11, 12), slice(5, 5), slice(-2, None), slice(9, 2)):
            assert (file.read("W", rows) == array[rows]).all() and file.read("W", rows).shape == array[rows].shape
        assert file.read("b").shape == ()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3), (0, 0), (0, 1 << 40)])
def test_a_dimension_of_zero_divides_nothing(tmp_path, shape):
    with SctWriter(tmp_path / "m.sct") as writer:
        writer.add_tensor("empty", [], dtype="F32", shape=shape)
        writer.add_tensor("W", np.ones((2, 3), "<f4"))
        writer.commit()
    with SctFile(tmp_path / "m.sct") as file:
        for rows in (slice(None), slice(0, 1), slice(1, 5)):
            count = len(range(*rows.indices(shape[0])))
            assert file.read("empty", rows).shape == (count, *shape[1:])
        assert file.tensor("empty").shape == shape and not file.tensor("empty").nbytes
        assert list(file.pieces(file.entry("empty"))) == []
        file.verify(file.entry("empty"))
        file.verify_padding()
