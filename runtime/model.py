"""A .sct file as a transformers model whose factored layers are `SpectralLinear`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from sctconv.formats.reader import SctFile

from .skeleton import ModelError, build_skeleton, directory_of, factor_, load_config, load_tokenizer
from .tensors import TORCH_DTYPES, mapped_tensor


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
            for blob in (*file.index.tensors.values(), *file.index.files.values()):
                file.verify(blob)
        files = {name: file.file(name) for name in file.index.files}
        config = load_config(files, str(path))
        model = build_skeleton(config, str(path))
        factor_(model, {name: record.rank for name, record in file.index.layers.items()})
        tensors = ((name, mapped_tensor(file, entry)) for name, entry in file.index.tensors.items())
        assign_(model, tensors, source=str(path), dtype=dtype, device=device)
        for name, record in file.index.layers.items():
            module = model.get_submodule(name)
            if (module.out_features, module.in_features) != (record.out, record.in_):
                raise ModelError(f"{path}: layer {name} is {record.out} x {record.in_}, not what config.json says")
        set_generation_config_(model, files)
        return Loaded(model, load_tokenizer(files))


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
    missing = {name for name, place in places.items() if place.device.type == "meta"}
    storages: set[int] = set()
    main: torch.dtype | None = None
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        place = places.get(name)
        if place is None:
            continue
        if place.shape != tensor.shape:
            raise ModelError(f"{source}: {name} is {list(tensor.shape)}, but the model needs {list(place.shape)}")
        if tensor.is_floating_point():
            narrow = place.dtype if name.endswith(".s") else dtype
            tensor = tensor.to(device=device, dtype=narrow or tensor.dtype)
            main = main or tensor.dtype
        if tensor.data_ptr() in storages:  # stored once by value; tied below if the model ties them, apart if not
            tensor = tensor.clone()
        storages.add(tensor.data_ptr())
        _set(model, name, tensor, place)
        missing.discard(name)
    if missing:
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
    elif model.all_tied_weights_keys:
        model.tie_weights(missing_keys=set(), recompute_mapping=False)
    if missing:
        names = sorted(missing)
        raise ModelError(f"{source}: lacks {len(names)} of the model's {len(places)} tensors, the first {names[0]}")
    model.config.dtype = dtype or main
    model.to(device)


def _set(model: nn.Module, name: str, tensor: Tensor, place: Tensor) -> None:
    parent, _, child = name.rpartition(".")
    module = model.get_submodule(parent)
    if isinstance(place, nn.Parameter):
        module._parameters[child] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    else:
        module._buffers[child] = tensor


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


def file_dtype(file: SctFile) -> torch.dtype:
    """The dtype that most bytes of floating tensors in a file have."""
    counts: dict[torch.dtype, int] = {}
    for entry in file.index.tensors.values():
        dtype = TORCH_DTYPES[entry.dtype]
        if dtype.is_floating_point:
            counts[dtype] = counts.get(dtype, 0) + entry.nbytes
    return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32
