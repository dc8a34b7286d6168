"""Dense checkpoint in, .sct file out: one tensor at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers

import sctconv
from sctconv.formats.atomic import check_target
from sctconv.formats.checkpoint import TensorInfo, read_tensor
from sctconv.formats.dtypes import FLOATS, dtype_name, numpy_dtype
from sctconv.formats.errors import OutputError
from sctconv.formats.index import LayerRecord
from sctconv.formats.writer import SctWriter
from sctconv.report.conversion import write_report
from sctconv.runtime.linalg import (
    NonFiniteError,
    check_finite,
    rank_for_energy,
    residual_norm,
    singular_values,
    truncated_svd,
)
from sctconv.runtime.memory import peak_rss_bytes
from sctconv.runtime.tensors import TORCH_DTYPES, to_numpy, to_torch
from sctconv.sources import Source, open_source
from sctconv.sources.model import usable_device
from sctconv.sources.weights import DenseModel

from .calibrated import Calibrated
from .fit import Fit
from .options import ConvertOptions
from .plan import LayerPlan, Plan, make_plan

Progress = Callable[[float, float, str], None]
"""Called with the work done, the whole work (in one arbitrary unit) and the name of what is being worked on."""

_FLOPS_PER_BYTE: Final = 200.0
"""Copying a byte counts as much as this many floating operations of an SVD; only the estimate of time depends on it."""


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did.

    Attributes:
        output: the file; `bytes` its size, `dense_bytes` that of all tensors unfactored in the same dtypes.
        layers: the factored layers.
        dense: selected layers that stayed dense, with the reason.
        unused: checkpoint tensors that the model has no place for, copied all the same.
        parameters, dense_parameters: entries of all tensors, after and before.
        seconds: wall time.
        peak_rss_bytes: largest resident memory of the process, None where unknown.
        quality: of a calibrated conversion, what the held-out windows say; see `Calibrated.facts`.
        memory_limit_bytes: what a calibrated conversion was to keep to.
        report: the page of pictures that was written beside the file, if any.
    """

    output: str
    bytes: int
    dense_bytes: int
    layers: list[LayerRecord]
    dense: list[LayerPlan]
    unused: list[str]
    parameters: int
    dense_parameters: int
    seconds: float
    peak_rss_bytes: int | None
    quality: dict[str, Any] | None = None
    memory_limit_bytes: int | None = None
    report: str | None = None


@dataclass
class _Work:
    """Progress in floating operations, so that the estimate of time follows the large matrices."""

    total: float
    progress: Progress | None
    done: float = 0.0

    def start(self, what: str) -> None:
        if self.progress:
            self.progress(self.done, self.total, what)

    def finish(self, cost: float, what: str) -> None:
        self.done += cost
        self.start(what)


