"""Where a conversion writes: another filesystem than the source's, and a directory that it may not write."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from sctconv.cli import main
from sctconv.formats.reader import SctFile
from tests.models import save, tiny_model
from tests.places import other_filesystem, public_directory, unprivileged


def convert(source: Path, target: Path) -> Result:
    command = ["convert", str(source), "-o", str(target), "--rank", "6", "--data-free", "--overwrite"]
    return CliRunner().invoke(main, command)


def test_a_conversion_to_another_filesystem_is_the_same_file(tmp_path: Path) -> None:
    source = save(tiny_model("llama"), tmp_path / "tiny")
    with other_filesystem(tmp_path) as there:
        here = tmp_path / "here"
        here.mkdir()
        for directory in (here, there):
            assert convert(source, directory / "tiny.sct").exit_code == 0
        assert (here / "tiny.sct").read_bytes() == (there / "tiny.sct").read_bytes()
        assert sorted(path.name for path in there.iterdir()) == sorted(path.name for path in here.iterdir())


def test_a_conversion_into_a_read_only_directory_is_one_line(tmp_path: Path) -> None:
    """As root, whom permissions do not bind, the test becomes nobody for the while, who may read the source."""
    with public_directory() as directory:
        source = save(tiny_model("llama"), directory / "tiny")
        output = directory / "out"
        output.mkdir()
        target = output / "tiny.sct"
        assert convert(source, target).exit_code == 0  # what is imported late is so by now
        before = {path.name: path.read_bytes() for path in output.iterdir()}
        output.chmod(0o555)
        with unprivileged():
            result = convert(source, target)
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
        assert result.stderr == f"sctconv: {target}: no permission to write in {output}\n"
        assert {path.name: path.read_bytes() for path in output.iterdir()} == before
        SctFile(target).close()
