"""Head, index and tail of a .sct file: bytes <-> validated objects.

`SPEC.md` beside this file is the specification; the checks here are its MUSTs, in its order. Nothing is allocated
from a number in the file before that number has been checked against the file's size or a limit below.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from .dtypes import FLOATS, numpy_dtype
from .errors import (
    BlobBoundsError,
    BlobLayoutError,
    DTypeError,
    DuplicateNameError,
    FeatureError,
    ForbiddenNameError,
    HeadError,
    IndexChecksumError,
    IndexSchemaError,
    IndexSyntaxError,
    LayerError,
    LimitError,
    ShapeError,
    TailError,
    VersionError,
)

MAGIC: Final = b"\x93SCT\r\n\x1a\n"  # a high byte, both line ends and ^Z: text-mode transfers break it visibly
TAIL_MAGIC: Final = b"SCT-TAIL"
MAJOR: Final = 1
MINOR: Final = 0
ALIGNMENT: Final = 64
HEAD_BYTES: Final = 64
TAIL_BYTES: Final = 64
FEATURES: Final[frozenset[str]] = frozenset()
"""Required features that this reader has. Version 1.0 defines none."""

MAX_INDEX_BYTES: Final = 64 << 20
MAX_ENTRIES: Final = 1 << 18  # tensors, layers or files in one index
MAX_DIMENSIONS: Final = 8
MAX_NAME_BYTES: Final = 1024
MAX_NESTING: Final = 64  # of objects and lists in the index
MAX_BYTES: Final = 1 << 60  # of a file, and so of anything in it

_HEAD: Final = struct.Struct("<8sHHIQ40s")
_TAIL: Final = struct.Struct("<QQ32s8s8s")
_FILE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
_HEX: Final = re.compile(r"[0-9a-f]+")
_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")  # its JSON escape


def align(offset: int) -> int:
    """The next multiple of `ALIGNMENT` at or after `offset`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Head:
    """The first 64 bytes: what the file is and how much of it counts.

    `committed` is the size in bytes up to the end of the last whole tail; 0 while nothing has been committed.
    """

    major: int = MAJOR
    minor: int = MINOR
    committed: int = 0

    def pack(self) -> bytes:
        return _HEAD.pack(MAGIC, self.major, self.minor, 0, self.committed, bytes(40))

    @staticmethod
    def unpack(data: bytes) -> Head:
        """Parses a head whose magic has been checked.

        Raises:
            VersionError: another major version.
            HeadError: reserved bytes are set, or the committed size is impossible.
        """
        _, major, minor, reserved, committed, rest = _HEAD.unpack(data)
        if major != MAJOR:
            raise VersionError(f"format version {major}.{minor}; this reader knows {MAJOR}.x; update sctconv")
        if minor <= MINOR and (reserved or any(rest)):
            raise HeadError("the head's reserved bytes are not zero; the file is corrupt")
        if committed > MAX_BYTES or (committed and committed < HEAD_BYTES + TAIL_BYTES):
            raise HeadError(f"the head gives an impossible committed size of {committed} bytes; the file is corrupt")
        return Head(major, minor, committed)


@dataclass(frozen=True)
class Tail:
    """The last 64 bytes: where the index is and what it must hash to."""

    index_offset: int
    index_nbytes: int
    index_sha256: bytes

    def pack(self) -> bytes:
        return _TAIL.pack(self.index_offset, self.index_nbytes, self.index_sha256, bytes(8), TAIL_MAGIC)

    @staticmethod
    def unpack(data: bytes, committed: int) -> Tail:
        """Parses the tail of a file of `committed` bytes.

        Raises:
            TailError: no tail there, reserved bytes set, or an index that does not end where the tail begins.
            LimitError: an index over `MAX_INDEX_BYTES`.
        """
        offset, nbytes, sha256, reserved, magic = _TAIL.unpack(data)
        if magic != TAIL_MAGIC or any(reserved):
            raise TailError("no tail at the committed end; the file is corrupt")
        if nbytes > MAX_INDEX_BYTES:
            raise LimitError(f"the index has {nbytes} bytes; at most {MAX_INDEX_BYTES} are allowed")
        if offset < HEAD_BYTES or offset + nbytes + TAIL_BYTES != committed:
            raise TailError(
                f"the tail puts the index at {offset}+{nbytes}, but it should end at {committed - TAIL_BYTES}"
            )
        return Tail(offset, nbytes, sha256)


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
        take = _Take(item, "a tensor entry")
        name = take.name("tensor", check_name)
        dtype = take("dtype", str)
        shape = tuple(take("shape", list))
        if len(shape) > MAX_DIMENSIONS:
            raise LimitError(f"tensor {name}: {len(shape)} dimensions; at most {MAX_DIMENSIONS} are allowed")
        if not all(type(size) is int and 0 <= size <= MAX_BYTES for size in shape):
            raise ShapeError(f"tensor {name}: shape {list(shape)!r:.200} is not a list of sizes")
        offset, nbytes = take("offset", int), take("nbytes", int)
        try:
            itemsize = numpy_dtype(dtype).itemsize
        except DTypeError as error:
            raise DTypeError(f"tensor {name}: {error}") from None
        # an array library multiplies the other sizes even where one is 0
        if math.prod(size or 1 for size in shape) * itemsize > MAX_BYTES:
            raise ShapeError(f"tensor {name}: shape {list(shape)} of {dtype} is over {MAX_BYTES} bytes")
        expected = math.prod(shape) * itemsize
        if nbytes != expected:
            raise ShapeError(f"tensor {name}: {nbytes} bytes, but {list(shape)} of {dtype} takes {expected}")
        return TensorEntry(name, dtype, shape, offset, nbytes, take.hex("xxh3", 16), take.rest())


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


