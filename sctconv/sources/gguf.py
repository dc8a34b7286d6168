"""A GGUF file as a checkpoint in Hugging Face's terms.

Configuration, tokenizer, tensor names and the undoing of llama.cpp's changes to tensors are transformers' own, so the
result is what `from_pretrained(gguf_file=...)` gives. What is ours is that it goes one tensor at a time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import transformers
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from sctconv.formats.checkpoint import TensorInfo, one_line, read_tensor
from sctconv.formats.dtypes import FLOATS, numpy_dtype
from sctconv.formats.errors import CheckpointError, CorruptShardError, UnsupportedCheckpointError
from sctconv.formats.gguf_file import GgufTensors
from sctconv.runtime.config import check_sizes
from sctconv.runtime.skeleton import GENERIC_TOKENIZER, build_skeleton, load_config

from .base import Source

ARCHITECTURES: Final = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "stablelm", "starcoder2", "gpt2")
"""GGUF architectures that are read: dense decoders of which each GGUF tensor is one of the model's."""

_STREAMED: Final = ("token_embd.weight", "output.weight")
"""Large tensors that no architecture changes: passed on piece by piece. The others are held whole."""

_SIZES: Final = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.dimension_count": "head_dim",
}
"""Metadata of which transformers makes a configuration, as far as something is built by them."""

_EOS_KEYS: Final = ("eos", "eot", "eom")


def open_gguf(path: Path, label: str) -> Source:
    """Opens a GGUF file.

    Raises:
        CheckpointError: it is damaged, or of an architecture that is not read.
    """
    tensors = GgufTensors(path)
    if tensors.architecture not in ARCHITECTURES:
        raise UnsupportedCheckpointError(
            f"{path}: GGUF architecture {tensors.architecture!r} is not read (only {', '.join(ARCHITECTURES)}); "
            "convert from the model's safetensors"
        )
    shapes = [info.shape for info in tensors.tensors.values()]
    sizes = {name: tensors.field(f"{tensors.architecture}.{key}") for key, name in _SIZES.items()}
    check_sizes(sizes, f"{path}: the metadata", shapes)
    files = _small_files(path, tensors)
    config = load_config(files, label, shapes)
    experts = tensors.field(f"{tensors.architecture}.expert_count")
    if isinstance(experts, int) and experts > 1:
        raise UnsupportedCheckpointError(
            f"{path}: a mixture of {experts} experts; convert from the model's safetensors"
        )
    origin = {"source": path.name, "format": "gguf"}
    for key in ("name", "license", "basename", "finetune"):
        if isinstance(value := tensors.field(f"general.{key}"), str):
            origin[f"general.{key}"] = value
    return Source(label, path.stem, files, _NamedGguf(tensors, config), origin)


class _NamedGguf:
    """GGUF tensors under the model's own names, in the model's own order of rows."""

    def __init__(self, tensors: GgufTensors, config: Any) -> None:
        self._gguf = tensors
        self._processor = TENSOR_PROCESSORS.get(tensors.architecture, TensorProcessor)(config=config.to_dict())
        # llama.cpp keeps norms and biases in F32 beside narrow matrices; a model computes in one dtype
        kinds = {info.dtype for info in tensors.tensors.values() if len(info.shape) > 1 and info.dtype in FLOATS}
        self._dtype = kinds.pop() if len(kinds) == 1 else "F32"
        with _parsed_once(tensors):
            names = get_gguf_hf_weights_map(build_skeleton(config, str(tensors.path)), self._processor)
        self._gguf_names: dict[str, str] = {}
        self.tensors: Final[dict[str, TensorInfo]] = {}
        for gguf_name, info in tensors.tensors.items():
            name = "lm_head.weight" if gguf_name == "output.weight" else names.get(gguf_name, gguf_name)
            if name in self._gguf_names:
                raise CorruptShardError(f"{tensors.path}: {gguf_name} and {self._gguf_names[name]} are both {name}")
            self._gguf_names[name] = gguf_name
            self.tensors[name] = self._processed(gguf_name, info)

    def _processed(self, gguf_name: str, info: TensorInfo) -> TensorInfo:
        """Its shape after processing, found on a tensor that takes no memory."""
        info = replace(info, dtype=self._dtype if info.dtype in FLOATS else info.dtype)
        if gguf_name in _STREAMED:
            return info
        empty = np.broadcast_to(np.zeros((), np.float32), info.shape)
        shape = np.shape(self._process(empty, gguf_name)) if len(info.shape) > 1 else info.shape
        return TensorInfo(info.dtype, tuple(shape), info.shard)

    def _process(self, values: np.ndarray, gguf_name: str) -> np.ndarray:
        try:
            weights: np.ndarray = self._processor.process(values, gguf_name).weights
        except (ValueError, ZeroDivisionError):  # of a reshape by numbers of heads
            raise UnsupportedCheckpointError(
                f"{self._gguf.path}: tensor {gguf_name} of shape {list(values.shape)} cannot have as many heads as the metadata says"
            ) from None
        return weights

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        gguf_name, dtype = self._gguf_names[name], numpy_dtype(self.tensors[name].dtype)
        if gguf_name in _STREAMED:
            for piece in self._gguf.chunks(gguf_name):
                yield piece.astype(dtype, copy=False)
            return
        values = self._process(read_tensor(self._gguf, gguf_name), gguf_name)
        yield np.ascontiguousarray(values, dtype).reshape(-1)


