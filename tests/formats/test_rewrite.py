import pytest

from sctconv.formats import reader as reader_module
from sctconv.formats.errors import ChecksumError, IncompleteError, OutputError
from sctconv.formats.reader import SctFile
from sctconv.formats.writer import rewrite

UNKNOWN = {
    ("quantisation",): {"bits": 4},
    ("tensors", "tied", "scale"): 0.5,
    ("layers", "l", "hessian"): [1, None],
    ("files", "config.json", "mime"): "application/json",
}


@pytest.fixture
def target(tmp_path):
    return tmp_path / "copy.sct"


def test_a_rewrite_changes_nothing_unasked(save, parts, target):
    """Of a file in the writer's order; keys from a later version included."""
    path = save(parts, UNKNOWN)
    with SctFile(path) as file:
        rewrite(file, target)
    with SctFile(target) as copy:
        assert copy.index.extra == {"quantisation": {"bits": 4}}
        assert copy.index.tensors["tied"].extra == {"scale": 0.5}
        assert copy.index.tensors["tied too"].extra == {}
        assert copy.index.layers["l"].extra == {"hessian": [1, None]}
        assert copy.index.files["config.json"].extra == {"mime": "application/json"}
    with SctFile(target) as copy, SctFile(path) as file:
        assert copy.index == file.index


def test_unknown_keys_never_replace_known_ones(save, parts, target):
    """A key that is unknown in one place may be known in another."""
    with SctFile(save(parts, {("tensors", "tied", "sha256"): "x", ("dtype",): "F4"})) as file:
        rewrite(file, target)
    with SctFile(target) as copy:
        assert copy.index.extra == {"dtype": "F4"}
        assert copy.index.tensors["tied"].extra == {"sha256": "x"}


def test_metadata_and_files_are_replaced_and_added(save, parts, target):
    with SctFile(save(parts, UNKNOWN)) as file:
        rewrite(file, target, metadata={"licence": "MIT"}, files={"config.json": b"[]", "new.txt": b"new"})
    with SctFile(target) as copy:
        assert copy.index.metadata == {"made": "by hand", "licence": "MIT"}
        assert (copy.file("config.json"), copy.file("new.txt")) == (b"[]", b"new")
        assert copy.index.files["config.json"].extra == {}  # it spoke of the old content
        assert copy.tensor("l.s").tolist() == [3, 1]
        for blob in copy.index.blobs:
            copy.verify(blob)


@pytest.mark.parametrize("chunk", [8, 16])
def test_a_rewrite_goes_piece_by_piece(save, parts, target, monkeypatch, chunk):
    monkeypatch.setattr(reader_module, "CHUNK_BYTES", chunk)
    with SctFile(save(parts)) as file:
        rewrite(file, target)
    with SctFile(target) as copy:
        assert copy.tensor("l.U").tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
        assert copy.tensor("scalar").shape == () and copy.tensor("empty").shape == (0, 3)


def test_a_rewrite_may_replace_its_source(save, parts):
    path = save(parts)
    with SctFile(path) as file:
        with pytest.raises(OutputError, match="exists already"):
            rewrite(file, path)
        rewrite(file, path, metadata={"a": 1}, overwrite=True)
        assert file.tensor("scalar") == 0.5  # the old file lives on while it is open
    with SctFile(path) as file:
        assert file.index.metadata == {"made": "by hand", "a": 1}


@pytest.mark.parametrize(("position", "name"), [(64, "tensor l.U"), (448, "embedded file config.json")])
def test_damage_is_not_sealed_with_a_fresh_checksum(save, parts, target, position, name):
    spoiled = bytearray(parts.build())
    spoiled[position] ^= 1
    with SctFile(save(bytes(spoiled))) as file, pytest.raises(ChecksumError, match=f"the {name} does not match"):
        rewrite(file, target)
    assert not target.exists()


def test_an_unfinished_file_does_not_become_a_finished_one(save, parts, target):
    path = save(parts, {("complete",): False})
    with SctFile(path, allow_incomplete=True) as file, pytest.raises(IncompleteError, match="not finished"):
        rewrite(file, target)
    assert not target.exists()
