"""`sctconv verify`."""

from __future__ import annotations

import click

from .common import print_json, progress_bar, size


@click.command(short_help="Check a .sct file through and through.")
@click.argument("file", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(file: str, as_json: bool) -> None:
    """Check index, checksums, finiteness of every tensor and orthonormality of every factor of FILE."""
    from sctconv.runtime.verify import verify as run

    with progress_bar("verifying", quiet=as_json) as progress:
        result = run(file, progress=progress)
    if as_json:
        print_json(result.to_json())
        return
    click.echo(
        f"{file}: good; {size(result.bytes)}, {result.tensors} tensors finite, {result.files} files, "
        f"{result.layers} layers orthonormal to {result.orthonormality:.1e}"
    )
