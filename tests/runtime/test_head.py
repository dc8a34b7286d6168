"""A model in two halves is the model."""

from __future__ import annotations

import pytest
import torch

from sctconv.runtime.head import Halves
from tests.models import FAMILIES, logits, tiny_model

IDS = torch.arange(2 * 24).reshape(2, 24) * 7 % 96


@pytest.mark.parametrize("family", FAMILIES)
def test_head_of_hidden_is_the_model(family: str) -> None:
    model = tiny_model(family)
    halves = Halves(model)
    with torch.inference_mode():
        hidden = halves.hidden(IDS)
        rows = halves.head(hidden.flatten(0, 1))
    torch.testing.assert_close(rows, logits(model, IDS).flatten(0, 1))
    assert logits(model, IDS).shape[-1] == 96, "the model itself is as it was"


def test_what_a_family_does_to_its_logits_is_done() -> None:
    model = tiny_model("gemma3")
    model.config.final_logit_softcapping = 0.5
    with torch.inference_mode():
        halves = Halves(model)
        rows = halves.head(halves.hidden(IDS)[0])
        assert float(rows.abs().max()) < 0.5
        torch.testing.assert_close(rows, model(input_ids=IDS).logits[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_both_halves(family: str) -> None:
    one, other = tiny_model(family), tiny_model(family)
    one(input_ids=IDS).logits.square().mean().backward()
    halves = Halves(other)
    halves.head(halves.hidden(IDS).flatten(0, 1)).square().mean().backward()
    for (name, first), second in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_do_not_see_another_document(family: str) -> None:
    halves = Halves(tiny_model(family))
    positions = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
    other = IDS.clone()
    other[:, :10] = (other[:, :10] + 5) % 96
    with torch.inference_mode():
        one, two = (halves.hidden(ids, positions)[:, 10:] for ids in (IDS, other))
        alone = halves.hidden(IDS[:, 10:])
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(one, alone, rtol=1e-4, atol=1e-5)
