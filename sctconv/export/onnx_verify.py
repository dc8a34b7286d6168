"""Whether an exported graph computes what the model does: onnxruntime against torch, number by number."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch

from sctconv.runtime.model import load
from sctconv.runtime.onnx_model import GRAPH, OnnxDecoder, OnnxError

TOLERANCES: Final = {"float32": 1e-3, "float16": 3e-2}
"""Dtype -> largest difference of logits, as a share of the largest logit, that an export is let through with."""

_PREFILL, _STEPS, _SHORT = 12, 16, 7
"""Tokens of the prompt, steps after it, and tokens of the shorter prompt in the padded batch."""


@dataclass(frozen=True)
class Comparison:
    """How far a graph is from torch.

    Attributes:
        differences: what was compared -> largest difference of its numbers over the largest of torch's. Of a decoder the
            logits of a `prefill`, of `decode` steps after it from the cache (against torch without one), and of a `padded`
            batch; of an encoder the `states` of a batch, and of a `padded` one.
        top1: share of all these tokens whose likeliest successor is the same; None of an encoder.
    """

    differences: dict[str, float]
    top1: float | None = None

    @property
    def worst(self) -> float:
        """The largest of the differences, NaN if one is."""
        return float(np.max(list(self.differences.values())))

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**self.differences, "top1": self.top1}


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """max |found - expected| / max |expected|."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def compare(
    directory: Path,
    model: str | os.PathLike[str],
    *,
    rounded: Mapping[str, Callable[[], np.ndarray]] = MappingProxyType({}),
    padded: bool = True,
    seed: int = 0,
) -> Comparison:
    """Runs both on random tokens.

    A quantised graph is run node by node as it is written, against torch with the very values that its codes stand for:
    what onnxruntime makes of it otherwise rounds activations to 8 bits too.

    Args:
        directory: the exported model.
        model: the .sct file that it was made of.
        rounded: values of what was quantised, by name; see `Ops.rounded`.
        padded: whether it takes padding on the left.
        seed: of the tokens.

    Raises:
        OnnxError: the graph is not valid, or not what onnxruntime can run.
    """
    import onnx

    try:
        onnx.checker.check_model(directory / GRAPH)
    except onnx.checker.ValidationError as error:
        raise OnnxError(f"{directory}: the graph is not valid: {' '.join(str(error).split())[:300]}") from None
    session, reference = OnnxDecoder(directory, literal=bool(rounded)), load(model, dtype=torch.float32).model
    with torch.no_grad():
        for name, read in rounded.items():
            reference.get_parameter(name).copy_(torch.from_numpy(read()))
            if name.endswith((".U", ".V")):
                reference.get_submodule(name[:-2]).s.fill_(1.0)
    vocabulary = int(reference.config.get_text_config().vocab_size)
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, vocabulary, (1, _PREFILL + _STEPS), np.int64)
    expected = _torch(reference, ids, np.ones_like(ids))
    found = [session.logits(ids[:, :_PREFILL])]
    found += [session.logits(ids[:, place : place + 1]) for place in range(_PREFILL, _PREFILL + _STEPS)]
    ours = np.concatenate(found, 1)
    pairs = {
        "prefill": (ours[:, :_PREFILL], expected[:, :_PREFILL]),
        "decode": (ours[:, _PREFILL:], expected[:, _PREFILL:]),
    }
    if padded:
        batch, mask = generator.integers(0, vocabulary, (2, _PREFILL), np.int64), np.ones((2, _PREFILL), np.int64)
        mask[1, : _PREFILL - _SHORT] = 0
        session.reset()
        pairs["padded"] = session.logits(batch, mask)[mask > 0], _torch(reference, batch, mask)[mask > 0]
    same = [(one.argmax(-1) == other.argmax(-1)).ravel() for one, other in pairs.values()]
    return Comparison({name: difference(*pair) for name, pair in pairs.items()}, float(np.concatenate(same).mean()))


@torch.inference_mode()
def _torch(model: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    positions = (mask.cumsum(1) - 1).clip(0)
    tensors = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    logits = model(**{name: torch.from_numpy(array) for name, array in tensors.items()}, use_cache=False).logits
    return np.asarray(logits.float().numpy())
