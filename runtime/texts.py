"""Text to evaluate, calibrate and train on: files and datasets, as the records in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from sctconv.formats.errors import SctError

HUB: Final = "hub:"
"""What the name of a dataset on the Hub begins with."""


NO_TOKENIZER: Final = (
    "has no tokenizer; put tokenizer.json beside its weights and convert it again, or give init --tokenizer SRC"
)


class TextError(SctError):
    """A text is missing, unreadable or not text."""


def has_records(source: str) -> bool:
    """Whether a text comes as records: a .jsonl or .parquet file or a dataset."""
    return source.startswith(HUB) or Path(source).suffix in (".jsonl", ".parquet")


def read_text(source: str) -> str:
    """All of a text as one string; records (their `text` field) with an empty line between them.

    Args:
        source: path of a .txt, .jsonl or .parquet file, or `hub:DATASET[:CONFIG]`.

    Raises:
        TextError: it cannot be read or holds no text.
    """
    if has_records(source):
        parts = []
        for number, record in enumerate(records(source), 1):
            text = record.get("text")
            if not isinstance(text, str):
                what = "is not a string" if "text" in record else "is missing"
                raise TextError(f"{source}: the text field of record {number} {what}")
            parts.append(text)
        whole = "\n\n".join(parts)
    else:
        whole = _content(source)
    if not whole.strip():
        raise TextError(f"{source}: an empty text")
    return whole


def records(source: str) -> Iterator[dict[str, Any]]:
    """The records of a .jsonl or .parquet file or of a dataset on the Hub, in order.

    Raises:
        TextError: it cannot be read, or a line is not a JSON object.
    """
    if source.startswith(HUB):
        name, _, config = source.removeprefix(HUB).partition(":")
        yield from _dataset(source, name, config or None)
        return
    if Path(source).suffix == ".parquet":
        yield from _dataset(source, "parquet", None, data_files=source)
        return
    for number, line in enumerate(_content(source).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise TextError(f"{source}: line {number} is not a JSON object")
        if "\\u" in line:  # how JSON writes what UTF-8 cannot
            check_characters(json.dumps(record, ensure_ascii=False), f"{source}: line {number}")
        yield record


def check_characters(text: str, where: str) -> None:
    """Refuses what no tokenizer takes: half of a surrogate pair, which Python also makes of bytes that are not UTF-8.

    Raises:
        TextError: the text holds one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"{where} is no Unicode text: {text[error.start]!a} stands alone there, half of a character; mend or remove it"
        ) from None


def _content(source: str) -> str:
    try:
        return Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{source}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise TextError(f"{source}: cannot be read ({error.strerror})") from None


def _dataset(source: str, name: str, config: str | None, **more: Any) -> Iterator[dict[str, Any]]:
    if more and not Path(source).is_file():
        raise TextError(f"{source}: no such file")
    try:
        import datasets
    except ImportError:
        raise TextError(
            f"{source}: reading it needs the package `datasets` (pip install 'sctconv[datasets]')"
        ) from None
    try:
        yield from datasets.load_dataset(name, config, split="train", **more)
    except Exception as error:  # datasets raises what the libraries under it do
        text = " ".join(str(error).split())[:160]
        where = "read as parquet" if more else "had from the Hub"
        raise TextError(f"{source}: cannot be {where} ({type(error).__name__}: {text})") from None
