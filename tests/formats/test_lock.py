"""One process at a time writes one output; a killed one leaves no lock that holds."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest

from sctconv.formats.errors import OutputError
from sctconv.formats.lock import output_lock

_ROOT = Path(__file__).parent.parent.parent
_HOLD = "import sys; from sctconv.formats.lock import output_lock\nwith output_lock(sys.argv[1]): print('held', flush=True); input()"
_COUNT = """
import sys, time
from sctconv.formats.errors import OutputError
from sctconv.formats.lock import output_lock
target, log, done = sys.argv[1], open(sys.argv[2], "a", buffering=1), 0
print("ready", flush=True), input()
while done < 20:
    try:
        with output_lock(target):
            log.write("in\\n"), time.sleep(0.001), log.write("out\\n")
            done += 1
    except OutputError as error:
        assert "is writing it" in str(error), error
"""


def spawn(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that runs code, once it has said its first word."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline()
    return process


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `o.sct`."""
    process = spawn(_HOLD, tmp_path / "o.sct")
    yield process
    process.kill()
    process.communicate()


def test_another_process_is_refused_by_id_and_file(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    held = (tmp_path / ".o.sct.lock").read_bytes()
    for _ in range(2):  # being refused takes nothing from the holder
        with pytest.raises(OutputError) as caught, output_lock(tmp_path / "o.sct"):
            pass
        assert str(caught.value) == (
            f"{tmp_path}/o.sct: process {holder.pid} is writing it and holds {tmp_path}/.o.sct.lock; "
            "wait until it has ended, or write elsewhere"
        )
    assert (tmp_path / ".o.sct.lock").read_bytes() == held
    with output_lock(tmp_path / "other.sct"):
        pass


def test_when_it_has_ended_the_next_may(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.communicate("go on\n")
    assert holder.returncode == 0 and not list(tmp_path.iterdir())
    with output_lock(tmp_path / "o.sct"):
        assert (tmp_path / ".o.sct.lock").read_text().startswith(f"{os.getpid()} ")
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_taken_over(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".o.sct.lock"], "it could not clean up"
    with output_lock(tmp_path / "o.sct"):
        assert (tmp_path / ".o.sct.lock").read_text().startswith(f"{os.getpid()} ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"1 elsewhere\n", b"\xff\xfe", b"x" * 100_000])
def test_a_file_that_nobody_holds_is_no_lock(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".o.sct.lock").write_bytes(content)
    with output_lock(tmp_path / "o.sct"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "holder_is"),
    [
        (b"", "another process is"),
        (b"\xff\xfe", "another process is"),
        (b"77 elsewhere\n", "process 77 on 'elsewhere' is"),
        (b"77", "process 77 is"),
    ],
)
def test_the_holder_is_named_as_far_as_its_file_says(content: bytes, holder_is: str, tmp_path: Path) -> None:
    with output_lock(tmp_path / "o.sct"):
        (tmp_path / ".o.sct.lock").write_bytes(content)
        with pytest.raises(OutputError, match=f": {holder_is} writing it"), output_lock(tmp_path / "o.sct"):
            pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_lets_it_go(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), output_lock(tmp_path / "o.sct"):
        raise error
    assert not list(tmp_path.iterdir())


def test_of_many_at_once_one_at_a_time(tmp_path: Path) -> None:
    """Each removes its file when it ends, so the others keep meeting files that are gone or new."""
    processes = [spawn(_COUNT, tmp_path / "o.sct", tmp_path / "log") for _ in range(4)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.wait(timeout=120) for process in processes] == [0] * 4
    for process in processes:
        process.communicate()
    assert (tmp_path / "log").read_text().split() == ["in", "out"] * 80
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".o.sct.lock").symlink_to(tmp_path / "precious")
    with (
        pytest.raises(OutputError, match=r"o\.sct: cannot be locked by .*\.o\.sct\.lock"),
        output_lock(tmp_path / "o.sct"),
    ):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_missing_directory_is_one_line_and_stays_missing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="none does not exist"), output_lock(tmp_path / "none" / "o.sct"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_filesystem_without_locks_is_written_all_the_same(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with output_lock(tmp_path / "o.sct"):
        (tmp_path / "o.sct").write_text("written")
    assert (tmp_path / "o.sct").read_text() == "written"


def test_a_name_of_any_length_and_a_directory(tmp_path: Path) -> None:
    for name in ("x" * 251 + ".sct", "d"):
        with output_lock(tmp_path / name):
            assert len(list(tmp_path.iterdir())) == 1
