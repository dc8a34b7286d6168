"""Checking a .sct file through and through."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sctconv.formats.errors import IncompleteError, SctError
from sctconv.formats.index import LayerRecord
from sctconv.formats.reader import UNFINISHED, SctFile

from .linalg import check_finite, orthonormality
from .tensors import TORCH_DTYPES, mapped_tensor


class FactorError(SctError):
    """The factors of a layer are not what the format promises: orthonormal columns, descending values >= 0."""


@dataclass(frozen=True)
class Verification:
    """A file that passed: how much was checked, and the largest max |X^T X - I| over its factors X."""

    bytes: int
    tensors: int
    layers: int
    files: int
    orthonormality: float

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def verify(
    path: str | os.PathLike[str], *, progress: Callable[[float, float, str], None] | None = None
) -> Verification:
    """Checks index, checksums, finiteness of every floating tensor, and every layer's factors.

    Rounding to a narrow dtype moves X^T X from I; what `tolerance` allows is that and no more.

    Raises:
        FormatError: the index or a blob is damaged. IncompleteError: all that is there is good, but a conversion was not
            finished. NonFiniteError: a tensor holds NaN or infinity.
        FactorError: factors are not orthonormal or singular values not descending.
    """
    with SctFile(path, allow_incomplete=True) as file:
        index = file.index
        total, done, worst = float(sum(entry.nbytes for entry in index.tensors.values())), 0.0, 0.0
        for entry in index.tensors.values():
            file.verify(entry)
            tensor = mapped_tensor(file, entry)
            if tensor.is_floating_point() and tensor.numel():
                check_finite(tensor if tensor.dtype.itemsize > 1 else tensor.float(), f"{path}: {entry.name}")
            done += entry.nbytes
            if progress:
                progress(done, total, entry.name)
        for blob in index.files.values():
            file.verify(blob)
        for record in index.layers.values():
            worst = max(worst, _check_factors(file, record))
        if not index.complete:  # what lies between blobs is no padding yet
            raise IncompleteError(
                f"{path}: {UNFINISHED}; the {len(index.tensors)} tensors and {len(index.layers)} layers that are there are good"
            )
        file.verify_padding()
        return Verification(file.nbytes, len(index.tensors), len(index.layers), len(index.files), worst)


def tolerance(dtype: torch.dtype) -> float:
    """The most that max |X^T X - I| may be for unit columns rounded to `dtype`.

    Rounding moves a column by at most eps/2 in norm and so an inner product of two by at most eps; twice that leaves
    room for the factorisation's own float32 rounding, and 1e-4 is the least.
    """
    return max(2.0 * torch.finfo(dtype).eps, 1e-4)


def _check_factors(file: SctFile, record: LayerRecord) -> float:
    tensors = {name[-1]: mapped_tensor(file, file.entry(name)) for name in record.factors}
    s = tensors["s"]
    if bool((s < 0).any()) or bool((s[1:] > s[:-1]).any()):
        raise FactorError(f"{file.path}: layer {record.name}: singular values are negative or not descending")
    worst = 0.0
    for letter in ("U", "V"):
        worst = max(worst, deviation := orthonormality(tensors[letter]))
        if deviation > (allowed := tolerance(TORCH_DTYPES[record.dtype])):
            raise FactorError(
                f"{file.path}: layer {record.name}: {letter} is not orthonormal, "
                f"max |X^T X - I| = {deviation:.1e} is over {allowed:.0e}"
            )
    return worst
