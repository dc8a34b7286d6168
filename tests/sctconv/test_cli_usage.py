"""How the command line is called: wrong usage in one line, prompts and texts that are none, and what is imported for it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sctconv
from tests.sctconv.command_line import fails, run

_ROOT = Path(sctconv.__file__).parent.parent


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nope"], ["No such option '--nope'; see sctconv --help"]),
        (["nope"], ["No such command 'nope'; see sctconv --help"]),
        (["convert"], ["Missing argument 'SOURCE'; see sctconv convert --help"]),
        (["convert", "x", "--rank", "nan"], ["'--rank'", "'nan' is not a valid integer; see sctconv convert --help"]),
        (["convert", "x", "--target-size", "-5GB"], ["'-5GB' is no size"]),
        (["convert", "x", "--rank", 4, "--data-free", "--max-memory", "1GB"], ["--max-memory needs calibration text"]),
        (["inspect", "-x.sct"], ["No such option '-x'"]),
        (["generate", "x", "-p", "y", "--seed", "-1"], ["'--seed'", "-1 is not in the range"]),
        (["init", "x", "-o", "y", "--rank", 4, "--seed", 2**32], ["'--seed'", "4294967296 is not in the range"]),
        (["train", "x", "--data", "y", "--teacher-weight", "0.3"], ["--teacher-weight: of whom? give --teacher SRC"]),
    ],
    ids=str,
)
def test_wrong_usage_is_one_line_too(arguments: list[Any], words: list[str]) -> None:
    fails(run(*arguments), *words, code=2)


def test_no_command_prints_the_help() -> None:
    assert "Usage: sctconv [OPTIONS] COMMAND" in run().output


def test_half_a_character_is_no_text(tiny_sct: Path, tmp_path: Path) -> None:
    """What JSON may hold and UTF-8 may not, and what Python makes of bytes on a command line that are not UTF-8."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "first"}\n{"text": "a \\ud800 b"}\n')
    message = [f"{bad}: line 2 is no Unicode text: '\\ud800' stands alone there"]
    fails(run("evaluate", tiny_sct, "--text", bad), *message)
    fails(run("train", tiny_sct, "--data", bad, "--context", 32, "-o", tmp_path / "t.sct"), *message)
    fails(run("generate", tiny_sct, "-p", "a\udcffb"), "the prompt is no Unicode text: '\\udcff'")
    good = tmp_path / "good.jsonl"
    good.write_text('{"text": "' + "a \\ud83d\\ude00 b" * 20 + '"}\n')
    assert run("evaluate", tiny_sct, "--text", good, "--context", 32).exit_code == 0


def test_a_prompt_that_does_not_come(tiny_sct: Path) -> None:
    """From standard input: closed, empty, or not UTF-8."""
    command = [sys.executable, "-m", "sctconv", "generate", str(tiny_sct), "--max-new-tokens", "2"]
    for shell, words in (
        ("<&-", "standard input is closed; give -p TEXT"),
        ("</dev/null", "the prompt is empty"),
        ("--chat </dev/null", "the prompt is empty"),
    ):
        done = subprocess.run(f"{shlex.join(command)} {shell}", shell=True, cwd=_ROOT, capture_output=True, text=True)
        assert done.returncode != 0 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    raw = subprocess.run(command, input=b"\xff\xfe\x00bad", cwd=_ROOT, capture_output=True)
    assert raw.returncode != 0 and b"the prompt" in raw.stderr and raw.stderr.count(b"\n") == 1, raw.stderr


def test_generation_ends_where_the_context_is_full(tiny_sct: Path) -> None:
    result = run("generate", tiny_sct, "-p", "x" * 30, "--max-new-tokens", 10**8, "--temperature", 0)
    assert result.exit_code == 0 and result.stderr == ""


def test_help_is_light() -> None:
    """Neither torch nor transformers nor numpy is imported before a command runs, nor to refuse options or an output."""
    code = (
        "import sys; from click.testing import CliRunner; from sctconv.cli import main\n"
        "for args in ([], ['--help'], ['convert', '--help'], ['--version'], ['convert', 'x', '--rank', '0'],\n"
        "             ['convert', 'x', '--rank', '4', '-o', '/nowhere/o.sct']):\n"
        "    CliRunner().invoke(main, args)\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'gguf') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=_ROOT, check=True)
    assert result.stdout.strip() == "[]"
