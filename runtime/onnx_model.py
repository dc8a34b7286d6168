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


class OnnxError(SctError):
    """A directory is no exported model, or onnxruntime cannot run it."""


class OnnxDecoder:
    """Logits of tokens after those that it has seen.

    Args:
        directory: as `export_onnx` wrote it.

    Raises:
        OnnxError: the graph is not there, or onnxruntime cannot load it.
    """

    def __init__(self, directory: Path) -> None:
        import onnxruntime

        if not (directory / GRAPH).is_file():
            raise OnnxError(f"{directory}: no exported model, {GRAPH} is not there")
        try:
            self._session: Any = onnxruntime.InferenceSession(directory / GRAPH, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes
            raise OnnxError(
                f"{directory}: onnxruntime {onnxruntime.__version__} cannot load it: {_line(error)}"
            ) from None
        self._past = [item for item in self._session.get_inputs() if item.name.startswith("past_key_values.")]
        self._outputs = [item.name for item in self._session.get_outputs()]
        self.reset()

    def reset(self) -> None:
        """Forgets what it has seen."""
        self._cache: list[np.ndarray] | None = None
        self._mask = np.zeros((0, 0), np.int64)

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
        batch, sequence = ids.shape
        if self._cache is None:
            self._mask = np.zeros((batch, 0), np.int64)
            self._cache = [np.zeros((batch, item.shape[1], 0, item.shape[3]), np.float32) for item in self._past]
        self._mask = np.concatenate([self._mask, np.ones_like(ids) if mask is None else mask], 1)
        positions = (self._mask.cumsum(1) - 1).clip(0)[:, -sequence:]
        feeds = {"input_ids": ids, "attention_mask": self._mask, "position_ids": positions}
        feeds |= {item.name: array for item, array in zip(self._past, self._cache, strict=True)}
        logits, *self._cache = self._session.run(self._outputs, feeds)
        return np.asarray(logits)


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
