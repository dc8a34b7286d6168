"""Fixtures: a .sct file taken apart, saved with edits, and refused as it should be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sctconv.formats.errors import FormatError
from sctconv.formats.reader import SctFile
from tests.formats.parts import Parts


@pytest.fixture
def parts() -> Parts:
    return Parts()


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Writes parts, edited, or plain bytes to a file."""

    def write(content: Parts | bytes, edits: Mapping[Any, Any] | None = None) -> Path:
        path = tmp_path / "model.sct"
        path.write_bytes(content if isinstance(content, bytes) else content.edit(edits or {}).build())
        return path

    return write


@pytest.fixture
def refused(save: Callable[..., Path]) -> Callable[..., FormatError]:
    """Opens what must be refused, with an error of exactly one class and a message of one line; returns the error."""

    def check(content: Parts | bytes, error: type[FormatError], message: str, edits: Any = None) -> FormatError:
        path = save(content, edits)
        with pytest.raises(error, match=message) as caught, SctFile(path):
            pass
        text = str(caught.value)
        assert caught.type is error
        assert text.startswith(f"{path}: ")
        assert text.isprintable() and len(text) < len(str(path)) + 1500
        return caught.value

    return check
