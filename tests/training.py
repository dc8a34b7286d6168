"""What the tests of training share: a text and quick options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sctconv
from sctconv.runtime.train import TrainData, TrainOptions, load_data

TEXT = "".join(f"{place} apples and {place % 5} pears. " for place in range(900))


def quick(**changes: Any) -> TrainOptions:
    """Options under which the small model learns something in a few steps."""
    settings = {
        "steps": 12,
        "batch": 4,
        "micro_batch": 2,
        "context": 32,
        "eval_every": 4,
        "norm_rate": 1e-3,
        "bf16": False,
    }
    own = {"angle": 0.02, "singular_rate": 0.01} if changes.get("optimizer") != "adamw" else {}
    return TrainOptions(**{**settings, "rate": 1e-3, **own, **changes})


def windows(factored: Path, **changes: Any) -> TrainData:
    """The text's."""
    tokenizer = sctconv.load(factored).tokenizer
    return load_data([str(factored.parent / "text.txt")], tokenizer, **{"context": 32, "held_out": 0.05, **changes})
