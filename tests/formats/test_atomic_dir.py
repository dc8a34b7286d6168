"""A directory that appears whole or not at all, and what a killed process leaves beside it."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from sctconv.formats import atomic_dir, leftovers
from sctconv.formats.atomic import atomic_file
from sctconv.formats.atomic_dir import atomic_directory
from sctconv.formats.errors import OutputError
from sctconv.formats.unfinished import abandon, is_unwinding, noted


def _fill(directory: Path, text: str) -> None:
    (directory / f"{text}.txt").write_text(text)
    (directory / "both.txt").write_text(text)


@pytest.fixture(params=["new", "old"])
def target(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "onnx"
    if request.param == "old":
        path.mkdir()
        _fill(path, "old")
    return path


@pytest.fixture(params=["exchanged", "renamed twice"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "renamed twice":
        monkeypatch.setattr(atomic_dir, "_exchange", lambda one, other: False)
    elif sys.platform != "linux":
        pytest.skip("only Linux exchanges two directories")
    return request.param


def _names(target: Path) -> list[str]:
    """Everything beside and in the target."""
    return sorted(str(path.relative_to(target.parent)) for path in target.parent.rglob("*"))


_NEW = ["onnx", "onnx/both.txt", "onnx/new.txt"]
_OLD = ["onnx", "onnx/both.txt", "onnx/old.txt"]


@pytest.mark.usefixtures("way")
def test_it_takes_the_place_of_the_old_one(target: Path) -> None:
    before = _names(target)
    with atomic_directory(target, overwrite=True) as made:
        _fill(made, "new")
        assert [name for name in _names(target) if name.startswith("onnx")] == before
    assert _names(target) == _NEW
    assert (target / "both.txt").read_text() == "new"


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(2, "no", "input")])
def test_an_exception_leaves_nothing_and_passes_through(target: Path, error: BaseException) -> None:
    before = _names(target)
    with pytest.raises(type(error)) as caught, atomic_directory(target, overwrite=True) as made:
        _fill(made, "new")
        raise error
    assert caught.value is error
    assert _names(target) == before


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "no space left on the disk; free some or write elsewhere; nothing of it was kept"),
        (errno.EIO, r"cannot be written \(Input/output error\); nothing of it was kept"),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_a_full_disk_is_one_line_and_leaves_nothing(target: Path, code: int, message: str, named: bool) -> None:
    before = _names(target)
    with pytest.raises(OutputError, match=message) as caught, atomic_directory(target, overwrite=True) as made:
        raise OSError(code, os.strerror(code), *([str(made / "model.onnx")] if named else []))
    assert str(caught.value).startswith(f"{target}: ")
    assert _names(target) == before


def test_a_write_that_numpy_could_not_finish_says_why(target: Path) -> None:
    with pytest.raises(OutputError, match="no room for all of it"), atomic_directory(target, overwrite=True):
        raise OSError("4096 requested and 512 written")


@pytest.mark.parametrize("at", ["first", "second"])
def test_interrupted_between_two_renames_the_old_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    target = tmp_path / "onnx"
    target.mkdir()
    _fill(target, "old")
    monkeypatch.setattr(atomic_dir, "_exchange", lambda one, other: False)
    rename, calls = Path.rename, []

    def interrupted(self: Path, to: Path) -> Path:
        calls.append(to)
        if len(calls) == 2 and at == "second":
            raise KeyboardInterrupt
        done = rename(self, to)
        if len(calls) == 1 and at == "first":
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_directory(target, overwrite=True) as made:
        _fill(made, "new")
    assert _names(target) == _OLD


def _killed_between_renames(target: Path) -> None:
    """What SIGKILL leaves where two directories cannot be exchanged."""
    left = target.with_name(f".{target.name}.0a1b2c3d.tmp")
    (left / target.name).mkdir(parents=True)
    _fill(left / target.name, "new")
    target.rename(left / "replaced")


@pytest.mark.skipif(sys.platform == "win32", reason="no locks that end with their process")
def test_killed_between_two_renames_the_old_one_is_put_back_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "onnx"
    target.mkdir()
    _fill(target, "old")
    _killed_between_renames(target)
    assert not target.exists()
    with pytest.raises(OutputError, match="exists already"), atomic_directory(target):
        pass
    assert _names(target) == _OLD
    _killed_between_renames(target)
    with atomic_directory(target, overwrite=True) as made:
        _fill(made, "new")
    assert _names(target) == _NEW


def test_what_stands_there_is_kept_unasked(tmp_path: Path) -> None:
    target = tmp_path / "onnx"
    with pytest.raises(OutputError, match="exists already; choose another name"), atomic_directory(target) as made:
        _fill(made, "new")
        target.mkdir()
        _fill(target, "old")
    assert _names(target) == _OLD
    with pytest.raises(OutputError, match=r"the directory .* does not exist"), atomic_directory(tmp_path / "no" / "x"):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="no locks that end with their process")
def test_the_next_run_removes_leftovers_but_not_what_is_in_use(tmp_path: Path) -> None:
    (tmp_path / ".model.sct.0a1b2c3d.tmp").write_bytes(b"left")
    (tmp_path / ".onnx.0a1b2c3d.tmp" / "onnx").mkdir(parents=True)
    others = [".model.sct.tmp", ".other.sct.0a1b2c3d.tmp", "model.sct.0a1b2c3d.tmp", ".model.sct.0a1b2c3d.tmp.txt"]
    for name in others:
        (tmp_path / name).write_text("mine")
    with atomic_file(tmp_path / "model.sct") as first, atomic_directory(tmp_path / "onnx") as second:
        in_use = {path.name for path in tmp_path.glob(".*.tmp")} - set(others)
        assert len(in_use) == 2, "those of this process"
        first.write(b"first")
        _fill(second, "second")
        with atomic_file(tmp_path / "model.sct") as again:
            again.write(b"again")
        assert {path.name for path in tmp_path.iterdir()} == {*others, "model.sct", *in_use}
        (tmp_path / "model.sct").unlink()
    assert {path.name for path in tmp_path.iterdir()} == {*others, "model.sct", "onnx"}
    assert (tmp_path / "model.sct").read_bytes() == b"first"


def test_a_process_that_just_ends_leaves_nothing_either(tmp_path: Path) -> None:
    assert not is_unwinding()
    with (
        pytest.raises(OutputError),
        noted(lambda: "a note"),
        noted(lambda: None),
        atomic_file(tmp_path / "a.sct") as file,
        atomic_directory(tmp_path / "onnx") as made,
    ):
        file.write(b"half")
        _fill(made, "new")
        assert is_unwinding()
        assert abandon() == ["a note"]
        assert list(tmp_path.iterdir()) == []
    assert not is_unwinding()


def test_interrupted_while_it_is_removed_it_is_removed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rmtree, calls = leftovers.remove_tree, []

    def interrupted(path: Path) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        rmtree(path)

    monkeypatch.setattr(atomic_dir, "remove_tree", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "onnx") as made:
        _fill(made, "new")
    assert is_unwinding()
    abandon()
    assert not is_unwinding()
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
