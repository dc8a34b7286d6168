import errno
import io
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sctconv.formats.atomic import atomic_file
from sctconv.formats.errors import OutputError
from sctconv.formats.reader import SctFile
from sctconv.formats.writer import SctWriter


@pytest.fixture(params=["new", "old"])
def target(tmp_path, request):
    """A path, with and without a file at it."""
    path = tmp_path / "model.sct"
    if request.param == "old":
        path.write_bytes(b"old")
    return path


def untouched(path: Path) -> bool:
    """Whether nothing was left beside the target, and the target is as it was."""
    return [file.read_bytes() for file in path.parent.iterdir()] in ([], [b"old"])


def write(path: Path, *, commit: bool = True, overwrite: bool = True) -> None:
    with SctWriter(path, overwrite=overwrite) as writer:
        writer.add_tensor("x", np.zeros(100_000, "<f4"))
        if commit:
            writer.commit()


def one_line(error: Exception, path: Path) -> bool:
    return str(error).startswith(f"{path}: ") and "\n" not in str(error)


class FullDisk(io.FileIO):
    """A file on a disk with room for `room` bytes."""

    room = 0
    error = errno.ENOSPC

    def write(self, data):
        if self.tell() + len(data) > self.room:
            raise OSError(self.error, os.strerror(self.error))
        return super().write(data)


def test_the_target_appears_with_ordinary_permissions(target):
    before = os.umask(0o027)
    try:
        write(target)
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert list(target.parent.iterdir()) == [target]
    SctFile(target).close()


def test_the_target_is_the_old_file_until_the_end(target):
    with atomic_file(target, overwrite=True) as file:
        file.write(b"new")
        file.flush()
        assert not target.exists() or target.read_bytes() == b"old"
        (temporary,) = {*target.parent.iterdir()} - {target}
        assert temporary.name.startswith(".model.sct.") and temporary.suffix == ".tmp"
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3), OSError(2, "no", "input")])
def test_an_exception_leaves_nothing_and_passes_through(target, error):
    with pytest.raises(type(error)) as caught, SctWriter(target, overwrite=True) as writer:
        writer.add_tensor("x", np.ones(10))
        raise error
    assert caught.value is error
    assert untouched(target)


def test_an_exception_after_commit_leaves_nothing(target):
    with pytest.raises(ValueError, match="late"), SctWriter(target, overwrite=True) as writer:
        writer.commit()
        raise ValueError("late")
    assert untouched(target)


def test_no_commit_leaves_nothing(target):
    write(target, commit=False)
    assert untouched(target)


@pytest.mark.parametrize("room", [0, 64, 300_000, 400_100])
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "no space left on the disk; free some or write elsewhere; nothing of it was kept"),
        (errno.EDQUOT, "no space left on the disk"),
        (errno.EIO, r"cannot be written \(Input/output error\); nothing of it was kept"),
    ],
)
def test_a_full_disk_leaves_nothing(target, monkeypatch, room, code, message):
    monkeypatch.setattr(FullDisk, "room", room)
    monkeypatch.setattr(FullDisk, "error", code)
    monkeypatch.setattr(os, "fdopen", lambda fd, mode: io.BufferedRandom(FullDisk(fd, mode)))
    with pytest.raises(OutputError, match=message) as caught:
        write(target)
    assert one_line(caught.value, target)
    assert untouched(target)


@pytest.mark.parametrize("where", ["fsync", "chmod", "replace"])
def test_a_failure_at_the_very_end_leaves_nothing(target, monkeypatch, where):
    def fail(path, *args, **options):
        names = () if where == "fsync" else (str(path), None, str(target))
        raise OSError(errno.EACCES, "Permission denied", *names)

    monkeypatch.setattr(os, where, fail)
    with pytest.raises(OutputError, match=r"cannot be written \(Permission denied\)") as caught:
        write(target)
    assert one_line(caught.value, target)
    assert untouched(target)


