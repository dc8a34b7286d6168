"""The calibrated fits of a conversion, made when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import takewhile
from typing import Any, Final

import numpy as np
import torch

from sctconv.errors import OptionError
from sctconv.runtime.precision import has_fast_bf16
from sctconv.runtime.skeleton import linear_layers, load_tokenizer
from sctconv.sources.weights import DenseModel

from .allocate import TRIAL_TOKENS, TRIALS, allocate, with_ranks
from .budget import MemoryPlan, plan_memory
from .calibration import Calibration, CalibrationError, load_calibration
from .decoder import Decoder
from .fit import DenseFit, Fit
from .fit_store import FitStore
from .gradients import output_metrics
from .options import ConvertOptions
from .plan import LayerPlan, Plan, is_fittable
from .refine import BLOCK_STEPS, STEP_WINDOWS, Tuned, model_bytes, tune_model
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

    Tensors are written in the order of the shards, which is nearly always that of the blocks. Where the whole model is tuned
    after the sweep, all of it is in memory.

    Args:
        model: the dense checkpoint.
        plan: which layers, at which ranks.
        options: how.
        texts: windows to calibrate on.
        store: takes what is found, and has what an earlier run found; hidden states that do not fit into memory go beside it.
        progress: called with the share of the work that is done and a word on it.

    Attributes:
        plan: the same with its ranks allocated.
        memory: how the sweep keeps to its budget.

    Raises:
        OptionError: the layers are not in decoder blocks, or the memory allowed is too small.
    """

    def __init__(
        self,
        model: DenseModel,
        plan: Plan,
        options: ConvertOptions,
        texts: Calibration,
        store: FitStore,
        *,
        progress: Callable[[float, str], None] | None = None,
    ) -> None:
        self._model, self._options, self._shapes = model, options, linear_layers(model.skeleton)
        self._texts, self._store, self._progress = texts, store, progress
        decoder = self._decoder(plan)
        self.memory = self._memory_plan(decoder)
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
            "sweep": float(texts.fit.numel() + texts.held_out.numel()),
            "tuning": 4.0 * options.refine * STEP_WINDOWS * texts.context if self._tunes_model else 0.0,
        }
        metrics = store.metrics(lambda: output_metrics(decoder, batches, self.memory, progress=self._stage("metric")))
        self.plan, self._allocation = plan, None
        if options.allocate == "measured":
            stage = self._stage("allocation")
            ranks, self._allocation = store.once(
                "allocation", lambda: allocate(decoder, plan, texts, self.memory, metrics, progress=stage)
            )
            self.plan = with_ranks(plan, ranks)
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
            done=store.block,
            progress=self._stage("sweep"),
        )
        self._blocks: Iterator[SweptBlock] = self._sweep.run()
        self._pending = {*decoder.layers, *decoder.others}
        if options.refine:  # a block's norms are asked for before its layers, and are not final until it is refined
            self._pending |= {name.rpartition(".")[0] for name in model.tensors if name.startswith(f"{decoder.path}.")}
        for record in store.records:
            self._settle(record["name"])
        self._tuned: Tuned | None = None

    def _decoder(self, plan: Plan) -> Decoder:
        """The decoder that holds a plan's layers."""
        names = [layer.name for layer in _planned(plan)]
        others = [name for name in self._shapes if name not in names and is_fittable(self._model, name)]
        others = others if self._options.refit else []
        return Decoder(self._model, names, others, device=self._options.device)

    def _memory_plan(self, decoder: Decoder) -> MemoryPlan:
        """What fits today; but what decides the numbers stays as it was when the conversion was begun."""
        options, texts = self._options, self._texts
        tokens = texts.fit.numel() + texts.held_out.numel()
        bf16 = has_fast_bf16(decoder.device) if options.bf16 is None else options.bf16
        memory = plan_memory(
            decoder, tokens, texts.context, limit=options.max_memory, directory=self._store.directory, bf16=bf16
        )
        decisive = ("batch", "gram_side", "dual_tokens", "bf16")
        return replace(memory, **self._store.once("memory", lambda: {key: getattr(memory, key) for key in decisive}))

    def _stage(self, stage: str) -> Callable[[float, str], None]:
        """Turns the progress of a stage into that of the whole."""
        whole = sum(self._work.values())
        before = sum(self._work[name] for name in takewhile(lambda name: name != stage, self._work))

        def report(share: float, what: str) -> None:
            if self._progress:
                self._progress((before + share * self._work[stage]) / whole, what)

        return report

    def fit(self, layer: str) -> Fit | DenseFit | None:
        """A layer's fit; None where calibration cannot reach it (outside the blocks, an expert)."""
        self._advance(layer)
        return self._store.fit(layer) if self._tuned is None else self._tuned.fits.get(layer)

    def tensor(self, name: str) -> np.ndarray | None:
        """What calibration made of a tensor that is written as it is (a bias, a norm, a layer that stays dense)."""
        layer, _, kind = name.rpartition(".")
        fit = self.fit(layer) if kind in ("weight", "bias") else None
        if fit is not None and kind == "bias" and fit.bias is not None:
            return fit.bias.float().cpu().numpy()
        if isinstance(fit, DenseFit) and kind == "weight":
            weight = fit.weight.T if self._shapes[layer].transposed else fit.weight
            return weight.contiguous().cpu().numpy()
        self._advance(layer)
        changed = self._tuned.tensors.get(name) if self._tuned else None
        changed = self._store.tensor(name) if changed is None else changed
        return None if changed is None else changed.float().cpu().numpy()

    def _advance(self, layer: str) -> None:
        if self._tunes_model and self._tuned is None:
            self._tune()
        while layer in self._pending:
            self._sweep_on()

    def _sweep_on(self) -> bool:
        """The next block; False after the last."""
        block = next(self._blocks, None)
        if block is None:
            return False
        if block.name not in (record["name"] for record in self._store.records):
            self._store.put(block)
            self._settle(block.name)
        return True

    def _settle(self, block: str) -> None:
        self._pending = {name for name in self._pending if not f"{name}.".startswith(f"{block}.")}

    def _tune(self) -> None:
        """The whole sweep, then the whole model."""
        self._result()
        fits: dict[str, Fit | DenseFit] = {}
        tensors: dict[str, torch.Tensor] = {}
        for record in self._store.records:
            block = self._store.block(record["name"])
            assert block is not None
            fits |= block.fits
            tensors |= block.tensors
        self._tuned = tune_model(
            self._model,
            fits,
            tensors,
            self._texts,
            self._options.refine,
            device=self._options.device,
            bf16=self.memory.bf16,
            progress=self._stage("tuning"),
        )

    def _result(self) -> dict[str, Any]:
        """What the held-out windows say at the end of the sweep."""

        def swept() -> dict[str, Any]:
            while self._sweep_on():
                pass
            return asdict(self._sweep.result)

        result: dict[str, Any] = self._store.once("result", swept)
        return result

    def facts(self) -> dict[str, Any]:
        """Where the calibration came from and what the held-out windows say; finishes the sweep.

        `perplexity` and `kl` (nats a token) are measured at the end of the sweep on windows that were not fitted on,
        `distances` after each block: |student - teacher| / |teacher| of the hidden states. `refinement` are each block's
        held-out losses, the closed form's first, `tuning` the whole model's, in nats a token.
        """
        result = self._result()
        facts: dict[str, Any] = {
            "calibration": [{"source": source, "tokens": tokens} for source, tokens in self._texts.sources],
            "calibration_context": self._texts.context,
            "bf16": self.memory.bf16,
            "refitted_dense_layers": sum(record["dense"] for record in self._store.records),
            "held_out": {"tokens": self._texts.held_out.numel(), **result},
        }
        if self._allocation:
            facts["allocation"] = self._allocation
        if self._options.refine:
            facts["refinement"] = [record["refinement"] for record in self._store.records]
        if self._tuned is not None:
            facts["tuning"] = self._tuned.losses
            facts["held_out"]["tuned_perplexity"] = math.exp(min(self._tuned.loss, 700.0))
        return facts


def _planned(plan: Plan) -> list[LayerPlan]:
    return [layer for layer in plan.layers.values() if layer.reason is None]
