"""Dense checkpoints in torch's own format: pytorch_model.bin, one file or shards with an index."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from sctconv.formats.checkpoint import CHUNK_BYTES, TensorInfo, check_shard, one_line, tensor_info
from sctconv.formats.errors import CorruptShardError, UnsupportedCheckpointError
from sctconv.runtime.tensors import TORCH_DTYPES, to_numpy

_NAMES: Final = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class TorchBinTensors:
    """The tensors of some torch .bin shards.

    Shards are unpickled with `weights_only`, so no code in them runs, and mapped, so only what is used is read. The
    mapping of a shard is dropped after each tensor. Files from before torch 1.6 cannot be mapped and are held whole.

    Args:
        shards: the files.

    Raises:
        CheckpointError: a shard is missing, a pointer, damaged, or holds more than tensors.
    """

    def __init__(self, shards: list[Path]) -> None:
        self.tensors: Final[dict[str, TensorInfo]] = {}
        for shard in shards:
            for name, tensor in _load(shard).items():
                if name in self.tensors:
                    raise CorruptShardError(f"{shard}: tensor {name} is also in {self.tensors[name].shard.name}")
                info = tensor_info(name, _NAMES.get(tensor.dtype, ""), tensor.shape, shard)
                if not info.dtype:
                    raise UnsupportedCheckpointError(
                        f"{shard}: tensor {name} is {tensor.dtype}, which is not supported"
                    )
                self.tensors[name] = info

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Consecutive flat pieces of a tensor in row-major order."""
        flat = _load(self.tensors[name].shard)[name].reshape(-1)
        for piece in flat.split(max(1, CHUNK_BYTES // flat.itemsize)):
            yield to_numpy(piece)


def _load(shard: Path) -> dict[str, torch.Tensor]:
    size = check_shard(shard)
    try:
        state = _unpickle(shard)
    except pickle.UnpicklingError as error:
        if "weights" in str(error).lower():
            raise UnsupportedCheckpointError(
                f"{shard}: holds more than tensors (pickled code, perhaps), which is not run; save it as safetensors"
            ) from None
        raise CorruptShardError(f"{shard}: not a torch checkpoint ({one_line(error)}); download it again") from None
    except Exception as error:  # torch lets out whatever its unpickling of nonsense met
        raise CorruptShardError(f"{shard}: cut or damaged ({one_line(error)}); download it again") from None
    tensors = _flat_tensors(state, shard)
    for name, tensor in tensors.items():
        if (
            tensor.layout != torch.strided or tensor.is_meta or tensor.numel() * tensor.itemsize > size
        ):  # strides of 0 make much of little
            raise CorruptShardError(
                f"{shard}: tensor {name!r:.80} is {list(tensor.shape)!s:.80}, more than the {size} bytes of the file"
            )
    return tensors


def _unpickle(shard: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols, of no use to who did not write the file
        try:
            return torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(shard, map_location="cpu", weights_only=True)


def _flat_tensors(state: Any, shard: Path) -> dict[str, torch.Tensor]:
    if isinstance(state, dict) and set(state) == {"state_dict"}:
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UnsupportedCheckpointError(f"{shard}: not a state dict of tensors; save the model's state_dict()")
    return {str(name): tensor for name, tensor in state.items()}
