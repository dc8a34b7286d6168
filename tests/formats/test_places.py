"""Where a file stands: directories that may not be written, and another filesystem than the source's."""

from __future__ import annotations

import numpy as np
import pytest

from sctconv.formats.errors import OutputError
from sctconv.formats.reader import SctFile
from sctconv.formats.writer import SctWriter, rewrite
from tests.places import other_filesystem, public_directory, unprivileged


def write(path, *, overwrite=False):
    with SctWriter(path, overwrite=overwrite) as writer:
        writer.add_tensor("x", np.arange(9, dtype="<f4"))
        writer.commit()


@pytest.mark.parametrize("old", [b"", b"old"])
def test_a_directory_that_may_not_be_written_stays_as_it_was(old):
    """As root, whom permissions do not bind, the test becomes nobody for the while."""
    with public_directory() as directory:
        path = directory / "model.sct"
        if old:
            path.write_bytes(old)
        directory.chmod(0o555)
        with unprivileged(), pytest.raises(OutputError) as caught:
            write(path, overwrite=True)
        assert str(caught.value) == f"{path}: no permission to write in {directory}"
        assert [file.read_bytes() for file in directory.iterdir()] == [old] * bool(old)


def test_a_directory_that_may_be_written_is():
    with public_directory() as directory:
        directory.chmod(0o777)
        with unprivileged():
            write(directory / "model.sct")
        assert [file.name for file in directory.iterdir()] == ["model.sct"]


def test_a_read_only_file_in_a_read_only_directory_opens(parts):
    """What is written to a buffer stays in the process, so reading needs no right to write."""
    with public_directory() as directory:
        path = directory / "model.sct"
        path.write_bytes(parts.build())
        path.chmod(0o444)
        directory.chmod(0o555)
        with unprivileged(), SctFile(path) as file:
            file.buffer("l.s")[:] = bytes(8)
            assert file.tensor("l.s").tolist() == [0, 0]
            file.verify(file.entry("l.s"))
        assert path.read_bytes() == parts.build()


def test_a_file_that_may_not_be_read_is_an_os_error(parts):
    with public_directory() as directory:
        path = directory / "model.sct"
        path.write_bytes(parts.build())
        path.chmod(0o000)
        with unprivileged(), pytest.raises(PermissionError, match=r"model\.sct"):
            SctFile(path)


def test_another_filesystem_gets_the_same_bytes_and_nothing_else(save, parts, tmp_path):
    with other_filesystem(tmp_path) as there:
        for path in (tmp_path / "written.sct", there / "written.sct"):
            write(path)
        with SctFile(save(parts)) as file:
            for path in (tmp_path / "copy.sct", there / "copy.sct"):
                rewrite(file, path)
        assert sorted(path.name for path in there.iterdir()) == ["copy.sct", "written.sct"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.sct", "model.sct", "written.sct"]
        for name in ("written.sct", "copy.sct"):
            assert (there / name).read_bytes() == (tmp_path / name).read_bytes()
