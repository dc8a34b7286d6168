"""What a stranger's .sct file may hold: a hostile chat template, any metadata, junk for a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sctconv.cli import main
from sctconv.formats.reader import SctFile
from sctconv.formats.writer import rewrite
from sctconv.runtime import chat_template

TEMPLATES = {
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ 'a' * 10**9 }}": "takes over 512 MiB of memory",
    "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}": "takes over 2 s",
    "{% for message in messages %}{{ message.content }}{% endfor %}": None,
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_hostile_template_ends_generate_and_train_in_one_line(
    tiny_sct: Path, tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 2)
    path, chats = tmp_path / "hostile.sct", tmp_path / "chats.jsonl"
    with SctFile(tiny_sct) as file:
        rewrite(file, path, files={"chat_template.jinja": template.encode()})
    record = {"messages": [{"role": "user", "content": "Hi " * 40}, {"role": "assistant", "content": "Ho " * 20}]}
    chats.write_text(f"{json.dumps(record)}\n" * 40)
    quick = ["--steps", "1", "--context", "16", "--batch", "2"]
    for command in (
        ["generate", path, "--chat", "-p", "Hi", "--max-new-tokens", "2"],
        ["train", path, "--data", chats, "-o", tmp_path / "trained.sct", *quick],
    ):
        result = CliRunner().invoke(main, [str(word) for word in command])
        refused = TEMPLATES[template]
        assert result.exit_code == (1 if refused else 0), result.output
        assert (tmp_path / "trained.sct").exists() == (command[0] == "train" and refused is None)
        if refused:
            assert isinstance(result.exception, SystemExit)
            (line,) = (line for line in result.stderr.splitlines() if line.startswith("sctconv: "))
            assert refused in line and "the chat template" in line


ANYTHING: list[Any] = [
    None,
    True,
    1,
    -1e308,
    "x",
    "\x1b]0;a\x07\u202e",
    [],
    [1],
    [[]],
    [{}],
    {},
    {"x": 1},
    {"source": {}},
]
ANYTHING += [[{"name": 1}], [{"name": "a\nb", "out": "x", "in": None, "reason": {}}]]
KEYS: list[tuple[str, ...]] = [
    ("source",),
    ("conversion",),
    ("generator",),
    ("dense_layers",),
    ("training",),
    ("parameters",),
]
KEYS += [("conversion", key) for key in ("method", "calibration", "held_out", "allocation", "refinement", "tuning")]


@pytest.mark.parametrize("key", KEYS)
def test_metadata_may_be_anything(tiny_sct: Path, tmp_path: Path, key: tuple[str, ...]) -> None:
    path = tmp_path / "hostile.sct"
    for value in ANYTHING:
        metadata = {key[0]: {key[1]: value} if len(key) > 1 else value}
        with SctFile(tiny_sct) as file:
            rewrite(file, path, metadata=metadata, overwrite=True)
        for command in (["inspect"], ["inspect", "--json"], ["report", "--overwrite"]):
            result = CliRunner().invoke(main, [command[0], str(path), *command[1:]], color=True)
            assert result.exit_code == 0, (value, result.exception)
            assert "\x1b" not in result.output


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("junk", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b"[]", b"1", b'{"a": NaN', b'"\\ud800"'])
def test_an_embedded_file_that_is_junk_is_one_line(tiny_sct: Path, tmp_path: Path, name: str, junk: bytes) -> None:
    path = tmp_path / "hostile.sct"
    with SctFile(tiny_sct) as file:
        rewrite(file, path, files={name: junk})
    result = CliRunner().invoke(main, ["generate", str(path), "-p", "Hi", "--max-new-tokens", "2"])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), (result.output, result.exception)
    assert len(result.stderr.strip().splitlines()) == 1 and result.stderr.startswith("sctconv: "), result.stderr
