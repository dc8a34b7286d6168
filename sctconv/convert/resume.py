"""Whether a stopped conversion may be gone on with: what decides its bytes, held against what it was begun with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
import transformers

import sctconv
from sctconv.errors import OptionError
from sctconv.formats.atomic import part_path
from sctconv.formats.part import check_part, open_part
from sctconv.sources.weights import DenseModel

from .calibration import Calibration
from .options import ConvertOptions
from .progress import Progress

JOURNAL_SECONDS: Final = 10.0
"""How often a conversion keeps what it has done; an entry costs a fraction of a second."""

_SHOWN: Final = 40


def fits_path(path: Path) -> Path:
    """Where a calibrated conversion to `path` keeps its fits; see `FitStore`."""
    return path.with_name(f"{path.name}.fits")


def check_stopped(path: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuses to begin a conversion anew where a stopped one stands, unless that may be replaced.

    Raises:
        OutputError: it does.
    """
    for kept in (path, fits_path(path)):
        check_part(kept, overwrite=overwrite, resume=resume)


def go_on_with(path: Path) -> str | None:
    """What to say of a conversion to `path` that is stopped; None where it leaves nothing to go on from."""
    if not any(part_path(kept).exists() for kept in (path, fits_path(path))):
        return None
    return f"what is done is kept beside {path}; go on with --resume"


def fingerprint(
    model: DenseModel, options: ConvertOptions, texts: Calibration | None, *, progress: Progress | None = None
) -> dict[str, Any]:
    """What decides the bytes of a conversion, each by the name that a message may give it.

    A shard counts by its content, and one from the Hub by its commit. Not counted: where memory ends and how many threads
    there are.
    """
    source = model.source
    shards = sorted({info.shard for info in source.tensors.values()})
    marks: dict[str, str] = {}
    for place, shard in enumerate(shards):
        if progress:  # a checkpoint of 140 GB is read for minutes
            progress(place, len(shards), f"checksum of {shard.name}")
        marks[shard.name] = source.fingerprint(shard)
    given = {key: value for key, value in asdict(options).items() if key not in ("calibration", "max_memory")}
    return {
        "sctconv": sctconv.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **{f"--{key.replace('_', '-')}": value for key, value in given.items()},
        "calibration text": None
        if texts is None
        else _digest(texts.fit.numpy().tobytes(), texts.held_out.numpy().tobytes()),
        **marks,
        **{name: _digest(data) for name, data in sorted(source.files.items())},
    }


def _digest(*parts: bytes) -> str:
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part)
    return sha256.hexdigest()


def digest(key: dict[str, Any]) -> str:
    """A fingerprint in one word."""
    return _digest(json.dumps(key, sort_keys=True).encode())


def check_same(metadata: Mapping[str, Any], key: dict[str, Any], part: Path) -> None:
    """Holds a fingerprint against what a stopped run wrote: its own as `resume`, or the digest of one at the end.

    Raises:
        OptionError: the first item that differs, with both values.
    """
    again = "take that again, or pass --overwrite without --resume to begin anew"
    begun = metadata.get("resume")
    if begun is None:
        if metadata.get("fingerprint") != digest(key):
            raise OptionError(f"{part}: another conversion, complete but for its name; move it away, or {again}")
        return
    for name in [*key, *begun]:
        old, new = begun.get(name), key.get(name)
        if old != new:
            raise OptionError(f"{part}: was begun with {name} {_short(old)}, not {_short(new)}; {again}")


def check_fits(path: Path, key: dict[str, Any]) -> None:
    """The same of the fits of a calibrated conversion to `path` that was stopped before it kept anything else.

    Raises:
        OptionError: as `check_same`. FormatError: they are damaged.
    """
    begun = open_part(fits_path(path))
    if begun is not None:
        with begun:
            check_same(begun.index.metadata, key, part_path(fits_path(path)))


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
