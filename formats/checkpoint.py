"""Dense checkpoints on disk behind one lazy interface."""

from __future__ import annotations

import math
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from .errors import CorruptShardError, FormatError, LFSPointerError, MissingFileError, TruncatedShardError
from .layout import MAX_BYTES, MAX_DIMENSIONS, check_name
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


def tensor_info(name: str, dtype: str, shape: Iterable[int], shard: Path) -> TensorInfo:
    """What a shard says of a tensor, held against what a .sct file can keep of it.

    Raises:
        CorruptShardError: the name is empty, too long or holds a control character, there are too many dimensions, or their
            product, each 0 in it taken as 1 and in the widest dtype, is beyond any disk.
    """
    sizes = tuple(shape)
    try:
        check_name(name)
    except FormatError as error:
        raise CorruptShardError(f"{shard}: damaged ({error}); download it again") from None
    if len(sizes) > MAX_DIMENSIONS or math.prod(max(size, 1) for size in sizes) > MAX_BYTES // 8:
        raise CorruptShardError(f"{shard}: tensor {name} cannot have the shape {list(sizes)!s:.80}; download it again")
    return TensorInfo(dtype, sizes, shard)


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


def one_line(error: BaseException, length: int = 120) -> str:
    """The start of what a library says of a file, fit for a terminal whatever of the file it repeats."""
    text = " ".join(str(error).split())[:length]
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def check_shard(path: Path, magic: bytes | None = None) -> int:
    """Returns a shard's size in bytes after looking at its first bytes.

    Args:
        path: the shard.
        magic: what it must begin with, if that is known.

    Raises:
        MissingFileError: it is not there, no regular file or cannot be read. LFSPointerError: it is a git-lfs pointer.
        TruncatedShardError: it is empty. CorruptShardError: it does not begin with `magic`.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):  # a pipe would wait, a device not end
            raise MissingFileError(f"{path}: cannot be read (no regular file, but a pipe, a device or a socket)")
        size = status.st_size
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