def convert(
    source: str | Source,
    output: str | os.PathLike[str] | None,
    options: ConvertOptions,
    *,
    overwrite: bool = False,
    low_disk: bool = False,
    report: bool = False,
    progress: Progress | None = None,
    must_shrink: bool = True,
) -> ConvertReport:
    """Converts a dense checkpoint into a .sct file.

    Without calibration each selected weight is truncated by its SVD, and memory is one weight in float32 and the work
    space of that. With calibration the factors are fitted block by block (see `sweep`), and memory is one block in
    float32, the hidden states of the calibration text, and embedding and head. The output appears whole or not at all.

    Args:
        source: directory, GGUF file, Hub id, or an opened source.
        output: the file to write; None for `NAME-LABEL.sct` in the working directory.
        options: layers, ranks, storage.
        overwrite: whether a file that stands at `output` may be replaced.
        low_disk: of a Hub checkpoint, keep one shard on the disk at a time.
        report: whether to draw `OUT.report.html` as well.
        progress: called as the work goes on.
        must_shrink: whether a layer stays dense where factors would take more; tests turn it off for the full rank.

    Raises:
        OptionError: the options do not fit the model. CheckpointError, ModelError: the source cannot be read.
        NonFiniteError: a tensor holds NaN or infinity. OutputError: the output cannot be written.
    """
    start = time.perf_counter()
    device = usable_device(options.device)
    if output is not None:
        check_target(Path(output), overwrite=overwrite)  # before anything is downloaded
    source = open_source(source, low_disk=low_disk) if isinstance(source, str) else source
    model = DenseModel(source)
    plan = make_plan(model, options, must_shrink=must_shrink)
    path = Path(output) if output is not None else default_output(source, options)
    check_target(path, overwrite=overwrite)
    page = path.with_suffix(".report.html") if report else None
    if page is not None:
        check_target(page, overwrite=overwrite)
    _check_space(path, plan)
    calibrated = None
    if options.calibration:
        calibrated = Calibrated(model, plan, options, path.absolute().parent, progress=_of_one(progress))
        plan = calibrated.plan
    run = _Conversion(model, plan, options, device, must_shrink, calibrated)
    with SctWriter(path, overwrite=overwrite) as out:
        run.write(out, progress)
        out.metadata.update(run.metadata())
        out.commit()
    if page is not None:
        write_report(path, page, overwrite=overwrite)
    return ConvertReport(
        output=str(path),
        bytes=path.stat().st_size,
        dense_bytes=plan.dense_bytes,
        layers=run.records,
        dense=run.dense,
        unused=model.unused,
        parameters=run.parameters,
        dense_parameters=plan.dense_parameters,
        seconds=time.perf_counter() - start,
        peak_rss_bytes=peak_rss_bytes(),
        quality=calibrated.facts() if calibrated else None,
        memory_limit_bytes=calibrated.memory.limit if calibrated else None,
        report=str(page) if page else None,
    )


def plan_conversion(
    source: str | Source, options: ConvertOptions, *, low_disk: bool = False, progress: Progress | None = None
) -> Plan:
    """What `convert` would do: the plan of a dry run; with measured allocation that takes the measuring.

    Raises:
        As `convert`, but for the output.
    """
    model = DenseModel(open_source(source, low_disk=low_disk) if isinstance(source, str) else source)
    plan = make_plan(model, options)
    if options.allocate == "measured":
        with tempfile.TemporaryDirectory() as directory:
            plan = Calibrated(model, plan, options, Path(directory), progress=_of_one(progress)).plan
    return plan


def _of_one(progress: Progress | None) -> Callable[[float, str], None] | None:
    """For those who know only the share of the work that is done."""
    return None if progress is None else lambda share, what: progress(share, 1.0, what)


def default_output(source: Source, options: ConvertOptions) -> Path:
    """`NAME-LABEL.sct` in the working directory: `SmolLM2-135M-r128.sct`."""
    return Path(f"{source.name}-{options.label}.sct")


