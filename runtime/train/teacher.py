"""What a teacher says of the next tokens: asked as the run goes on, or once for all and kept on disk.

The loss is `T^2 KL(p || q)` with p and q the distributions of teacher and student at temperature T (Hinton, Vinyals and
Dean 2015). A cache keeps each token's `top` most likely successors; the KL is then that of the distributions over those and
one more event, "any other", a lower bound that loses nothing where the teacher is sure.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from sctconv.formats.reader import SctFile
from sctconv.formats.writer import SctWriter

from ..head import Halves
from ..precision import has_fast_bf16, products
from ..tensors import mapped_tensor, to_numpy
from .data import Batch, TrainData
from .options import TrainError

_LEAST: Final = 1e-7
"""Probabilities of "any other" count as no less, as 1 minus a float32 sum is no better."""


@dataclass(frozen=True)
class Taught:
    """Log-probabilities of successors.

    Attributes:
        logs: (rows, vocabulary), or (rows, top) with `ids`, float32.
        ids: (rows, top) int64, whose they are; None for the whole vocabulary in order.
    """

    logs: Tensor
    ids: Tensor | None = None


class Teacher(Protocol):
    """Knows what to say of a batch.

    Attributes:
        vocabulary: how many tokens it knows.
    """

    vocabulary: int

    def lesson(self, batch: Batch) -> Callable[[slice], Taught]:
        """Of the batch's predicted tokens, row by row in the order of `batch.predicted`, those in a slice."""
        ...


def divergence(logits: Tensor, taught: Taught, temperature: float) -> Tensor:
    """`T^2 KL(p || q)` summed over rows, nats; logits (rows, vocabulary) float32 are the student's."""
    own = F.log_softmax(logits / temperature, -1)
    if taught.ids is None:
        return F.kl_div(own, taught.logs, reduction="sum", log_target=True) * temperature**2
    own = own.gather(1, taught.ids)
    total = F.kl_div(own, taught.logs, reduction="sum", log_target=True)
    rest, other = (1.0 - logs.exp().sum(-1) for logs in (own, taught.logs))
    total = total + F.kl_div(
        rest.clamp_min(_LEAST).log(), other.clamp_min(_LEAST).log(), reduction="sum", log_target=True
    )
    return total * temperature**2


class ModelTeacher:
    """A model that runs beside the student, in its own dtype and on its own device.

    Args:
        model: dense or factored.
        temperature: T.
        bf16: whether its matrix products are bfloat16; None for where the device multiplies so faster.
    """

    def __init__(self, model: Any, temperature: float = 1.0, *, bf16: bool | None = None) -> None:
        self._halves, self._temperature = Halves(model.eval()), temperature
        self._device = next(model.parameters()).device
        self._bf16 = has_fast_bf16(self._device) if bf16 is None else bf16
        self.vocabulary = int(model.config.get_text_config().vocab_size)

    def lesson(self, batch: Batch) -> Callable[[slice], Taught]:
        """See `Teacher`; the logits of a slice are made when it is asked for."""
        moved = batch.to(self._device)
        with torch.no_grad(), products(self._device, self._bf16):
            rows = self._halves.hidden(moved.windows, moved.positions)[:, :-1][moved.predicted]

        def of(part: slice) -> Taught:
            with torch.no_grad(), products(self._device, self._bf16):
                logits = self._halves.head(rows[part]).float()
            return Taught(F.log_softmax(logits / self._temperature, -1).to(batch.windows.device))

        return of


class CachedTeacher:
    """What `write_cache` kept, mapped from the disk.

    Args:
        path: the cache.
        facts: what it must have been made of; see `cache_facts`.

    Raises:
        FormatError: the file is damaged or none. TrainError: it was made of something else, which is named.
    """

    def __init__(self, path: str | os.PathLike[str], facts: dict[str, Any]) -> None:
        self._file = SctFile(path)
        theirs = self._file.index.metadata.get("teacher_cache")
        if not isinstance(theirs, dict):
            raise TrainError(f"{path}: no teacher's cache; name another file for --teacher-cache")
        for name, value in facts.items():
            if theirs.get(name) != value:
                raise TrainError(
                    f"{path}: was made with {name} {theirs.get(name)}, not {value}; name another file for --teacher-cache"
                )
        for entry in self._file.index.tensors.values():
            self._file.verify(entry)
        self.vocabulary = int(theirs["vocabulary"])

    def lesson(self, batch: Batch) -> Callable[[slice], Taught]:
        """See `Teacher`."""
        kept = [[self._tensor(kind, place) for place in batch.places] for kind in ("logs", "ids")]
        mask = batch.predicted.cpu()
        logs, ids = (torch.stack(tensors)[mask].to(batch.windows.device) for tensors in kept)
        return lambda part: Taught(logs[part].float(), ids[part].long())

    def _tensor(self, kind: str, place: int) -> Tensor:
        return mapped_tensor(self._file, self._file.entry(f"{kind}.{place}"))


def cache_facts(data: TrainData, teacher: str, temperature: float, top: int) -> dict[str, Any]:
    """What decides a cache: a fingerprint of the windows, the teacher's name, temperature and successors kept."""
    return {"data": data.fingerprint(), "teacher": teacher, "temperature": temperature, "top": top}


def write_cache(
    teacher: Any,
    data: TrainData,
    path: Path,
    facts: dict[str, Any],
    *,
    bf16: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Asks a model about all windows to be trained on and writes what it says, one window in memory at a time.

    A .sct file without a model: `logs.N` (context - 1, top) F16 and `ids.N` I32 for each window N. It appears whole or not
    at all.

    Args:
        teacher: a causal language model.
        data: the windows.
        path: the file.
        facts: see `cache_facts`.
        bf16: see `ModelTeacher`.
        progress: called with windows done and windows in all.

    Raises:
        OutputError: the file cannot be written.
    """
    asked = ModelTeacher(teacher, facts["temperature"], bf16=bf16)
    top = min(facts["top"], asked.vocabulary)
    with SctWriter(path) as out:
        for place, batch in enumerate(data.training.split(1)):
            batch = replace(batch, learned=torch.ones_like(batch.learned))  # each row, so that places need no mask
            logs, ids = asked.lesson(batch)(slice(None)).logs.topk(top)
            out.add_tensor(f"logs.{place}", to_numpy(logs.half().cpu()))
            out.add_tensor(f"ids.{place}", to_numpy(ids.int().cpu()))
            if progress:
                progress(place + 1, len(data.training.places))
        out.metadata["teacher_cache"] = {**facts, "vocabulary": asked.vocabulary}
        out.commit()
