"""The calibrated fits of a conversion, made when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from sctconv.errors import OptionError
from sctconv.runtime.precision import has_fast_bf16
from sctconv.runtime.skeleton import linear_layers, load_tokenizer
from sctconv.sources.weights import DenseModel

from .allocate import TRIAL_TOKENS, TRIALS, allocate
from .budget import plan_memory
from .calibration import Calibration, CalibrationError, load_calibration
from .decoder import Decoder
from .fit import DenseFit, Fit
from .gradients import output_metrics
from .options import ConvertOptions
from .plan import LayerPlan, Plan, is_fittable
from .refine import BLOCK_STEPS, STEP_WINDOWS, model_bytes, tune_model
from .sweep import Sweep, SweptBlock

_METRIC_TOKENS: Final = 8192
"""Tokens that the output metric is measured on."""


def read_texts(model: DenseModel, options: ConvertOptions) -> Calibration:
    """The calibration windows of a conversion.

    Raises:
        CalibrationError: a text is missing or too short, or the model has no tokenizer.
    """
    tokenizer = load_tokenizer(model.source.files)
    if tokenizer is None:
        raise CalibrationError(f"{model.source.label}: has no tokenizer, which calibration needs; use --data-free")
    return load_calibration(
        options.calibration, tokenizer, tokens=options.calibration_tokens, context=options.calibration_context
    )


class Calibrated:
    """Gives each layer its fit; the sweep goes on, in forward order, as far as the tensor asked for.

    Tensors are written in the order of the shards, which is nearly always that of the blocks; where it is not, the fits
    that are made on the way wait in memory. Where the whole model is tuned after the sweep, all of them do.

    Args:
        model: the dense checkpoint.
        plan: which layers, at which ranks.
        options: texts, and how.
        directory: where hidden states go that do not fit into memory.
        progress: called with the share of the work that is done and a word on it.

    Attributes:
        plan: the same with its ranks allocated.
        dense: layers that were fitted and stay dense.
        memory: how the sweep keeps to its budget.

    Raises:
        CalibrationError: a text is missing or too short, or the model has no tokenizer.
        OptionError: the layers are not in decoder blocks, or the memory allowed is too small.
    """

    def __init__(
        self,
        model: DenseModel,
        plan: Plan,
        options: ConvertOptions,
        directory: Path,
        *,
        progress: Callable[[float, str], None] | None = None,
    ) -> None:
        self._model, self._options, self._shapes = model, options, linear_layers(model.skeleton)
        self._texts = texts = read_texts(model, options)
        self._progress = progress
        decoder = self._decoder(plan)
        tokens = texts.fit.numel() + texts.held_out.numel()
        bf16 = has_fast_bf16(decoder.device) if options.bf16 is None else options.bf16
        self.memory = plan_memory(
            decoder, tokens, texts.context, limit=options.max_memory, directory=directory, bf16=bf16
        )
        widest = max(n for _, n in decoder.shapes)
        if options.energy and widest > self.memory.gram_side:
            raise OptionError(
                f"--energy: needs Gram matrices of {widest} x {widest}; allow more --max-memory, or give --rank"
            )
        self._tunes_model = options.refine > 0 and model_bytes(model, texts) < self.memory.limit
        few = texts.fit[: max(1, _METRIC_TOKENS // texts.context)]
        batch = min(self.memory.batch, len(few))
        batches = list(few[: len(few) // batch * batch].split(batch))
        self._work = {
            "metric": 4.0 * batch * len(batches) * texts.context,
            "allocation": 1.5 * TRIALS * TRIAL_TOKENS if options.allocate == "measured" else 0.0,
            "sweep": float(tokens),
            "tuning": 4.0 * options.refine * STEP_WINDOWS * texts.context if self._tunes_model else 0.0,
        }
        metrics = output_metrics(decoder, batches, self.memory, progress=self._stage("metric"))
        self.plan, self._allocation = plan, None
        if options.allocate == "measured":
            stage = self._stage("allocation")
            self.plan, self._allocation = allocate(decoder, plan, texts, self.memory, metrics, progress=stage)
            decoder = self._decoder(self.plan)
        planned = _planned(self.plan)
        self._sweep = Sweep(
            decoder,
            {layer.name: layer.rank for layer in planned if layer.rank is not None},
            texts,
            self.memory,
            energies={layer.name: options.energy for layer in planned if layer.rank is None and options.energy},
            metrics=metrics,
            refine=min(options.refine, BLOCK_STEPS),
            progress=self._stage("sweep"),
        )
        self._blocks: Iterator[SweptBlock] = self._sweep.run()
        self._pending = {*decoder.layers, *decoder.others}
        if options.refine:  # a block's norms are asked for before its layers, and are not final until it is refined
            self._pending |= {name.rpartition(".")[0] for name in model.tensors if name.startswith(f"{decoder.path}.")}
        self._factors: dict[str, Fit] = {}
        self._tensors: dict[str, np.ndarray] = {}
        self._refinement: list[list[float]] = []
        self._tuning: list[float] | None = None
        self._tuned_loss = math.nan
        self.dense: set[str] = set()

    def _decoder(self, plan: Plan) -> Decoder:
        """The decoder that holds a plan's layers."""
        names = [layer.name for layer in _planned(plan)]
        others = [name for name in self._shapes if name not in names and is_fittable(self._model, name)]
        others = others if self._options.refit else []
        return Decoder(self._model, names, others, device=self._options.device)

    def _stage(self, stage: str) -> Callable[[float, str], None]:
        """Turns the progress of a stage into that of the whole."""
        whole = sum(self._work.values())
        before = sum(self._work[name] for name in takewhile(lambda name: name != stage, self._work))

        def report(share: float, what: str) -> None:
            if self._progress:
                self._progress((before + share * self._work[stage]) / whole, what)

        return report

    def fit(self, layer: str) -> Fit | None:
        """A layer's fit, once; None where it stays dense or calibration cannot reach it (outside the blocks, an expert)."""
        self._advance(layer)
        return self._factors.pop(layer, None)

    def tensor(self, name: str) -> np.ndarray | None:
        """What calibration made of a tensor that is written as it is (a bias, a norm, a layer that stays dense), once."""
        self._advance(name.rpartition(".")[0])
        return self._tensors.pop(name, None)

    def _advance(self, layer: str) -> None:
        if self._tunes_model and self._tuning is None:
            self._tune()
        while layer in self._pending:
            block = next(self._blocks)
            self._refinement.append(block.refinement)
            self._pending = {name for name in self._pending if not name.startswith(f"{block.name}.")}
            self._keep(block.fits, block.tensors)

    def _tune(self) -> None:
        """The whole sweep, then the whole model."""
        fits: dict[str, Fit | DenseFit] = {}
        tensors: dict[str, torch.Tensor] = {}
        for block in self._blocks:
            self._refinement.append(block.refinement)
            fits |= block.fits
            tensors |= block.tensors
        self._pending = set()
        tuned = tune_model(
            self._model,
            fits,
            tensors,
            self._texts,
            self._options.refine,
            device=self._options.device,
            bf16=self.memory.bf16,
            progress=self._stage("tuning"),
        )
        self._tuning, self._tuned_loss = tuned.losses, tuned.loss
        self._keep(tuned.fits, {**tensors, **tuned.tensors})

    def _keep(self, fits: Mapping[str, Fit | DenseFit], tensors: Mapping[str, torch.Tensor]) -> None:
        """Until they are asked for."""
        for name, fit in fits.items():
            if isinstance(fit, Fit):
                self._factors[name] = fit
            else:
                self.dense.add(name)
                weight = fit.weight.T if self._shapes[name].transposed else fit.weight
                self._tensors[f"{name}.weight"] = weight.contiguous().cpu().numpy()
            if fit.bias is not None:
                self._tensors[f"{name}.bias"] = fit.bias.float().cpu().numpy()
        self._tensors |= {name: tensor.float().cpu().numpy() for name, tensor in tensors.items()}

    def facts(self) -> dict[str, Any]:
        """Where the calibration came from and what the held-out windows say; finishes the sweep.

        `perplexity` and `kl` (nats a token) are measured at the end of the sweep on windows that were not fitted on,
        `distances` after each block: |student - teacher| / |teacher| of the hidden states. `refinement` are each block's
        held-out losses, the closed form's first, `tuning` the whole model's, in nats a token.
        """
        self._advance("")
        for block in self._blocks:
            self._keep(block.fits, block.tensors)
        result = self._sweep.result
        facts: dict[str, Any] = {
            "calibration": [{"source": source, "tokens": tokens} for source, tokens in self._texts.sources],
            "calibration_context": self._texts.context,
            "bf16": self.memory.bf16,
            "refitted_dense_layers": len(self.dense),
            "held_out": {
                "tokens": self._texts.held_out.numel(),
                "perplexity": result.perplexity,
                "teacher_perplexity": result.teacher_perplexity,
                "kl": result.kl,
                "distances": result.distances,
            },
        }
        if self._allocation:
            facts["allocation"] = self._allocation
        if self._options.refine:
            facts["refinement"] = self._refinement
        if self._tuning is not None:
            facts["tuning"] = self._tuning
            facts["held_out"]["tuned_perplexity"] = math.exp(min(self._tuned_loss, 700.0))
        return facts


def _planned(plan: Plan) -> list[LayerPlan]:
    return [layer for layer in plan.layers.values() if layer.reason is None]
