"""An exported decoder in onnxruntime, alone and as a model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from sctconv.formats.errors import SctError

from .model import Loaded, set_generation_config_
from .skeleton import load_config, load_tokenizer

GRAPH: Final = "model.onnx"
"""The graph's file in an exported directory; its weights are in `model.onnx.data`."""

_ROOM: Final = 256
"""Tokens that a cache has room for at first."""


class OnnxError(SctError):
    """A directory is no exported model, or onnxruntime cannot run it."""


class OnnxDecoder:
    """Logits of tokens after those that it has seen.

    Keys and values are in buffers that onnxruntime reads and writes where they are, and that grow by doubling.

    Args:
        directory: as `export_onnx` wrote it.
        literal: run each node as it is written, none fused or replaced.

    Raises:
        OnnxError: the graph is not there, or onnxruntime cannot load it.
    """

    def __init__(self, directory: Path, *, literal: bool = False) -> None:
        import onnxruntime

        if not (directory / GRAPH).is_file():
            raise OnnxError(f"{directory}: no exported model, {GRAPH} is not there")
        options = onnxruntime.SessionOptions()
        if literal:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session: Any = onnxruntime.InferenceSession(directory / GRAPH, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes
            raise OnnxError(
                f"{directory}: onnxruntime {onnxruntime.__version__} cannot load it: {_line(error)}"
            ) from None
        inputs = {item.name: item for item in session.get_inputs()}
        past = [item for name, item in inputs.items() if name.startswith("past_key_values.")]
        outputs = {item.name: item for item in session.get_outputs()}
        if not past or "logits" not in outputs:
            raise OnnxError(f"{directory}: no decoder with a KV cache; its outputs are {', '.join(outputs)}")
        self._session, self._names = session, [item.name for item in past]
        self._heads, self._head_dim = past[0].shape[1], past[0].shape[3]
        self._dtype: Any = np.float16 if past[0].type == "tensor(float16)" else np.float32
        self._vocabulary = outputs["logits"].shape[2]
        # `ort` graphs write behind what is there; the others write all of it anew, elsewhere
        self._shares = session.get_modelmeta().custom_metadata_map.get("sctconv.profile") == "ort"
        self._takes = set(inputs)
        self.reset()

    def reset(self) -> None:
        """Forgets what it has seen."""
        self._mask = np.zeros((0, 0), np.int64)
        self._room = 0
        self._past: list[np.ndarray] = []
        self._present: list[np.ndarray] = []

    @property
    def seen(self) -> int:
        """Tokens, padding included, that it remembers."""
        return self._mask.shape[1]

    def logits(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """(batch, sequence, vocabulary) float32 for ids (batch, sequence) int64 that follow what was seen.

        Args:
            ids: the tokens.
            mask: (batch, sequence) of 1 and, for padding on the left, 0; None for ones.
        """
        (batch, sequence), seen = ids.shape, self.seen
        if not seen:
            self._mask = np.zeros((batch, 0), np.int64)
        total = seen + sequence
        self._grow(batch, total)
        self._mask = np.concatenate([self._mask, np.ones_like(ids) if mask is None else mask], 1)
        positions = (self._mask.cumsum(1) - 1).clip(0)[:, -sequence:]
        logits = np.empty((batch, sequence, self._vocabulary), np.float32)
        io = self._session.io_binding()
        feeds = {"input_ids": ids, "attention_mask": self._mask, "position_ids": positions}
        kept = {name: np.ascontiguousarray(array) for name, array in feeds.items() if name in self._takes}
        for name, array in kept.items():
            io.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        io.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)
        before, after = (self._room, self._room) if self._shares else (seen, total)
        for name, past, present in zip(self._names, self._past, self._present, strict=True):
            shape = (batch, self._heads, before, self._head_dim)
            io.bind_input(name, "cpu", 0, self._dtype, shape, past.ctypes.data)
            shape = (batch, self._heads, after, self._head_dim)
            name = name.replace("past_key_values", "present")
            io.bind_output(name, "cpu", 0, self._dtype, shape, present.ctypes.data)
        self._session.run_with_iobinding(io)
        self._past, self._present = self._present, self._past
        return logits

    def _grow(self, batch: int, total: int) -> None:
        """Makes room for so many tokens, keeping what is remembered."""
        if total <= self._room:
            return
        old, seen = self._past, self.seen
        self._room = max(_ROOM, 1 << (total - 1).bit_length())
        shape = (batch, self._heads, self._room, self._head_dim)
        self._past = [np.zeros(shape, self._dtype) for _ in self._names]
        for array, kept in zip(self._past, old, strict=False):
            if self._shares:
                array[:, :, :seen] = kept[:, :, :seen]
            else:  # packed at the front
                count = batch * self._heads * seen * self._head_dim
                array.reshape(-1)[:count] = kept.reshape(-1)[:count]
        self._present = self._past if self._shares else [np.zeros(shape, self._dtype) for _ in self._names]


class OnnxCausalLM(PreTrainedModel, GenerationMixin):
    """The same as a causal language model, so that transformers' own sampling and stopping work on it.

    Args:
        config: the model's.
        decoder: what computes.
    """

    main_input_name = "input_ids"
    _is_stateful = True  # the cache is the decoder's own: what is generated cannot be taken back

    def __init__(self, config: Any, decoder: OnnxDecoder) -> None:
        super().__init__(config)
        self._decoder = decoder

    @property
    def device(self) -> torch.device:
        """The CPU: that is where logits appear."""
        return torch.device("cpu")

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False, **kwargs: Any
    ) -> CausalLMOutput:
        """Logits (batch, sequence, vocabulary); with `use_cache` only of the tokens beyond those seen in the last call."""
        seen = self._decoder.seen
        if not use_cache or seen >= input_ids.shape[1]:
            self._decoder.reset()
            seen = 0
        mask = None if attention_mask is None else attention_mask[:, seen:].numpy()
        return CausalLMOutput(logits=torch.from_numpy(self._decoder.logits(input_ids[:, seen:].numpy(), mask)))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own; each call begins anew."""
        self._decoder.reset()
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """All tokens each time; `forward` knows which are new."""
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask"), "use_cache": True}

    def _supports_default_dynamic_cache(self) -> bool:
        return False


def load_onnx(directory: Path) -> Loaded:
    """An exported directory as model and tokenizer.

    Raises:
        OnnxError: see `OnnxDecoder`. ModelError: its configuration or tokenizer cannot be read.
    """
    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file() and GRAPH not in path.name}
    model = OnnxCausalLM(load_config(files, str(directory)), OnnxDecoder(directory))
    set_generation_config_(model, files)
    return Loaded(model, load_tokenizer(files))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
