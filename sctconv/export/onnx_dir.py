"""A .sct file as a directory for onnxruntime: the graph, its weights, configuration and tokenizer."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sctconv.formats.errors import OutputError
from sctconv.formats.reader import SctFile
from sctconv.runtime.onnx_model import GRAPH, OnnxError
from sctconv.runtime.skeleton import load_config

from .decoder_spec import read_spec
from .onnx_graph import build_graph
from .onnx_verify import TOLERANCE, Comparison, compare

_IN_FLIGHT: Final = 64 << 20
"""Bytes of weights that are on their way to the disk at once, one tensor at least."""


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        verify: whether to run the graph against torch before it is let through.
    """

    verify: bool = True


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        directory: what was written; `bytes` its size.
        layers: factored layers in the graph.
        comparison: to torch, if it was made.
    """

    directory: str
    bytes: int
    layers: int
    comparison: Comparison | None


def export_onnx(
    model: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    options: ExportOptions = ExportOptions(),
    *,
    overwrite: bool = False,
    progress: Callable[[float, float, str], None] | None = None,
) -> ExportReport:
    """Writes `model.onnx` and `model.onnx.data` with configuration and tokenizer beside them.

    The directory appears whole and verified, or not at all.

    Args:
        model: the .sct file.
        directory: what to make.
        options: see there.
        overwrite: whether a directory that stands there may be replaced.
        progress: called with tensors written, all tensors, and the name of one.

    Raises:
        OptionError: no graph is known for the model. FormatError: the file is damaged. OutputError: the directory exists or
            cannot be written. OnnxError: the graph does not compute what the model does.
    """
    target = Path(directory)
    if target.exists() and not overwrite:
        raise OutputError(f"{target}: exists already; choose another name or pass --overwrite")
    if target.exists() and not (target / GRAPH).is_file():
        raise OutputError(f"{target}: is there and no exported model; --overwrite would remove it, choose another name")
    if not target.absolute().parent.is_dir():
        raise OutputError(f"{target}: the directory {target.parent} does not exist; create it first")
    with SctFile(model) as file:
        files = {name: file.file(name) for name in file.index.files}
        spec = read_spec(load_config(files, str(model)), str(model))
        graph = build_graph(spec, file)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.absolute().parent) as temporary:
            made = Path(temporary) / target.name
            made.mkdir()
            _save(graph, made, progress)
            for name, data in files.items():
                (made / name).write_bytes(data)
            comparison = _verified(made, model) if options.verify else None
            if target.exists():
                shutil.rmtree(target)
            made.rename(target)
        layers = len(file.index.layers)
    size = sum(path.stat().st_size for path in target.iterdir())
    return ExportReport(str(target), size, layers, comparison)


def _save(graph: Any, directory: Path, progress: Callable[[float, float, str], None] | None) -> None:
    import onnx_ir as ir

    def report(tensor: Any, info: Any) -> None:
        if progress:
            progress(info.index, info.total, tensor.name or "")

    ir.save(
        graph,
        directory / GRAPH,
        external_data=f"{GRAPH}.data",
        size_threshold_bytes=1024,
        callback=report,
        max_in_flight_bytes=_IN_FLIGHT,
    )


def _verified(directory: Path, model: str | os.PathLike[str]) -> Comparison:
    found = compare(directory, model)
    if not found.worst <= TOLERANCE:  # NaN is not
        raise OnnxError(
            f"{model}: the exported graph differs from the model by {found.worst:.1e} of the largest logit, more than "
            f"{TOLERANCE:.0e}; nothing was kept"
        )
    return found
