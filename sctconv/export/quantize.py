"""Weights in 8 or 4 bits: blocks of 32 along the rows, one scale a block, as GGUF's Q8_0 and Q4_0."""

from __future__ import annotations

from typing import Final

import numpy as np

BITS: Final = {"int8": 8, "int4": 4}
"""Names of `--quantize` -> bits of a weight."""

BLOCK: Final = 32
"""Weights that share a scale."""

_SLAB: Final = 1 << 20
"""Weights that are worked on at once: what that takes in float32 stays small beside the matrix."""


def quantised(rows: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a matrix: row n, block b, place j holds `codes[n, b, j] * scales[n, b]`.

    The entry of largest size in a block becomes -2^(bits - 1) exactly (GGUF's Q4_0), so all codes are used.

    Args:
        rows: (n, k) finite, float.
        bits: 8 or 4.

    Returns:
        codes (n, ceil(k / 32), 32) int8 in [-2^(bits - 1), 2^(bits - 1)), zero beyond k; scales (n, ceil(k / 32)) float32.
    """
    n, k = rows.shape
    blocks = -(-k // BLOCK)
    codes, scales = np.empty((n, blocks, BLOCK), np.int8), np.empty((n, blocks), np.float32)
    slab = max(1, _SLAB // (blocks * BLOCK))
    for start in range(0, n, slab):
        part = slice(start, start + slab)
        codes[part], scales[part] = _rounded(rows[part], blocks, -(2 ** (bits - 1)))
    return codes, scales


def _rounded(rows: np.ndarray, blocks: int, lowest: int) -> tuple[np.ndarray, np.ndarray]:
    n, k = rows.shape
    padded = np.zeros((n, blocks * BLOCK), np.float32)
    padded[:, :k] = rows
    cut = padded.reshape(n, blocks, BLOCK)
    largest = np.take_along_axis(cut, np.abs(cut).argmax(-1, keepdims=True), -1)
    scales = largest / np.float32(lowest)
    steps = np.divide(cut, scales, out=np.zeros_like(cut), where=scales != 0)
    return np.rint(steps).clip(lowest, -lowest - 1), scales[..., 0]


def dequantised(codes: np.ndarray, scales: np.ndarray, k: int) -> np.ndarray:
    """(n, k) float32: what `quantised` made of a matrix."""
    return (codes * scales[..., None]).reshape(len(codes), -1)[:, :k]
