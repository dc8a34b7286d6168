"""Names, counts, shapes and offsets at the ends of what the format allows, each with what lies just beyond."""

from __future__ import annotations

import json
import struct
import unicodedata

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sctconv.formats.errors import (
    BlobBoundsError,
    BlobLayoutError,
    ForbiddenNameError,
    LayerError,
    LimitError,
    ShapeError,
    TruncatedError,
)
from sctconv.formats.index import LayerRecord
from sctconv.formats.layout import check_name
from sctconv.formats.reader import SctFile
from sctconv.formats.writer import SctWriter
from tests.formats.mutations import Base
from tests.formats.parts import Parts

NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=1024)


def filled(name: str, nbytes: int) -> str:
    """The beginning of a name, made up to exactly so many bytes."""
    start = name.encode()[: nbytes - 4].decode(errors="ignore")
    return start + "x" * (nbytes - len(start.encode()))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(NAMES, min_size=1, max_size=4), nbytes=st.integers(1022, 1024))
@example(names=["\U0010ffff", "\ue000", "\u202e", "\ufeff", "\xa0", " ", "/", "..", "\u0345"], nbytes=1024)
def test_a_name_of_any_letters_comes_back(tmp_path, names, nbytes):
    names = sorted({*(name.encode()[:1024].decode(errors="ignore") for name in names), filled(names[0], nbytes)})
    path = tmp_path / "names.sct"
    with SctWriter(path, overwrite=True) as writer:
        for place, name in enumerate(names):
            writer.add_tensor(name, np.array([place], "<i4"))
        writer.commit()
    with SctFile(path) as file:
        assert list(file.index.tensors) == names
        assert [file.tensor(name).item() for name in names] == list(range(len(names)))
    with pytest.raises(LimitError, match="is over 1024 bytes"):
        check_name(filled(names[0], 1025))


@pytest.mark.parametrize("category", ["Cc", "Zl", "Zp", "Cs"])
def test_letters_that_no_name_may_hold_are_exactly_those_of_the_specification(category):
    letters = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) == category]
    assert letters
    for letter in letters:
        with pytest.raises(ForbiddenNameError):
            check_name(f"a{letter}b")


def test_names_that_look_alike_are_two(tmp_path):
    """Nothing is normalised: composed and decomposed, Latin and Cyrillic."""
    names = ["\xe9", "e\u0301", "a", "\u0430", "\ufb01", "fi"]
    with SctWriter(tmp_path / "m.sct") as writer:
        for place, name in enumerate(names):
            writer.add_tensor(name, np.array(place))
        writer.commit()
    with SctFile(tmp_path / "m.sct") as file:
        assert [file.tensor(name).item() for name in names] == list(range(len(names)))


@pytest.mark.parametrize("nbytes", [1022, 1023])
def test_a_layers_name_leaves_room_for_its_factors(tmp_path, nbytes):
    name = filled("層" * 400, nbytes)
    path = tmp_path / "m.sct"
    with SctWriter(path) as writer:
        arrays = {"U": np.eye(3, 2, dtype="<f4"), "s": np.array([2.0, 1.0], "<f4"), "V": np.eye(4, 2, dtype="<f4")}
        for letter, array in arrays.items():
            if nbytes > 1022 and letter == "U":
                with pytest.raises(LimitError, match="is over 1024 bytes"):
                    writer.add_tensor(f"{name}.{letter}", array)
                return
            writer.add_tensor(f"{name}.{letter}", array)
        writer.add_layer(LayerRecord(name, 3, 4, 2, None, None, None, "F32"))
        writer.commit()
    with SctFile(path) as file:
        assert list(file.index.layers) == [name]


def many_layers(count: int) -> Parts:
    """So many layers more, whose tensors share the blobs of the sample's."""
    parts = Parts()
    for number in range(count):
        name = f"model.layers.{number}.mlp.up_proj"
        parts.index["layers"].append({**parts.at("layers", 0), "name": name, "bias": f"{name}.bias"})
        for place, letter in enumerate(("U", "s", "V", "bias")):
            parts.index["tensors"].append({**parts.at("tensors", place), "name": f"{name}.{letter}"})
    return parts


def test_ten_thousand_layers_come_back_and_one_wrong_is_named(save):
    parts = many_layers(10_000)
    with SctFile(save(parts)) as file:
        assert len(file.index.layers) == 10_001 and len(file.index.tensors) == 40_008
        assert json.loads(file.index.pack()) == parts.index
        assert (file.tensor("model.layers.9999.mlp.up_proj.s") == [3, 1]).all()
    parts.index["layers"][7_654]["rank"] = 1
    with pytest.raises(LayerError, match=r"layer model\.layers\.7653\.mlp\.up_proj: .*\.U should be F32 \[4, 1\]"):
        SctFile(save(parts))


