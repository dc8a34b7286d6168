"""A writer that is stopped at any moment, and gone on with."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sctconv.formats import writer as writer_module
from sctconv.formats.atomic import part_path
from sctconv.formats.errors import ChecksumError, FormatError, IncompleteError, OutputError
from sctconv.formats.index import LayerRecord
from sctconv.formats.part import open_part
from sctconv.formats.reader import SctFile
from sctconv.formats.writer import SctWriter

LAYERS = 5


def _steps() -> Iterator[tuple[str, Any]]:
    """What is written, in an order in which biases come late, contents repeat and sizes vary."""
    rng = np.random.default_rng(0)
    yield "empty", np.empty((0, 3), "<f4")
    for place in range(LAYERS):
        m, n = 3 + 40 * place, 20
        factors = {"U": rng.random((m, 2), "f4"), "s": np.array([2, 1], "<f4"), "V": rng.random((n, 2), "f4")}
        yield f"l{place}", (factors, m, n)
        yield f"l{place}.bias", np.zeros(m, "<f4")
    yield "norm", np.zeros(3, "<f4")
    yield "large", rng.random(5000)


def _write(out: SctWriter, *, stop: int | None = None, journaled: bool = True) -> None:
    """Goes on with what is not there yet, keeping each step; stops after so many."""
    for place, (name, content) in enumerate(_steps()):
        if place == stop:
            raise KeyboardInterrupt
        if isinstance(content, tuple):
            if name in out.layers:
                continue
            factors, m, n = content
            for letter, array in factors.items():
                out.add_tensor(f"{name}.{letter}", array)
            out.add_layer(LayerRecord(name, m, n, 2, None, None, f"{name}.bias", "F32"))
        elif name not in out.tensors:
            out.add_tensor(name, content)
        out.metadata["done"] = place
        if journaled:
            out.journal()
    if "config.json" not in out.files:
        out.add_file("config.json", b"{}")
    out.metadata.clear()
    out.metadata["made"] = "here"
    out.commit()


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    with SctWriter(tmp_path / "whole.sct") as out:
        _write(out, journaled=False)
    return (tmp_path / "whole.sct").read_bytes()


@pytest.fixture(params=[0, 1000, 1 << 20], ids=lambda ahead: f"{ahead} ahead")
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_AHEAD", request.param)


def _finish(path: Path) -> bytes:
    with SctWriter(path, journaled=True, resume=True) as out:
        if not out.is_complete:
            _write(out)
    assert not part_path(path).exists()
    return path.read_bytes()


def _check(part: Path) -> int:
    """Holds a stopped file against its index; returns how many tensors it has."""
    with SctFile(part, allow_incomplete=True) as file:
        for blob in file.index.blobs:
            file.verify(blob)
        return len(file.index.tensors)


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("stop", range(2 * LAYERS + 4))
def test_a_stopped_file_is_finished_byte_for_byte(tmp_path: Path, whole: bytes, stop: int) -> None:
    path = tmp_path / "a.sct"
    if stop < 2 * LAYERS + 3:
        with pytest.raises(KeyboardInterrupt), SctWriter(path, journaled=True) as out:
            _write(out, stop=stop)
        assert not path.exists()
        assert part_path(path).exists() == (stop > 0)
    assert _finish(path) == whole


@pytest.mark.usefixtures("ahead")
def test_killed_at_any_write_the_file_resumes_and_never_looks_whole(
    tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every prefix of what the writer tells the system, the last write cut short too: what a killed process leaves."""
    path = tmp_path / "a.sct"
    tape: list[tuple[int, bytes | None]] = []

    class Taped(io.FileIO):
        def write(self, data: Any) -> int:
            tape.append((self.tell(), bytes(data)))
            return super().write(data)

        def truncate(self, size: int | None = None) -> int:
            assert size is not None
            tape.append((size, None))
            return super().truncate(size)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", lambda descriptor, mode: io.BufferedRandom(Taped(descriptor, "r+")))
        with SctWriter(path, journaled=True) as out:
            _write(out)
    assert path.read_bytes() == whole
    assert len(tape) > 30
    most = 0
    for count in range(len(tape)):
        for share in (0.0, 0.3, 0.7):
            path.unlink(missing_ok=True)
            _replay(tape[:count], tape[count], share, part_path(path))
            with open_part(path) or SctFile(tmp_path / "whole.sct") as file:
                assert file.index.complete == (file.path.name == "whole.sct" or file.index.metadata == {"made": "here"})
            if file.path == part_path(path):
                tensors = _check(part_path(path))
                assert tensors >= most, "what was kept once is never lost again"
                most = tensors
            if count % 5 == 0 or count > len(tape) - 6:
                assert _finish(path) == whole
    assert most == 3 * LAYERS + LAYERS + 3


