"""Matrix products in bfloat16 with weights and sums in float32."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def products(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager[Any]:
    """Within, matrix products and attention are bfloat16 with float32 sums; norms, softmax and weights stay float32.

    Weights are cast as they are used: autocast's cache would hold half of them again until its end, and a pass uses each once.
    """
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False) if bf16 else contextlib.nullcontext()


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 faster than float32."""
    return device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
