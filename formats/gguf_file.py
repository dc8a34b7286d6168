"""Dense checkpoints in GGUF, dequantised on the way."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from .checkpoint import CHUNK_BYTES, TensorInfo, check_shard
from .errors import CorruptShardError, TruncatedShardError, UnsupportedCheckpointError

_PLAIN: Final = {"F32": "F32", "F16": "F16", "F64": "F64", "I8": "I8", "I16": "I16", "I32": "I32"}


class GgufTensors:
    """The tensors of one GGUF file under their GGUF names and in GGUF's own order of rows.

    Plain types keep their dtype; quantised ones come out as F32, by `gguf.dequantize`. Shapes are (out, in), as in
    torch; GGUF itself lists them the other way round.

    Args:
        path: the file.

    Raises:
        CheckpointError: not a GGUF file, cut, damaged, split over several files or with unknown quantisation.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.path: Final = path
        size = check_shard(path, magic=b"GGUF")
        try:
            self._reader = GGUFReader(path)
        except Exception as error:  # its parser raises whatever numpy or struct did; it has no error class of its own
            raise TruncatedShardError(
                f"{path}: not a whole GGUF file ({size} bytes; {str(error)[:120]}); download it again"
            ) from None
        if (self.field("split.count") or 1) > 1:
            raise UnsupportedCheckpointError(f"{path}: one part of a split GGUF; join them with `llama-gguf-split --merge`")
        self._items = {str(item.name): item for item in self._reader.tensors}
        if len(self._items) != len(self._reader.tensors):
            raise CorruptShardError(f"{path}: a tensor name stands twice; the file is damaged")
        self.tensors: Final = {
            name: TensorInfo(_PLAIN.get(item.tensor_type.name, "F32"), tuple(int(n) for n in reversed(item.shape)), path)
            for name, item in self._items.items()
        }

    def field(self, key: str) -> Any:
        """A metadata value, or None where the file does not have it."""
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

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
        rows = item.data.reshape(-1, item.data.shape[-1])  # a view; what is used is its shape
        step = max(1, CHUNK_BYTES // max(1, info.size // len(rows) * 4))
        with self.path.open("rb") as file:  # not through the reader's mapping, whose pages would stay resident
            file.seek(item.data_offset)
            for start in range(0, len(rows), step):
                count = min(step, len(rows) - start) * rows.shape[1]
                piece = np.fromfile(file, rows.dtype, count).reshape(-1, rows.shape[1])
                try:
                    yield (piece if kind.name in _PLAIN else dequantize(piece, kind)).reshape(-1)
                except NotImplementedError:
                    raise UnsupportedCheckpointError(
                        f"{self.path}: tensor {name} is {kind.name}, which cannot be dequantised"
                    ) from None
