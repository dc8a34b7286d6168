"""Perplexity on a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from sctconv.formats.errors import SctError


class EvaluationError(SctError):
    """The text or the window does not suit the model."""


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        nll: mean negative log-likelihood per predicted token, in nats.
        perplexity: exp(nll).
        stderr: of the perplexity: perplexity times the standard error of the mean nll, tokens taken as independent.
        tokens: predicted tokens: all but the first of each window.
        windows: number of windows; context: their length in tokens (the last may be shorter).
    """

    nll: float
    perplexity: float
    stderr: float
    tokens: int
    windows: int
    context: int


@torch.inference_mode()
def perplexity(
    model: Any,
    ids: Sequence[int],
    *,
    context: int = 512,
    progress: Callable[[int, int, float], None] | None = None,
) -> Perplexity:
    """The perplexity of a token sequence in non-overlapping windows.

    Each window is predicted on its own; its first token is given, not predicted. Log-probabilities are float32,
    their sum float64.

    Args:
        model: a causal language model of transformers.
        ids: the text's tokens.
        context: window length in tokens, at least 2 and at most what the model can take.
        progress: called after each window with windows done, windows in all, and the perplexity so far.

    Raises:
        EvaluationError: fewer than two tokens, or a context that does not suit the model.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context < 2 or (longest and context > longest):
        raise EvaluationError(f"context {context}: must be at least 2 and at most the model's {longest or 'limit'}")
    if len(ids) < 2:
        raise EvaluationError(f"the text has {len(ids)} tokens; at least 2 are needed")
    starts = [start for start in range(0, len(ids), context) if len(ids) - start >= 2]
    total, squares, count = 0.0, 0.0, 0
    for done, start in enumerate(starts, 1):
        window = torch.tensor([list(ids[start : start + context])], device=model.device)
        logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
        losses = F.cross_entropy(logits, window[0, 1:], reduction="none").double()
        total += float(losses.sum())
        squares += float(losses.square().sum())
        count += losses.numel()
        if progress:
            progress(done, len(starts), _exp(total / count))
    nll = total / count
    variance = max(0.0, squares / count - nll**2)
    ppl = _exp(nll)
    return Perplexity(nll, ppl, ppl * math.sqrt(variance / max(1, count - 1)), count, len(starts), context)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
