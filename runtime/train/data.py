"""Windows of tokens to train on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..chat_template import ChatTemplateError, render_chat
from ..texts import HUB, TextError, has_records, read_text, records
from .options import TrainError

Piece = tuple[list[int], list[bool]]


@dataclass(frozen=True)
class Batch:
    """Some windows.

    Attributes:
        places: which of the data's they are.
        windows: (batch, context) int64.
        learned: (batch, context) bool: the tokens that are to be predicted. The first of a window never is.
        positions: (batch, context) int64, places within documents that do not see each other; None where they do.
    """

    places: tuple[int, ...]
    windows: Tensor
    learned: Tensor
    positions: Tensor | None = None

    @property
    def predicted(self) -> Tensor:
        """(batch, context - 1) bool: the tokens whose successor is learned."""
        return self.learned[:, 1:]

    @property
    def targets(self) -> Tensor:
        """(learned tokens,) int64."""
        return self.windows[:, 1:][self.predicted]

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        positions = None if self.positions is None else self.positions.to(device)
        return replace(self, windows=self.windows.to(device), learned=self.learned.to(device), positions=positions)

    def split(self, size: int) -> Iterator[Batch]:
        """In parts of so many windows at most."""
        for start in range(0, len(self.places), size):
            part = slice(start, start + size)
            positions = None if self.positions is None else self.positions[part]
            yield Batch(self.places[part], self.windows[part], self.learned[part], positions)


@dataclass(frozen=True)
class TrainData:
    """Windows to train and to measure on.

    Attributes:
        training: all windows to train on, as one batch.
        held_out: the same, never trained on.
        sources: name and number of tokens of each text.
    """

    training: Batch
    held_out: Batch
    sources: tuple[tuple[str, int], ...]

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """The windows of a step: each epoch in an order of its own, decided by seed and step alone."""
        count = len(self.training.places)
        places = []
        for position in range(step * size, (step + 1) * size):
            epoch, place = divmod(position, count)
            generator = torch.Generator().manual_seed(hash((seed, epoch)) & 0x7FFFFFFF)
            places.append(int(torch.randperm(count, generator=generator)[place]))
        return _taken(self.training, places)

    def fingerprint(self) -> str:
        """sha256 of the windows and of which of their tokens are learned."""
        digest = hashlib.sha256()
        for part in (self.training, self.held_out):
            tensors = (part.windows, part.learned, part.positions)
            for tensor in (tensor for tensor in tensors if tensor is not None):
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def load_data(
    sources: Sequence[str],
    tokenizer: Any,
    *,
    context: int,
    held_out: float,
    document_masks: bool = False,
    vocabulary: int | None = None,
) -> TrainData:
    """Packs texts into windows, one after the other, and keeps some aside.

    A .jsonl or .parquet file or a dataset (`hub:NAME[:CONFIG]`) has records with `text`; with `prompt` and `completion`, of
    which the completion is learned; or with chat `messages`, rendered by the model's own template, of which the assistant's
    are. Records end with the end-of-text token. The text that does not fill the last window is left out.

    Args:
        sources: texts; a .txt file is one document.
        tokenizer: the model's.
        context: tokens in a window.
        held_out: share of the windows that is kept aside, at least one, evenly spread.
        document_masks: whether tokens see only their own document.
        vocabulary: how many tokens the model knows, where that is to be checked.

    Raises:
        TextError: a text cannot be read or a record is none of these.
        TrainError: fewer than two windows in all, nothing in them to learn, or a token that the model does not know.
    """
    ids: list[int] = []
    learned: list[bool] = []
    positions: list[int] = []
    names = []
    for source in sources:
        before = len(ids)
        for piece, mask in _documents(source, tokenizer):
            ids += piece
            learned += mask
            positions += range(len(piece))
        names.append((source if source.startswith(HUB) else Path(source).name, len(ids) - before))
    if vocabulary is not None and max(ids, default=0) >= vocabulary:
        raise TrainError(
            f"the tokenizer makes token {max(ids)}, but the model's vocabulary is {vocabulary}; it is another model's"
        )
    count = len(ids) // context
    if count < 2:
        raise TrainError(f"{', '.join(sources)}: {len(ids)} tokens, less than two windows of {context}; give more text")
    kept = [torch.tensor(values[: count * context]).reshape(count, context) for values in (ids, learned, positions)]
    whole = Batch(tuple(range(count)), kept[0], kept[1], _restarted(kept[2]) if document_masks else None)
    aside = torch.zeros(count, dtype=torch.bool)
    share = max(1, min(count - 1, round(held_out * count)))
    aside[torch.linspace(0, count - 1, share + 2)[1:-1].round().long()] = True
    parts = (_taken(whole, where.nonzero().flatten().tolist()) for where in (~aside, aside))
    training, kept_aside = (replace(part, places=tuple(range(len(part.places)))) for part in parts)
    for part, what in ((training, "train"), (kept_aside, "measure")):
        if not bool(part.predicted.any()):
            raise TrainError(f"{', '.join(sources)}: no token to {what} on is an answer; give more records")
    return TrainData(training, kept_aside, tuple(names))


def _taken(batch: Batch, places: list[int]) -> Batch:
    positions = None if batch.positions is None else batch.positions[places]
    return Batch(tuple(places), batch.windows[places], batch.learned[places], positions)


def _restarted(positions: Tensor) -> Tensor:
    """Places in a document (windows, context) -> places in what of it is in the window."""
    begins = positions == 0
    begins[:, 0] = True
    here = torch.arange(positions.shape[1]).expand_as(positions)
    return here - torch.where(begins, here, 0).cummax(1).values


def _documents(source: str, tokenizer: Any) -> Iterator[Piece]:
    if has_records(source):
        for number, record in enumerate(records(source), 1):
            yield _piece(f"{source}: record {number}", record, tokenizer)
        return
    ids = tokenizer(read_text(source), verbose=False).input_ids
    yield ids, [True] * len(ids)


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
    if "messages" in record:
        raise TextError(f"{where}: messages is no list of objects with role and content")
    raise TextError(f"{where} has neither text, nor prompt and completion, nor messages")


def _chat(where: str, messages: list[Any], tokenizer: Any) -> Piece:
    """The rendered conversation; an answer is what its message adds to the prompt for it."""
    if not getattr(tokenizer, "chat_template", None):
        raise TextError(f"{where}: has messages, but the model has no chat template")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or "role" not in message or not {"content", "tool_calls"} & message.keys():
            raise TextError(f"{where}: message {number} is no object with role and content")
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
    except ChatTemplateError as error:
        raise TextError(f"{where}: {error}") from None
    except Exception as error:  # a message that is no object, or has no role
        text = " ".join(str(error).split())[:160]
        raise TextError(f"{where}: the chat template cannot render it ({type(error).__name__}: {text})") from None
    return ids, learned[: len(ids)]


def _rendered(tokenizer: Any, messages: list[Any], *, prompt: bool) -> list[int]:
    text = render_chat(tokenizer, messages, prompt=prompt) if messages else ""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids
