"""Text to calibrate on, as windows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from sctconv.formats.errors import SctError
from sctconv.runtime.texts import HUB, TextError, read_text

HELD_OUT: Final = 16
"""One window in so many is kept aside to measure on, at least one."""


class CalibrationError(SctError):
    """The calibration text is too short, or the model cannot read it."""


@dataclass(frozen=True)
class Calibration:
    """Windows of tokens to fit on and to measure on.

    Attributes:
        fit: (windows, context) int64.
        held_out: (windows, context) int64, never fitted on.
        sources: what they were taken from, by name, with the number of tokens of each.
    """

    fit: Tensor
    held_out: Tensor
    sources: tuple[tuple[str, int], ...]

    @property
    def tokens(self) -> int:
        """Tokens that are fitted on."""
        return self.fit.numel()

    @property
    def context(self) -> int:
        """Tokens in a window."""
        return self.fit.shape[1]


def load_calibration(sources: Sequence[str], tokenizer: Any, *, tokens: int, context: int) -> Calibration:
    """Cuts texts into windows, as many from each as the tokens asked for allow, spread over the whole of each text.

    Args:
        sources: paths of .txt or .jsonl files (`text` field), or `hub:DATASET[:CONFIG]`; a mixture takes equal shares.
        tokenizer: the model's.
        tokens: how many to fit on, over all sources; all there are where a text has fewer.
        context: tokens in a window.

    Raises:
        TextError: a text cannot be read. CalibrationError: it has less than two windows.
    """
    share = -(-tokens // (context * len(sources)))  # windows of each, without those held out
    share += max(1, -(-share // HELD_OUT))
    fit: list[Tensor] = []
    held_out: list[Tensor] = []
    names: list[tuple[str, int]] = []
    for source in sources:
        ids = torch.tensor(tokenizer(_read(source), verbose=False).input_ids, dtype=torch.int64)
        windows = ids[: len(ids) // context * context].reshape(-1, context)
        if len(windows) < 2:
            raise CalibrationError(f"{source}: {len(ids)} tokens, less than two windows of {context}; give more text")
        # evenly spaced: neighbouring windows say less than distant ones
        windows = windows[torch.linspace(0, len(windows) - 1, min(share, len(windows))).round().long()]
        aside = torch.zeros(len(windows), dtype=torch.bool)
        aside[HELD_OUT // 2 :: HELD_OUT] = True
        aside[-1] |= not aside.any()
        fit.append(windows[~aside])
        held_out.append(windows[aside])
        names.append((Path(source).name if not source.startswith(HUB) else source, fit[-1].numel()))
    return Calibration(torch.cat(fit), torch.cat(held_out), tuple(names))


def _read(source: str) -> str:
    try:
        return read_text(source)
    except TextError as error:
        if not source.startswith(HUB):
            raise
        raise TextError(f"{error}; give --calibration FILE.txt, or --data-free for the plain truncation") from None
