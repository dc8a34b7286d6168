"""The calibrated fits of a conversion, made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from sctconv.runtime.skeleton import load_tokenizer
from sctconv.sources.weights import DenseModel

from .blocks import Decoder
from .calibration import CalibrationError, load_calibration
from .fit import Fit
from .options import ConvertOptions
from .plan import Plan
from .sweep import Sweep


class Calibrated:
    """Gives each planned layer its fit; the sweep goes on, in forward order, as far as the layer asked for.

    Tensors are written in the order of the shards, which is nearly always that of the blocks; where it is not, the fits
    that are made on the way wait in memory.

    Args:
        model: the dense checkpoint.
        plan: which layers, at which ranks.
        options: the texts.

    Raises:
        CalibrationError: a text is missing or too short, or the model has no tokenizer.
        OptionError: the layers are not in decoder blocks.
    """

    def __init__(self, model: DenseModel, plan: Plan, options: ConvertOptions) -> None:
        ranks = {layer.name: layer.rank for layer in plan.layers.values() if layer.rank is not None}
        tokenizer = load_tokenizer(model.source.files)
        if tokenizer is None:
            raise CalibrationError(f"{model.source.label}: has no tokenizer, which calibration needs; use --data-free")
        self._texts = load_calibration(
            options.calibration, tokenizer, tokens=options.calibration_tokens, context=options.calibration_context
        )
        decoder = Decoder(model, list(ranks))
        self._pending = set(decoder.layers)
        self._biased = {f"{layer.name}.bias": layer.name for layer in plan.layers.values() if layer.bias}
        self._sweep = Sweep(decoder, ranks, self._texts, progress=self._report)
        self._blocks: Iterator[tuple[str, dict[str, Fit]]] = self._sweep.run()
        self._fits: dict[str, Fit] = {}
        self.progress: Callable[[float, str], None] | None = None

    def fit(self, layer: str) -> Fit | None:
        """A layer's fit, once; None where calibration cannot reach it (outside the blocks, an expert)."""
        self._advance(layer)
        return self._fits.get(layer)

    def bias(self, tensor: str) -> np.ndarray | None:
        """The corrected bias of a fitted layer, if that is what the tensor is."""
        layer = self._biased.get(tensor)
        fit = self.fit(layer) if layer is not None else None
        return fit.bias.float().numpy() if fit is not None and fit.bias is not None else None

    def _advance(self, layer: str) -> None:
        while layer in self._pending:
            block, fits = next(self._blocks)
            self._fits |= fits
            self._pending -= {name for name in self._pending if name.startswith(f"{block}.")}

    def facts(self) -> dict[str, Any]:
        """Where the calibration came from and what the held-out windows say; finishes the sweep.

        `perplexity` and `kl` (nats a token) are measured at the end on windows that were not fitted on, `distances`
        after each block: |student - teacher| / |teacher| of the hidden states.
        """
        for _, fits in self._blocks:
            self._fits |= fits
        result = self._sweep.result
        return {
            "calibration": [{"source": source, "tokens": tokens} for source, tokens in self._texts.sources],
            "calibration_context": self._texts.context,
            "held_out": {
                "tokens": self._texts.held_out.numel(),
                "perplexity": result.perplexity,
                "teacher_perplexity": result.teacher_perplexity,
                "kl": result.kl,
                "distances": result.distances,
            },
        }

    def _report(self, share: float, what: str) -> None:
        if self.progress:
            self.progress(share, what)
