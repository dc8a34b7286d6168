"""Errors of the tool itself; the rest of the tree is in `sctconv.formats.errors`."""

from __future__ import annotations

from typing import ClassVar

from .formats.errors import SctError


class OptionError(SctError):
    """Options that contradict each other or the model. Exit code 2, as for any usage error."""

    exit_code: ClassVar[int] = 2
