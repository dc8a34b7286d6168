"""Perplexity is what it says, by an independent computation."""

from __future__ import annotations

import math

import pytest
import torch

from sctconv.runtime.evaluate import EvaluationError, perplexity
from tests.models import tiny_model


def _token_losses(model, ids: list[int], context: int) -> torch.Tensor:
    """By hand, one token at a time, in float64."""
    losses = []
    for start in range(0, len(ids), context):
        window = ids[start : start + context]
        for place in range(1, len(window)):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([window[:place]])).logits[0, -1].double()
            losses.append(-torch.log_softmax(logits, 0)[window[place]])
    return torch.stack(losses)


@pytest.mark.parametrize(("length", "context"), [(40, 8), (41, 8), (42, 8), (5, 64), (2, 2)])
def test_against_one_token_at_a_time(length: int, context: int) -> None:
    model = tiny_model("llama")
    ids = [(7 * place + place // 5) % 96 for place in range(length)]
    expected = _token_losses(model, ids, context)
    result = perplexity(model, ids, context=context)
    assert result.tokens == len(expected)
    assert result.nll == pytest.approx(float(expected.mean()), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    if len(expected) > 1:
        stderr = float(expected.std(unbiased=True)) / math.sqrt(len(expected))
        assert result.stderr == pytest.approx(result.perplexity * stderr, rel=1e-4)


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, list(range(90)), context=30).perplexity == pytest.approx(96, rel=1e-5)


def test_progress_ends_at_the_result() -> None:
    seen: list[tuple[int, int, float]] = []
    result = perplexity(tiny_model("llama"), list(range(50)), context=16, progress=lambda *args: seen.append(args))
    assert [item[:2] for item in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert seen[-1][2] == pytest.approx(result.perplexity)


@pytest.mark.parametrize(
    ("ids", "context", "message"),
    [
        ([], 8, "has 0 tokens"),
        ([1], 8, "has 1 tokens"),
        ([1, 2, 3], 1, "context 1"),
        ([1, 2], 129, "at most the model's 128"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(ids: list[int], context: int, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        perplexity(tiny_model("llama"), ids, context=context)
