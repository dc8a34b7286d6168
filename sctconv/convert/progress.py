"""How far a conversion has come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Progress = Callable[[float, float, str], None]
"""Called with the work done, the whole work (in one arbitrary unit) and the name of what is being worked on."""


@dataclass
class Work:
    """Progress in floating operations, so that the estimate of time follows the large matrices."""

    total: float
    progress: Progress | None
    done: float = 0.0

    def start(self, what: str) -> None:
        if self.progress:
            self.progress(self.done, self.total, what)

    def finish(self, cost: float, what: str) -> None:
        self.done += cost
        self.start(what)


def of_one(progress: Progress | None) -> Callable[[float, str], None] | None:
    """For those who know only the share of the work that is done."""
    return None if progress is None else lambda share, what: progress(share, 1.0, what)