def _replay(done: list[tuple[int, bytes | None]], last: tuple[int, bytes | None], share: float, part: Path) -> None:
    with part.open("wb") as file:
        for place, data in [*done, (last[0], last[1] and last[1][: int(share * len(last[1]))])]:
            if data is None:
                file.truncate(place)
            else:
                file.seek(place)
                file.write(data)


def _stopped(path: Path) -> Path:
    with pytest.raises(KeyboardInterrupt), SctWriter(path, journaled=True) as out:
        _write(out, stop=4)
    return part_path(path)


def test_a_stopped_file_is_not_read_as_a_model_nor_begun_anew_unasked(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "a.sct"
    part = _stopped(path)
    with pytest.raises(IncompleteError, match="not finished; go on with `sctconv convert --resume`"), SctFile(part):
        pass
    with (
        pytest.raises(OutputError, match=r"a stopped run's, .* --resume, or pass --overwrite"),
        SctWriter(path, journaled=True),
    ):
        pass
    assert _check(part) > 0
    with SctWriter(path, journaled=True, overwrite=True) as out:
        assert not out.tensors
        _write(out)
    assert path.read_bytes() == whole


def test_a_damaged_one_is_refused_and_left(tmp_path: Path) -> None:
    path = tmp_path / "a.sct"
    part = _stopped(path)
    data = bytearray(part.read_bytes())
    data[-100] ^= 1
    part.write_bytes(data)
    with pytest.raises(FormatError, match="sha256"), SctWriter(path, journaled=True, resume=True):
        pass
    assert part.read_bytes() == data
    part.write_text("notes of mine")
    for resume in (False, True):
        with pytest.raises(OutputError), SctWriter(path, journaled=True, resume=resume):
            pass
    assert part.read_text() == "notes of mine"


def test_damage_in_a_blob_is_found_when_the_file_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.sct"
    part = _stopped(path)
    with SctFile(part, allow_incomplete=True) as file:
        place = file.entry("l0.U").offset
    data = bytearray(part.read_bytes())
    data[place] ^= 1
    part.write_bytes(data)
    with pytest.raises(ChecksumError, match=r"l0\.U"), SctWriter(path, journaled=True, resume=True):
        pass


def test_a_full_disk_keeps_what_was_kept_and_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.sct"

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(OutputError, match=r"no space left on the disk; free some or write elsewhere$"),
        SctWriter(path, journaled=True) as out,
    ):
        out.add_tensor("x", np.ones(3))
        out.journal()
        out.add_tensor("y", np.ones(3))
        monkeypatch.setattr(os, "fsync", full)
        out.journal()
    assert _check(part_path(path)) == 1


def test_an_abandoned_journal_goes(tmp_path: Path) -> None:
    with SctWriter(tmp_path / "a.sct", journaled=True) as out:
        out.add_tensor("x", np.ones(3))
        out.journal()
        assert out.read("x").tolist() == [1, 1, 1]
        out.forget()
    assert list(tmp_path.iterdir()) == []