def test_an_error_without_a_number_is_told(target):
    with (
        pytest.raises(OutputError, match=r"cannot be written \(odd\); nothing of it was kept"),
        atomic_file(target, overwrite=True),
    ):
        raise OSError("odd")
    assert untouched(target)


def test_no_temporary_file_no_output(target, monkeypatch):
    def fail(path, *args):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OutputError, match="no space left on the disk") as caught:
        write(target)
    assert one_line(caught.value, target) and untouched(target)


def test_a_file_size_limit_leaves_nothing(tmp_path):
    """As `ulimit -f` sets it: a real refusal of the operating system in the middle of a tensor."""
    pytest.importorskip("resource")
    path = tmp_path / "model.sct"
    path.write_bytes(b"old")
    program = """if True:
        import resource, sys
        import numpy as np
        from sctconv.formats.errors import OutputError
        from sctconv.formats.writer import SctWriter
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            with SctWriter(sys.argv[1], overwrite=True) as writer:
                writer.add_tensor("x", np.zeros(1 << 20, "<f4"))
                writer.commit()
        except OutputError as error:
            print(error)
            sys.exit(error.exit_code)
    """
    run = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    expected = f"{path}: file size limit reached (ulimit -f or the filesystem's); nothing of it was kept\n"
    assert (run.returncode, run.stdout, run.stderr) == (1, expected, "")
    assert path.read_bytes() == b"old" and untouched(path)


def test_a_target_that_exists_is_kept(tmp_path):
    path = tmp_path / "model.sct"
    path.write_bytes(b"old")
    with pytest.raises(OutputError, match="exists already; choose another name or pass --overwrite") as caught:
        write(path, overwrite=False)
    assert one_line(caught.value, path) and untouched(path)


def test_a_target_that_appears_meanwhile_is_kept(tmp_path):
    path = tmp_path / "model.sct"
    with pytest.raises(OutputError, match="exists already"), SctWriter(path) as writer:
        path.write_bytes(b"old")
        writer.commit()
    assert untouched(path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_is_no_target(tmp_path, overwrite):
    with pytest.raises(OutputError, match="is a directory; name a file") as caught:
        write(tmp_path, overwrite=overwrite)
    assert one_line(caught.value, tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("is_link", [False, True])
def test_a_pipe_or_device_is_no_target(tmp_path, overwrite, is_link):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    target = tmp_path / "link" if is_link else pipe
    if is_link:
        target.symlink_to(pipe)
    with pytest.raises(OutputError, match="is a device or a pipe; name a file") as caught:
        write(target, overwrite=overwrite)
    assert one_line(caught.value, target) and pipe.is_fifo()


def test_a_missing_directory_is_named(tmp_path):
    path = tmp_path / "missing" / "model.sct"
    with pytest.raises(OutputError, match=r"the directory .*missing does not exist; create it first") as caught:
        write(path)
    assert one_line(caught.value, path) and not path.parent.exists()


def test_a_name_too_long_is_refused(tmp_path):
    path = tmp_path / ("a" * 300)
    with pytest.raises(OutputError, match=r"cannot be written \(File name too long\)") as caught:
        write(path)
    assert one_line(caught.value, path)


def test_a_long_name_is_no_obstacle(tmp_path):
    write(tmp_path / ("重" * 84))  # 252 of 255 bytes; the temporary name is no longer
    assert len(list(tmp_path.iterdir())) == 1


def test_a_read_only_directory_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "model.sct"
    tmp_path.chmod(0o555)
    if os.access(tmp_path, os.W_OK):  # root may write everywhere
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    try:
        with pytest.raises(OutputError, match="no permission to write in") as caught:
            write(path)
    finally:
        tmp_path.chmod(0o755)
    assert one_line(caught.value, path) and untouched(path)


def test_interrupted_as_the_temporary_file_is_made_none_is_left(target, monkeypatch):
    made = os.open

    def interrupted(path, *args):
        made(path, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(target)
    assert untouched(target)