@contextlib.contextmanager
def _parsed_once(tensors: GgufTensors) -> Iterator[None]:
    """Within, transformers is given the file as it was parsed, and gguf makes its table of names once.

    It would parse the file for the configuration, and again for the tokenizer, and make the table for each module of the
    model: of SmolLM2-135M, half of the ten seconds that opening takes.
    """
    import gguf

    instead = {
        "GGUFReader": lambda *_: tensors.reader,
        "get_tensor_name_map": functools.cache(gguf.get_tensor_name_map),
    }
    usual = {name: getattr(gguf, name) for name in instead}
    for name, stand_in in instead.items():
        setattr(gguf, name, stand_in)
    try:
        yield
    finally:
        for name, own in usual.items():
            setattr(gguf, name, own)


def _small_files(path: Path, tensors: GgufTensors) -> dict[str, bytes]:
    """config.json, generation_config.json and the tokenizer, as transformers recovers them from the metadata."""
    try:
        with _alone(path) as directory, _parsed_once(tensors):
            named: Any = {"gguf_file": path.name, "trust_remote_code": False}
            config = transformers.AutoConfig.from_pretrained(directory, **named)
            if not config.architectures:
                config.architectures = [_causal_class(config)]
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **named)
            return _saved(config, tokenizer, tensors)
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises what it likes here
        raise UnsupportedCheckpointError(
            f"{path}: transformers cannot recover the model from its metadata ({one_line(error)})"
        ) from None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """A directory in which a file is the only one: transformers would take settings and names of code from those beside it."""
    with tempfile.TemporaryDirectory(prefix="sctconv-") as directory:
        try:
            (Path(directory) / path.name).symlink_to(path.resolve())
        except OSError:  # Windows lets few make links
            yield path.parent
            return
        yield Path(directory)


def _saved(config: Any, tokenizer: Any, tensors: GgufTensors) -> dict[str, bytes]:
    # every id that ends a turn, or generation would run on past the first kind that the model happens to use
    ids = [tensors.field(f"tokenizer.ggml.{key}_token_id") for key in _EOS_KEYS]
    eos = list(dict.fromkeys(value for value in ids if value is not None))
    if eos:
        config.eos_token_id = eos[0]
    generation = {"bos_token_id": tensors.field("tokenizer.ggml.bos_token_id"), "eos_token_id": eos or None}
    with tempfile.TemporaryDirectory(prefix="sctconv-") as directory:
        config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        (Path(directory) / "generation_config.json").write_text(
            json.dumps({key: value for key, value in generation.items() if value is not None}, indent=2)
        )
        files = {file.name: file.read_bytes() for file in sorted(Path(directory).iterdir()) if file.is_file()}
    # a model's own tokenizer class would rebuild its pipeline from the vocabulary and ignore what tokenizer.json says
    settings = json.loads(files["tokenizer_config.json"]) | {"tokenizer_class": GENERIC_TOKENIZER}
    return files | {"tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False).encode()}


def _causal_class(config: Any) -> str:
    return str(transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__)
