"""A causal language model in two: a backbone that gives hidden states, and a head that makes logits of them.

Logits are the largest thing in a step of a small model (1024 tokens of a vocabulary of 128,256: 0.5 GB in float32, and as
much for their gradient), and nobody needs all of them at once.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast


class Halves:
    """A model of transformers as `logits = head(hidden(ids))`; the parameters are the model's own.

    The head is the model itself with its backbone replaced by what hands over given hidden states, so all that a family
    does to its logits (soft caps, scales, biases) is done here too. A model without a part that is its backbone gives
    logits as its hidden states, and the head hands them on.

    Args:
        model: a causal language model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._is_whole = model.base_model is model
        self._given = _Given()
        self._top = copy.copy(model)
        self._top._modules = {**model._modules, model.base_model_prefix: self._given}

    def hidden(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Hidden states (batch, context, width) after the last norm.

        Args:
            ids: (batch, context) int64.
            positions: (batch, context) int64, each token's place in its document: begins again where another document
                begins, and no token sees across; None for one document a row.
        """
        more = {} if positions is None else {"position_ids": positions}
        if self._is_whole:
            logits: Tensor = self._model(input_ids=ids, use_cache=False, **more).logits
            return logits
        state: Tensor = self._model.base_model(input_ids=ids, use_cache=False, **more).last_hidden_state
        return state

    def head(self, rows: Tensor) -> Tensor:
        """Logits (rows, vocabulary) of hidden states (rows, width)."""
        if self._is_whole:
            return rows
        self._given.state = rows[None]
        logits: Tensor = self._top(inputs_embeds=rows[None], use_cache=False).logits[0]
        self._given.state = None
        return logits


def ends(model: Any) -> list[nn.Module]:
    """Input embedding and head."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return [module for module in modules if module is not None]


class _Given(nn.Module):
    """Stands in for a backbone."""

    state: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> _Output:
        return _Output(last_hidden_state=self.state)


class _Output(BaseModelOutputWithPast):
    """Of what else a family's backbone returns (cross attentions, router logits) there is none."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
