"""Weights in 8 or 4 bits: blocks of 32 along the rows, a scale and a zero point each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

BITS: Final = {"int8": 8, "int4": 4}
"""Names of `--quantize` -> bits of a weight."""

BLOCK: Final = 32
"""Weights that share a scale."""

_SLAB: Final = 1 << 18
"""Weights that are worked on at once: what that takes in float32 stays small beside the matrix."""


@dataclass(frozen=True)
class Codes:
    """Place j of block b of row n stands for `(codes[n, b, j] - zeros[n, b]) * scales[n, b]`.

    Attributes:
        codes: (n, blocks, 32) uint8 below 2^bits; beyond the row's end what stands for zero.
        scales: (n, blocks) float32. zeros: (n, blocks) uint8.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray

    def values(self, k: int) -> np.ndarray:
        """(n, k) float32: the first k of each row."""
        steps = self.codes.astype(np.float32) - self.zeros[..., None]
        return (steps * self.scales[..., None]).reshape(len(steps), -1)[:, :k]


class Rows(Protocol):
    """A matrix (n, k) of which some rows are looked at at once: an array, or what reads them from a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, k)."""

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Some rows, float."""


def quantised(rows: Rows, bits: int) -> Codes:
    """The nearest codes of a matrix.

    Codes span each block's range, zero included, which is always met exactly.

    Args:
        rows: (n, k) finite, float.
        bits: 8 or 4.
    """
    n, k = rows.shape
    blocks = -(-k // BLOCK)
    found = Codes(
        np.empty((n, blocks, BLOCK), np.uint8), np.empty((n, blocks), np.float32), np.empty((n, blocks), np.uint8)
    )
    slab = max(1, _SLAB // (blocks * BLOCK))
    for start in range(0, n, slab):
        part = slice(start, start + slab)
        taken = rows[part]
        padded = np.zeros((len(taken), blocks * BLOCK), np.float32)
        padded[:, :k] = taken
        cut, most = padded.reshape(-1, blocks, BLOCK), 2**bits - 1
        low, high = cut.min(-1).clip(None, 0.0), cut.max(-1).clip(0.0, None)
        scales = (high - low) / np.float32(most)
        scales[scales == 0.0] = 1.0
        zeros = np.rint(-low / scales)
        found.codes[part] = np.rint(cut / scales[..., None] + zeros[..., None]).clip(0, most)
        found.scales[part], found.zeros[part] = scales, zeros
    return found
