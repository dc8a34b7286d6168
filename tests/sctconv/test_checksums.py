"""A flipped bit in any blob is refused by name before anything is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import sctconv
from sctconv.cli import main
from sctconv.convert import ConvertOptions, convert
from sctconv.formats.errors import ChecksumError
from sctconv.formats.reader import SctFile
from tests.models import save, tiny_model, tiny_tokenizer

BLOBS = [
    "model.layers.1.mlp.up_proj.U",
    "model.layers.0.mlp.down_proj.s",
    "model.layers.0.mlp.gate_proj.V",
    "model.layers.0.self_attn.q_proj.weight",
    "model.norm.weight",
    "model.embed_tokens.weight",
    "config.json",
    "tokenizer.json",
    "LICENSE",
]
COMMANDS = {
    "train": [
        "train",
        "m.sct",
        "-o",
        "out/o.sct",
        "--data",
        "text.txt",
        "--steps",
        "2",
        "--batch",
        "2",
        "--context",
        "32",
    ],
    "export": ["export-onnx", "m.sct", "-o", "out/o", "--no-verify"],
    "evaluate": ["evaluate", "m.sct", "--text", "text.txt", "--context", "32", "--max-tokens", "64"],
    "generate": ["generate", "m.sct", "-p", "apples", "--max-new-tokens", "2"],
}


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a factored model in `m.sct`, a text, and an empty directory `out`."""
    monkeypatch.chdir(tmp_path)
    save(tiny_model("llama", vocab_size=260), tmp_path / "dense", files={"LICENSE": "terms"})
    tiny_tokenizer(tmp_path / "dense")
    convert(str(tmp_path / "dense"), tmp_path / "m.sct", ConvertOptions(rank=6))
    (tmp_path / "text.txt").write_text("".join(f"{place} apples and {place % 5} pears. " for place in range(900)))
    (tmp_path / "out").mkdir()
    return tmp_path


def flip(path: Path, name: str, where: float = 0.5) -> None:
    """Flips one bit of a blob."""
    with SctFile(path) as file:
        blob = file.index.tensors.get(name) or file.index.files[name]
    data = bytearray(path.read_bytes())
    data[blob.offset + min(int(where * blob.nbytes), blob.nbytes - 1)] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", BLOBS)
def test_a_flipped_bit_is_refused_before_anything_is_written(name: str, command: str, room: Path) -> None:
    flip(room / "m.sct", name)
    result = CliRunner().invoke(main, COMMANDS[command])
    assert result.exit_code == 1 and result.stdout == "", result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("sctconv: m.sct: the ") and f" {name} does not match its checksum" in line
    assert not list((room / "out").iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_an_undamaged_file_is_taken(command: str, room: Path) -> None:
    result = CliRunner().invoke(main, COMMANDS[command])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("where", [0.0, 0.3, 1.0])
def test_loading_with_verify_finds_it_in_every_blob(where: float, room: Path) -> None:
    whole = (room / "m.sct").read_bytes()
    with SctFile(room / "m.sct") as file:
        names = [*file.index.tensors, *file.index.files]
    for name in names:
        flip(room / "m.sct", name, where)
        with pytest.raises(ChecksumError, match=f" {name} does not match its checksum"):
            sctconv.load(room / "m.sct", verify=True)
        (room / "m.sct").write_bytes(whole)
    sctconv.load(room / "m.sct", verify=True)


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_who_does_not_want_it_need_not_wait_for_it(command: str, room: Path) -> None:
    flip(room / "m.sct", "model.norm.weight", 0.0)
    assert CliRunner().invoke(main, [*COMMANDS[command], "--no-verify"]).exit_code == 0
