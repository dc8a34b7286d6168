"""Two runs that write one output do not mix: the second is refused in one line, or comes when the first has ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from click.testing import CliRunner

from sctconv.cli import main
from sctconv.convert import ConvertOptions, convert
from sctconv.formats.lock import output_lock
from sctconv.formats.reader import SctFile
from sctconv.runtime.verify import verify
from tests.models import save, tiny_model, tiny_tokenizer

_ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model in `dense`, its conversion in `m.sct` and a text in `text.txt`."""
    room = tmp_path_factory.mktemp("room")
    save(tiny_model("llama", vocab_size=260), room / "dense")
    tiny_tokenizer(room / "dense")
    convert(str(room / "dense"), room / "m.sct", ConvertOptions(rank=6))
    (room / "text.txt").write_text("".join(f"{place} apples and {place % 5} pears. " for place in range(900)))
    return room


def commands(room: Path, out: Path) -> dict[str, list[str]]:
    text = str(room / "text.txt")
    quick = ["--steps", "2", "--batch", "2", "--context", "32"]
    return {
        "data-free": ["convert", f"{room}/dense", "-o", f"{out}/o", "--rank", "4", "--data-free"],
        "calibrated": [
            *("convert", f"{room}/dense", "-o", f"{out}/o", "--rank", "4"),
            *("--calibration", text, "--calibration-tokens", "2048"),
        ],
        "train": ["train", f"{room}/m.sct", "-o", f"{out}/o", "--data", text, *quick],
        "export": ["export-onnx", f"{room}/m.sct", "-o", f"{out}/o", "--no-verify"],
    }


@pytest.mark.parametrize("kind", ["data-free", "calibrated", "train", "export"])
def test_an_output_that_another_run_writes_is_refused(kind: str, room: Path, tmp_path: Path) -> None:
    command = commands(room, tmp_path)[kind]
    with output_lock(tmp_path / "o"):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1 and result.stdout == "", result.output
        assert result.stderr.splitlines() == [
            f"sctconv: {tmp_path}/o: process {os.getpid()} is writing it and holds {tmp_path}/.o.lock; "
            "wait until it has ended, or write elsewhere"
        ]
        assert [path.name for path in tmp_path.iterdir()] == [".o.lock"], "nothing was begun"
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "o").exists() and not list(tmp_path.glob(".*")), "nothing is left of the lock"


def test_of_conversions_to_one_output_each_is_whole_or_refused(tmp_path: Path) -> None:
    """At ranks of their own, so that a mixture would show."""
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
    )
    save(transformers.LlamaForCausalLM(config), tmp_path / "dense", shard="100MB")
    out = tmp_path / "out"
    out.mkdir()
    processes: list[subprocess.Popen[Any]] = []
    for rank in (8, 16, 24):
        command = [sys.executable, "-m", "sctconv", "convert", str(tmp_path / "dense"), "-o", str(out / "o.sct")]
        command += ["--rank", str(rank), "--data-free", "--overwrite", "--no-report"]
        processes.append(
            subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    ends = [(process.communicate(timeout=300)[1], process.returncode) for process in processes]
    for stderr, code in ends:
        assert code == 0 or (code == 1 and len(stderr.splitlines()) == 1 and "is writing it" in stderr), stderr
    assert any(code == 0 for _, code in ends)
    verify(out / "o.sct")
    with SctFile(out / "o.sct") as file:
        assert {record.rank for record in file.index.layers.values()} in ({8}, {16}, {24})
    assert [path.name for path in out.iterdir()] == ["o.sct"]
