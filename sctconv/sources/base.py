"""What a user may name as input, behind one interface."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from sctconv.formats.checkpoint import DenseTensors, TensorInfo, check_shard
from sctconv.formats.errors import MissingFileError, UnsupportedCheckpointError
from sctconv.runtime.skeleton import TOKENIZER_FILES

SMALL_FILES: Final = ("config.json", "generation_config.json", *TOKENIZER_FILES)
"""Files of a model that travel with it, besides its notices."""

NOTICE: Final = re.compile(r"(?i)(licen[cs]e|notice|copying|use_policy)[\w.-]*")
"""Names of licence and notice files, which travel too."""

MAX_SMALL_FILE_BYTES: Final = 256 << 20


@dataclass
class Source:
    """An opened dense checkpoint.

    Attributes:
        label: what to call it in messages: the path or Hub id as the user gave it.
        name: a bare name, for the output's.
        files: config.json, tokenizer, generation_config.json, notices: verbatim.
        dense: the tensors, by the checkpoint's own names.
        origin: where it came from, for the provenance in the file: no path of this machine.
    """

    label: str
    name: str
    files: Mapping[str, bytes]
    dense: DenseTensors
    origin: dict[str, Any] = field(default_factory=dict)
    _hashes: dict[Path, str] = field(default_factory=dict, repr=False)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """See `DenseTensors`."""
        return self.dense.tensors

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """See `DenseTensors`."""
        return self.dense.chunks(name)

    def sha256(self, shard: Path) -> str:
        """The sha256 of a shard, as hex; taken once."""
        if shard not in self._hashes:
            with open(shard, "rb") as file:
                self._hashes[shard] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._hashes[shard]

    def fingerprint(self, shard: Path) -> str:
        """Something that differs where the content of a shard does."""
        return self.sha256(shard)

    def release(self, shard: Path) -> None:
        """Called once nothing more will be read from a shard. A local checkpoint is left as it is."""


def read_small_files(directory: Path) -> dict[str, bytes]:
    """The files of a model directory that travel with the model.

    Raises:
        MissingFileError: one cannot be read. LFSPointerError: one is a git-lfs pointer.
        UnsupportedCheckpointError: one is too large to be what its name says.
    """
    files = {}
    try:
        paths = sorted(path for path in directory.iterdir() if path.is_file())
        for path in paths:
            if (path.name in SMALL_FILES or NOTICE.fullmatch(path.name)) and check_small(path):
                files[path.name] = path.read_bytes()
    except OSError as error:
        raise MissingFileError(f"{directory}: cannot be read ({error.strerror})") from None
    return files


def check_small(path: Path) -> int:
    """The size of a small file after a look at it. Raises as `read_small_files` does."""
    size = path.stat().st_size
    if size > MAX_SMALL_FILE_BYTES:
        raise UnsupportedCheckpointError(f"{path}: {size} bytes; more than a configuration or tokenizer file may have")
    return check_shard(path) if size else 0
