"""torch <-> numpy without a copy, bfloat16 included."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeVar

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from sctconv.formats.dtypes import numpy_dtype
from sctconv.formats.errors import FormatError
from sctconv.formats.index import TensorEntry
from sctconv.formats.reader import SctFile

_T = TypeVar("_T", bound=Tensor)

TORCH_DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""On-disk name -> torch dtype."""

TOGETHER: Final = 1 << 20
"""Entries that are stacked at most: many small tensors at a time, large ones one by one, while a cache holds them."""

_BITS: Final = {
    torch.bfloat16: (torch.int16, np.dtype(ml_dtypes.bfloat16)),
    torch.float8_e4m3fn: (torch.int8, np.dtype(ml_dtypes.float8_e4m3fn)),
    torch.float8_e5m2: (torch.int8, np.dtype(ml_dtypes.float8_e5m2)),
}
_NOT_IN_NUMPY: Final = {array_dtype: dtype for dtype, (_, array_dtype) in _BITS.items()}


def mapped_tensor(file: SctFile, entry: TensorEntry) -> Tensor:
    """A tensor of a .sct file, in the file's mapping: read when used; writing into it stays in this process.

    Raises:
        FormatError: the tensor is too large for this process to address.
    """
    try:
        return to_torch(np.ndarray(entry.shape, numpy_dtype(entry.dtype), file.mapping, entry.offset))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise FormatError(f"{file.path}: tensor {entry.name} cannot be mapped ({error})") from None


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A CPU tensor as an array on the same memory."""
    tensor = tensor.detach()
    if tensor.dtype in _BITS:
        bits, dtype = _BITS[tensor.dtype]
        return tensor.contiguous().view(bits).numpy().view(dtype)
    array: np.ndarray = tensor.numpy()
    return array


def to_torch(array: np.ndarray) -> Tensor:
    """A writable array as a tensor on the same memory."""
    if (dtype := _NOT_IN_NUMPY.get(array.dtype)) is None:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(f"i{dtype.itemsize}")).view(dtype)


def by_shape(tensors: Iterable[_T]) -> list[list[_T]]:
    """Tensors that can be stacked stand together: of one shape, dtype and device; in the order of the first of each.

    At most `TOGETHER` entries in a group of more than one.
    """
    groups: dict[tuple[object, ...], list[list[_T]]] = {}
    for tensor in tensors:
        alike = groups.setdefault((tuple(tensor.shape), tensor.dtype, tensor.device), [[]])
        if alike[-1] and (len(alike[-1]) + 1) * tensor.numel() > TOGETHER:
            alike.append([])
        alike[-1].append(tensor)
    return [group for alike in groups.values() for group in alike]
