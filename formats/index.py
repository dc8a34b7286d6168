"""The index of a .sct file: JSON <-> validated entries, which are then held against each other and the file."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from types import MappingProxyType
from typing import Any, Final, TypeVar

from .dtypes import FLOATS, numpy_dtype
from .errors import (
    BlobBoundsError,
    BlobLayoutError,
    DTypeError,
    DuplicateNameError,
    FeatureError,
    IndexChecksumError,
    IndexSchemaError,
    LayerError,
    LimitError,
    ShapeError,
)
from .layout import (
    ALIGNMENT,
    FEATURES,
    HEAD_BYTES,
    MAX_BYTES,
    MAX_DIMENSIONS,
    MAX_ENTRIES,
    Tail,
    align,
    check_file_name,
    check_name,
)
from .strict_json import canonical_json, parse_json

_HEX: Final = re.compile(r"[0-9a-f]+")
_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})
_TENSOR_KEYS: Final = ("name", "dtype", "shape", "offset", "nbytes", "xxh3")
_TENSOR_TYPES: Final = (str, str, list, int, int, str)


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's blob. `xxh3` is XXH3-64 of its bytes, 16 hex digits."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    xxh3: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        known = {"name": self.name, "dtype": self.dtype, "shape": list(self.shape), "offset": self.offset}
        return {**self.extra, **known, "nbytes": self.nbytes, "xxh3": self.xxh3}

    @staticmethod
    def from_json(item: Any) -> TensorEntry:
        extra: Mapping[str, Any] = _NOTHING
        values: tuple[Any, ...] = ()
        if type(item) is dict and len(item) == len(_TENSOR_KEYS):
            values = tuple(map(item.get, _TENSOR_KEYS))
        if tuple(map(type, values)) == _TENSOR_TYPES:  # the ordinary entry, of which there may be thousands
            name, dtype, shape, offset, nbytes, xxh3 = values
            check_name(name)
        else:  # unknown keys, or something wrong, which `_Take` names
            take = _Take(item, "a tensor entry")
            name = take.name("tensor", check_name)
            dtype, shape = take("dtype", str), take("shape", list)
            offset, nbytes, xxh3 = take("offset", int), take("nbytes", int), take("xxh3", str)
            extra = take.rest()
        if len(shape) > MAX_DIMENSIONS:
            raise LimitError(f"tensor {name}: {len(shape)} dimensions; at most {MAX_DIMENSIONS} are allowed")
        count = room = 1
        for size in shape:
            if type(size) is not int or not 0 <= size <= MAX_BYTES:
                raise ShapeError(f"tensor {name}: shape {shape!r:.200} is not a list of sizes")
            count *= size
            room *= size or 1  # an array library multiplies the other sizes even where one is 0
        try:
            itemsize = numpy_dtype(dtype).itemsize
        except DTypeError as error:
            raise DTypeError(f"tensor {name}: {error}") from None
        if room * itemsize > MAX_BYTES:
            raise ShapeError(f"tensor {name}: shape {shape} of {dtype} is over {MAX_BYTES} bytes")
        if nbytes != count * itemsize:
            raise ShapeError(f"tensor {name}: {nbytes} bytes, but {shape} of {dtype} takes {count * itemsize}")
        if len(xxh3) != 16 or not _HEX.fullmatch(xxh3):
            raise IndexSchemaError(f"'xxh3' of the tensor {name} is not 16 lower-case hex digits")
        return TensorEntry(name, dtype, tuple(shape), offset, nbytes, xxh3, extra)


@dataclass(frozen=True)
class LayerRecord:
    """A factored linear layer: W (out, in) kept as `U diag(s) V^T`.

    Its tensors are `NAME.U` (out, rank), `NAME.s` (rank,) F32 descending and >= 0, and `NAME.V` (in, rank).

    Attributes:
        energy: ||U diag(s) V^T||_F^2 / ||W||_F^2 of the truncation, in [0, 1]; None if unknown.
        error: ||W - U diag(s) V^T||_F / ||W||_F, measured in float64; None if unknown.
        bias: the tensor that holds the bias (out,), or None.
        dtype: dtype of U and V, one of `FLOATS`.
    """

    name: str
    out: int
    in_: int
    rank: int
    energy: float | None
    error: float | None
    bias: str | None
    dtype: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        known = {"name": self.name, "out": self.out, "in": self.in_, "rank": self.rank, "energy": self.energy}
        return {**self.extra, **known, "error": self.error, "bias": self.bias, "dtype": self.dtype}

    @staticmethod
    def from_json(item: Any) -> LayerRecord:
        take = _Take(item, "a layer entry")
        name = take.name("layer", check_name)
        bias = take("bias", (str, type(None)))
        if bias is not None:
            check_name(bias)
        numbers: list[float | None] = []
        for key, most in (("energy", 1.0), ("error", math.inf)):
            number = take(key, (int, float, type(None)))
            if number is not None and not 0.0 <= number <= most:
                raise LayerError(f"layer {name}: {key} {number} is out of range")
            numbers.append(None if number is None else float(number))
        out, in_, rank = (take(key, int) for key in ("out", "in", "rank"))
        if not 1 <= rank <= min(out, in_):
            raise LayerError(f"layer {name}: rank {rank} does not fit a layer of {out} x {in_}")
        if (dtype := take("dtype", str)) not in FLOATS:
            raise LayerError(f"layer {name}: factors of dtype {dtype!r:.40}; they may be {', '.join(sorted(FLOATS))}")
        return LayerRecord(name, out, in_, rank, numbers[0], numbers[1], bias, dtype, take.rest())

    @property
    def factors(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of U, s and V."""
        return {
            f"{self.name}.U": (self.out, self.rank),
            f"{self.name}.s": (self.rank,),
            f"{self.name}.V": (self.in_, self.rank),
        }

    def check(self, tensors: Mapping[str, TensorEntry]) -> None:
        """Holds the record against the tensors of its file.

        Raises:
            LayerError: a factor is missing or has another shape or dtype; the bias is missing or misshapen.
        """
        for name, shape in self.factors.items():
            entry = tensors.get(name)
            dtype = "F32" if len(shape) == 1 else self.dtype
            if entry is None or entry.shape != shape or entry.dtype != dtype:
                found = "missing" if entry is None else f"{entry.dtype} {list(entry.shape)}"
                raise LayerError(f"layer {self.name}: {name} should be {dtype} {list(shape)}, but is {found}")
        if self.bias is not None and (self.bias not in tensors or tensors[self.bias].shape != (self.out,)):
            raise LayerError(f"layer {self.name}: its bias {self.bias!r} is not a tensor of {self.out} entries")


