"""A .sct file as a directory for onnxruntime: the graph, its weights, configuration and tokenizer."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from sctconv.errors import OptionError
from sctconv.formats.atomic import check_parent
from sctconv.formats.atomic_dir import atomic_directory
from sctconv.formats.errors import OutputError
from sctconv.formats.lock import output_lock
from sctconv.formats.reader import SctFile
from sctconv.runtime.model import load
from sctconv.runtime.onnx_model import GRAPH, OnnxError
from sctconv.runtime.skeleton import build_skeleton, load_config

from .decoder_spec import read_spec
from .genai import write_genai_config
from .onnx_encoder import compare_encoder, write_encoder
from .onnx_profiles import PROFILES
from .onnx_verify import TOLERANCES, Comparison, compare
from .quantize import BITS

DTYPES: Final = ("float32", "float16")
"""Names of `--dtype`."""


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        profile: `portable` (opset 21 primitives, any onnxruntime since 1.20, left padding), `standard` (opset 23's Attention,
            RotaryEmbedding and RMSNormalization) or `ort` (onnxruntime's own fused nodes and a shared cache, for
            onnxruntime-genai too).
        dtype: of weights, activations and cache: `float32` or `float16`.
        quantize: `int8` or `int4` blocks of 32 for all matrices, embeddings and head being int8 in both; None for `dtype`.
        verify: whether to run the graph against torch before it is let through.

    Raises:
        OptionError: a value is none of those.
    """

    profile: str = "portable"
    dtype: str = "float32"
    quantize: str | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        choices = {"profile": tuple(PROFILES), "dtype": DTYPES, "quantize": (None, *BITS)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                names = ", ".join(value for value in allowed if value)
                raise OptionError(f"--{name} {getattr(self, name)}: choose one of {names}")


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
        OptionError: no graph is known for the model. FormatError: the file is damaged. OutputError: the directory exists,
            cannot be written or is being written by another process. OnnxError: the graph does not compute what the model does.
    """
    target = Path(directory)
    _check_old(target, overwrite=overwrite)
    with output_lock(target):
        return _export(model, target, options, overwrite, progress)


def _export(
    model: str | os.PathLike[str],
    target: Path,
    options: ExportOptions,
    overwrite: bool,
    progress: Callable[[float, float, str], None] | None,
) -> ExportReport:
    with SctFile(model) as file:
        file.verify_blobs()  # a graph has no checksums: what is damaged would never be found again
        files = {name: file.file(name) for name in file.index.files}
        config = load_config(files, str(model), [entry.shape for entry in file.index.tensors.values()])
        is_decoder = build_skeleton(config, str(model)).can_generate()
        with atomic_directory(target, overwrite=overwrite) as made:
            for name, data in files.items():
                (made / name).write_bytes(data)
            if is_decoder:
                comparison = _decoder(file, config, made, options, progress)
            else:
                comparison = _encoder(str(model), made, options)
            tolerance = TOLERANCES[options.dtype]
            if comparison is not None and not comparison.worst <= tolerance:  # NaN is not
                raise OnnxError(
                    f"{model}: the exported graph differs from the model by {comparison.worst:.1e} of the largest number, "
                    f"more than {tolerance:.0e}; nothing was kept"
                )
        layers = len(file.index.layers)
    size = sum(path.stat().st_size for path in target.iterdir())
    return ExportReport(str(target), size, layers, comparison)


def _check_old(target: Path, *, overwrite: bool) -> None:
    """Refuses to replace what is no exported model."""
    if target.exists() and not overwrite:
        raise OutputError(f"{target}: exists already; choose another name or pass --overwrite")
    if target.exists() and not (target / GRAPH).is_file():
        raise OutputError(f"{target}: is there and no exported model; --overwrite would remove it, choose another name")
    check_parent(target.absolute())


def _decoder(
    file: SctFile,
    config: Any,
    directory: Path,
    options: ExportOptions,
    progress: Callable[[float, float, str], None] | None,
) -> Comparison | None:
    spec = read_spec(config, str(file.path))
    decoder = PROFILES[options.profile](spec, file, options.dtype, BITS[options.quantize] if options.quantize else None)
    _save(decoder.build(), directory, progress)
    if options.profile == "ort":
        write_genai_config(directory, spec)
    if not options.verify:
        return None
    return compare(directory, file.path, rounded=decoder.rounded, padded=decoder.takes_padding)


def _encoder(model: str, directory: Path, options: ExportOptions) -> Comparison | None:
    if options != ExportOptions(verify=options.verify):
        raise OptionError(
            f"{model}: is an encoder, which is exported in float32 with plain nodes; leave out --profile, --dtype and --quantize"
        )
    loaded = load(model, dtype=torch.float32).model
    write_encoder(loaded, directory, model)
    return compare_encoder(loaded, directory) if options.verify else None


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
        max_workers=1,  # one tensor in memory at a time
    )
