"""Dense checkpoints in GGUF, dequantised on the way where they are quantised."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from .checkpoint import CHUNK_BYTES, TensorInfo, check_shard, one_line, tensor_info
from .dtypes import numpy_dtype
from .errors import CheckpointError, CorruptShardError, TruncatedShardError, UnsupportedCheckpointError
from .gguf_head import check_head

_PLAIN: Final = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8"})  # GGUF calls them as we do


class GgufTensors:
    """The tensors of one GGUF file under their GGUF names and in GGUF's own order of rows.

    Plain types keep their dtype; quantised ones come out as F32, by `gguf.dequantize`. Shapes are (out, in), as in
    torch; GGUF itself lists them the other way round.

    Args:
        path: the file.

    Attributes:
        reader: the file as `gguf` parsed it.

    Raises:
        CheckpointError: not a GGUF file, cut, damaged, split over several files or with unknown quantisation.
    """

    def __init__(self, path: Path) -> None:
        self.path: Final = path
        size = check_shard(path, magic=b"GGUF")
        try:
            self.reader = _open(path)
        except CheckpointError:
            raise
        except EOFError as error:
            raise TruncatedShardError(
                f"{path}: cut after {size} bytes ({one_line(error)}); download it again"
            ) from None
        except Exception as error:  # its parser raises whatever numpy or struct did; it has no error class of its own
            reason = one_line(error)
            if "GGMLQuantizationType" in reason:
                raise UnsupportedCheckpointError(f"{path}: a tensor of unknown type ({reason}); update gguf") from None
            raise CorruptShardError(f"{path}: damaged ({reason}); download it again") from None
        if self.field("split.count") not in (None, 0, 1):
            raise UnsupportedCheckpointError(
                f"{path}: one part of a split GGUF; join them with `llama-gguf-split --merge`"
            )
        self._items = {str(item.name): item for item in self.reader.tensors}
        self.tensors: Final = {name: self._info(item) for name, item in self._items.items()}

    def _info(self, item: Any) -> TensorInfo:
        kind = item.tensor_type.name
        shape = tuple(int(size) for size in reversed(item.shape))
        return tensor_info(str(item.name), kind if kind in _PLAIN else "F32", shape, self.path)

    def field(self, key: str) -> Any:
        """A metadata value, or None where the file does not have it.

        Raises:
            CorruptShardError: it is no text where the file says that it is.
        """
        field = self.reader.get_field(key)
        try:
            return None if field is None else field.contents()
        except ValueError as error:
            raise CorruptShardError(
                f"{self.path}: damaged ({key} is no text: {one_line(error)}); download it again"
            ) from None

    @cached_property
    def architecture(self) -> str:
        """`general.architecture`.

        Raises:
            CorruptShardError: the file does not say.
        """
        name = self.field("general.architecture")
        if not isinstance(name, str):
            raise CorruptShardError(f"{self.path}: lacks general.architecture; not a model")
        return name

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Consecutive flat pieces of a tensor in row-major order."""
        from gguf import dequantize

        item, info = self._items[name], self.tensors[name]
        kind = item.tensor_type
        if not info.size:
            yield np.empty(0, numpy_dtype(info.dtype))
            return
        rows = item.data.reshape(-1, item.data.shape[-1])  # a view; what is used is its shape
        step = max(1, CHUNK_BYTES // (info.size // len(rows) * numpy_dtype(info.dtype).itemsize))
        with self.path.open("rb") as file:  # not through the reader's mapping, whose pages would stay resident
            file.seek(item.data_offset)
            for start in range(0, len(rows), step):
                count = min(step, len(rows) - start) * rows.shape[1]
                piece = np.fromfile(file, rows.dtype, count)
                if piece.size != count:
                    raise TruncatedShardError(f"{self.path}: ends within a tensor; it was cut while it was being read")
                if kind.name in _PLAIN:
                    yield piece.view(numpy_dtype(info.dtype))  # BF16 comes as bytes
                    continue
                try:
                    yield dequantize(piece.reshape(-1, rows.shape[1]), kind).reshape(-1)
                except NotImplementedError:
                    raise UnsupportedCheckpointError(
                        f"{self.path}: tensor {name} is {kind.name}, which cannot be dequantised"
                    ) from None


def _open(path: Path) -> Any:
    """A `GGUFReader` of a file whose head has been checked."""
    from gguf import GGUFReader

    with path.open("rb") as file:
        version = file.read(8)[4:]
    if version[:2] == bytes(2) != version[2:]:
        raise UnsupportedCheckpointError(f"{path}: of the other byte order; convert it with `gguf-convert-endian`")
    check_head(path)
    return GGUFReader(path)