@dataclass(frozen=True)
class FileEntry:
    """An embedded file, verbatim. `sha256` is 64 hex digits."""

    name: str
    offset: int
    nbytes: int
    sha256: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        known = {"name": self.name, "offset": self.offset, "nbytes": self.nbytes, "sha256": self.sha256}
        return {**self.extra, **known}

    @staticmethod
    def from_json(item: Any) -> FileEntry:
        take = _Take(item, "a file entry")
        name = take.name("file", check_file_name)
        return FileEntry(name, take("offset", int), take("nbytes", int), take.hex("sha256", 64), take.rest())


Blob = TensorEntry | FileEntry


@dataclass(frozen=True)
class Index:
    """What the file holds. `extra` keeps top-level keys that this version does not know; they survive a rewrite."""

    tensors: dict[str, TensorEntry]
    layers: dict[str, LayerRecord]
    files: dict[str, FileEntry]
    metadata: dict[str, Any]
    complete: bool = True
    required_features: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def blobs(self) -> list[Blob]:
        """The blobs of all tensors and embedded files."""
        return [*self.tensors.values(), *self.files.values()]

    def pack(self) -> bytes:
        """Canonical JSON: keys sorted, no white space, UTF-8, no NaN."""
        item = {
            **self.extra,
            "complete": self.complete,
            "required_features": list(self.required_features),
            "tensors": [entry.to_json() for entry in self.tensors.values()],
            "layers": [record.to_json() for record in self.layers.values()],
            "files": [entry.to_json() for entry in self.files.values()],
            "metadata": self.metadata,
        }
        return canonical_json(item)

    @staticmethod
    def unpack(data: bytes, tail: Tail) -> Index:
        """Parses and checks the index of a file with this tail.

        Raises:
            FormatError: the subclass for the first rule of SPEC.md that the index breaks.
        """
        if hashlib.sha256(data).digest() != tail.index_sha256:
            raise IndexChecksumError(
                "the index does not match its sha256; the file is damaged; fetch or convert it again"
            )
        item = parse_json(data)
        take = _Take(item, "the index")
        features = take("required_features", list)
        if not all(isinstance(name, str) for name in features):
            raise IndexSchemaError("'required_features' is not a list of names")
        if missing := [name for name in features if name not in FEATURES]:
            names = f"{', '.join(map(repr, missing[:3])):.200}"
            raise FeatureError(
                f"the file needs {len(missing)} features unknown to this version ({names}); update sctconv"
            )
        tensors = _by_name("tensor", take("tensors", list), TensorEntry.from_json)
        layers = _by_name("layer", take("layers", list), LayerRecord.from_json)
        files = _by_name("file", take("files", list), FileEntry.from_json)
        metadata, complete = take("metadata", dict), take("complete", bool)
        index = Index(tensors, layers, files, metadata, complete, tuple(features), take.rest())
        _check_blobs(index.blobs, tail.index_offset, holes=not complete)
        for record in layers.values():
            record.check(tensors)
        return index


