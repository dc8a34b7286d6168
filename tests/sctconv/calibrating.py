"""Small models with a text beside them, and how they are calibrated on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sctconv.convert import ConvertOptions
from tests.models import save, tiny_model, tiny_tokenizer

TEXT = "".join(
    f"Item {place}: {place * place} apples, {place % 7} pears; the {place}th of many.\n" for place in range(400)
)


def source_with_text(family: str, directory: Path) -> Path:
    source = save(tiny_model(family, vocab_size=260), directory / family)
    tiny_tokenizer(source)
    (directory / "text.txt").write_text(TEXT)
    return source


def calibrated_options(source: Path, **changes: Any) -> ConvertOptions:
    settings: dict[str, Any] = {
        "rank": 6,
        "modules": "all",
        "calibration_tokens": 4096,
        "calibration_context": 64,
        "bf16": False,
        **changes,
    }
    return ConvertOptions(calibration=(str(source.parent / "text.txt"),), **settings)
