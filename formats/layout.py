"""The frame of a .sct file: head and tail, limits, and what a name may be.

`SPEC.md` beside this file is the specification; the checks here and in `index.py` are its MUSTs, in its order. Nothing
is allocated from a number in the file before that number has been checked against the file's size or a limit below.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Final

from .errors import ForbiddenNameError, HeadError, LimitError, TailError, VersionError

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
_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


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
