"""The gradients of a dense model's loss at the outputs of its layers, as what `Metric` is made of.

One pass forward and one backward, block by block, one block's weights in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from sctconv.runtime.memory import release_free

from .blocks import hooked
from .budget import MemoryPlan
from .decoder import Decoder
from .metric import Metric
from .states import States

_SIDE: Final = 8192
"""Outputs up to which all products of gradients are summed; of more, their squares only."""


def output_metrics(
    decoder: Decoder,
    batches: Sequence[Tensor],
    memory: MemoryPlan,
    *,
    progress: Callable[[float, str], None] | None = None,
) -> dict[str, Metric]:
    """The metric of each layer in `decoder.layers` that a gradient reaches.

    Args:
        decoder: the dense checkpoint.
        batches: (batch, context) of tokens each.
        memory: how much may be held at once; the hidden states before every block are.
        progress: called with the share of the work done and a word on it.
    """
    report = progress or (lambda share, what: None)
    states = [States.of(decoder.embed(batches), len(batches), memory.spill)]
    blocks = len(decoder)
    with torch.no_grad():
        for place in range(blocks):
            block = decoder.block(place, None)
            after = (block.run(state.to(decoder.device), bf16=memory.bf16) for state in states[-1])
            states.append(States.of(after, len(batches), memory.spill))
            report((place + 1) / (3 * blocks), block.name)
            del block, after  # before the next is loaded
    gradients = decoder.head_gradients(states.pop(), batches)
    side = min(_SIDE, memory.gram_side)
    metrics: dict[str, Metric] = {}
    for place in reversed(range(blocks)):
        block, before = decoder.block(place, None), states.pop()
        block.module.requires_grad_(False)
        prefix = f"{block.name}."
        names = [name.removeprefix(prefix) for name in decoder.layers if name.startswith(prefix)]
        moments: dict[str, Tensor] = {}
        with hooked(block.module, {name: (None, _adder(moments, f"{prefix}{name}", side)) for name in names}):
            for number, state in enumerate(before):
                with torch.enable_grad():
                    state = state.to(decoder.device).requires_grad_()
                    block.run(state, bf16=memory.bf16).backward(gradients[number].to(decoder.device))
                assert state.grad is not None
                gradients[number] = state.grad
        for name in list(moments):
            if (metric := Metric.of(moments.pop(name))) is not None:
                metrics[name] = metric
        report((blocks + 2 * (blocks - place)) / (3 * blocks), block.name)
        del block
        release_free()
    return metrics


def _adder(moments: dict[str, Tensor], name: str, side: int) -> Callable[[Tensor], None]:
    """Sees to it that the products of the gradient at some outputs are added up."""

    def add(gradient: Tensor) -> None:
        rows = gradient.flatten(0, -2).float()
        part = rows.T @ rows if rows.shape[1] <= side else rows.square().sum(0)
        moments[name] = moments[name].add_(part) if name in moments else part.double()

    def watch(output: Tensor) -> None:
        output.register_hook(add)

    return watch
