"""A .sct file as a transformers model whose factored layers are `SpectralLinear` and `SpectralEmbedding`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from sctconv.formats.dtypes import FLOATS
from sctconv.formats.index import TensorEntry
from sctconv.formats.reader import SctFile

from .skeleton import ModelError, build_skeleton, directory_of, factor_, load_config, load_tokenizer
from .spectral import SpectralLayer
from .tensors import TORCH_DTYPES, mapped_tensor, to_torch


class Loaded(NamedTuple):
    """A model ready to run, and its tokenizer (None if the file has none)."""

    model: Any
    tokenizer: Any


def load(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    verify: bool = False,
) -> Loaded:
    """Loads a .sct file: `model, tokenizer = sctconv.load("model.sct")`.

    On the CPU and in the file's own dtype the parameters are views of the file's mapping: nothing is read before it
    is used, two processes share one copy, and training a parameter in place never reaches the file.

    Args:
        path: the file.
        dtype: what to cast floating parameters to; None keeps each as stored. Singular values stay float32.
        device: where to put the model.
        verify: hold every blob against its checksum first; reads the whole file.

    Raises:
        FormatError: the file is damaged or no .sct file.
        ModelError: transformers cannot build the model, or the tensors are not those of the model.
    """
    with SctFile(path) as file:
        if verify:
            file.verify_blobs()
        files = {name: file.file(name) for name in file.index.files}
        config = load_config(files, str(path), [entry.shape for entry in file.index.tensors.values()])
        model = build_skeleton(config, str(path))
        factor_(model, {name: record.rank for name, record in file.index.layers.items()})
        tensors = ((name, _tensor(file, entry, dtype)) for name, entry in file.index.tensors.items())
        assign_(model, tensors, source=str(path), dtype=dtype, device=device)
        for name, record in file.index.layers.items():
            module = model.get_submodule(name)
            if (module.out_features, module.in_features) != (record.out, record.in_):
                raise ModelError(f"{path}: layer {name} is {record.out} x {record.in_}, not what config.json says")
        set_generation_config_(model, files)
        return Loaded(model, load_tokenizer(files))


def _tensor(file: SctFile, entry: TensorEntry, dtype: torch.dtype | None) -> Tensor:
    """A view of the mapping, or, of what will be cast, a copy: pages of the mapping would stay resident for nothing."""
    if dtype is None or entry.dtype not in FLOATS or TORCH_DTYPES[entry.dtype] == dtype:
        return mapped_tensor(file, entry)
    return to_torch(file.read(entry.name))


def assign_(
    model: Any,
    tensors: Mapping[str, Tensor] | Iterator[tuple[str, Tensor]],
    *,
    source: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Gives a skeleton its tensors, ties what the model ties, and moves it to the device.

    Tensors that the model has no place for are passed over, as transformers does.

    Args:
        model: a skeleton; changed in place.
        tensors: name -> tensor, by the model's own names. One tensor is held at a time.
        source: what to call them in an error.
        dtype: what to cast floating tensors to; None keeps each as it is. Singular values stay float32.
        device: where to put the model.

    Raises:
        ModelError: a tensor has another shape than the model's, or the model needs one that is not there.
    """
    places = model.state_dict(keep_vars=True)
    tied = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
    missing = {name for name, place in places.items() if place.is_meta}
    seen: set[int] = set()
    main: torch.dtype | None = None
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        if (place := places.get(name)) is None:
            continue
        if place.shape != tensor.shape:
            raise ModelError(f"{source}: {name} is {list(tensor.shape)}, but the model needs {list(place.shape)}")
        parent, _, child = name.rpartition(".")
        module = model.get_submodule(parent)
        if tensor.is_floating_point():
            is_singular = isinstance(module, SpectralLayer) and child == "s"
            tensor = tensor.to(device=device, dtype=torch.float32 if is_singular else dtype or tensor.dtype)
            main = main or tensor.dtype
        if tensor.data_ptr() in seen and name not in tied:
            tensor = tensor.clone()  # equal by value in the file; two parameters all the same
        seen.add(tensor.data_ptr())
        if isinstance(place, nn.Parameter):
            module._parameters[child] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        else:
            module._buffers[child] = tensor
        missing.discard(name)
    if tied:
        model.tie_weights(missing_keys=missing, recompute_mapping=False)  # takes what it ties out of `missing`
    if missing:
        raise ModelError(
            f"{source}: lacks {len(missing)} of the model's {len(places)} tensors, the first {min(missing)}"
        )
    model.config.dtype = dtype or main
    model.to(device)


def set_generation_config_(model: Any, files: Mapping[str, bytes]) -> None:
    """Gives a model its own generation_config.json, if there is one among its files.

    Raises:
        ModelError: it cannot be read.
    """
    if "generation_config.json" not in files or not hasattr(model, "generation_config"):
        return
    with directory_of({"generation_config.json": files["generation_config.json"]}) as directory:
        try:
            model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
        except Exception as error:
            raise ModelError(f"generation_config.json cannot be read: {error}") from None
