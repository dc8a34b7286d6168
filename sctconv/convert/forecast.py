"""What a conversion will take: seconds on this machine and bytes of memory, before any weight is read.

Time is measured on made matrices: the very functions that a conversion spends it in, at the layer's own shape where that takes a
moment, else at a smaller one and scaled by the operations. Gaussian matrices have the flattest spectra there are, so the SVDs
come out no faster than a model's. What a block's forward passes take is counted as its products.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from sctconv.runtime.linalg import EXACT_SIDE, truncated_svd
from sctconv.runtime.memory import rss_bytes
from sctconv.runtime.precision import has_fast_bf16, products
from sctconv.runtime.skeleton import linear_layers
from sctconv.sources.weights import DenseModel

from .budget import plan_memory
from .calibration import HELD_OUT
from .decoder import Decoder
from .fit import Moments, closed_form, closed_form_dense, closed_form_dual
from .options import ConvertOptions
from .plan import LayerPlan, Plan, is_fittable

_SIDE: Final = 4096
"""Matrices with two larger sides are timed at smaller ones, above `EXACT_SIDE`, so that the method is the same. At half of this
what goes by the sides, not by their product, would be most of the time: 8192 x 28672 were forecast at three times what they took."""

_COPIED: Final = 500e6
"""Bytes a second that are read, cast and written."""

_PASSES: Final = 6
"""Of the calibration text through a block: the teacher's, one for each group of layers with an input of their own, the student's."""

_METRIC_TOKENS: Final = 8192
"""That the metrics are made of."""


@dataclass(frozen=True)
class Forecast:
    """`seconds` of wall time on this machine as it is now; `peak_bytes` of resident memory."""

    seconds: float
    peak_bytes: int


def forecast(model: DenseModel, plan: Plan, options: ConvertOptions) -> Forecast:
    """Of a conversion by a plan. Measured allocation and refinement are not counted."""
    planned = [layer for layer in plan.layers.values() if layer.reason is None]
    seconds = (plan.dense_bytes + plan.bytes) / _COPIED
    if options.calibration:
        return _calibrated(model, planned, options, seconds)
    shapes = Counter((layer.out, layer.in_, layer.rank) for layer in planned)
    device = torch.device(options.device)
    seconds += sum(count * _svd_seconds(*shape, device) for shape, count in shapes.items())
    peak = max((_svd_bytes(layer) for layer in planned), default=0)
    return Forecast(seconds, rss_bytes() + max(peak, 2 * _largest_piece(plan)))


def _largest_piece(plan: Plan) -> int:
    return min(64 << 20, max(4 * info.size for info in plan.tensors.values()))


def _svd_bytes(layer: LayerPlan) -> int:
    """W in float32, and the blocks of the subspace; see `truncated_svd`."""
    m, n, rank = layer.out, layer.in_, layer.rank or min(layer.out, layer.in_)
    exact = min(m, n) <= EXACT_SIDE
    return 4 * m * n * (2 if exact else 1) + 32 * (m + n) * min(rank, min(m, n))


def _svd_seconds(m: int, n: int, rank: int | None, device: torch.device) -> float:
    small, large = min(m, n), max(m, n)
    share = 1.0
    if small > EXACT_SIDE and rank is not None:
        share = (small / min(small, _SIDE)) * (large / min(large, _SIDE))
        small, large = min(small, _SIDE), min(large, _SIDE)
    W = _random(small, large, device)
    return share * _seconds(lambda: truncated_svd(W, min(rank or small, small)), device)


def _calibrated(model: DenseModel, planned: list[LayerPlan], options: ConvertOptions, seconds: float) -> Forecast:
    names = [layer.name for layer in planned]
    others = [name for name in linear_layers(model.skeleton) if name not in names and is_fittable(model, name)]
    decoder = Decoder(model, names, others if options.refit else [], device=options.device)
    bf16 = has_fast_bf16(decoder.device) if options.bf16 is None else options.bf16
    tokens = options.calibration_tokens + -(-options.calibration_tokens // HELD_OUT)
    context = options.calibration_context
    memory = plan_memory(decoder, tokens, context, limit=options.max_memory, directory=Path(), bf16=bf16)
    ranks = {layer.name: layer.rank for layer in planned}
    named = zip((*decoder.layers, *decoder.others), decoder.shapes, strict=True)
    shapes = Counter((m, n, ranks.get(name)) for name, (m, n) in named)
    weights = sum(count * m * n for (m, n, _), count in shapes.items())
    batch, device = memory.batch * context, decoder.device
    rate, slow = _product_rate(batch, bf16, device), _product_rate(batch, False, device)
    seconds += 2.0 * weights * (_PASSES * tokens + 3 * _METRIC_TOKENS) / rate
    # the output layer: there and back for the metrics, and of both models for the held-out windows
    text = model.skeleton.config.get_text_config()
    seconds += 2.0 * text.vocab_size * decoder.width * (2 * _METRIC_TOKENS + 2 * tokens / HELD_OUT) / slow
    for (m, n, rank), count in shapes.items():
        metric = 2.0 * _METRIC_TOKENS * m * min(m, 8192)
        if n <= memory.gram_side:
            sums = 2.0 * tokens * n * (n + min(m, n))
            seconds += count * ((metric + sums) / slow + _closed_form_seconds(m, n, rank, device))
        elif rank is not None:  # from the tokens themselves; what is to stay dense there stays as it is
            seconds += count * (metric / slow + _dual_seconds(m, n, rank, memory.dual_tokens, device))
    return Forecast(seconds, memory.estimate)


def _closed_form_seconds(m: int, n: int, rank: int | None, device: torch.device) -> float:
    a, b = min(m, _SIDE), min(n, _SIDE)
    W, K = _random(a, b, device), torch.eye(b, dtype=torch.float64, device=device)

    def run() -> object:
        moments = Moments(K, K.clone(), 1.0, b, W=W)
        return closed_form_dense(moments, prior=W) if rank is None else closed_form(moments, min(rank, a, b), prior=W)

    return n * n * (m + n) / (b * b * (a + b)) * _seconds(run, device)  # products of n x n, and of m x n by that


def _dual_seconds(m: int, n: int, rank: int, tokens: int, device: torch.device) -> float:
    a, b = min(m, _SIDE), min(n, _SIDE)
    W, x = _random(a, b, device), _random(tokens, b, device)
    y = x @ W.T

    def run() -> object:
        return closed_form_dual(x, y.clone(), min(rank, a, b), prior=W)

    def operations(m: int, n: int) -> float:
        """Outputs' Gram matrix, the full solution, the tokens' Gram matrix and its root."""
        return n * m * m + m * n * tokens + tokens**2 * (m + n)

    return operations(m, n) / operations(a, b) * _seconds(run, device)


def _product_rate(tokens: int, bf16: bool, device: torch.device) -> float:
    """Operations a second of (tokens, side) by (side, side)."""
    x, W = _random(tokens, _SIDE, device), _random(_SIDE, _SIDE, device)
    with products(device, bf16):
        seconds = _seconds(lambda: x @ W, device)
    return 2.0 * tokens * _SIDE**2 / seconds


def _random(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of the second run, as the first warms up; of the first where that takes a while."""
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
        if seconds > 1.0:
            break
    return seconds
