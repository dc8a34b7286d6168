"""Reading a .sct file: mapped, lazy and checked."""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np
import xxhash

from .dtypes import numpy_dtype
from .errors import (
    ChecksumError,
    FormatError,
    IncompleteError,
    MissingEntryError,
    NotSctError,
    TrailingDataError,
    TruncatedError,
)
from .index import Blob, FileEntry, Index, TensorEntry
from .layout import HEAD_BYTES, MAGIC, TAIL_BYTES, Head, Tail, align

CHUNK_BYTES: Final = 16 << 20
"""How much is read at a time where a whole blob is walked: its pages are given back after each piece."""

UNFINISHED: Final = "the conversion was not finished; go on with `sctconv convert --resume`, or convert again"


class SctFile:
    """An open .sct file.

    Opening reads head, tail and index and nothing else. Tensors are views into a private (copy-on-write) mapping of
    the file: nothing is read before it is used, and writing into a view never reaches the file. A view keeps the
    mapping alive, also after `close`.

        with SctFile("model.sct") as file:
            U = file.tensor("model.layers.0.mlp.up_proj.U")

    Args:
        path: the file.
        allow_incomplete: open a conversion that was not finished, to describe or resume it.

    Raises:
        FormatError: the subclass that says what is wrong with the file.
        OSError: the file cannot be opened at all.
    """

    def __init__(self, path: str | os.PathLike[str], *, allow_incomplete: bool = False) -> None:
        self.path: Final = Path(path)
        if self.path.is_dir():
            raise NotSctError(
                f"{self.path}: not a .sct file, but a directory; `sctconv convert` makes one of a checkpoint"
            )
        self._seeking = threading.Lock()
        self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (closed by close)
        try:
            self.nbytes: Final = os.fstat(self._file.fileno()).st_size
            self.head: Final = self._read_head()
            end = self.head.committed
            self.tail: Final = Tail.unpack(self._pread(end - TAIL_BYTES, TAIL_BYTES), end)
            data = self._pread(self.tail.index_offset, self.tail.index_nbytes)
            self.index: Final = Index.unpack(data, self.tail)
            if not self.index.complete and not allow_incomplete:
                raise IncompleteError(UNFINISHED)
            if self.index.complete and self.nbytes > end:
                raise TrailingDataError(f"{self.nbytes - end} bytes follow its end at {end}; it is damaged")
        except FormatError as error:
            self._file.close()
            raise type(error)(f"{self.path}: {error}") from None
        except BaseException:
            self._file.close()
            raise

    def _read_head(self) -> Head:
        data = self._pread(0, min(HEAD_BYTES, self.nbytes))
        if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
            raise NotSctError(f"not a .sct file, but {describe_content(data)}")
        if len(data) < HEAD_BYTES:
            raise TruncatedError(f"cut after {self.nbytes} bytes, within the head; fetch or convert it again")
        head = Head.unpack(data)
        if head.committed == 0:
            raise TruncatedError("nothing was ever committed to this file; convert again")
        if head.committed > self.nbytes:
            raise TruncatedError(f"cut: {self.nbytes} of {head.committed} bytes are there; fetch or convert it again")
        return head

    def _pread(self, offset: int, nbytes: int) -> bytes:
        return bytes(self._pread_into(bytearray(nbytes), offset))

    def _pread_into(self, data: bytearray, offset: int) -> bytearray:
        view, done = memoryview(data), 0
        with self._seeking:
            self._file.seek(offset)
            while piece := self._file.readinto(view[done:]):
                done += piece
        if done < len(data):
            raise TruncatedError(f"{self.path}: cut while it was open; {len(data)} bytes at {offset} are gone")
        return data

    @cached_property
    def mapping(self) -> np.ndarray:
        """The bytes of the whole file, mapped. Writable, but what is written stays in this process."""
        descriptor = self._file.fileno()
        if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
            return np.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY), np.uint8)
        # Without MAP_NORESERVE the kernel may refuse a writable private mapping larger than the memory.
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
        mapped = mmap.mmap(descriptor, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return np.frombuffer(mapped, np.uint8)

    def entry(self, name: str) -> TensorEntry:
        """The index entry of a tensor.

        Raises:
            MissingEntryError: there is no such tensor.
        """
        try:
            return self.index.tensors[name]
        except KeyError:
            raise MissingEntryError(f"{self.path}: no tensor {name!r}; it has {len(self.index.tensors)}") from None

    def buffer(self, name: str) -> memoryview:
        """The bytes of a tensor, without a copy. Writable, but what is written stays in this process.

        Raises:
            MissingEntryError: there is no such tensor.
        """
        entry = self.entry(name)
        return self.mapping.data[entry.offset : entry.offset + entry.nbytes]

    def tensor(self, name: str) -> np.ndarray:
        """A tensor as a read-only array, without a copy; BF16 as `ml_dtypes.bfloat16`.

        Raises:
            MissingEntryError: there is no such tensor.
        """
        entry = self.entry(name)
        array = np.frombuffer(self.buffer(name), dtype=numpy_dtype(entry.dtype)).reshape(entry.shape)
        array.flags.writeable = False
        return array

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor as `tensor` gives it, but a copy that was read: no page of the mapping stays resident for it.

        Args:
            name: of the tensor.
            rows: which of its first dimension, in steps of one.

        Raises:
            MissingEntryError: there is no such tensor. TruncatedError: the file was cut meanwhile.
        """
        entry = self.entry(name)
        length = entry.shape[0] if entry.shape else 1
        start, stop, _ = rows.indices(length)
        width = entry.nbytes // length if length else 0
        data = self._pread_into(bytearray(max(0, stop - start) * width), entry.offset + start * width)
        shape = (max(0, stop - start), *entry.shape[1:]) if entry.shape else ()
        return np.frombuffer(data, dtype=numpy_dtype(entry.dtype)).reshape(shape)

    def file(self, name: str) -> bytes:
        """An embedded file, checked against its sha256.

        Raises:
            MissingEntryError: there is no such file. ChecksumError: it was damaged.
        """
        try:
            entry = self.index.files[name]
        except KeyError:
            raise MissingEntryError(f"{self.path}: no embedded file {name!r}") from None
        data = self._pread(entry.offset, entry.nbytes)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise self._damaged(entry)
        return data

    def verify(self, blob: Blob) -> None:
        """Holds a blob against its checksum, reading `CHUNK_BYTES` at a time.

        Raises:
            ChecksumError: it was damaged.
        """
        is_tensor = isinstance(blob, TensorEntry)
        digest = xxhash.xxh3_64() if is_tensor else hashlib.sha256()
        for piece in self.pieces(blob):
            digest.update(piece)
        if digest.hexdigest() != (blob.xxh3 if isinstance(blob, TensorEntry) else blob.sha256):
            raise self._damaged(blob)

    def verify_blobs(self) -> None:
        """Holds every blob against its checksum, each once, in the order of the file.

        Raises:
            ChecksumError: one was damaged; it is named.
        """
        blobs = {(blob.offset, blob.nbytes): blob for blob in self.index.blobs}
        for _, blob in sorted(blobs.items(), key=lambda pair: pair[0]):
            self.verify(blob)

    def verify_padding(self) -> None:
        """Checks that the bytes between blobs are zero: what remains when `verify` has held every blob.

        Raises:
            ChecksumError: they are not.
        """
        for end in sorted({blob.offset + blob.nbytes for blob in self.index.blobs}):
            if any(self._pread(end, align(end) - end)):
                raise ChecksumError(f"{self.path}: the padding at {end} is not zero; the file is damaged")

    def pieces(self, blob: Blob) -> Iterator[bytes]:
        """A blob's bytes, `CHUNK_BYTES` at a time; read, not mapped, so that no page stays resident."""
        for start in range(0, blob.nbytes, CHUNK_BYTES):
            yield self._pread(blob.offset + start, min(CHUNK_BYTES, blob.nbytes - start))

    def _damaged(self, blob: Blob) -> ChecksumError:
        what = "embedded file" if isinstance(blob, FileEntry) else "tensor"
        return ChecksumError(f"{self.path}: the {what} {blob.name} does not match its checksum; the file is damaged")

    def close(self) -> None:
        """Closes the file. The mapping goes when the last view of it does."""
        self.__dict__.pop("mapping", None)
        self._file.close()

    def __enter__(self) -> SctFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def is_sct(path: str | os.PathLike[str]) -> bool:
    """Whether the file begins like a .sct file. False for what cannot be read or is no file."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def describe_content(data: bytes) -> str:
    """What a file seems to be by its first bytes, with the way out; for messages about files of the wrong kind."""
    if not data:
        return "an empty file"
    if data.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer; fetch the file itself with `git lfs pull`"
    if data.startswith(MAGIC[:4]):
        return "a .sct file damaged by a transfer in text mode; fetch it again in binary mode"
    if data.startswith(b"GGUF"):
        return "a GGUF file; `sctconv convert` makes a .sct of it"
    if data.startswith(b"PK\x03\x04"):
        return "a zip archive, perhaps a torch .bin; `sctconv convert` takes the directory it is in"
    if data[8:9] == b"{":
        return "perhaps a safetensors file; `sctconv convert` takes the directory it is in"
    if data.lstrip()[:1] == b"<":
        return "an HTML page, perhaps an error page saved by a download"
    if all(byte >= 32 or byte in b"\t\r\n\f" for byte in data):
        return "a text file"
    return "something else"
