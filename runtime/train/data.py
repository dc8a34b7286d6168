"""Windows of tokens to train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..texts import HUB, TextError, read_text, records
from .options import TrainError

Piece = tuple[list[int], list[bool]]


@dataclass(frozen=True)
class TrainData:
    """Windows to train and to measure on.

    Attributes:
        windows: (count, context) int64.
        learned: (count, context) bool: the tokens that are to be predicted. The first of a window never is.
        held_out, held_out_learned: the same, never trained on.
        sources: name and number of tokens of each text.
    """

    windows: Tensor
    learned: Tensor
    held_out: Tensor
    held_out_learned: Tensor
    sources: tuple[tuple[str, int], ...]

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """The windows of a step: each epoch in an order of its own, decided by seed and step alone."""
        places = []
        for position in range(step * size, (step + 1) * size):
            epoch, place = divmod(position, len(self.windows))
            generator = torch.Generator().manual_seed(hash((seed, epoch)) & 0x7FFFFFFF)
            places.append(int(torch.randperm(len(self.windows), generator=generator)[place]))
        return self.windows[places], self.learned[places]


def load_data(sources: Sequence[str], tokenizer: Any, *, context: int, held_out: float) -> TrainData:
    """Packs texts into windows, one after the other, and keeps some aside.

    A .jsonl file or dataset (`hub:NAME[:CONFIG]`) has records with `text`; with `prompt` and `completion`, of which the
    completion is learned; or with chat `messages`, rendered by the model's own template, of which the assistant's are.
    Records end with the end-of-text token. The text that does not fill the last window is left out.

    Raises:
        TextError: a text cannot be read or a record is none of these.
        TrainError: fewer than two windows in all.
    """
    ids: list[int] = []
    learned: list[bool] = []
    names = []
    for source in sources:
        before = len(ids)
        if source.startswith(HUB) or Path(source).suffix == ".jsonl":
            for number, record in enumerate(records(source), 1):
                piece, mask = _piece(f"{source}: record {number}", record, tokenizer)
                ids += piece
                learned += mask
        else:
            piece = tokenizer(read_text(source), verbose=False).input_ids
            ids += piece
            learned += [True] * len(piece)
        names.append((source if source.startswith(HUB) else Path(source).name, len(ids) - before))
    count = len(ids) // context
    if count < 2:
        raise TrainError(f"{', '.join(sources)}: {len(ids)} tokens, less than two windows of {context}; give more text")
    windows = torch.tensor(ids[: count * context]).reshape(count, context)
    masks = torch.tensor(learned[: count * context]).reshape(count, context)
    aside = torch.zeros(count, dtype=torch.bool)
    share = max(1, min(count - 1, round(held_out * count)))
    aside[torch.linspace(0, count - 1, share + 2)[1:-1].round().long()] = True
    return TrainData(windows[~aside], masks[~aside], windows[aside], masks[aside], tuple(names))


def _piece(where: str, record: dict[str, Any], tokenizer: Any) -> Piece:
    """Tokens of a record and which of them are learned."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if isinstance(record.get("messages"), list):
        return _chat(where, record["messages"], tokenizer)
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        prompt = tokenizer(record["prompt"], verbose=False).input_ids
        answer = tokenizer(record["completion"], add_special_tokens=False, verbose=False).input_ids + end
        return prompt + answer, [False] * len(prompt) + [True] * len(answer)
    if isinstance(record.get("text"), str):
        ids = tokenizer(record["text"], verbose=False).input_ids + end
        return ids, [True] * len(ids)
    raise TextError(f"{where} has neither text, nor prompt and completion, nor messages")


def _chat(where: str, messages: list[Any], tokenizer: Any) -> Piece:
    """The rendered conversation; an answer is what its message adds to the prompt for it."""
    if not getattr(tokenizer, "chat_template", None):
        raise TextError(f"{where}: has messages, but the model has no chat template")
    ids: list[int] = []
    learned: list[bool] = []
    try:
        for place, message in enumerate(messages):
            is_answer = message["role"] == "assistant"
            if is_answer:
                prompt = _rendered(tokenizer, messages[:place], prompt=True)
                learned += [False] * (len(prompt) - len(ids))
                ids = prompt
            whole = _rendered(tokenizer, messages[: place + 1], prompt=False)
            learned += [is_answer] * (len(whole) - len(ids))
            ids = whole
    except Exception as error:  # the template's own language raises what it likes
        text = " ".join(str(error).split())[:160]
        raise TextError(f"{where}: the chat template cannot render it ({type(error).__name__}: {text})") from None
    return ids, learned[: len(ids)]


def _rendered(tokenizer: Any, messages: list[Any], *, prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt) if messages else ""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids
