"""A .sct file held against the dense checkpoint that it was made of."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash

from sctconv.formats.checkpoint import read_tensor
from sctconv.formats.dtypes import numpy_dtype
from sctconv.formats.errors import SctError
from sctconv.formats.index import LayerRecord, TensorEntry
from sctconv.formats.reader import SctFile
from sctconv.runtime.linalg import frobenius_norm, residual_norm
from sctconv.runtime.skeleton import linear_layers
from sctconv.runtime.tensors import to_torch
from sctconv.sources import Source, open_source
from sctconv.sources.weights import DenseModel

_RELATIVE: Final = 1e-6
"""The most that a recomputed error may differ from the recorded one: float64 sums in another order, and no more."""

_ABSOLUTE: Final = 1e-9
_NAMED: Final = 4
_IN_A_BLOCK: Final = re.compile(r"\.\d+\.")


class DifferenceError(SctError):
    """A file is not what its source and its own record say."""


@dataclass(frozen=True)
class Difference:
    """A layer whose error is not the recorded one, or a dense tensor that is not the source's.

    Attributes:
        name: of the layer or tensor; `kind` says which: `layer` or `tensor`.
        recorded: of a layer the record's `error`; of a tensor the source's entry where the two are farthest apart.
        found: of a layer |W - U diag(s) V^T| / |W|; of a tensor the file's entry at that place.
    """

    name: str
    kind: str
    recorded: float
    found: float

    def __str__(self) -> str:
        if self.kind == "layer":
            return f"{self.name} has an error of {self.found:.6g}, recorded as {self.recorded:.6g}"
        return f"{self.name} has {self.found:.6g} where the source has {self.recorded:.6g}"


@dataclass(frozen=True)
class Comparison:
    """What `compare_with_source` found.

    Attributes:
        source: what the user named; `shards_recorded`: whether its shards have the sha256 in the file's metadata, None where
            none are there.
        layers: factored layers of which the error was computed again; `worst_error` the largest of them, `unrecorded` how
            many have no error on record.
        tensors: dense tensors compared; `fitted` how many of them calibration changed.
        trained: whether the file was trained since, after which neither errors nor dense tensors follow the source.
        differences: what is not as it should be.
    """

    source: str
    shards_recorded: bool | None
    layers: int
    unrecorded: int
    worst_error: float
    tensors: int
    fitted: int
    trained: bool
    differences: list[Difference]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    def check(self, path: str | os.PathLike[str]) -> None:
        """Raises DifferenceError where something is not as it should be; names the first few."""
        if self.trained and self.shards_recorded is False:
            raise DifferenceError(
                f"{path}: was trained, and not from {self.source}: its shards are not those of the file's metadata"
            )
        if not self.differences:
            return
        named = "; ".join(str(item) for item in self.differences[:_NAMED])
        more = f"; and {len(self.differences) - _NAMED} more" if len(self.differences) > _NAMED else ""
        other = " (whose shards are not those of the file's metadata)" if self.shards_recorded is False else ""
        raise DifferenceError(
            f"{path}: {len(self.differences)} of {self.layers + self.tensors} layers and tensors do not agree with "
            f"{self.source}{other}: {named}{more}"
        )


def compare_with_source(
    path: str | os.PathLike[str],
    source: str | Source,
    *,
    progress: Callable[[float, float, str], None] | None = None,
) -> Comparison:
    """Computes every layer's error again from the source's weight, and holds dense tensors against the source's.

    Memory is one weight in float32 and the work space of `residual_norm`. The file's blobs are taken to match their
    checksums (see `verify`): a dense tensor is compared by hashing the source's, cast to the file's dtype. What calibration
    fitted may differ: dense tensors of the blocks, and all of them where the whole model was tuned.

    Args:
        path: the .sct file.
        source: directory, GGUF file, Hub id, or an opened source.
        progress: called with entries done, entries in all, and a name.

    Raises:
        FormatError, CheckpointError, ModelError: one of the two cannot be read. DifferenceError: the source is another model.
    """
    source = open_source(source) if isinstance(source, str) else source
    model = DenseModel(source)
    with SctFile(path) as file:
        compared = _Compared(file, model)
        compared.check_names()
        total, done = float(sum(info.size for info in model.tensors.values())), 0.0
        for name, info in model.tensors.items():
            if progress:
                progress(done, total, name)
            compared.add(name)
            for shard in model.shards_done_after(name):
                source.release(shard)
            done += info.size
        return Comparison(source.label, _same_shards(file, model), *compared.result())


class _Compared:
    def __init__(self, file: SctFile, model: DenseModel) -> None:
        self._file, self._model = file, model
        self._layers = {f"{name}.weight": record for name, record in file.index.layers.items()}
        self._transposed = {
            f"{name}.weight" for name, shape in linear_layers(model.skeleton).items() if shape.transposed
        }
        conversion = file.index.metadata.get("conversion")
        facts = conversion if isinstance(conversion, dict) else {}
        self._calibrated, self._tuned = facts.get("method") == "calibrated", "tuning" in facts
        self._trained = "training" in file.index.metadata
        self._errors: list[float] = []
        self._unrecorded = self._tensors = self._fitted = 0
        self._differences: list[Difference] = []

    def result(self) -> tuple[int, int, float, int, int, bool, list[Difference]]:
        """What `Comparison` has after its first two."""
        worst = max(self._errors, default=0.0)
        counts = (len(self._errors), self._unrecorded, worst, self._tensors, self._fitted)
        return (*counts, self._trained, self._differences)

    def check_names(self) -> None:
        """Refuses a source whose tensors are not those of the file, by name and shape."""
        tensors = self._model.tensors
        factors = {factor for record in self._layers.values() for factor in record.factors}
        shapes = {name: entry.shape for name, entry in self._file.index.tensors.items() if name not in factors}
        for name, record in self._layers.items():
            shapes[name] = (record.in_, record.out) if name in self._transposed else (record.out, record.in_)
        for name in [*tensors, *shapes]:
            if name.startswith("optimizer."):  # a checkpoint's own
                continue
            mine, theirs = shapes.get(name), tensors[name].shape if name in tensors else None
            if mine != theirs:
                raise DifferenceError(
                    f"{self._model.source.label}: another model than {self._file.path} was made of: {name} is "
                    f"{_shape(theirs)} there and {_shape(mine)} in the file"
                )

    def add(self, name: str) -> None:
        """Compares a tensor of the source."""
        if (record := self._layers.get(name)) is not None:
            self._add_layer(record)
        else:
            self._add_tensor(self._file.entry(name))

    def _add_layer(self, record: LayerRecord) -> None:
        name = f"{record.name}.weight"
        W = to_torch(read_tensor(self._model, name, np.float32))
        W = W.T if name in self._transposed else W
        U, s, V = (to_torch(self._file.read(factor)) for factor in record.factors)
        norm = frobenius_norm(W)
        error = residual_norm(W, U, s, V) / norm if norm else 0.0
        self._errors.append(error)
        if record.error is None:
            self._unrecorded += 1
        elif not abs(error - record.error) <= _ABSOLUTE + _RELATIVE * record.error:  # NaN is not
            self._differences.append(Difference(record.name, "layer", record.error, error))

    def _add_tensor(self, entry: TensorEntry) -> None:
        self._tensors += 1
        digest = xxhash.xxh3_64()
        for chunk in self._cast(entry):
            digest.update(chunk.tobytes())
        if digest.hexdigest() == entry.xxh3:
            return
        if self._trained or self._tuned or (self._calibrated and _IN_A_BLOCK.search(entry.name)):
            self._fitted += 1
            return
        expected, found = np.concatenate(list(self._cast(entry))), self._file.read(entry.name).reshape(-1)
        places = np.abs(expected.astype(np.float64) - found.astype(np.float64))
        place = int(np.argmax(np.where(np.isnan(places), np.inf, places)))
        self._differences.append(Difference(entry.name, "tensor", float(expected[place]), float(found[place])))

    def _cast(self, entry: TensorEntry) -> Iterator[np.ndarray]:
        with np.errstate(over="ignore"):
            for chunk in self._model.chunks(entry.name):
                yield chunk.reshape(-1).astype(numpy_dtype(entry.dtype), copy=False)


def _same_shards(file: SctFile, model: DenseModel) -> bool | None:
    """Whether the source's shards are those that the file's metadata names, by sha256."""
    origin = file.index.metadata.get("source")
    shards = origin.get("shards") if isinstance(origin, dict) else None
    if not isinstance(shards, list):
        return None
    recorded = {shard.get("sha256") for shard in shards if isinstance(shard, dict)}
    used: set[Path] = {info.shard for info in model.source.tensors.values()}
    return {model.source.sha256(shard) for shard in used} == recorded if recorded else None


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
