"""The command line as tests call it."""

from __future__ import annotations

from click.testing import CliRunner, Result

from sctconv.cli import main


def run(*args: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], input=stdin)


def fails(result: Result, *words: str, code: int = 1) -> None:
    """One line on stderr with these words, nothing on stdout, the exit code, no traceback."""
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr
