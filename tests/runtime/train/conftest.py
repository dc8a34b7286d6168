"""A small factored model and a text, for every test of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from sctconv.convert import ConvertOptions, convert
from tests.models import save, tiny_model, tiny_tokenizer
from tests.training import TEXT


@pytest.fixture(scope="session")
def factored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("train")
    source = save(tiny_model("llama", vocab_size=260), directory / "m")
    tiny_tokenizer(source)
    (directory / "text.txt").write_text(TEXT)
    convert(str(source), directory / "m.sct", ConvertOptions(rank=6, modules="all"))
    return directory / "m.sct"
