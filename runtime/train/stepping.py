"""Parameters that move within the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..head import ends
from .optimizer import SpectralAdam


class Stepping:
    """Steps in the backward pass: moves each parameter the moment its gradient is whole, and lets the gradient go.

    Embeddings and head are left to `optimizer.step()`: their gradients come in parts.

    Args:
        model: a causal language model.
        optimizer: its optimiser; None, or any but `SpectralAdam`, for nothing to move here.

    Attributes:
        on: whether this pass completes the gradients.
        squares: sum of the squares of the gradients that are gone.
    """

    def __init__(self, model: Any, optimizer: Optimizer | None) -> None:
        self.on = False
        self.squares: Tensor | float = 0.0
        self._hooks: list[Any] = []
        if not isinstance(optimizer, SpectralAdam):
            return
        at_ends = {id(parameter) for module in ends(model) for parameter in module.parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in at_ends:
                    hook = self._hook(optimizer)
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    def _hook(self, optimizer: SpectralAdam) -> Callable[[nn.Parameter], None]:
        def move(parameter: nn.Parameter) -> None:
            if self.on and parameter.grad is not None:
                self.squares += torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()
                optimizer.step_one(parameter)
                parameter.grad = None

        return move

    def __enter__(self) -> Stepping:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
