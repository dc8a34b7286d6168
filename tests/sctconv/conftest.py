"""A model as a file, for the tests of what a stranger may put into one."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from sctconv.cli import main
from tests.models import talking_llama


@pytest.fixture(scope="session")
def tiny_sct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama as a .sct file."""
    directory = talking_llama(tmp_path_factory.mktemp("source") / "tiny", layers=1)
    path = directory.parent / "tiny.sct"
    result = CliRunner().invoke(main, ["convert", str(directory), "-o", str(path), "--rank", "6", "--data-free"])
    assert result.exit_code == 0, result.output
    return path