class _Take:
    """Takes typed values out of a JSON object; what is left over is unknown and kept."""

    def __init__(self, item: Any, what: str) -> None:
        if not isinstance(item, dict):
            raise IndexSchemaError(f"{what} is {type(item).__name__}, not an object")
        self._item: dict[str, Any] = dict(item)
        self._what = what

    def __call__(self, key: str, kind: type | tuple[type, ...]) -> Any:
        try:
            value = self._item.pop(key)
        except KeyError:
            raise IndexSchemaError(f"{self._what} lacks {key!r}") from None
        # bool is an int in Python, not in JSON
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise IndexSchemaError(f"{key!r} of {self._what} is {type(value).__name__}")
        return value

    def name(self, kind: str, check: Callable[[str], str]) -> str:
        """Takes the name, by which later errors call the entry."""
        name = check(self("name", str))
        self._what = f"the {kind} {name}"
        return name

    def hex(self, key: str, digits: int) -> str:
        value: str = self(key, str)
        if len(value) != digits or not _HEX.fullmatch(value):
            raise IndexSchemaError(f"{key!r} of {self._what} is not {digits} lower-case hex digits")
        return value

    def rest(self) -> dict[str, Any]:
        return self._item


T = TypeVar("T", TensorEntry, LayerRecord, FileEntry)


def _by_name(what: str, items: list[Any], parse: Callable[[Any], T]) -> dict[str, T]:
    if len(items) > MAX_ENTRIES:
        raise LimitError(f"{len(items)} {what} entries; at most {MAX_ENTRIES} are allowed")
    entries: dict[str, T] = {}
    items.reverse()
    while items:  # the JSON goes as the entries come, and the garbage collector never walks both
        entry = parse(items.pop())
        if entry.name in entries:
            raise DuplicateNameError(f"the {what} {entry.name} stands twice in the index")
        entries[entry.name] = entry
    return entries


def _check_blobs(blobs: Iterable[Blob], index_offset: int, *, holes: bool) -> None:
    """Blobs lie one after another from the head to the index, each aligned; tensors of equal content may share one.

    In an unfinished file, `holes` between them may hold indexes that a later one has replaced.
    """
    end = HEAD_BYTES
    previous: Blob | None = None
    # Two stable sorts: pairs as keys would be objects enough to set the garbage collector off more often.
    by_size = sorted(blobs, key=attrgetter("nbytes"))
    for blob in sorted(by_size, key=attrgetter("offset")):
        if blob.offset < HEAD_BYTES or blob.offset % ALIGNMENT or not 0 <= blob.nbytes <= MAX_BYTES:
            raise BlobBoundsError(f"{blob.name}: its blob at {blob.offset}+{blob.nbytes} is not a place for one")
        if blob.offset + blob.nbytes > index_offset:
            raise BlobBoundsError(f"{blob.name}: its blob ends at {blob.offset + blob.nbytes}, past {index_offset}")
        if _shared(blob, previous):
            continue
        if blob.offset < end or (blob.offset != align(end) and not holes):
            fault = "overlaps" if blob.offset < end else "leaves a hole after"
            raise BlobLayoutError(f"{blob.name}: its blob at {blob.offset} {fault} the one that ends at {end}")
        end, previous = blob.offset + blob.nbytes, blob
    if align(end) != index_offset and not holes:
        raise BlobLayoutError(f"the blobs end at {end}, but the index begins at {index_offset}")


def _shared(blob: Blob, other: Blob | None) -> bool:
    return (
        isinstance(blob, TensorEntry)
        and isinstance(other, TensorEntry)
        and (blob.offset, blob.nbytes, blob.dtype, blob.shape, blob.xxh3)
        == (other.offset, other.nbytes, other.dtype, other.shape, other.xxh3)
    )
