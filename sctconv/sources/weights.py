"""A checkpoint's tensors under the names that the model gives them."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from sctconv.formats.checkpoint import TensorInfo, read_tensor
from sctconv.formats.errors import MissingFileError, UnsupportedCheckpointError
from sctconv.runtime.skeleton import build_skeleton, load_config
from sctconv.runtime.tensors import to_numpy, to_torch

from .base import Source


@dataclass
class _Merge:
    """Checkpoint tensors that transformers joins or splits into one or more of the model's (stacked experts, say)."""

    converter: WeightConverter
    first: str
    sources: list[tuple[str, str]] = field(default_factory=list)  # (pattern, checkpoint name)


class DenseModel:
    """A dense checkpoint by the names of the model's own parameters, lazily; itself a `DenseTensors`.

    Names on disk and in the model differ for some architectures (a prefix dropped, experts stored one by one). The
    rules are transformers' own, applied one tensor at a time instead of to the whole state dict.

    Attributes:
        source: the checkpoint.
        config: its transformers configuration.
        skeleton: its model on the meta device; see `runtime.skeleton`.
        tensors: model name -> what is known of it, in the order of the shards.
        unused: checkpoint tensors that the model has no place for, among `tensors` under their own names.

    Raises:
        ModelError: transformers does not know the architecture.
        CheckpointError: a tensor has another shape than the model's, or the model needs one that is not there.
    """

    def __init__(self, source: Source) -> None:
        self.source: Final = source
        self.config: Final = load_config(source.files, source.label, [info.shape for info in source.tensors.values()])
        self.skeleton: Final = build_skeleton(self.config, source.label)
        self._origin: dict[str, str] = {}
        self._merges: dict[str, _Merge] = {}
        self._merged: tuple[_Merge | None, dict[str, np.ndarray]] = (None, {})
        self.unused: Final[list[str]] = []
        self._map_names()
        self.tensors: Final = self._describe()
        self._check()

    def _map_names(self) -> None:
        mapping = get_model_conversion_mapping(self.skeleton)
        renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        prefix, places = self.skeleton.base_model_prefix, self.skeleton.state_dict()
        merges: dict[str, _Merge] = {}
        for name in sorted(self.source.tensors, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, places)
            if target not in places and name in places:
                target, pattern = rename_source_key(name, [], [], prefix, places)
            if target not in places:
                self.unused.append(name)
            elif pattern is None:
                self._origin[target] = name
            else:
                merge = merges.setdefault(target, _Merge(by_pattern[pattern], target))
                merge.sources.append((pattern, name))
        for merge in merges.values():
            targets = merge.converter.target_patterns
            for target in targets:
                self._merges[merge.first.replace(targets[0], target)] = merge

    def _describe(self) -> dict[str, TensorInfo]:
        """In the order in which the shards are needed, so that each can be read once and given back."""
        shards = {info.shard: place for place, info in enumerate(self.source.tensors.values())}
        places = self.skeleton.state_dict()
        tensors = {target: self.source.tensors[name] for target, name in self._origin.items()}
        tensors |= {name: self.source.tensors[name] for name in self.unused}
        for target, merge in self._merges.items():
            infos = [self.source.tensors[name] for _, name in merge.sources]
            last = max((info.shard for info in infos), key=lambda shard: shards[shard])
            tensors[target] = TensorInfo(infos[0].dtype, tuple(places[target].shape), last)
        return dict(sorted(tensors.items(), key=lambda pair: (shards[pair[1].shard], dot_natural_key(pair[0]))))

    def shards_read_by(self, name: str) -> set[Path]:
        """The shards that a tensor is read from."""
        merge = self._merges.get(name)
        names = [source for _, source in merge.sources] if merge else [self._origin.get(name, name)]
        return {self.source.tensors[source].shard for source in names}

    def shards_done_after(self, name: str) -> set[Path]:
        """The shards that nothing after this tensor, in the order of `tensors`, is read from."""
        return {shard for shard in self.shards_read_by(name) if self._last_use[shard] == name}

    @cached_property
    def _last_use(self) -> dict[Path, str]:
        return {shard: name for name in self.tensors for shard in self.shards_read_by(name)}

    def _check(self) -> None:
        places = self.skeleton.state_dict()
        for name, info in self.tensors.items():
            if name in places and tuple(places[name].shape) != info.shape:
                raise UnsupportedCheckpointError(
                    f"{self.source.label}: {name} is {list(info.shape)} in {info.shard.name}, "
                    f"but config.json makes it {list(places[name].shape)}"
                )
        missing = {name for name, place in places.items() if place.device.type == "meta" and name not in self.tensors}
        for target, origin in self.skeleton.all_tied_weights_keys.items():
            if target in self.tensors or origin in self.tensors:
                missing -= {target, origin}
        if missing:
            raise MissingFileError(
                f"{self.source.label}: lacks {len(missing)} of the model's {len(places)} tensors, the first {min(missing)}"
            )

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Consecutive flat pieces of a tensor in row-major order; a merged tensor comes in one piece."""
        if name in self._merges:
            return iter([self._merge(self._merges[name])[name].reshape(-1)])
        return self.source.chunks(self._origin.get(name, name))

    def _merge(self, merge: _Merge) -> dict[str, np.ndarray]:
        """What transformers makes of a group; the last one is kept, as its outputs are asked for one after another."""
        if self._merged[0] is not merge:
            self._merged = (None, {})
            converter: Any = deepcopy(merge.converter)
            for pattern, name in merge.sources:
                converter.add_tensor(merge.first, name, pattern, _reader(self.source, name))
            made = converter.convert(merge.first, model=self.skeleton, config=self.config)
            tensors = {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
            self._merged = (merge, {key: to_numpy(value.contiguous()) for key, value in tensors.items()})
        return self._merged[1]


def _reader(source: Source, name: str) -> Any:
    return lambda: to_torch(read_tensor(source, name))