def canonical_json(item: Any) -> bytes:
    """JSON with sorted keys, no white space, UTF-8, no NaN or infinity: the same object gives the same bytes.

    Raises:
        IndexSyntaxError: it holds what such JSON cannot: NaN, infinity or a lone surrogate.
    """
    try:
        return json.dumps(item, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise IndexSyntaxError(f"not to be written as JSON ({str(error)[:200]})") from None


def parse_json(data: bytes) -> Any:
    """Parses JSON strictly, so that every reader sees the same and all of it can be written again.

    Raises:
        IndexSyntaxError: it is not JSON in UTF-8, a key stands twice in an object, a number is NaN, infinite or an
            integer beyond 64 bits, or a string holds a lone surrogate.
        LimitError: it is nested deeper than `MAX_NESTING`.
    """
    try:
        item = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_finite,
        )
        _check_nesting(item)
        if _SURROGATE.search(data):
            json.dumps(item, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise LimitError(f"the index is nested deeper than {MAX_NESTING} levels") from None
    except ValueError as error:  # UnicodeError and JSONDecodeError are ValueErrors
        raise IndexSyntaxError(f"the index is not valid JSON ({str(error)[:200]})") from None
    return item


def check_name(name: str) -> str:
    """Returns `name` if a tensor or layer may have it: 1 to 1024 bytes of UTF-8 without control characters.

    Raises:
        LimitError: too long. ForbiddenNameError: empty, a control character, line separator or lone surrogate.
    """
    if not name or _UNPRINTABLE.search(name, 0, MAX_NAME_BYTES):
        raise ForbiddenNameError(f"the name {name[:80]!r} is empty or holds a control character")
    if len(name) > MAX_NAME_BYTES or len(name.encode()) > MAX_NAME_BYTES:
        raise LimitError(f"the name {name[:40]!r}... is over {MAX_NAME_BYTES} bytes")
    return name


def check_file_name(name: str) -> str:
    """Returns `name` if an embedded file may have it: letters, digits, `.`, `_`, `-`, no leading `.` or `-`, <= 255.

    Raises:
        ForbiddenNameError: it is not such a name, a path included.
    """
    if not _FILE_NAME.fullmatch(name):
        raise ForbiddenNameError(f"an embedded file may not be called {name[:80]!r}")
    return name


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    item = dict(pairs)
    if len(item) != len(pairs):
        raise ValueError("an object has one key twice")
    return item


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _integer(text: str) -> int:
    if len(text) > 20 or not -(1 << 63) <= (value := int(text)) < 1 << 64:
        raise ValueError(f"the integer {text[:24]} is beyond 64 bits")
    return value


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"the number {text[:24]} is beyond float64")
    return value


def _check_nesting(item: Any) -> None:
    level = [item]
    for _ in range(MAX_NESTING + 1):
        level = [part for part in level if isinstance(part, (dict, list))]
        if not level:
            return
        level = [value for part in level for value in (part.values() if isinstance(part, dict) else part)]
    raise LimitError(f"the index is nested deeper than {MAX_NESTING} levels")


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
    for item in items:
        entry = parse(item)
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
    for blob in sorted(blobs, key=lambda blob: (blob.offset, blob.nbytes)):
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
