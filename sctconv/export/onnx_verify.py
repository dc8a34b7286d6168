"""Whether an exported graph computes what the model does: onnxruntime against torch, number by number."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from sctconv.runtime.model import load
from sctconv.runtime.onnx_model import GRAPH, OnnxDecoder, OnnxError

TOLERANCE: Final = 1e-3
"""Largest difference of logits, as a share of the largest logit, that an export is let through with."""

_PREFILL, _STEPS, _SHORT = 12, 16, 7
"""Tokens of the prompt, steps after it, and tokens of the shorter prompt in the padded batch."""


@dataclass(frozen=True)
class Comparison:
    """Differences of logits to torch's, over the largest of torch's logits.

    Attributes:
        prefill: of a prompt at once.
        decode: of the steps after it, from the cache, against torch without one.
        padded: of a batch with padding on the left.
        top1: share of all these tokens whose likeliest successor is the same.
    """

    prefill: float
    decode: float
    padded: float
    top1: float

    @property
    def worst(self) -> float:
        """The largest of the three."""
        return max(self.prefill, self.decode, self.padded)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def compare(directory: Path, model: str | os.PathLike[str], *, seed: int = 0) -> Comparison:
    """Runs both on random tokens.

    Args:
        directory: the exported model.
        model: the .sct file that it was made of.
        seed: of the tokens.

    Raises:
        OnnxError: the graph is not valid, or not what onnxruntime can run.
    """
    import onnx

    try:
        onnx.checker.check_model(directory / GRAPH)
    except onnx.checker.ValidationError as error:
        raise OnnxError(f"{directory}: the graph is not valid: {' '.join(str(error).split())[:300]}") from None
    session, torch_model = OnnxDecoder(directory), load(model, dtype=torch.float32).model
    vocabulary = int(torch_model.config.get_text_config().vocab_size)
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, vocabulary, (1, _PREFILL + _STEPS), np.int64)
    reference = _torch(torch_model, ids, np.ones_like(ids))
    found = [session.logits(ids[:, :_PREFILL])]
    found += [session.logits(ids[:, place : place + 1]) for place in range(_PREFILL, _PREFILL + _STEPS)]
    ours = np.concatenate(found, 1)
    padded, mask = generator.integers(0, vocabulary, (2, _PREFILL), np.int64), np.ones((2, _PREFILL), np.int64)
    mask[1, : _PREFILL - _SHORT] = 0
    session.reset()
    real = mask.astype(bool)
    pair = session.logits(padded, mask)[real], _torch(torch_model, padded, mask)[real]
    scale = float(np.abs(reference).max())
    same = [(a.argmax(-1) == b.argmax(-1)).ravel() for a, b in ((ours, reference), pair)]
    return Comparison(
        prefill=float(np.abs(ours - reference)[:, :_PREFILL].max()) / scale,
        decode=float(np.abs(ours - reference)[:, _PREFILL:].max()) / scale,
        padded=float(np.abs(pair[0] - pair[1]).max()) / scale,
        top1=float(np.concatenate(same).mean()),
    )


@torch.inference_mode()
def _torch(model: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    positions = (mask.cumsum(1) - 1).clip(0)
    tensors = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    logits = model(**{name: torch.from_numpy(array) for name, array in tensors.items()}, use_cache=False).logits
    return np.asarray(logits.float().numpy())
