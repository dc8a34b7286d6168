"""Causal attention in bfloat16 on a processor, by torch's own matrix products.

`scaled_dot_product_attention` keeps no probabilities, but multiplies bfloat16 on a processor without AMX no faster than
float32, and makes them again on the way back. Where a block is computed again anyway, and its probabilities are few, keeping
them that long is less than half the time. Scores and softmax are float32; queries go by blocks, each with the keys up to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_QUERIES: Final = 128
"""Of a block."""
_KEPT: Final = 32 << 20
"""Bytes of probabilities up to which they are kept."""

_NAME: Final = "sdpa"
_OTHERWISE: Final = ("cache", "position_bias", "softcap")
"""Arguments that ask for more than this."""


@contextlib.contextmanager
def probabilities_kept() -> Iterator[None]:
    """Within, models that call `sdpa` are given this where it does the same."""
    usual = ALL_ATTENTION_FUNCTIONS[_NAME]

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
    ) -> tuple[Tensor, None]:
        if attention_mask is not None or not _is_plain(module, query, key, value, more):
            output: tuple[Tensor, None] = usual(module, query, key, value, attention_mask, **more)
            return output
        scale = more.get("scaling") or query.shape[-1] ** -0.5
        cast = [tensor.bfloat16() for tensor in (query, key, value)]
        return _Causal.apply(*cast, scale).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS[_NAME] = attention
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[_NAME] = usual


def _is_plain(module: Any, query: Tensor, key: Tensor, value: Tensor, more: dict[str, Any]) -> bool:
    causal = more.get("is_causal")
    return (
        query.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and not torch.cpu._is_amx_tile_supported()
        and (getattr(module, "is_causal", True) if causal is None else causal)
        and not more.get("dropout")
        and all(more.get(name) is None for name in _OTHERWISE)
        and query.shape[2] == key.shape[2]
        and query.shape[1] % key.shape[1] == 0
        and key.shape[:3] == value.shape[:3]
        and 2 * query.shape[:3].numel() * key.shape[2] <= _KEPT
    )


class _Causal(torch.autograd.Function):
    """q (b, heads, t, d), k and v (b, fewer heads, t, d or e) -> (b, heads, t, e); bfloat16."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        keys, values, parts, kept = _flat(k), _flat(v), [], []
        wide = keys.float().mul_(scale)
        for block in _blocks(q):
            queries = _of(q, k, block)
            scores = queries.float() @ wide[:, : block.stop].mT
            _hide_(scores, block)
            kept.append(scores.softmax(-1).to(q.dtype))
            parts.append(_back(kept[-1] @ values[:, : block.stop], q, block))
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, *kept)
        return torch.cat(parts, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v, *kept = ctx.saved_tensors
        keys, values, parts = _flat(k), _flat(v), []
        dk, dv = (torch.zeros(one.shape, device=one.device) for one in (keys, values))
        for block, P in zip(_blocks(q), kept, strict=True):
            dy, stop = _of(gradients[0].to(q.dtype), k, block), block.stop
            dv[:, :stop] += P.mT @ dy
            dS = torch._softmax_backward_data(dy @ values[:, :stop].mT, P, -1, P.dtype)
            parts.append(_back(dS @ keys[:, :stop], q, block))
            dk[:, :stop] += dS.mT @ _of(q, k, block)
        dq = torch.cat(parts, 2).mul_(ctx.scale)
        return dq, dk.mul_(ctx.scale).to(k.dtype).view_as(k), dv.to(v.dtype).view_as(v), None


def _blocks(q: Tensor) -> list[slice]:
    length = q.shape[2]
    return [slice(start, min(start + _QUERIES, length)) for start in range(0, length, _QUERIES)]


def _flat(k: Tensor) -> Tensor:
    """(b, heads, t, d) -> (b x heads, t, d)."""
    return k.flatten(0, 1).contiguous()


def _of(q: Tensor, k: Tensor, block: slice) -> Tensor:
    """A block of queries, those that share keys together: (b x fewer heads, group x block, d)."""
    return q[:, :, block].reshape(k.shape[0] * k.shape[1], -1, q.shape[-1])


def _back(part: Tensor, q: Tensor, block: slice) -> Tensor:
    """The reverse: (b, heads, block, e)."""
    return part.view(*q.shape[:2], block.stop - block.start, -1)


def _hide_(scores: Tensor, block: slice) -> None:
    """Of each query the keys after it; only the last square of a block has such."""
    size = block.stop - block.start
    later = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu_(1)
    scores.view(len(scores), -1, size, block.stop)[..., block.start :].masked_fill_(later, -torch.inf)
