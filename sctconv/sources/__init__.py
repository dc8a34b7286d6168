"""What a user may name as input: a directory, a GGUF file, or `org/name[@revision]` on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from sctconv.formats.errors import MissingFileError

from .base import Source

_HUB_ID: Final = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[\w./-]+))?")


def open_source(text: str, *, low_disk: bool = False) -> Source:
    """Opens what the user named.

    A path that exists is a path; otherwise `org/name[@revision]` is looked up on the Hub.

    Args:
        text: directory, GGUF file or Hub id.
        low_disk: of a Hub checkpoint, keep one shard on the disk at a time.

    Raises:
        CheckpointError: it is not there or cannot be read; `HubError` for what the Hub refuses.
    """
    path = Path(text).expanduser()
    if path.exists():
        from .local import open_local

        return open_local(path, text)
    if match := _HUB_ID.fullmatch(text):
        from .hub import open_hub

        return open_hub(match["repo"], match["revision"], low_disk=low_disk)
    raise MissingFileError(f"{text}: no such file or directory, and not a Hub id (org/name or org/name@revision)")


__all__ = ["Source", "open_source"]
