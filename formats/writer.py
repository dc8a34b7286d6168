"""Writing a .sct file in one pass."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

import numpy as np
import xxhash

from .atomic import atomic_file
from .dtypes import dtype_name, numpy_dtype
from .errors import ChecksumError, DuplicateNameError, IncompleteError, ShapeError
from .index import FileEntry, Index, LayerRecord, TensorEntry
from .layout import TAIL_BYTES, Head, Tail, align, check_file_name, check_name
from .reader import CHUNK_BYTES, SctFile


class SctWriter:
    """Writes tensors as they come and the index last; the target appears whole, on `commit`, or not at all.

    Memory while writing is one piece of one tensor. Leaving the block without `commit` removes what was written.

        with SctWriter("model.sct") as writer:
            writer.add_tensor("norm.weight", array)
            writer.commit()

    Tensors with the same dtype, shape and bytes are stored once, whatever their names; so tied weights are found by
    value.

    Args:
        path: the target.
        overwrite: whether a file that stands there may be replaced.
        metadata: a JSON object about the file as a whole; may be added to until `commit`.
        extra: top-level keys of the index that this version does not know, kept by a rewrite.

    Raises:
        OutputError: the target exists, cannot be written, or the disk is full.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        metadata: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.path: Final = Path(path)
        self.metadata: Final[dict[str, Any]] = dict(metadata or {})
        self._extra = dict(extra or {})
        self._overwrite = overwrite
        self._tensors: dict[str, TensorEntry] = {}
        self._layers: dict[str, LayerRecord] = {}
        self._files: dict[str, FileEntry] = {}
        self._by_content: dict[tuple[str, tuple[int, ...], str], TensorEntry] = {}
        self._committed = False
        self._stack = contextlib.ExitStack()
        self._out: BinaryIO

    def __enter__(self) -> SctWriter:
        self._out = self._stack.enter_context(atomic_file(self.path, overwrite=self._overwrite))
        self._out.write(Head().pack())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._committed:
            kind, error = _AbandonedError, _AbandonedError()
        self._stack.__exit__(kind, error, trace)

    @property
    def nbytes(self) -> int:
        """Bytes written so far."""
        return self._out.tell()

    def add_tensor(
        self,
        name: str,
        data: np.ndarray | Iterable[np.ndarray],
        *,
        dtype: str | None = None,
        shape: Iterable[int] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> TensorEntry:
        """Writes a tensor.

        Args:
            name: its name, unique in the file.
            data: the tensor; or, with `dtype` and `shape` given, consecutive pieces of it in row-major order.
            dtype: on-disk dtype; the pieces are cast to it. Defaults to the array's own.
            shape: the whole tensor's shape.
            extra: keys of its index entry that this version does not know.

        Raises:
            DuplicateNameError: the name is taken. ForbiddenNameError, LimitError: the name is not allowed.
            DTypeError: the dtype cannot be stored. ShapeError: the pieces do not add up to the shape.
            OutputError: the disk is full.
        """
        if check_name(name) in self._tensors:
            raise DuplicateNameError(f"{self.path}: the tensor {name} was written already")
        if isinstance(data, np.ndarray):
            dtype, shape, data = dtype or dtype_name(data.dtype), data.shape, (data,)
        assert dtype is not None and shape is not None, "pieces need a dtype and a shape"
        shape = tuple(int(size) for size in shape)
        target = numpy_dtype(dtype)
        start = self._pad()
        digest = xxhash.xxh3_64()
        for piece in data:
            for part in _bounded(piece):
                raw = np.ascontiguousarray(part, dtype=target).reshape(-1).view(np.uint8)
                digest.update(raw.data)
                self._out.write(raw.data)
        nbytes = self._out.tell() - start
        if nbytes != int(np.prod(shape, dtype=object)) * target.itemsize:
            raise ShapeError(f"{self.path}: tensor {name}: {nbytes} bytes do not make {list(shape)} of {dtype}")
        entry = TensorEntry(name, dtype, shape, start, nbytes, digest.hexdigest(), extra or {})
        self._tensors[name] = entry = self._share(entry)
        return entry

    def _share(self, entry: TensorEntry) -> TensorEntry:
        """If the same content was written before, takes the new copy back and points to the old one."""
        twin = self._by_content.setdefault((entry.dtype, entry.shape, entry.xxh3), entry)
        if twin is entry or not self._same_bytes(twin, entry):
            return entry
        self._out.seek(entry.offset)
        self._out.truncate()
        return replace(entry, offset=twin.offset)

    def _same_bytes(self, a: TensorEntry, b: TensorEntry) -> bool:
        end = self._out.tell()
        try:
            for start in range(0, a.nbytes, CHUNK_BYTES):
                size = min(CHUNK_BYTES, a.nbytes - start)
                pieces = []
                for entry in (a, b):
                    self._out.seek(entry.offset + start)
                    pieces.append(self._out.read(size))
                if pieces[0] != pieces[1]:
                    return False
            return True
        finally:
            self._out.seek(end)

    def add_layer(self, record: LayerRecord) -> None:
        """Records a factored layer. Its tensors may be written before or after; `commit` holds it against them.

        Raises:
            DuplicateNameError: the layer was recorded already.
        """
        if record.name in self._layers:
            raise DuplicateNameError(f"{self.path}: the layer {record.name} was recorded already")
        self._layers[record.name] = record

    def add_file(self, name: str, data: bytes, *, extra: Mapping[str, Any] | None = None) -> FileEntry:
        """Embeds a file verbatim.

        Raises:
            DuplicateNameError: the name is taken. ForbiddenNameError: the name is not a plain file name.
        """
        if check_file_name(name) in self._files:
            raise DuplicateNameError(f"{self.path}: the file {name} was embedded already")
        start = self._pad()
        self._out.write(data)
        entry = FileEntry(name, start, len(data), hashlib.sha256(data).hexdigest(), extra or {})
        self._files[name] = entry
        return entry

    def commit(self) -> None:
        """Writes index, tail and head; leaving the block then puts the file in its place.

        Raises:
            FormatError: what was added does not make a valid file (a layer without its tensors, say).
        """
        offset = self._pad()
        index = Index(self._tensors, self._layers, self._files, self.metadata, extra=self._extra)
        data = index.pack()
        tail = Tail(offset, len(data), hashlib.sha256(data).digest())
        committed = offset + len(data) + TAIL_BYTES
        Index.unpack(data, Tail.unpack(tail.pack(), committed))  # never write what the reader refuses
        self._out.write(data)
        self._out.write(tail.pack())
        self._out.seek(0)
        self._out.write(Head(committed=committed).pack())
        self._out.seek(committed)
        self._committed = True

    def _pad(self) -> int:
        assert not self._committed, "nothing can be added after commit"
        position = self._out.tell()
        self._out.write(bytes(align(position) - position))
        return align(position)


def rewrite(
    source: SctFile,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a copy with other metadata or embedded files; tensors, records and unknown keys stay.

    Args:
        source: the file to copy.
        path: the target.
        metadata: replaces keys of the metadata.
        files: replaces or adds embedded files.
        overwrite: whether a file that stands at `path` may be replaced.

    Raises:
        ChecksumError: a tensor or file of the source is damaged. IncompleteError: the source was not finished.
        OutputError: the target exists, cannot be written, or the disk is full.
    """
    index = source.index
    if not index.complete:
        raise IncompleteError(f"{source.path}: the conversion was not finished; convert again")
    merged = {**index.metadata, **(metadata or {})}
    with SctWriter(path, overwrite=overwrite, metadata=merged, extra=index.extra) as out:
        for entry in index.tensors.values():
            dtype = numpy_dtype(entry.dtype)
            pieces = (np.frombuffer(piece, dtype) for piece in source.pieces(entry))
            copy = out.add_tensor(entry.name, pieces, dtype=entry.dtype, shape=entry.shape, extra=entry.extra)
            if copy.xxh3 != entry.xxh3:  # or damage would be sealed with a fresh checksum
                raise ChecksumError(f"{source.path}: the tensor {entry.name} does not match its checksum; damaged")
        for record in index.layers.values():
            out.add_layer(record)
        for name, file in index.files.items():
            if name not in (files or {}):
                out.add_file(name, source.file(name), extra=file.extra)
        for name, data in (files or {}).items():
            out.add_file(name, data)
        out.commit()


def _bounded(array: np.ndarray) -> Iterable[np.ndarray]:
    """An array in flat pieces of at most `CHUNK_BYTES`, so that casting one never doubles a tensor."""
    flat = array.reshape(-1)
    step = max(1, CHUNK_BYTES // max(1, flat.itemsize))
    return (flat[start : start + step] for start in range(0, max(1, flat.size), step))


class _AbandonedError(Exception):
    """Unwinds the atomic file of a writer that was left without a commit."""
