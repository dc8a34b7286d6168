"""What the commands share: how they print, and a progress bar at the edge."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

import click

DTYPE = click.Choice(["bfloat16", "float16", "float32"])

SEED = click.IntRange(0, 2**32 - 1)
"""What numpy, torch and transformers all take."""

VERIFY = click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Hold a .sct file against its checksums first."
)


class Size(click.ParamType):
    """Bytes: `8GiB`, `500MB`, `1.5G` (G is GB), `4096`."""

    name = "size"
    _UNITS: Final = {"": 1, "B": 1} | {
        f"{letter}{tail}": base**power
        for power, letter in enumerate("KMGT", 1)
        for tail, base in (("", 1000), ("B", 1000), ("IB", 1024))
    }

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Raises click's own complaint where the text is no size."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Za-z]*)", str(value))
        if match is None or match[2].upper() not in self._UNITS:
            self.fail(f"{value!r} is no size; write 8GiB, 500MB or a number of bytes", param, ctx)
        return int(float(match[1]) * self._UNITS[match[2].upper()])


def given(*names: str) -> str:
    """Those of a command's options that were written out, as they are written; the empty string for none."""
    context = click.get_current_context()
    return ", ".join(
        f"--{name.replace('_', '-')}"
        for name in names
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    )


def print_json(item: Any) -> None:
    """One JSON object on stdout."""
    click.echo(json.dumps(item, indent=2, ensure_ascii=False))


def size(nbytes: float) -> str:
    """Bytes for people: `512 B`, `98.4 MB`, `1.30 GB` (powers of ten, as disks and the Hub count)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes:.0f} B"


def count(number: float) -> str:
    """A number of parameters for people: `134.5M`."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.4g}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Time for people, to two figures or so: `45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


@contextlib.contextmanager
def progress_bar(what: str, *, quiet: bool = False) -> Iterator[Callable[[float, float, str], None]]:
    """A bar in per cent on stderr with an estimate of the time left; nothing where stderr is no terminal.

    Yields a function of work done, whole work and a word on what is being done.
    """
    from tqdm import tqdm

    style = "{desc} {percentage:3.0f}%|{bar:30}| {elapsed}<{remaining}{postfix}"
    with tqdm(
        total=1.0, desc=what, bar_format=style, disable=True if quiet else None, file=sys.stderr, leave=False
    ) as bar:

        def update(done: float, total: float, doing: str) -> None:
            share = done / total if total else 0.0
            if share < bar.n:  # something else begins, and its time with it
                bar.reset()
            bar.set_postfix_str(doing, refresh=False)
            bar.update(share - bar.n)

        yield update
