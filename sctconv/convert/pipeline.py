"""Dense checkpoint in, .sct file out: one tensor at a time."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers

import sctconv
from sctconv.formats.atomic import check_target, part_path
from sctconv.formats.checkpoint import TensorInfo, read_tensor
from sctconv.formats.dtypes import FLOATS, dtype_name, numpy_dtype
from sctconv.formats.errors import OutputError
from sctconv.formats.index import LayerRecord
from sctconv.formats.leftovers import remove_tree
from sctconv.formats.lock import output_lock
from sctconv.formats.unfinished import noted, unfinished
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

from .calibrated import Calibrated, read_texts
from .fit import DenseFit, Fit
from .fit_store import FitStore
from .forecast import Forecast, forecast
from .options import ConvertOptions
from .plan import LayerPlan, Plan, make_plan
from .resume import JOURNAL_SECONDS, check_same, check_stopped, digest, fingerprint, fits_path, go_on_with

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
        quality: of a calibrated conversion, what the file's metadata say of it, the held-out windows among it; see
            `Calibrated.facts`.
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
    resume: bool = False,
    low_disk: bool = False,
    report: bool = False,
    progress: Progress | None = None,
    must_shrink: bool = True,
    journal_seconds: float = JOURNAL_SECONDS,
) -> ConvertReport:
    """Converts a dense checkpoint into a .sct file.

    Without calibration each selected weight is truncated by its SVD, and memory is one weight in float32 and the work
    space of that. With calibration the factors are fitted block by block (see `sweep`), and memory is one block in
    float32, the hidden states of the calibration text, and embedding and head. The output appears whole or not at all.

    While it is made it is `OUT.part`, which a run that is stopped leaves behind, and of a calibrated one `OUT.fits.part`. A
    run that goes on from there writes, to the byte, what one that was never stopped does.

    Args:
        source: directory, GGUF file, Hub id, or an opened source.
        output: the file to write; None for `NAME-LABEL.sct` in the working directory.
        options: layers, ranks, storage.
        overwrite: whether a file that stands at `output` may be replaced, and, without `resume`, a stopped conversion.
        resume: whether to go on from a stopped conversion, if there is one.
        low_disk: of a Hub checkpoint, keep one shard on the disk at a time.
        report: whether to draw `OUT.report.html` as well.
        progress: called as the work goes on.
        must_shrink: whether a layer stays dense where factors would take more; tests turn it off for the full rank.
        journal_seconds: how often what is done is kept.

    Raises:
        OptionError: the options do not fit the model, or are not those of the stopped conversion. CheckpointError, ModelError:
            the source cannot be read. NonFiniteError: a tensor holds NaN or infinity. OutputError: the output cannot be
            written, or another process is writing it.
    """
    start = time.perf_counter()
    device = usable_device(options.device)
    if output is not None:
        check_target(Path(output), overwrite=overwrite)  # before anything is downloaded
    source = open_source(source, low_disk=low_disk) if isinstance(source, str) else source
    path = Path(output) if output is not None else default_output(source, options)
    check_target(path, overwrite=overwrite)
    with output_lock(path):
        check_stopped(path, overwrite=overwrite, resume=resume)
        page = path.with_suffix(".report.html") if report else None
        if page is not None:
            check_target(page, overwrite=overwrite)
        model = DenseModel(source)
        plan = make_plan(model, options, must_shrink=must_shrink)
        texts = read_texts(model, options) if options.calibration else None
        key = fingerprint(model, options, texts)
        calibrated = None
        with contextlib.ExitStack() as stack:
            stack.enter_context(noted(lambda: go_on_with(path)))
            out = stack.enter_context(SctWriter(path, overwrite=overwrite, journaled=True, resume=resume))
            _check_space(path, plan, out)
            _begin(out, model, plan, key)
            if texts is not None and not out.is_complete:
                kept = FitStore(fits_path(path), key, resume=resume, journal_seconds=journal_seconds)
                calibrated = Calibrated(
                    model, plan, options, texts, stack.enter_context(kept), progress=_of_one(progress)
                )
                plan = calibrated.plan
            else:  # of a run that was stopped when all but the last step was done, or of another that is overwritten
                part_path(fits_path(path)).unlink(missing_ok=True)
            run = _Conversion(model, plan, options, device, must_shrink, calibrated, out)
            if not out.is_complete:
                run.write(progress, journal_seconds)
                run.finish(key)
        if page is not None:
            write_report(path, page, overwrite=overwrite)
        return run.report(page, time.perf_counter() - start)


def _begin(out: SctWriter, model: DenseModel, plan: Plan, key: dict[str, Any]) -> None:
    """Fills the metadata of a new file with what is known at once, or holds those of a stopped one against it.

    The provenance grows as the file does: nothing in it differs between two runs, stopped or not.
    """
    if out.metadata:
        check_same(out.metadata, key, part_path(out.path))
        return
    begun = {
        "generator": f"sctconv {sctconv.__version__}",
        "transformers": transformers.__version__,
        "source": {**model.source.origin, "shards": []},
        "dense_layers": [],
        "parameters": 0,
        "dense_parameters": plan.dense_parameters,
        "resume": key,
    }
    out.metadata.update(begun)


def plan_conversion(
    source: str | Source, options: ConvertOptions, *, low_disk: bool = False, progress: Progress | None = None
) -> tuple[Plan, Forecast]:
    """What `convert` would do and what that would take: the dry run; with measured allocation that takes the measuring.

    Raises:
        As `convert`, but for the output.
    """
    usable_device(options.device)
    model = DenseModel(open_source(source, low_disk=low_disk) if isinstance(source, str) else source)
    plan = make_plan(model, options)
    if options.allocate == "measured":
        texts = read_texts(model, options)
        with (
            tempfile.TemporaryDirectory(prefix="sctconv-") as directory,
            unfinished(lambda: remove_tree(Path(directory))),
            FitStore(Path(directory) / "plan", {}) as kept,
        ):
            plan = Calibrated(model, plan, options, texts, kept, progress=_of_one(progress)).plan
    return plan, forecast(model, plan, options)


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
    out: SctWriter

    def write(self, progress: Progress | None, journal_seconds: float) -> None:
        """Writes the tensors that are not there yet, and keeps what is done every so often."""
        tensors, kept = self.model.tensors, time.monotonic()
        work = _Work(sum(self._cost(name) for name in tensors if not self._is_written(name)), progress)
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

    def report(self, page: Path | None, seconds: float) -> ConvertReport:
        """What was done, of a file that stands; `page` is where its pictures are."""
        facts, layers = self.out.metadata, {layer.name: layer for layer in self.plan.layers.values()}
        return ConvertReport(
            output=str(self.out.path),
            bytes=self.out.path.stat().st_size,
            dense_bytes=self.plan.dense_bytes,
            layers=list(self.out.layers.values()),
            dense=[replace(layers[item["name"]], reason=item["reason"]) for item in facts["dense_layers"]],
            unused=self.model.unused,
            parameters=facts["parameters"],
            dense_parameters=self.plan.dense_parameters,
            seconds=seconds,
            peak_rss_bytes=peak_rss_bytes(),
            quality=facts["conversion"] if self.options.calibration else None,
            memory_limit_bytes=self.calibrated.memory.limit if self.calibrated else None,
            report=str(page) if page else None,
        )

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


def _check_space(path: Path, plan: Plan, out: SctWriter) -> None:
    needed = plan.bytes + plan.files - out.nbytes
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OutputError(f"{path}: needs {needed} bytes, but only {free} are free on the disk; write elsewhere")
