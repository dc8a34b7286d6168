"""The retraction as a callback, for those who train with the Trainer of transformers."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..retraction import Method, retract_


class RetractionCallback(TrainerCallback):
    """Brings U and V back to orthonormal columns after every step of the optimiser.

        trainer = Trainer(model=model, callbacks=[RetractionCallback()], ...)

    Args:
        method: see `retract`.
    """

    def __init__(self, method: Method = "qr") -> None:
        self._method: Method = method

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer between its optimiser's step and the next."""
        model: nn.Module = kwargs["model"]
        retract_(model, self._method)
