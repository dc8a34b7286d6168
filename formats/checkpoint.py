"""Dense checkpoints on disk behind one lazy interface."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from .errors import CorruptShardError, LFSPointerError, MissingFileError, TruncatedShardError
from .reader import describe_content

CHUNK_BYTES: Final = 64 << 20
"""The most that `DenseTensors.chunks` yields at once, in bytes as stored."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it. `dtype` is an on-disk name, `shard` the file that holds it."""

    dtype: str
    shape: tuple[int, ...]
    shard: Path

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


class DenseTensors(Protocol):
    """The tensors of a dense checkpoint: names, shapes and dtypes at once, values one tensor at a time."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What is there, in the order of the shards."""

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Consecutive flat pieces of a tensor in row-major order, each at most `CHUNK_BYTES` as stored."""


def read_tensor(source: DenseTensors, name: str, dtype: np.dtype | type | None = None) -> np.ndarray:
    """A whole tensor as one array, cast to `dtype` piece by piece, so that only the result is ever held whole."""
    info = source.tensors[name]
    out: np.ndarray | None = None
    position = 0
    for chunk in source.chunks(name):
        if out is None:
            out = np.empty(info.size, dtype=dtype or chunk.dtype)
        out[position : position + chunk.size] = chunk.reshape(-1)
        position += chunk.size
    if out is None or position != info.size:
        raise CorruptShardError(f"{info.shard}: tensor {name} has {position} entries, not the {info.size} of its shape")
    return out.reshape(info.shape)


def check_shard(path: Path, magic: bytes | None = None) -> int:
    """Returns a shard's size in bytes after looking at its first bytes.

    Args:
        path: the shard.
        magic: what it must begin with, if that is known.

    Raises:
        MissingFileError: it is not there or cannot be read. LFSPointerError: it is a git-lfs pointer.
        TruncatedShardError: it is empty. CorruptShardError: it does not begin with `magic`.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise MissingFileError(f"{path}: cannot be read ({error.strerror})") from None
    if start.startswith(b"version https://git-lfs"):
        raise LFSPointerError(f"{path}: a git-lfs pointer of {size} bytes, not the weights; run `git lfs pull`")
    if not start:
        raise TruncatedShardError(f"{path}: an empty file; download it again")
    if magic is not None and not start.startswith(magic):
        raise CorruptShardError(f"{path}: not the kind of file that its name says, but {describe_content(start)}")
    return size
