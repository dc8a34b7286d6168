"""How much the model's end cares about each output of a layer.

For a layer with outputs y the loss of the dense model on calibration text changes, to second order, like
`sum_j d_j^2 e_j^2` for small errors e of y, where `d_j = sqrt(mean_t g_tj^2)` and g is the gradient of the next-token
cross-entropy at the layer's outputs, token by token (the diagonal of the empirical Fisher matrix). With D = diag(d) the
closed forms minimise `|D (Y - W' X~)|`. SmolLM2-135M, MLP at rank 128, 16k tokens: perplexity 126.7 -> 102.0.

The gradients come from one pass forward and one backward, block by block, one block's weights in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from .blocks import hooked
from .budget import MemoryPlan
from .decoder import Decoder
from .states import States

CLAMP: Final = 100.0
"""d lies between 1/CLAMP and CLAMP times its root mean square."""


def output_metric(
    decoder: Decoder,
    batches: Sequence[Tensor],
    memory: MemoryPlan,
    *,
    progress: Callable[[float, str], None] | None = None,
) -> dict[str, Tensor]:
    """d (out,) float64 of each layer in `decoder.layers`, scaled to a root mean square of 1.

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
            after = (block.run(state.to(decoder.device), bf16=decoder.bf16) for state in states[-1])
            states.append(States.of(after, len(batches), memory.spill))
            report((place + 1) / (3 * blocks), block.name)
            del block, after  # before the next is loaded
    gradients = decoder.head_gradients(states.pop(), batches)
    squares: dict[str, Tensor] = {}
    for place in reversed(range(blocks)):
        block, before = decoder.block(place, None), states.pop()
        block.module.requires_grad_(False)
        prefix = f"{block.name}."
        names = [name.removeprefix(prefix) for name in decoder.layers if name.startswith(prefix)]
        with hooked(block.module, {name: (None, _adder(squares, f"{prefix}{name}")) for name in names}):
            for number, state in enumerate(before):
                with torch.enable_grad():
                    state = state.to(decoder.device).requires_grad_()
                    block.run(state, bf16=decoder.bf16).backward(gradients[number].to(decoder.device))
                assert state.grad is not None
                gradients[number] = state.grad
        report((blocks + 2 * (blocks - place)) / (3 * blocks), block.name)
        del block
    metric = {}
    for name, square in squares.items():
        d = square.sqrt()
        scale = float(square.mean().sqrt())
        metric[name] = (d / scale).clamp(1.0 / CLAMP, CLAMP) if scale > 0.0 else torch.ones_like(d)
    return metric


def _adder(squares: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    """Sees to it that the squares of the gradient at some outputs are added up."""

    def add(gradient: Tensor) -> None:
        part = gradient.double().square().flatten(0, -2).sum(0)
        squares[name] = squares[name] + part if name in squares else part

    def watch(output: Tensor) -> None:
        output.register_hook(add)

    return watch
