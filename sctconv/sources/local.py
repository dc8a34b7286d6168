"""Checkpoints on this machine: a Hugging Face directory or a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

from sctconv.formats.checkpoint import DenseTensors, check_shard, one_line
from sctconv.formats.errors import CorruptShardError, MissingFileError, UnsupportedCheckpointError
from sctconv.formats.reader import is_sct
from sctconv.formats.safetensors_dir import SafetensorsTensors, read_weight_map

from .base import Source, read_small_files

SAFETENSORS_INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"


def open_local(path: Path, label: str) -> Source:
    """Opens a directory, or a file within one.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be read.
    """
    if path.is_dir():
        return _open_directory(path, label)
    if not path.exists():
        raise MissingFileError(f"{path}: no such file or directory")
    check_shard(path)
    if is_sct(path):
        raise UnsupportedCheckpointError(f"{path}: a .sct file; its layers are factored already")
    if path.suffix == ".gguf" or _starts_with(path, b"GGUF"):
        from .gguf import open_gguf

        return open_gguf(path, label)
    if path.suffix in (".safetensors", ".bin", ".json"):
        raise UnsupportedCheckpointError(f"{path}: name the directory that it is in, {path.parent}, not the file")
    raise UnsupportedCheckpointError(f"{path}: neither a checkpoint directory nor a GGUF file")


def _open_directory(directory: Path, label: str) -> Source:
    ggufs = sorted(directory.glob("*.gguf"))
    dense, kind = _open_shards(directory)
    if dense is None:
        if len(ggufs) == 1:
            return open_local(ggufs[0], label)
        if ggufs:
            raise UnsupportedCheckpointError(f"{directory}: {len(ggufs)} GGUF files; name one, {ggufs[0]} for example")
        raise MissingFileError(
            f"{directory}: no checkpoint here (model.safetensors, {SAFETENSORS_INDEX}, pytorch_model.bin, *.gguf)"
        )
    files = read_small_files(directory)
    if "config.json" not in files:
        raise MissingFileError(f"{directory}: has no config.json")
    refuse_quantised(files["config.json"], label)
    name = directory.resolve().name
    return Source(label, name, files, dense, {"source": name, "format": kind})


def _open_shards(directory: Path) -> tuple[DenseTensors | None, str]:
    if (index := directory / SAFETENSORS_INDEX).exists():
        weight_map = read_weight_map(index)
        shards = [directory / file for file in sorted(set(weight_map.values()))]
        return SafetensorsTensors(shards, weight_map), "safetensors"
    single = directory / "model.safetensors"
    found = [single] if single.exists() else sorted(directory.glob("*.safetensors"))
    if len(found) == 1:
        return SafetensorsTensors(found), "safetensors"
    if found:
        raise MissingFileError(f"{directory}: {len(found)} .safetensors files, but no {SAFETENSORS_INDEX} to join them")
    from .torch_bin import TorchBinTensors

    if (index := directory / BIN_INDEX).exists():
        shards = [directory / file for file in sorted(set(read_weight_map(index).values()))]
        return TorchBinTensors(shards), "torch"
    if (single := directory / "pytorch_model.bin").exists():
        return TorchBinTensors([single]), "torch"
    return None, ""


def refuse_quantised(config: bytes, label: str) -> None:
    """Refuses a checkpoint whose weights are packed by a quantiser.

    Raises:
        UnsupportedCheckpointError: config.json has a quantization_config. CorruptShardError: it is not JSON.
    """
    try:
        item = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise CorruptShardError(f"{label}: config.json is not JSON ({one_line(error)})") from None
    quantisation = item.get("quantization_config") if isinstance(item, dict) else None
    if quantisation:
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else "unknown"
        raise UnsupportedCheckpointError(f"{label}: quantised with {method}; convert the original, unquantised model")


def _starts_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError as error:
        raise MissingFileError(f"{path}: cannot be read ({error.strerror})") from None
