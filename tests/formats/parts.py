"""A .sct file taken apart, put together without the writer: from SPEC.md, struct and json alone."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash

U = np.arange(8, dtype="<f4").reshape(4, 2)
TENSORS: dict[str, tuple[str, np.ndarray]] = {
    "l.U": ("F32", U),
    "l.s": ("F32", np.array([3.0, 1.0], "<f4")),
    "l.V": ("F32", np.arange(6, dtype="<f4").reshape(3, 2)),
    "l.bias": ("F32", np.ones(4, "<f4")),
    "tied": ("I16", np.arange(6, dtype="<i2").reshape(2, 3)),
    "empty": ("F32", np.empty((0, 3), "<f4")),
    "scalar": ("F64", np.array(0.5, "<f8")),
}
CONFIG = b'{"model_type": "none"}'


class Parts:
    """What a test may spoil before `build` puts the file together; hashes and sizes follow unless they are set.

    `edit` takes attribute names, or paths into the index such as `("tensors", "l.U", "shape")`; `...` deletes.
    """

    def __init__(self) -> None:
        self.magic = b"\x93SCT\r\n\x1a\n"
        self.major, self.minor = 1, 0
        self.head_reserved, self.head_rest = 0, bytes(40)
        self.tail_reserved, self.tail_magic = bytes(8), b"SCT-TAIL"
        self.index_text: bytes | None = None
        self.committed: int | None = None
        self.index_offset: int | None = None
        self.index_nbytes: int | None = None
        self.sha256: bytes | None = None
        self.trailing = b""
        self.data = b""
        self.index: Any = {
            "complete": True,
            "required_features": [],
            "tensors": [],
            "layers": [
                {
                    **{"name": "l", "out": 4, "in": 3, "rank": 2, "energy": 0.875, "error": 0.25},
                    **{"bias": "l.bias", "dtype": "F32"},
                }
            ],
            "files": [],
            "metadata": {"made": "by hand"},
        }
        for name, (dtype, array) in TENSORS.items():
            entry = {"name": name, "dtype": dtype, "shape": list(array.shape), "nbytes": array.nbytes}
            entry |= {"offset": self.append(array.tobytes()), "xxh3": xxhash.xxh3_64_hexdigest(array.tobytes())}
            self.index["tensors"].append(entry)
        self.index["tensors"].append({**self.at("tensors", "tied"), "name": "tied too"})
        entry = {"name": "config.json", "nbytes": len(CONFIG), "sha256": hashlib.sha256(CONFIG).hexdigest()}
        self.index["files"].append({**entry, "offset": self.append(CONFIG)})

    def append(self, data: bytes) -> int:
        """Appends a blob and its padding; returns its offset in the file."""
        offset = 64 + len(self.data)
        self.data += data + bytes(-len(data) % 64)
        return offset

    def at(self, *path: Any) -> Any:
        item = self.index
        for key in path:
            if isinstance(item, list) and isinstance(key, str):
                key = next(i for i, entry in enumerate(item) if entry["name"] == key)
            item = item[key]
        return item

    def edit(self, edits: Mapping[Any, Any]) -> Parts:
        for path, value in edits.items():
            if isinstance(path, str):
                assert hasattr(self, path), path
                setattr(self, path, value)
            elif value is ...:
                del self.at(*path[:-1])[path[-1]]
            elif path[-1] == "+":
                self.at(*path[:-1]).append(value)
            else:
                self.at(*path[:-1])[path[-1]] = copy.deepcopy(value)
        return self

    def build(self) -> bytes:
        text = self.index_text
        if text is None:
            text = json.dumps(self.index, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        offset = 64 + len(self.data) if self.index_offset is None else self.index_offset
        nbytes = len(text) if self.index_nbytes is None else self.index_nbytes
        committed = 64 + len(self.data) + len(text) + 64 if self.committed is None else self.committed
        sha256 = self.sha256 or hashlib.sha256(text).digest()
        head = struct.pack(
            "<8sHHIQ40s", self.magic, self.major, self.minor, self.head_reserved, committed, self.head_rest
        )
        tail = struct.pack("<QQ32s8s8s", offset, nbytes, sha256, self.tail_reserved, self.tail_magic)
        return head + self.data + text + tail + self.trailing
