"""Dense checkpoints in safetensors: one file, or shards with an index."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import SafetensorError, safe_open

from .checkpoint import CHUNK_BYTES, TensorInfo, check_shard, one_line, tensor_info
from .dtypes import DTYPES, numpy_dtype
from .errors import CorruptShardError, MissingFileError, TruncatedShardError, UnsupportedCheckpointError
from .reader import describe_content

MAX_HEADER_BYTES: Final = 100_000_000
"""safetensors' own limit."""


_SHARD: Final = re.compile(r"[^/\\\0]{1,255}")  # a name, and never a path, on any system


class SafetensorsTensors:
    """The tensors of some safetensors shards.

    Opening reads the headers. Values are read with positioned reads, not through a mapping, so that the resident
    memory holds one piece and not every page that was ever touched.

    Args:
        shards: the files.
        weight_map: tensor name -> name of the file that the index says it is in; checked if given.

    Raises:
        CheckpointError: a shard is missing, a pointer, cut or damaged, or the index contradicts it.
    """

    def __init__(self, shards: list[Path], weight_map: Mapping[str, str] | None = None) -> None:
        self._places: dict[str, _Place] = {}
        for shard in shards:
            for name, place in _read_header(shard).items():
                if name in self._places:
                    raise CorruptShardError(f"{shard}: tensor {name} is also in {self._places[name].info.shard.name}")
                self._places[name] = place
        for name, file in (weight_map or {}).items():
            if name not in self._places or self._places[name].info.shard.name != file:
                raise CorruptShardError(
                    f"{shards[0].parent / str(file)}: lacks the tensor {name!r:.80} that the index puts there; download it again"
                )
        self.tensors: Final = {name: place.info for name, place in self._places.items()}

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Consecutive flat pieces of a tensor in row-major order."""
        place = self._places[name]
        dtype = numpy_dtype(place.info.dtype)
        step = CHUNK_BYTES // dtype.itemsize
        try:
            with place.info.shard.open("rb", buffering=0) as file:
                file.seek(place.offset)
                for start in range(0, max(1, place.info.size), step):
                    piece = np.empty(min(step, place.info.size - start), dtype=dtype)
                    _fill(file, piece)
                    yield piece
        except OSError as error:
            raise MissingFileError(f"{place.info.shard}: cannot be read ({error.strerror})") from error


@dataclass(frozen=True)
class _Place:
    info: TensorInfo
    offset: int


def _fill(file: Any, piece: np.ndarray) -> None:
    view = piece.view(np.uint8).data
    while view:
        count = file.readinto(view)
        if not count:
            raise TruncatedShardError(f"{file.name}: ends within a tensor; it was cut while it was being read")
        view = view[count:]


def _read_header(shard: Path) -> dict[str, _Place]:
    """Lets safetensors check the file, then takes the offsets from its header."""
    size = check_shard(shard)
    with shard.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if length > MAX_HEADER_BYTES:
            found = describe_content(prefix + file.read(56))
            raise CorruptShardError(f"{shard}: not a safetensors file, but {found}; download it again")
        if length > size - 8:
            raise TruncatedShardError(f"{shard}: cut ({size} bytes, a header of {length}); download it again")
        header = file.read(length)
    try:
        with safe_open(shard, framework="numpy"):
            pass
        items = json.loads(header, object_pairs_hook=_unique)
    except (SafetensorError, ValueError) as error:
        raise _diagnose(shard, size, length, header, error) from None
    items.pop("__metadata__", None)
    places = {}
    for name, item in sorted(items.items(), key=lambda pair: pair[1]["data_offsets"]):
        info = tensor_info(name, item["dtype"], item["shape"], shard)
        if info.dtype not in DTYPES:
            raise UnsupportedCheckpointError(f"{shard}: tensor {name} is {info.dtype}, which is not supported")
        places[name] = _Place(info, 8 + length + item["data_offsets"][0])
    return places


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    item = dict(pairs)
    if len(item) != len(pairs):  # safetensors takes the last one
        raise ValueError(f"one name twice among {len(pairs)}")
    return item


def _diagnose(shard: Path, size: int, length: int, header: bytes, error: Exception) -> Exception:
    """Why safetensors refused a file: most often it was cut, which the offsets in its own header show."""
    try:
        items = json.loads(header)
        expected = 8 + length + max(item["data_offsets"][1] for name, item in items.items() if name != "__metadata__")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return CorruptShardError(f"{shard}: not a safetensors file ({one_line(error)}); download it again")
    if expected > size:
        return TruncatedShardError(f"{shard}: cut, {size} of {expected} bytes are there; download it again")
    return CorruptShardError(f"{shard}: damaged ({one_line(error)}); download it again")


def read_weight_map(index: Path) -> dict[str, str]:
    """The `weight_map` of an index file: tensor name -> file name beside the index.

    Raises:
        CorruptShardError: it is not such an index, or a file name leaves the directory.
        MissingFileError: the index or a shard that it names is not there.
    """
    if (size := check_shard(index)) > MAX_HEADER_BYTES:
        raise CorruptShardError(f"{index}: {size} bytes; more than a checkpoint index may have")
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptShardError(
            f"{index}: not a checkpoint index ({type(error).__name__}: {one_line(error)})"
        ) from None
    for file in files:
        if not isinstance(file, str) or not _SHARD.fullmatch(file) or file in (".", ".."):
            raise CorruptShardError(f"{index}: names the shard {file!r:.80}, which is not a file beside it")
    there = {path.name for path in index.parent.iterdir()}
    if missing := [file for file in files if file not in there]:
        raise MissingFileError(
            f"{index.parent}: {len(missing)} of {len(files)} shards are missing, first {missing[0]!r:.80}; download them"
        )
    return dict(weight_map)
