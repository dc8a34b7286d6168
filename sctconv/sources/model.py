"""Anything that can be run: a .sct file, or a dense checkpoint through the same reader that converts it."""

from __future__ import annotations

from pathlib import Path

import torch

from sctconv.errors import OptionError
from sctconv.formats.checkpoint import read_tensor
from sctconv.formats.reader import is_sct
from sctconv.runtime.model import Loaded, assign_, load, set_generation_config_
from sctconv.runtime.onnx_model import GRAPH, load_onnx
from sctconv.runtime.skeleton import load_tokenizer
from sctconv.runtime.tensors import to_torch

from . import open_source
from .base import Source
from .weights import DenseModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Names of `--dtype` -> torch dtypes."""


def load_any(text: str, *, dtype: str | None = None, device: str = "cpu", verify: bool = True) -> Loaded:
    """Loads a .sct file, an exported ONNX directory, a checkpoint directory, a GGUF file or a Hub id.

    Args:
        text: what the user named.
        dtype: a name in `DTYPES` to compute in; None for that of the file (float32 where a GGUF is quantised).
        device: where to put the model, as torch names it.
        verify: hold a .sct file against its checksums first; reads all of it.

    Raises:
        OptionError: an unknown dtype, or a device that this machine does not have.
        SctError: what was named is not there, damaged or of an unknown architecture.
    """
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    place, kind = usable_device(device), DTYPES[dtype] if dtype else None
    if (Path(text) / GRAPH).is_file():
        if kind is not None or place.type != "cpu":
            raise OptionError(
                f"{text}: an exported graph has its own dtype and runs on the CPU; leave out --dtype and --device"
            )
        return load_onnx(Path(text))
    if Path(text).is_file() and is_sct(text):
        return load(text, dtype=kind, device=place, verify=verify)
    return load_dense(open_source(text), dtype=kind, device=place)


def load_dense(source: Source, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Loaded:
    """A dense checkpoint as the transformers model that it is."""
    dense = DenseModel(source)
    tensors = ((name, to_torch(read_tensor(dense, name))) for name in dense.tensors)
    assign_(dense.skeleton, tensors, source=source.label, dtype=dtype, device=device)
    set_generation_config_(dense.skeleton, source.files)
    return Loaded(dense.skeleton, load_tokenizer(source.files))


def usable_device(name: str) -> torch.device:
    """The torch device of this name.

    Raises:
        OptionError: torch does not know it, or this machine does not have it.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"--device {name}: not usable here ({str(error).splitlines()[0][:120]})") from None
    return device
