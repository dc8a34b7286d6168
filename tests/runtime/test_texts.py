"""Texts from files and from the Hub's datasets."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from sctconv.runtime.texts import TextError, read_text, records


def test_a_file_is_its_text_and_records_have_lines_between_them(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words, ünïcode\n", encoding="utf-8")
    assert read_text(str(tmp_path / "a.txt")) == "words, ünïcode\n"
    lines = [{"text": "one"}, {"text": "two", "id": 3}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    assert read_text(str(tmp_path / "a.jsonl")) == "one\n\ntwo"
    assert list(records(str(tmp_path / "a.jsonl"))) == lines


def test_a_dataset_comes_by_name_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` is optional and the Hub is not here; what is asked of it is what its documentation says."""
    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> list[dict[str, str]]:
        asked.append((name, config, split))
        return [{"text": "from"}, {"text": "the Hub"}]

    stub = types.ModuleType("datasets")
    stub.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stub)
    assert read_text("hub:Salesforce/wikitext:wikitext-2-raw-v1") == "from\n\nthe Hub"
    assert read_text("hub:org/name") == "from\n\nthe Hub"
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "train"), ("org/name", None, "train")]


def test_what_the_hub_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no\nroute")

    stub = types.ModuleType("datasets")
    stub.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stub)
    with pytest.raises(TextError, match=r"^hub:a/b: cannot be had from the Hub \(ConnectionError: no route\)$"):
        read_text("hub:a/b")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.txt", None, "cannot be read"),
        ("empty.txt", b" \n", "an empty text"),
        ("latin.txt", b"caf\xe9", r"not UTF-8 text \(byte 3\)"),
        ("bad.jsonl", b"{}\n[1]\n", "record 1 is missing"),
        ("list.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("deep.jsonl", b"[" * 100_000, "line 1 is not a JSON object"),
    ],
)
def test_what_cannot_be_read_is_one_line(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message) as caught:
        read_text(str(tmp_path / name))
    assert name in str(caught.value) and "\n" not in str(caught.value)