@dataclass
class _Conversion:
    model: DenseModel
    plan: Plan
    options: ConvertOptions
    device: torch.device
    must_shrink: bool
    calibrated: Calibrated | None
    records: list[LayerRecord] = field(default_factory=list)
    dense: list[LayerPlan] = field(default_factory=list)
    shards: list[dict[str, Any]] = field(default_factory=list)
    parameters: int = 0

    def write(self, out: SctWriter, progress: Progress | None) -> None:
        tensors = self.model.tensors
        work = _Work(sum(self._cost(name) for name in tensors), progress)
        if self.calibrated:  # it reports itself, and copying counts for nothing beside it
            work.progress = None
        hashed: set[Path] = set()
        for name, info in tensors.items():
            work.start(name)
            self._tensor(out, name, info)
            work.finish(self._cost(name), name)
            for shard in self.model.shards_read_by(name) - hashed:
                hashed.add(shard)
                self.shards.append({"name": shard.name, "sha256": self.model.source.sha256(shard)})
            for shard in self.model.shards_done_after(name):
                self.model.source.release(shard)
        for file, data in self.model.source.files.items():
            out.add_file(file, data)

    def _tensor(self, out: SctWriter, name: str, info: TensorInfo) -> None:
        layer = self.plan.layers.get(name)
        if layer is not None and layer.reason is None:
            layer = self._factor(out, name, info, layer)
        if layer is not None and layer.rank is not None:
            self.parameters += layer.parameters
            return
        if layer is not None:
            self.dense.append(layer)
        self.parameters += info.size
        dtype = self.plan.stored_dtype(info)
        fitted = self.calibrated.tensor(name) if self.calibrated else None
        chunks = self.model.chunks(name) if fitted is None else iter([fitted])
        out.add_tensor(name, _checked(chunks, name, dtype), dtype=dtype, shape=info.shape)

    def _factor(self, out: SctWriter, name: str, info: TensorInfo, layer: LayerPlan) -> LayerPlan:
        """Writes the factors of a weight; or nothing, where its energy asks for a rank that would not shrink it."""
        fit = self.calibrated.fit(layer.name) if self.calibrated else None
        if self.calibrated and layer.name in self.calibrated.dense:
            return replace(layer, reason=f"energy {self.options.energy:g} asks for a rank that would not shrink it")
        W = to_torch(read_tensor(self.model, name, np.float32)).to(self.device)
        W = W.T if layer.transposed else W
        if fit is not None:
            self._write_fit(out, layer, fit, W, TORCH_DTYPES[self.plan.factor_dtype(info)], name)
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
        self._write_factors(out, layer, (svd.U, svd.s, svd.V), svd.energy, svd.error, {})
        return layer

    def _write_fit(
        self, out: SctWriter, layer: LayerPlan, fit: Fit, W: torch.Tensor, dtype: torch.dtype, name: str
    ) -> None:
        """Writes fitted factors. They are not the weight's nearest, so no energy of it is kept, and the error is larger."""
        norm = check_finite(W, name)
        U, s, V = fit.U.to(W.device, dtype), fit.s.to(W.device), fit.V.to(W.device, dtype)
        error = residual_norm(W, U, s, V) / norm if norm else 0.0
        self._write_factors(out, layer, (U, s, V), None, error, {"output_error": fit.error})

    def _write_factors(
        self,
        out: SctWriter,
        layer: LayerPlan,
        factors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        energy: float | None,
        error: float,
        extra: dict[str, float],
    ) -> None:
        arrays = [to_numpy(factor.cpu()) for factor in factors]
        for letter, array in zip("UsV", arrays, strict=True):
            out.add_tensor(f"{layer.name}.{letter}", array)
        bias = f"{layer.name}.bias" if layer.bias else None
        rank, dtype = len(arrays[1]), dtype_name(arrays[0].dtype)
        record = LayerRecord(layer.name, layer.out, layer.in_, rank, energy, error, bias, dtype, extra)
        out.add_layer(record)
        self.records.append(record)

    def _cost(self, name: str) -> float:
        info, layer = self.plan.tensors[name], self.plan.layers.get(name)
        cost = _FLOPS_PER_BYTE * info.size * numpy_dtype(info.dtype).itemsize
        if layer is not None and layer.reason is None:
            m, n = sorted((layer.out, layer.in_))
            exact = 6.0 * m * m * n + 20.0 * m**3
            cost += exact if layer.rank is None or m <= 1536 else min(exact, 30.0 * m * n * layer.rank)
        return cost

    def metadata(self) -> dict[str, Any]:
        """Provenance and conversion facts; nothing that differs between two runs."""
        return {
            "generator": f"sctconv {sctconv.__version__}",
            "transformers": transformers.__version__,
            "source": {**self.model.source.origin, "shards": self.shards},
            "conversion": {
                "method": "calibrated" if self.calibrated else "svd",
                **self.options.to_json(),
                **(self.calibrated.facts() if self.calibrated else {}),
            },
            "dense_layers": [
                {"name": layer.name, "out": layer.out, "in": layer.in_, "reason": layer.reason} for layer in self.dense
            ],
            "parameters": self.parameters,
            "dense_parameters": self.plan.dense_parameters,
        }


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


def _check_space(path: Path, plan: Plan) -> None:
    needed = plan.bytes + plan.files
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OutputError(f"{path}: needs {needed} bytes, but only {free} are free on the disk; write elsewhere")
