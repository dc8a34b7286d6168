"""Writing a .sct file in one pass, at will with a journal that a stopped one can be gone on from.

A journal entry is an index with `complete` false, and its tail, put some way beyond the end of what is written; then the head
names it. Blobs that follow fill the way up to it. Where the next one would run into it, it is first written again further on.
So the head always names a whole tail, nothing it names is ever overwritten, and the finished file has no hole: it is, byte for
byte, what a writer without a journal makes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

import numpy as np
import xxhash

from .atomic import atomic_file, part_file
from .dtypes import dtype_name, numpy_dtype
from .errors import ChecksumError, DuplicateNameError, IncompleteError, ShapeError
from .index import FileEntry, Index, LayerRecord, TensorEntry
from .layout import HEAD_BYTES, TAIL_BYTES, Head, Tail, align, check_file_name, check_name
from .part import check_part, open_part
from .reader import CHUNK_BYTES, UNFINISHED, SctFile

_AHEAD: Final = 64 << 20
"""How far beyond the end a journal entry is put, in bytes: a hole, until blobs fill it."""


class SctWriter:
    """Writes tensors as they come and the index last; the target appears whole, on `commit`, or not at all.

    Memory while writing is one piece of one tensor. Leaving the block without `commit` removes what was written, unless
    there is a journal: then it stays as `NAME.part`.

        with SctWriter("model.sct") as writer:
            writer.add_tensor("norm.weight", array)
            writer.commit()

    Tensors with the same dtype, shape and bytes are stored once, whatever their names; so tied weights are found by
    value.

    Args:
        path: the target.
        overwrite: whether a file that stands there may be replaced, and, without `resume`, a stopped one.
        metadata: a JSON object about the file as a whole; may be added to until `commit`.
        extra: top-level keys of the index that this version does not know, kept by a rewrite.
        journaled: whether to write to `NAME.part`, where `journal` can keep what is done.
        resume: whether to go on from what a stopped writer kept there, if it kept anything.

    Attributes:
        tensors, layers, files, metadata: what is in the file so far.
        is_complete: whether nothing is left to be done but to put the file in its place; on entry, too, where a writer was
            stopped just before that.

    Raises:
        OutputError: the target exists, cannot be written, or the disk is full; or a stopped one stands at `NAME.part` and
            neither `resume` nor `overwrite` says what is to become of it.
        FormatError: what stands at `NAME.part` is damaged, its blobs included.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        metadata: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        journaled: bool = False,
        resume: bool = False,
    ) -> None:
        self.path: Final = Path(path)
        self.metadata: Final[dict[str, Any]] = dict(metadata or {})
        self.tensors: Final[dict[str, TensorEntry]] = {}
        self.layers: Final[dict[str, LayerRecord]] = {}
        self.files: Final[dict[str, FileEntry]] = {}
        self.is_complete = False
        self._extra = dict(extra or {})
        self._overwrite, self._journaled, self._resume = overwrite, journaled, resume
        self._by_content: dict[tuple[str, tuple[int, ...], str], TensorEntry] = {}
        self._end = HEAD_BYTES
        self._journal: _Entry | None = None
        self._stack = contextlib.ExitStack()
        self._out: BinaryIO

    def __enter__(self) -> SctWriter:
        if not self._journaled:
            self._out = self._stack.enter_context(atomic_file(self.path, overwrite=self._overwrite))
            self._out.write(Head().pack())
            return self
        check_part(self.path, overwrite=self._overwrite, resume=self._resume)
        begun = open_part(self.path) if self._resume else None
        keeps = lambda: self._journal is not None  # noqa: E731
        with contextlib.ExitStack() as stack:
            self._out = stack.enter_context(part_file(self.path, overwrite=self._overwrite, is_worth_keeping=keeps))
            if begun is not None:
                with begun:
                    self._go_on(begun)
            else:
                self._out.truncate(0)
                self._out.write(Head().pack())
            self._out.seek(self._end)
            self._stack = stack.pop_all()
        return self

    def _go_on(self, begun: SctFile) -> None:
        index = begun.index
        # first, so that what is damaged stays too
        self._journal = _Entry(begun.tail.index_offset, begun.head.committed, index.pack())
        for blob in index.blobs:  # or damage would be sealed
            begun.verify(blob)
        self.metadata.update(index.metadata)
        self.tensors.update(index.tensors)
        self.layers.update(index.layers)
        self.files.update(index.files)
        for entry in index.tensors.values():
            self._by_content.setdefault((entry.dtype, entry.shape, entry.xxh3), entry)
        self.is_complete = index.complete
        self._end = max((blob.offset + blob.nbytes for blob in index.blobs), default=HEAD_BYTES)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self.is_complete:
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
        if check_name(name) in self.tensors:
            raise DuplicateNameError(f"{self.path}: the tensor {name} was written already")
        if isinstance(data, np.ndarray):
            dtype, shape, data = dtype or dtype_name(data.dtype), data.shape, (data,)
        assert dtype is not None and shape is not None, "pieces need a dtype and a shape"
        shape = tuple(int(size) for size in shape)
        target = numpy_dtype(dtype)
        nbytes = int(np.prod(shape, dtype=object)) * target.itemsize
        start = self._begin_blob(nbytes)
        digest, written = xxhash.xxh3_64(), 0
        for piece in data:
            for part in _bounded(piece):
                raw = np.ascontiguousarray(part, dtype=target).reshape(-1).view(np.uint8)
                written += raw.nbytes
                if written > nbytes:
                    break
                digest.update(raw.data)
                self._out.write(raw.data)
        if written != nbytes:
            raise ShapeError(f"{self.path}: tensor {name}: {written} bytes do not make {list(shape)} of {dtype}")
        entry = self._share(TensorEntry(name, dtype, shape, start, nbytes, digest.hexdigest(), extra or {}))
        self.tensors[name] = entry
        self._end = max(self._end, entry.offset + nbytes)
        self._out.seek(self._end)
        return entry

    def read(self, name: str) -> np.ndarray:
        """A tensor that was written already, read back."""
        entry = self.tensors[name]
        self._out.seek(entry.offset)
        data = self._out.read(entry.nbytes)
        self._out.seek(self._end)
        return np.frombuffer(data, numpy_dtype(entry.dtype)).reshape(entry.shape)

    def _share(self, entry: TensorEntry) -> TensorEntry:
        """If the same content was written before, points to that; the new copy is overwritten by what comes next."""
        twin = self._by_content.setdefault((entry.dtype, entry.shape, entry.xxh3), entry)
        if twin is entry or not self._same_bytes(twin, entry):
            return entry
        return replace(entry, offset=twin.offset)

    def _same_bytes(self, a: TensorEntry, b: TensorEntry) -> bool:
        for start in range(0, a.nbytes, CHUNK_BYTES):
            size = min(CHUNK_BYTES, a.nbytes - start)
            pieces = []
            for entry in (a, b):
                self._out.seek(entry.offset + start)
                pieces.append(self._out.read(size))
            if pieces[0] != pieces[1]:
                return False
        return True

    def add_layer(self, record: LayerRecord) -> None:
        """Records a factored layer. Its tensors may be written before or after; `commit` holds it against them.

        Raises:
            DuplicateNameError: the layer was recorded already.
        """
        if record.name in self.layers:
            raise DuplicateNameError(f"{self.path}: the layer {record.name} was recorded already")
        self.layers[record.name] = record

    def add_file(self, name: str, data: bytes, *, extra: Mapping[str, Any] | None = None) -> FileEntry:
        """Embeds a file verbatim.

        Raises:
            DuplicateNameError: the name is taken. ForbiddenNameError: the name is not a plain file name.
        """
        if check_file_name(name) in self.files:
            raise DuplicateNameError(f"{self.path}: the file {name} was embedded already")
        start = self._begin_blob(len(data))
        self._out.write(data)
        entry = FileEntry(name, start, len(data), hashlib.sha256(data).hexdigest(), extra or {})
        self.files[name] = entry
        self._end = start + len(data)
        return entry

    def journal(self) -> None:
        """Keeps what was added so far: a writer that is stopped after this can be gone on from here.

        Nothing happens while the bias of a recorded layer is still to come, as no index may lack it.

        Raises:
            FormatError: a layer lacks factors. OutputError: the disk is full; what was kept before still is.
        """
        assert self._journaled, "only a journaled writer has one"
        if any(record.bias is not None and record.bias not in self.tensors for record in self.layers.values()):
            return
        behind = self._journal.end if self._journal else 0
        self._put_journal(max(self._end + _AHEAD, behind), self._index(complete=False))

    def forget(self) -> None:
        """Lets go of the journal: leaving the block without `commit` removes the file after all."""
        self._journal = None

    def commit(self) -> None:
        """Writes index, tail and head; leaving the block then puts the file in its place.

        Raises:
            FormatError: what was added does not make a valid file (a layer without its tensors, say).
        """
        if self.is_complete:
            return
        data = self._index(complete=True)
        offset = self._begin_blob(len(data) + TAIL_BYTES)
        committed = self._put_index(offset, data)
        self._out.truncate(committed)
        self.is_complete = True

    def _index(self, *, complete: bool) -> bytes:
        return Index(self.tensors, self.layers, self.files, self.metadata, complete=complete, extra=self._extra).pack()

    def _begin_blob(self, nbytes: int) -> int:
        """Pads to where the next blob begins, and puts the journal out of its way."""
        assert not self.is_complete, "nothing can be added after commit"
        start = align(self._end)
        if self._journal and start + nbytes > self._journal.offset:
            self._put_journal(max(start + nbytes + _AHEAD, self._journal.end), self._journal.data)
        self._out.seek(self._end)  # a tensor that failed halfway may have left it elsewhere
        self._out.write(bytes(start - self._end))
        return start

    def _put_journal(self, after: int, data: bytes) -> None:
        offset = align(after)
        self._journal = _Entry(offset, self._put_index(offset, data), data)
        self._out.seek(self._end)

    def _put_index(self, offset: int, data: bytes) -> int:
        """Writes index and tail, then the head that names them; returns where they end."""
        tail = Tail(offset, len(data), hashlib.sha256(data).digest())
        committed = offset + len(data) + TAIL_BYTES
        Index.unpack(data, Tail.unpack(tail.pack(), committed))  # never write what the reader refuses
        self._out.seek(offset)
        self._out.write(data)
        self._out.write(tail.pack())
        if self._journaled:  # or a power cut might keep the head and lose what it names
            self._sync()
        self._out.seek(0)
        self._out.write(Head(committed=committed).pack())
        if self._journaled:
            self._sync()
        return committed

    def _sync(self) -> None:
        self._out.flush()
        os.fsync(self._out.fileno())


@dataclass(frozen=True)
class _Entry:
    """A journal entry: where its index begins, where its tail ends, and the index."""

    offset: int
    end: int
    data: bytes


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
        raise IncompleteError(f"{source.path}: {UNFINISHED}")
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
