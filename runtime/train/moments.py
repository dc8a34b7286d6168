"""What an optimiser remembers of a gradient, in as many bits as it is worth.

`float32`, `bfloat16`, or `int8`: codes of -127 to 127 with one float32 scale for 256 rows of a column, as 8-bit optimisers have
them (Dettmers et al., arXiv 2110.02861), with plain steps in place of their map: the columns of a factor's gradient have no
outliers worth one.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

MOMENTA: Final = ("float32", "bfloat16", "int8")
"""Names of `--momentum`."""

_ROWS: Final = 256


def begin_(state: dict[str, Any], name: str, like: Tensor, kind: str) -> None:
    """Keeps zeros of a tensor's shape (m,) or (m, k), in one of `MOMENTA`."""
    state[name] = torch.zeros_like(like, dtype=getattr(torch, kind))
    if kind == "int8":
        columns = like[0].numel() if like.ndim > 1 else 1
        state[f"{name}_scale"] = torch.zeros(-(-len(like) // _ROWS), columns, device=like.device)


def put_(state: dict[str, Any], name: str, value: Tensor) -> None:
    """Keeps a tensor float32 in the place of what was kept."""
    if state[name].dtype != torch.int8:
        state[name].copy_(value)
        return
    blocks = _blocks(value)
    scales = blocks.abs().amax(1, keepdim=True) / 127.0
    codes = (blocks / torch.where(scales == 0.0, 1.0, scales)).round_()
    state[name].copy_(codes.flatten(0, 1)[: len(value)].reshape(value.shape))
    state[f"{name}_scale"].copy_(scales.squeeze(1))


def get(state: dict[str, Any], name: str) -> Tensor:
    """What is kept under a name, float32."""
    value: Tensor = state[name]
    if value.dtype != torch.int8:
        return value.float()
    blocks = _blocks(value.float()) * state[f"{name}_scale"].unsqueeze(1)
    return blocks.flatten(0, 1)[: len(value)].reshape(value.shape)


def _blocks(value: Tensor) -> Tensor:
    """(m,) or (m, k) -> (blocks, 256, k), zeros at the end."""
    flat = value.reshape(len(value), -1)
    count = -(-len(flat) // _ROWS)
    padded = torch.nn.functional.pad(flat, (0, 0, 0, count * _ROWS - len(flat)))
    return padded.reshape(count, _ROWS, -1)


def rounded(value: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, up or down at random so that the mean is the value: steps smaller than half a unit are not lost.

    (Stochastic rounding; Zamirai et al., arXiv 2010.06192.)
    """
    noise = torch.randint(0, 1 << 16, value.shape, generator=generator, device=value.device, dtype=torch.int32)
    bits = (value.contiguous().view(torch.int32) + noise) & -65536
    return bits.view(torch.float32).to(torch.bfloat16)
