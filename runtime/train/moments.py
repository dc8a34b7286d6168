"""What an optimiser remembers of a gradient, in as many bits as it is worth.

`float32`, `bfloat16`, or `int8`: codes of -127 to 127 with one float32 scale for 256 rows of a column, as 8-bit optimisers have
them (Dettmers et al., arXiv 2110.02861), with plain steps in place of their map: the optimiser keeps momenta in units of
their second moments here, and those have no outliers worth one.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

MOMENTA: Final = ("float32", "bfloat16", "int8")
"""Names of `--momentum`."""

_ROWS: Final = 256
_NOISE: Final = 1 << 16
"""Draws of one rounding."""


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
    scales = blocks.abs().amax(1) / 127.0
    codes = (blocks / torch.where(scales == 0.0, 1.0, scales).unsqueeze(1)).round_()
    state[name].copy_(codes.flatten(0, 1)[: len(value)].reshape(value.shape))
    state[f"{name}_scale"].copy_(scales)


def get(state: dict[str, Any], name: str) -> Tensor:
    """What is kept under a name, float32."""
    value: Tensor = state[name]
    if value.dtype != torch.int8:
        return value.float()
    blocks = _blocks(value.float()).mul_(state[f"{name}_scale"].unsqueeze(1))
    return blocks.flatten(0, 1)[: len(value)].reshape(value.shape)


def _blocks(value: Tensor) -> Tensor:
    """(m,) or (m, k) -> (blocks, 256, k), zeros at the end; on the same memory where none are wanted."""
    flat = value.reshape(len(value), -1)
    count = -(-len(flat) // _ROWS)
    if missing := count * _ROWS - len(flat):
        flat = torch.nn.functional.pad(flat, (0, 0, 0, missing))
    return flat.reshape(count, _ROWS, -1)


def rounded(value: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, up or down at random so that the mean is the value: steps smaller than half a unit are not lost.

    (Stochastic rounding; Zamirai et al., arXiv 2010.06192.) Entries that are a multiple of `_NOISE` apart share what is
    added to them: drawing it for each would take as long as the rest of a step.
    """
    bits = value.contiguous().view(torch.int32).flatten()
    count = min(len(bits), _NOISE)
    noise = torch.randint(0, 1 << 16, (count,), generator=generator, device=value.device, dtype=torch.int32)
    whole = len(bits) - len(bits) % count if count else 0
    up = torch.empty_like(bits)
    torch.add(bits[:whole].view(-1, max(1, count)), noise, out=up[:whole].view(-1, max(1, count)))
    torch.add(bits[whole:], noise[: len(bits) - whole], out=up[whole:])
    return up.bitwise_and_(-65536).view(torch.float32).view(value.shape).to(torch.bfloat16)