def far() -> tuple[Base, dict[int, bytes]]:
    """A file of more than 8 GiB: what of it is not zero, by offset, and its index.

    Blobs lie across 2 and 4 GiB, and one is over 4 GiB. The checksums of the zeros between them are none.
    """
    tensors, blobs, end = [], {}, 64

    def add(name: str, dtype: str, shape: list[int], nbytes: int, data: bytes = b"") -> None:
        nonlocal end
        entry = {"name": name, "dtype": dtype, "shape": shape, "offset": end, "nbytes": nbytes}
        tensors.append({**entry, "xxh3": xxhash.xxh3_64_hexdigest(data) if data else "0" * 16})
        blobs[end] = data
        end = -(-(end + nbytes) // 64) * 64

    for power in (31, 32):
        add(f"below {power}", "U8", [(1 << power) - 128 - end], (1 << power) - 128 - end)
        add(f"across {power}", "F32", [8, 8], 256, np.arange(64, dtype="<f4").tobytes())
    add("over 4 GiB", "U8", [(1 << 32) + 5], (1 << 32) + 5)
    add("last", "F64", [], 8, struct.pack("<d", 0.5))
    index = {"complete": True, "required_features": [], "tensors": tensors, "layers": [], "files": [], "metadata": {}}
    return Base(b"", json.dumps(index)), {**blobs, end: b""}


def save_far(path, base: Base, blobs: dict[int, bytes]) -> None:
    """Writes what is not zero; the rest of the file is a hole in the filesystem."""
    end = max(blobs)
    near = base.signed()  # head, index and tail, as if there were no data
    text = near[64:-64]
    head = struct.pack("<8sHHIQ40s", near[:8], 1, 0, 0, end + len(text) + 64, b"")
    tail = struct.pack("<QQ", end, len(text)) + near[-48:]
    with path.open("wb") as file:
        for offset, data in {**blobs, 0: head, end: text + tail}.items():
            file.seek(offset)
            file.write(data)


def test_blobs_across_2_and_4_gib_are_read_where_they_lie(tmp_path):
    path = tmp_path / "far.sct"
    save_far(path, *far())
    if path.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("the filesystem has no holes")
    with SctFile(path) as file:
        assert file.nbytes > 1 << 33
        for power in (31, 32):
            entry = file.entry(f"across {power}")
            assert entry.offset < 1 << power < entry.offset + entry.nbytes
            assert (file.tensor(entry.name).reshape(-1) == np.arange(64)).all()
            assert (file.read(entry.name, slice(3, 5)).reshape(-1) == np.arange(24, 40)).all()
            file.verify(entry)
            assert not file.tensor(f"below {power}")[-3:].any()
        assert file.tensor("last") == file.read("last") == 0.5
        assert file.tensor("over 4 GiB").shape == ((1 << 32) + 5,)
        assert file.tensor("over 4 GiB")[-1] == 0
        assert file.read("over 4 GiB", slice((1 << 32) - 1, None)).tolist() == [0] * 6
        assert bytes(file.buffer("over 4 GiB")[(1 << 32) - 1 :]) == bytes(6)


@pytest.mark.parametrize(
    ("name", "key", "wrong", "error"),
    [
        ("across 32", "offset", lambda value: value, None),
        ("last", "offset", lambda value: value & 0xFFFFFFFF, BlobLayoutError),
        ("across 31", "offset", lambda value: value - (1 << 32), BlobBoundsError),
        ("over 4 GiB", "nbytes", lambda value: value & 0xFFFFFFFF, ShapeError),
        ("over 4 GiB", "shape", lambda value: [5], ShapeError),
        ("last", "offset", lambda value: value + (1 << 32), BlobBoundsError),
    ],
)
def test_offsets_and_sizes_are_not_taken_modulo_2_to_the_32(tmp_path, name, key, wrong, error):
    base, blobs = far()
    index = json.loads(base.index)
    entry = next(entry for entry in index["tensors"] if entry["name"] == name)
    entry[key] = wrong(entry[key])
    path = tmp_path / "far.sct"
    save_far(path, Base(b"", json.dumps(index)), blobs)
    if error is None:
        SctFile(path).close()
    else:
        with pytest.raises(error, match=name):
            SctFile(path)


@pytest.mark.parametrize("size", [1 << 31, (1 << 32) - 1, 1 << 32, (1 << 32) + 1, 1 << 33])
def test_a_file_cut_at_2_or_4_gib_is_refused(tmp_path, size):
    path = tmp_path / "far.sct"
    save_far(path, *far())
    with path.open("r+b") as file:
        file.truncate(size)
    with pytest.raises(TruncatedError, match=f"cut: {size} of "):
        SctFile(path)
