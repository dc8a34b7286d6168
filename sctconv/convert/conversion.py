"""A plan carried out: tensors read, factored where the plan says so, and written."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch

from sctconv.formats.checkpoint import TensorInfo, read_tensor
from sctconv.formats.dtypes import FLOATS, dtype_name, numpy_dtype
from sctconv.formats.index import LayerRecord
from sctconv.formats.writer import SctWriter
from sctconv.runtime.linalg import (
    NonFiniteError,
    check_finite,
    rank_for_energy,
    residual_norm,
    singular_values,
    truncated_svd,
)
from sctconv.runtime.tensors import TORCH_DTYPES, to_numpy, to_torch
from sctconv.sources.weights import DenseModel

from .calibrated import Calibrated
from .fit import DenseFit, Fit
from .options import ConvertOptions
from .plan import LayerPlan, Plan
from .progress import Progress, Work
from .resume import digest

_FLOPS_PER_BYTE: Final = 200.0
"""Copying a byte counts as much as this many floating operations of an SVD; only the estimate of time depends on it."""


@dataclass
class Conversion:
    """Writes the tensors of a plan, one at a time, into a file that may have some of them already.

    Attributes:
        model, plan, options: what is converted, into what, and how.
        device: where decompositions are computed.
        must_shrink: whether a layer stays dense where factors would take more.
        calibrated: where fitted factors come from; None for the SVD of each weight.
        out: the file.
    """

    model: DenseModel
    plan: Plan
    options: ConvertOptions
    device: torch.device
    must_shrink: bool
    calibrated: Calibrated | None
    out: SctWriter

    def write(self, progress: Progress | None, journal_seconds: float) -> None:
        """Writes the tensors that are not there yet, and keeps what is done every so often."""
        tensors, kept = self.model.tensors, time.monotonic()
        work = Work(sum(self._cost(name) for name in tensors if not self._is_written(name)), progress)
        if self.calibrated:  # it reports itself, and copying counts for nothing beside it
            work.progress = None
        for name, info in tensors.items():
            if not self._is_written(name):
                work.start(name)
                self._tensor(name, info)
                work.finish(self._cost(name), name)
            self._hash_shards(name)
            for shard in self.model.shards_done_after(name):
                self.model.source.release(shard)
            if time.monotonic() - kept >= journal_seconds:
                self.out.journal()
                kept = time.monotonic()
        for file, data in self.model.source.files.items():
            self.out.add_file(file, data)

    def finish(self, key: dict[str, Any]) -> None:
        """Completes the metadata and commits."""
        self.out.metadata["conversion"] = {
            "method": "calibrated" if self.calibrated else "svd",
            **self.options.to_json(),
            **(self.calibrated.facts() if self.calibrated else {}),
        }
        del self.out.metadata["resume"]
        self.out.metadata["fingerprint"] = digest(key)
        self.out.commit()

    def _is_written(self, name: str) -> bool:
        layer = self.plan.layers.get(name)
        return name in self.out.tensors or (layer is not None and layer.name in self.out.layers)

    def _hash_shards(self, name: str) -> None:
        hashed: list[dict[str, str]] = self.out.metadata["source"]["shards"]
        for shard in self.model.shards_read_by(name):
            if shard.name not in {item["name"] for item in hashed}:
                hashed.append({"name": shard.name, "sha256": self.model.source.sha256(shard)})

    def _tensor(self, name: str, info: TensorInfo) -> None:
        layer = self.plan.layers.get(name)
        if layer is not None and layer.reason is None:
            layer = self._factor(name, info, layer)
        if layer is not None and layer.rank is not None:
            self.out.metadata["parameters"] += layer.parameters
            return
        dtype = self.plan.stored_dtype(info)
        fitted = self.calibrated.tensor(name) if self.calibrated else None
        chunks = self.model.chunks(name) if fitted is None else iter([fitted])
        self.out.add_tensor(name, _checked(chunks, name, dtype), dtype=dtype, shape=info.shape)
        self.out.metadata["parameters"] += info.size
        if layer is not None:
            item = {"name": layer.name, "out": layer.out, "in": layer.in_, "reason": layer.reason}
            self.out.metadata["dense_layers"].append(item)

    def _factor(self, name: str, info: TensorInfo, layer: LayerPlan) -> LayerPlan:
        """Writes the factors of a weight; or nothing, where its energy asks for a rank that would not shrink it."""
        fit = self.calibrated.fit(layer.name) if self.calibrated else None
        if isinstance(fit, DenseFit):
            return replace(layer, reason=f"energy {self.options.energy:g} asks for a rank that would not shrink it")
        W = to_torch(read_tensor(self.model, name, np.float32)).to(self.device)
        W = W.T if layer.transposed else W
        if fit is not None:
            self._write_fit(layer, fit, W, TORCH_DTYPES[self.plan.factor_dtype(info)], name)
            return replace(layer, rank=len(fit.s))
        if layer.rank is None:
            assert self.options.energy is not None
            rank = rank_for_energy(singular_values(W, name=name), self.options.energy)
            layer = layer.with_rank(rank, must_shrink=self.must_shrink)
            if layer.rank is None:
                return layer
        assert layer.rank is not None
        dtype = self.plan.factor_dtype(info)
        svd = truncated_svd(W, layer.rank, dtype=TORCH_DTYPES[dtype], seed=self.options.seed, name=name)
        self._write_factors(layer, (svd.U, svd.s, svd.V), svd.energy, svd.error, {})
        return layer

    def _write_fit(self, layer: LayerPlan, fit: Fit, W: torch.Tensor, dtype: torch.dtype, name: str) -> None:
        """Writes fitted factors. They are not the weight's nearest, so no energy of it is kept, and the error is larger."""
        norm = check_finite(W, name)
        U, s, V = fit.U.to(W.device, dtype), fit.s.to(W.device), fit.V.to(W.device, dtype)
        error = residual_norm(W, U, s, V) / norm if norm else 0.0
        self._write_factors(layer, (U, s, V), None, error, {"output_error": fit.error})

    def _write_factors(
        self,
        layer: LayerPlan,
        factors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        energy: float | None,
        error: float,
        extra: dict[str, float],
    ) -> None:
        arrays = [to_numpy(factor.cpu()) for factor in factors]
        for letter, array in zip("UsV", arrays, strict=True):
            self.out.add_tensor(f"{layer.name}.{letter}", array)
        bias = f"{layer.name}.bias" if layer.bias else None
        rank, dtype = len(arrays[1]), dtype_name(arrays[0].dtype)
        self.out.add_layer(LayerRecord(layer.name, layer.out, layer.in_, rank, energy, error, bias, dtype, extra))

    def _cost(self, name: str) -> float:
        info, layer = self.plan.tensors[name], self.plan.layers.get(name)
        cost = _FLOPS_PER_BYTE * info.size * numpy_dtype(info.dtype).itemsize
        if layer is not None and layer.reason is None:
            m, n = sorted((layer.out, layer.in_))
            exact = 6.0 * m * m * n + 20.0 * m**3
            cost += exact if layer.rank is None or m <= 1536 else min(exact, 30.0 * m * n * layer.rank)
        return cost


def _checked(chunks: Iterator[np.ndarray], name: str, dtype: str) -> Iterator[np.ndarray]:
    """Chunks cast to a dtype on the way, refused where they hold NaN or infinity, before or after the cast."""
    for chunk in chunks:
        if dtype_name(chunk.dtype) in FLOATS:
            if not np.isfinite(chunk).all():
                raise NonFiniteError(
                    f"{name}: holds NaN or infinity; the checkpoint is damaged or was saved from a diverged run"
                )
            with np.errstate(over="ignore"):
                cast = chunk.astype(numpy_dtype(dtype), copy=False)
            if not np.isfinite(cast).all():
                raise NonFiniteError(
                    f"{name}: has entries up to {np.abs(chunk).max():g}, too large for {dtype}; use bfloat16"
                )
            chunk = cast
        yield chunk
