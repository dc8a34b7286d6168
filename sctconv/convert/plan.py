"""Which layers are factored, at which rank, and what the file will take."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from sctconv.errors import OptionError
from sctconv.formats.checkpoint import TensorInfo
from sctconv.formats.dtypes import FLOATS, numpy_dtype
from sctconv.formats.reader import SctFile, is_sct
from sctconv.runtime.skeleton import linear_layers
from sctconv.sources.weights import DenseModel

from .options import GROUPS, STORAGE_DTYPES, ConvertOptions

_ENTRY: Final = 63 + 136
"""Padding of a tensor and its entry in the index, without its name, at most; of each of a layer's three."""

_RECORD: Final = 256
"""A factored layer's record in the index, without its name, and what the metadata say of it."""

_SHARD: Final = 160
"""A shard's name and sha256 in the metadata."""

_METADATA: Final = 8 << 10
"""The rest of them."""

_ATTENTION: Final = re.compile(r"attn|attention", re.IGNORECASE)
_OTHER: Final = re.compile(r"mixer|mamba|ssm|rnn|recurrent", re.IGNORECASE)
_ROUTER: Final = re.compile(r"(?:shared_expert_)?gate|router", re.IGNORECASE)


@dataclass(frozen=True)
class LayerPlan:
    """A selected linear layer W (out, in).

    Attributes:
        rank: the rank it is factored at; None if it stays dense, or while energy is to decide.
        reason: why it stays dense; None if it is factored.
        transposed: whether the checkpoint stores W^T (GPT-2's Conv1D).
    """

    name: str
    out: int
    in_: int
    bias: bool
    transposed: bool
    rank: int | None = None
    reason: str | None = None

    @property
    def largest_useful_rank(self) -> int:
        """The largest k with k (out + in + 1) < out * in; 0 if there is none."""
        return (self.out * self.in_ - 1) // (self.out + self.in_ + 1)

    @property
    def parameters(self) -> int:
        """Parameters of W as planned."""
        return self.rank * (self.out + self.in_ + 1) if self.rank else self.out * self.in_

    def with_rank(self, rank: int, *, must_shrink: bool = True) -> LayerPlan:
        """The same layer factored at this rank, or dense with the reason where that would not shrink it."""
        if rank > min(self.out, self.in_):
            return replace(self, reason=f"rank {rank} is beyond min({self.out}, {self.in_})")
        if must_shrink and rank > self.largest_useful_rank:
            return replace(self, reason=f"rank {rank} would not shrink it (up to {self.largest_useful_rank} would)")
        return replace(self, rank=rank)


