"""Encoders as ONNX graphs, traced by torch.onnx: (input_ids, attention_mask) -> last_hidden_state; factors stay factors."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from sctconv.runtime.onnx_model import GRAPH, OnnxError

from .onnx_verify import Comparison, difference

_OPSET: Final = 21
_TOKENS: Final = 12
_SHORT: Final = 7
"""Tokens of the sequences that are compared, and of the shorter one in a padded batch."""


def write_encoder(model: Any, directory: Path, source: str) -> None:
    """Traces a model's backbone, float32, batch and sequence of any size.

    Args:
        model: what transformers builds; its head is left out.
        directory: where `model.onnx` and its weights go.
        source: what to call the model in an error.

    Raises:
        OnnxError: torch cannot trace it.
    """
    ids, mask = _tokens(model, 2)
    dims = {0: torch.export.Dim("batch_size"), 1: torch.export.Dim("sequence_length")}
    try:
        with _quiet():
            program = torch.onnx.export(
                _Encoder(model).eval(),
                (ids, mask),
                dynamo=True,
                opset_version=_OPSET,
                input_names=["input_ids", "attention_mask"],
                output_names=["last_hidden_state"],
                dynamic_shapes={"input_ids": dims, "attention_mask": dims},
                verbose=False,
            )
    except Exception as error:  # the exporter raises what it likes
        raise OnnxError(f"{source}: torch cannot trace it: {' '.join(str(error).split())[:300]}") from None
    assert program is not None
    program.save(directory / GRAPH, external_data=True)


def compare_encoder(model: Any, directory: Path) -> Comparison:
    """Runs both on random tokens, in another batch than it was traced with.

    Raises:
        OnnxError: the graph is not what onnxruntime can run.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(directory / GRAPH, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise OnnxError(f"{directory}: onnxruntime cannot load it: {' '.join(str(error).split())[:300]}") from None
    ids, mask = _tokens(model, 3)
    with torch.inference_mode():
        expected = _Encoder(model)(ids, mask).numpy()
    (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    real, full = mask.numpy() > 0, mask.numpy().all(1)
    return Comparison(
        {"states": difference(found[full], expected[full]), "padded": difference(found[real], expected[real])}
    )


class _Encoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone = model.base_model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        state: Tensor = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return state


def _tokens(model: Any, batch: int) -> tuple[Tensor, Tensor]:
    """Ids and a mask with padding on the right, as encoders have it."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.from_numpy(np.random.default_rng(batch).integers(0, vocabulary, (batch, _TOKENS), np.int64))
    mask = torch.ones_like(ids)
    mask[1, _SHORT:] = 0
    return ids, mask


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of torchvision, which nobody here needs, and of its own deprecations."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
