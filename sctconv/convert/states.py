"""Hidden states of all batches, in memory or on disk."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sctconv.formats.errors import OutputError


class States(Sequence[Tensor]):
    """A list of equally shaped float32 tensors that can be assigned to.

    On disk they live in a file without a name, which the system takes back when the process ends, however it ends; they
    are read and written whole, not mapped, so that none of them counts as memory while it is not looked at.

    Args:
        count: how many.
        shape: of each.
        directory: where the file is; None for memory.

    Raises:
        OutputError: the disk cannot take them.
    """

    def __init__(self, count: int, shape: tuple[int, ...], directory: Path | None = None) -> None:
        self._count, self._shape = count, shape
        self._kept: list[Tensor | None] = [None] * count
        self._bytes = 4 * torch.Size(shape).numel()
        self._file: Any = None
        if directory is not None:
            with _complaints(directory):
                self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 (closed with this object)
        self._directory = directory

    @classmethod
    def of(cls, given: Iterable[Tensor], count: int, directory: Path | None = None) -> States:
        """Filled with some tensors, at least one."""
        tensors = iter(given)
        first = next(tensors)
        states = cls(count, tuple(first.shape), directory)
        for place, tensor in enumerate(itertools.chain([first], tensors)):
            states[place] = tensor
        return states

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> Tensor:  # type: ignore[override]
        if not 0 <= place < self._count:
            raise IndexError(place)
        if self._file is None:
            state = self._kept[place]
            assert state is not None, "read before it was written"
            return state
        state = torch.empty(self._shape)
        view = memoryview(state.numpy().data).cast("B")
        self._file.seek(place * self._bytes)
        while view:
            view = view[self._file.readinto(view) :]
        return state

    def __setitem__(self, place: int, state: Tensor) -> None:
        state = state.detach().to("cpu", torch.float32).contiguous()
        if self._file is None:
            self._kept[place] = state
            return
        assert self._directory is not None
        view = memoryview(state.numpy().data).cast("B")
        with _complaints(self._directory):
            self._file.seek(place * self._bytes)
            while view:
                view = view[self._file.write(view) :]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[place] for place in range(self._count))


@contextlib.contextmanager
def _complaints(directory: Path) -> Iterator[None]:
    """Turns the system's words about a full or read-only disk into ours."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{directory}: cannot hold the hidden states of the calibration text ({error.strerror}); "
            "give fewer --calibration-tokens, a larger --max-memory or an output on a larger disk"
        ) from None