@dataclass(frozen=True)
class Plan:
    """What a conversion will do.

    Attributes:
        layers: the selected layers by the name of their weight, in the model's order.
        tensors: every tensor of the checkpoint.
        dtype: on-disk dtype for floating tensors; None for their own.
        files: bytes of the files that go along.
    """

    layers: dict[str, LayerPlan]
    tensors: dict[str, TensorInfo]
    dtype: str | None
    files: int = 0

    def stored_dtype(self, info: TensorInfo) -> str:
        """The on-disk dtype of a tensor."""
        return self.dtype if self.dtype and info.dtype in FLOATS else info.dtype

    def factor_dtype(self, info: TensorInfo) -> str:
        """The on-disk dtype of the factors of a weight: never wider than float32."""
        return "F32" if self.stored_dtype(info) == "F64" else self.stored_dtype(info)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all tensors if nothing were factored, in the file's dtypes."""
        return sum(self._bytes(info, info.size) for info in self.tensors.values())

    @property
    def bytes(self) -> int:
        """Bytes of all tensors as planned; layers that energy is yet to decide count as dense."""
        return sum(self._bytes(info, self._size(name, info)) for name, info in self.tensors.items())

    @property
    def file_bytes(self) -> int:
        """What the file will have at most: tensors, files, and a generous index."""
        factored = {name for name, layer in self.layers.items() if layer.reason is None}
        entries = sum((len(name.encode()) + _ENTRY) * (3 if name in factored else 1) for name in self.tensors)
        records = sum(len(name.encode()) + _RECORD for name in factored)
        shards = len({info.shard for info in self.tensors.values()}) * _SHARD
        return self.bytes + self.files + entries + records + shards + _METADATA

    @property
    def dense_parameters(self) -> int:
        """Entries of the checkpoint's tensors."""
        return sum(info.size for info in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Entries of the tensors as planned."""
        return sum(self._size(name, info) for name, info in self.tensors.items())

    def _size(self, name: str, info: TensorInfo) -> int:
        return self.layers[name].parameters if name in self.layers else info.size

    def _bytes(self, info: TensorInfo, size: int) -> int:
        return size * numpy_dtype(self.stored_dtype(info)).itemsize


def make_plan(model: DenseModel, options: ConvertOptions, *, must_shrink: bool = True) -> Plan:
    """Selects the layers and gives each its rank, where the options alone decide it.

    Args:
        model: the dense checkpoint.
        options: what to select and how to choose ranks.
        must_shrink: whether a layer stays dense where factors would take more; tests turn it off for the full rank.

    Raises:
        OptionError: nothing is selected, or nothing that is selected can be factored at this rank or to this size.
    """
    if options.target_size is not None:
        return _largest_within(model, options, options.target_size)
    layers = {}
    for layer in select_layers(model.skeleton, options.modules):
        weight = f"{layer.name}.weight"
        if reason := _must_stay(model, weight):
            layer = replace(layer, reason=reason)
        elif options.rank is not None:
            layer = layer.with_rank(options.rank, must_shrink=must_shrink)
        elif options.ranks is not None:
            rank = options.ranks.get(layer.name)
            layer = replace(layer, reason="--ranks gives it none") if rank is None else layer.with_rank(rank)
        elif options.ratio is not None:
            # as many parameters as the share allows, which always shrinks
            layer = layer.with_rank(max(1, int(options.ratio * layer.out * layer.in_ / (layer.out + layer.in_ + 1))))
        layers[weight] = layer
    if options.ranks is not None:
        _check_ranks(options.ranks, layers.values(), options)
    _check_rank(list(layers.values()), options)
    dtype = STORAGE_DTYPES[options.dtype] if options.dtype else None
    files = sum(len(data) for data in model.source.files.values())
    return Plan({name: layers[name] for name in model.tensors if name in layers}, dict(model.tensors), dtype, files)


def _largest_within(model: DenseModel, options: ConvertOptions, size: int) -> Plan:
    """The plan of the largest rank for all layers whose file is not larger than a size."""

    def plan(rank: int) -> Plan:
        return make_plan(model, replace(options, target_size=None, rank=rank))

    low, high = 1, max(layer.largest_useful_rank for layer in plan(1).layers.values())
    smallest, largest = plan(low).file_bytes, plan(high).file_bytes
    if smallest > size:
        raise OptionError(
            f"--target-size {size}: at rank 1 the file still takes up to {smallest} bytes; allow more, or factor more layers "
            "by --modules all"
        )
    if largest <= size:
        raise OptionError(f"--target-size {size}: factored at any rank it is smaller, {largest} bytes at most")
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if plan(middle).file_bytes <= size else (low, middle)
    return plan(low)


def select_layers(skeleton: Any, modules: str) -> Iterator[LayerPlan]:
    """The linear layers that `modules` names, as `ConvertOptions` says, none with a rank yet.

    Raises:
        OptionError: there are none.
    """
    shapes = linear_layers(skeleton)
    if modules in GROUPS:
        wanted = ("mlp", "attention") if modules == "all" else (modules,)
        names = [name for name in shapes if _group(name) in wanted]
        if not names:
            raise OptionError(f"--modules {modules}: a {skeleton.config.model_type} has no such linear layers")
    else:
        names = [name for name in shapes if re.search(modules, name)]
        if not names:
            raise OptionError(
                f"--modules {modules!r}: matches none of the {len(shapes)} linear layers, {next(iter(shapes), '')} for example"
            )
    for name in names:
        shape = shapes[name]
        yield LayerPlan(name, shape.out, shape.in_, shape.bias, shape.transposed)


def is_fittable(model: DenseModel, name: str) -> bool:
    """Whether a linear layer that stays dense may be fitted to calibration text: one of a block's, and no other's too."""
    return _group(name) is not None and _must_stay(model, f"{name}.weight") is None


def _group(name: str) -> str | None:
    """`mlp` or `attention` for a linear layer of a decoder block, None for any other.

    A block is an element of a module list, so its path has a number; what follows tells attention from the rest.
    """
    match = re.search(r"\.\d+\.(.+)$", f".{name}")
    if match is None or _OTHER.search(match[1]) or _ROUTER.fullmatch(name.rpartition(".")[2]):
        return None
    return "attention" if _ATTENTION.search(match[1]) else "mlp"


def _must_stay(model: DenseModel, weight: str) -> str | None:
    tied = model.skeleton.all_tied_weights_keys
    for target, origin in tied.items():
        if weight in (target, origin):
            return f"tied to {origin if weight == target else target}"
    if weight not in model.tensors:
        return "not in the checkpoint"
    dtype = model.tensors[weight].dtype
    return None if dtype in FLOATS else f"stored as {dtype}"


def read_ranks(path: str | os.PathLike[str]) -> dict[str, int]:
    """The ranks of another conversion: of a .sct file, or of what `sctconv convert --json` printed, dry or not.

    Raises:
        OptionError: the file has none. OSError: it cannot be read. FormatError: the .sct file is damaged.
    """
    if is_sct(path):
        with SctFile(path) as file:
            return {record.name: record.rank for record in file.index.layers.values()}
    try:
        layers = json.loads(Path(path).read_text(encoding="utf-8"))["layers"]
        ranks = {str(layer["name"]): layer["rank"] for layer in layers if layer["rank"] is not None}
    except (ValueError, KeyError, TypeError):
        ranks = {}
    if not ranks or not all(type(rank) is int and rank > 0 for rank in ranks.values()):
        raise OptionError(f"--ranks {path}: neither a .sct file nor what `sctconv convert --json` prints")
    return ranks


def _check_ranks(ranks: Mapping[str, int], layers: Iterable[LayerPlan], options: ConvertOptions) -> None:
    """Refuses ranks of another model or selection, and any that would not shrink their layer."""
    selected = {layer.name: layer for layer in layers}
    strange = next((name for name in ranks if name not in selected), None)
    if strange is not None:
        raise OptionError(f"--ranks: {strange} is not among the {len(selected)} layers of --modules {options.modules}")
    refused = next((layer for name, layer in selected.items() if name in ranks and layer.rank is None), None)
    if refused is not None:
        raise OptionError(f"--ranks: {refused.name} cannot have rank {ranks[refused.name]}: {refused.reason}")


def _check_rank(layers: list[LayerPlan], options: ConvertOptions) -> None:
    """Refuses a conversion that would factor nothing."""
    if any(layer.reason is None for layer in layers):
        return
    candidates = [layer for layer in layers if layer.reason and layer.reason.startswith("rank ")]
    if not candidates:
        raise OptionError(
            f"--modules {options.modules}: none of the {len(layers)} layers can be factored; "
            f"{layers[0].name} is {layers[0].reason}"
        )
    limit = max(min(layer.out, layer.in_) for layer in candidates)
    if options.rank is not None and options.rank > limit:
        raise OptionError(
            f"--rank {options.rank}: beyond min(out, in) of every selected layer; the largest has {limit}"
        )
    useful = max(layer.largest_useful_rank for layer in candidates)
    raise OptionError(
        f"--rank {options.rank}: would shrink none of the {len(candidates)} selected layers; "
        f"the largest rank that does is {useful}"
    )
