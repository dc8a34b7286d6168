"""Parameters that move within the backward pass."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.optim import Optimizer

from ..head import ends
from .optimizer import SpectralAdam

_FADING: Final = 0.7
"""Weight of what was expected before a step in what is expected after it."""


@dataclass
class RunningNorm:
    """Running mean of the norms of a run's gradients; None before the first."""

    value: float | None = None

    def take(self, norm: float) -> None:
        self.value = norm if self.value is None else _FADING * self.value + (1.0 - _FADING) * norm


class Stepping:
    """Steps in the backward pass: moves each parameter the moment its gradient is whole, and lets the gradient go.

    Embeddings and head are left to `optimizer.step()`: their gradients come in parts.

    A gradient that is clipped to the norm of all needs that norm before the first of them goes, when it is not known. So it
    is scaled by a running mean of the norms of the steps before, which is nearer to it than the last of them; and by its own,
    where that alone is longer. (LOMO, Lv et al., arXiv 2306.09782, takes a backward pass for the norm and one more for the step.)

    Args:
        model: a causal language model.
        optimizer: its optimiser; None, or any but `SpectralAdam`, for nothing to move here.
        norm: of the gradients as the steps before have it; takes that of each step.
        clip: norm to which gradients are clipped, 0 for none.

    Attributes:
        on: whether this pass completes the gradients.
    """

    def __init__(self, model: Any, optimizer: Optimizer | None, norm: RunningNorm, clip: float = 0.0) -> None:
        self.on = False
        self._norm, self._clip, self._squares, self._measures = norm, clip, 0.0, False
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
                self._squares += self._clipped_(parameter) ** 2
                if not self._measures:
                    optimizer.step_one(parameter)
                parameter.grad = None

        return move

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Within, gradients go and nothing moves."""
        self._measures = True
        try:
            yield
        finally:
            self._measures = False

    def finish(self, parameters: list[nn.Parameter]) -> float:
        """Norm of all gradients of a step; those that are still there are clipped as those that are gone were."""
        left = [self._clipped_(parameter) for parameter in parameters if parameter.grad is not None]
        found = math.sqrt(self._squares + sum(norm**2 for norm in left))
        self._squares = 0.0
        self._norm.take(found)
        return found

    def _clipped_(self, parameter: nn.Parameter) -> float:
        """Clips one gradient; returns its norm as it was."""
        assert parameter.grad is not None
        norm = float(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        if self._clip and not self._measures and (longest := max(norm, self._norm.value or 0.0)) > self._clip:
            parameter.grad.mul_(self._clip / longest)
        return norm

    def __enter__(self) -> Stepping:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
