"""Dense checkpoint in, .sct file out: one tensor at a time."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers

import sctconv
from sctconv.errors import OptionError
from sctconv.formats.atomic import check_target, part_path
from sctconv.formats.errors import OutputError
from sctconv.formats.index import LayerRecord
from sctconv.formats.leftovers import remove_tree
from sctconv.formats.lock import output_lock
from sctconv.formats.unfinished import noted, unfinished
from sctconv.formats.writer import SctWriter
from sctconv.report.conversion import write_report
from sctconv.runtime.memory import peak_rss_bytes
from sctconv.sources import Source, open_source
from sctconv.sources.model import usable_device
from sctconv.sources.weights import DenseModel

from .calibrated import Calibrated, read_texts
from .conversion import Conversion
from .fit_store import FitStore
from .forecast import Forecast, forecast
from .options import ConvertOptions
from .plan import LayerPlan, Plan, make_plan
from .progress import Progress, of_one
from .resume import JOURNAL_SECONDS, check_fits, check_same, check_stopped, fingerprint, fits_path, go_on_with


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
        key = fingerprint(model, options, texts, progress=progress)
        calibrated = None
        with contextlib.ExitStack() as stack:
            stack.enter_context(noted(lambda: go_on_with(path), but=OptionError))
            out = stack.enter_context(SctWriter(path, overwrite=overwrite, journaled=True, resume=resume))
            _check_space(path, plan, out)
            _begin(out, model, plan, key)
            fits = fits_path(path)
            if texts is not None and not out.is_complete:
                kept = FitStore(fits, key, resume=resume, journal_seconds=journal_seconds)
                calibrated = Calibrated(
                    model, plan, options, texts, stack.enter_context(kept), progress=of_one(progress)
                )
                plan = calibrated.plan
            else:
                if resume and not out.is_complete:
                    check_fits(path, key)
                # of a run that was stopped when all but the last step was done, or of another that is overwritten
                part_path(fits).unlink(missing_ok=True)
            run = Conversion(model, plan, options, device, must_shrink, calibrated, out)
            if not out.is_complete:
                run.write(progress, journal_seconds)
                run.finish(key)
        if page is not None:
            write_report(path, page, overwrite=overwrite)
        return _report(run, page, time.perf_counter() - start)


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
    began = time.perf_counter()
    usable_device(options.device)
    model = DenseModel(open_source(source, low_disk=low_disk) if isinstance(source, str) else source)
    plan = make_plan(model, options)
    opening = time.perf_counter() - began  # of which a conversion is spared nothing
    if options.allocate == "measured":
        texts = read_texts(model, options)
        with (
            tempfile.TemporaryDirectory(prefix="sctconv-") as directory,
            unfinished(lambda: remove_tree(Path(directory))),
            FitStore(Path(directory) / "plan", {}) as kept,
        ):
            plan = Calibrated(model, plan, options, texts, kept, progress=of_one(progress)).plan
    found = forecast(model, plan, options)
    return plan, replace(found, seconds=found.seconds + opening)


def default_output(source: Source, options: ConvertOptions) -> Path:
    """`NAME-LABEL.sct` in the working directory: `SmolLM2-135M-r128.sct`."""
    return Path(f"{source.name}-{options.label}.sct")


def _check_space(path: Path, plan: Plan, out: SctWriter) -> None:
    needed = plan.file_bytes - out.nbytes
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OutputError(f"{path}: needs {needed} bytes, but only {free} are free on the disk; write elsewhere")


def _report(run: Conversion, page: Path | None, seconds: float) -> ConvertReport:
    """What was done, of a file that stands; `page` is where its pictures are."""
    facts, layers = run.out.metadata, {layer.name: layer for layer in run.plan.layers.values()}
    return ConvertReport(
        output=str(run.out.path),
        bytes=run.out.path.stat().st_size,
        dense_bytes=run.plan.dense_bytes,
        layers=list(run.out.layers.values()),
        dense=[replace(layers[item["name"]], reason=item["reason"]) for item in facts["dense_layers"]],
        unused=run.model.unused,
        parameters=facts["parameters"],
        dense_parameters=run.plan.dense_parameters,
        seconds=seconds,
        peak_rss_bytes=peak_rss_bytes(),
        quality=facts["conversion"] if run.options.calibration else None,
        memory_limit_bytes=run.calibrated.memory.limit if run.calibrated else None,
        report=str(page) if page else None,
    )
