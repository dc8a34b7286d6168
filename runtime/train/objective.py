"""What a step of training minimises, and its gradients, logits a few rows at a time."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from ..head import Halves
from ..precision import products
from .data import Batch
from .options import TrainError, TrainOptions
from .teacher import Teacher, divergence

_LOGITS_BYTES: Final = 32 << 20
_LEAN_LOGITS_BYTES: Final = 16 << 20


class Objective:
    """Cross-entropy, mixed with the divergence from a teacher where there is one.

    Args:
        model: a causal language model.
        options: of the run.
        teacher: over the same vocabulary.

    Raises:
        TrainError: the teacher has another vocabulary.
    """

    def __init__(self, model: Any, options: TrainOptions, teacher: Teacher | None) -> None:
        self._halves, self._options = Halves(model), options
        self._teacher = teacher if options.teacher_weight else None
        vocabulary = int(model.config.get_text_config().vocab_size)
        if teacher is not None and teacher.vocabulary != vocabulary:
            raise TrainError(
                f"the teacher has a vocabulary of {teacher.vocabulary}, the model one of {vocabulary}; they must be the same"
            )
        self._rows = max(1, logits_bytes(options) // (4 * vocabulary))

    def descend(self, batch: Batch, scale: float) -> float:
        """Adds the gradients of `scale` times the loss, summed over learned tokens; returns that.

        Each part of the logits goes back as far as the hidden states at once and is let go, so that neither logits nor
        their gradient are ever whole, and nothing is computed twice.
        """
        lesson = self._teacher.lesson(batch) if self._teacher is not None else None
        hidden, targets = self._predicted(batch), batch.targets
        rows = hidden.detach().requires_grad_()
        total = 0.0
        for start in range(0, len(targets), self._rows):
            part = slice(start, start + self._rows)
            with products(hidden.device, bool(self._options.bf16)):
                logits = self._halves.head(rows[part])
            loss = scale * self._mixed(logits.float(), targets[part], lesson(part) if lesson else None)
            loss.backward()
            total += float(loss.detach())
        if math.isfinite(total) and rows.grad is not None and hidden.requires_grad:
            hidden.backward(rows.grad)
        return total

    @torch.no_grad()
    def cross_entropy(self, batch: Batch) -> float:
        """Summed over learned tokens."""
        hidden, targets = self._predicted(batch), batch.targets
        total = 0.0
        for rows, row in zip(hidden.split(self._rows), targets.split(self._rows), strict=True):
            with products(hidden.device, bool(self._options.bf16)):
                logits = self._halves.head(rows)
            total += float(F.cross_entropy(logits.float(), row, reduction="sum"))
        return total

    def _predicted(self, batch: Batch) -> Tensor:
        """Hidden states (learned tokens, width) float32."""
        with products(batch.windows.device, bool(self._options.bf16)):
            hidden = self._halves.hidden(batch.windows, batch.positions)
        return hidden[:, :-1][batch.predicted].float()

    def _mixed(self, logits: Tensor, targets: Tensor, taught: Any) -> Tensor:
        weight = self._options.teacher_weight if taught is not None else 0.0
        loss = logits.new_zeros(())
        if weight < 1.0:
            loss = loss + (1.0 - weight) * F.cross_entropy(logits, targets, reduction="sum")
        if weight > 0.0:
            loss = loss + weight * divergence(logits, taught, self._options.temperature)
        return loss


def logits_bytes(options: TrainOptions) -> int:
    """Logits that are held in float32 at once."""
    return _LEAN_LOGITS_BYTES if options.is_lean else _LOGITS_BYTES
