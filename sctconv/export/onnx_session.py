"""An exported decoder in onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np

from sctconv.formats.errors import SctError

GRAPH: Final = "model.onnx"
"""The graph's file in an exported directory; its weights are in `model.onnx.data`."""


class OnnxError(SctError):
    """A directory is no exported model, or onnxruntime cannot run it."""


class OnnxDecoder:
    """Logits of tokens after those that it has seen.

    Args:
        directory: as `export_onnx` wrote it.

    Raises:
        OnnxError: the graph is not there, or onnxruntime cannot load it.
    """

    def __init__(self, directory: Path) -> None:
        import onnxruntime

        if not (directory / GRAPH).is_file():
            raise OnnxError(f"{directory}: no exported model, {GRAPH} is not there")
        try:
            self._session: Any = onnxruntime.InferenceSession(directory / GRAPH, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes
            raise OnnxError(
                f"{directory}: onnxruntime {onnxruntime.__version__} cannot load it: {_line(error)}"
            ) from None
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        self._past = [item for item in self._session.get_inputs() if item.name.startswith("past_key_values.")]
        self._outputs = [item.name for item in self._session.get_outputs()]
        self.reset()

    def reset(self) -> None:
        """Forgets what it has seen."""
        self._cache: list[np.ndarray] | None = None
        self._mask = np.zeros((0, 0), np.int64)

    def logits(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """(batch, sequence, vocabulary) float32 for ids (batch, sequence) int64 that follow what was seen.

        Args:
            ids: the tokens.
            mask: (batch, sequence) of 1 and, for padding on the left, 0; None for ones.
        """
        batch, sequence = ids.shape
        if self._cache is None:
            self._mask = np.zeros((batch, 0), np.int64)
            self._cache = [np.zeros((batch, item.shape[1], 0, item.shape[3]), np.float32) for item in self._past]
        self._mask = np.concatenate([self._mask, np.ones_like(ids) if mask is None else mask], 1)
        positions = (self._mask.cumsum(1) - 1).clip(0)[:, -sequence:]
        feeds = {"input_ids": ids, "attention_mask": self._mask, "position_ids": positions}
        feeds |= {item.name: array for item, array in zip(self._past, self._cache, strict=True)}
        logits, *self._cache = self._session.run(self._outputs, feeds)
        return np.asarray(logits)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
