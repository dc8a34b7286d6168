"""The command line: `sctconv COMMAND`.

Nothing here or in `commands` imports torch or transformers before a command runs, so that `--help` is light.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from . import __version__
from .commands.convert import convert
from .commands.evaluate import evaluate
from .commands.export_onnx import export_onnx
from .commands.generate import generate
from .commands.init import init
from .commands.inspect import inspect
from .commands.report import report
from .commands.train import train
from .commands.verify import verify
from .formats.errors import SctError
from .formats.unfinished import abandon
from .interrupts import INTERRUPTED, interruptible


class _Group(click.Group):
    """Ends every command in one line on stderr and an exit code: 1 for an error, 2 for wrong usage, 130 for Ctrl-C."""

    def invoke(self, context: click.Context) -> Any:
        with interruptible(_interrupted) as leave:
            try:
                return super().invoke(context)
            except click.UsageError as error:
                self._misused(error)
            except SctError as error:
                self._fail("; ".join([str(error), *_notes(error)]), error.exit_code)
            except MemoryError as error:
                self._fail("; ".join(["out of memory; a smaller model, rank or context needs less", *_notes(error)]), 1)
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
                sys.exit(1)
            except OSError as error:
                named = f"{error.filename}: " if error.filename else ""
                self._fail("; ".join([f"{named}{error.strerror or error}", *_notes(error)]), 1)
            except KeyboardInterrupt as error:
                abandon()  # where a second one came while the first was cleaned up after
                click.echo(_interrupted(_notes(error)), err=True)
                leave()
                sys.exit(INTERRUPTED)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """As click's, with its complaints in one line."""
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            self._misused(error)
            raise

    def _misused(self, error: click.UsageError) -> None:
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            raise error  # prints the help
        command = error.ctx.command_path if error.ctx else self.name
        self._fail(f"{error.format_message().rstrip('.')}; see {command} --help", error.exit_code)

    @staticmethod
    def _fail(message: str, code: int) -> None:
        click.echo(_line(message), err=True)
        sys.exit(code)


@click.group(name="sctconv", cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="sctconv")
def main() -> None:
    """Language models whose linear layers are truncated SVD factors, W = U diag(s) V^T."""


def _line(message: str) -> str:
    return f"sctconv: {' '.join(message.split())}"


def _interrupted(notes: list[str]) -> str:
    return _line("; ".join(["interrupted", *(notes or ["nothing half-written was left"])]))


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


for command in (convert, inspect, report, verify, evaluate, generate, init, train, export_onnx):
    main.add_command(command)
