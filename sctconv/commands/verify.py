"""`sctconv verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .common import print_json, progress_bar, size

if TYPE_CHECKING:
    from sctconv.convert.against import Comparison


@click.command(short_help="Check a .sct file through and through.")
@click.argument("file", type=click.Path())
@click.option("--deep", is_flag=True, help="Also compute every layer's error again; needs --against.")
@click.option("--against", metavar="SRC", help="The dense checkpoint that FILE was made of; implies --deep.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(file: str, deep: bool, against: str | None, as_json: bool) -> None:
    """Check index, checksums, finiteness of every tensor and orthonormality of every factor of FILE.

    With --deep --against SRC also compute each layer's |W - U diag(s) V^T| / |W| from the weights of SRC and hold it against
    what FILE records, and what FILE keeps dense against the tensors of SRC.
    """
    from sctconv.errors import OptionError
    from sctconv.runtime.verify import verify as run

    if deep and against is None:
        raise OptionError("--deep: against which checkpoint? give --against SRC too")
    with progress_bar("verifying", quiet=as_json) as progress:
        result = run(file, progress=progress)
    found = None
    if against is not None:
        from sctconv.convert.against import compare_with_source

        with progress_bar("comparing", quiet=as_json) as progress:
            found = compare_with_source(file, against, progress=progress)
    if as_json:
        print_json(result.to_json() | ({"against": found.to_json()} if found else {}))
    if found:
        found.check(file)
    if as_json:
        return
    click.echo(
        f"{file}: good; {size(result.bytes)}, {result.tensors} tensors finite, {result.files} files, "
        f"{result.layers} layers orthonormal to {result.orthonormality:.1e}"
    )
    if found:
        click.echo(_describe(found))


def _describe(found: Comparison) -> str:
    if found.trained:
        return (
            f"against {found.source}: trained since, so neither errors nor dense tensors follow it; the largest error of "
            f"{found.layers} layers is now {found.worst_error:.3g}, and {found.fitted} of {found.tensors} dense tensors moved"
        )
    fitted = f", but for {found.fitted} that calibration fitted" if found.fitted else ""
    unrecorded = f" ({found.unrecorded} have none on record)" if found.unrecorded else ""
    return (
        f"against {found.source}: the errors of {found.layers} layers are as recorded{unrecorded}, up to "
        f"{found.worst_error:.3g}; {found.tensors} dense tensors are its own{fitted}"
    )
