"""`sctconv report`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Draw what a .sct file holds as an HTML page.")
@click.argument("file", type=click.Path())
@click.option("-o", "--output", type=click.Path(), help="The page to write.  [default: FILE.report.html]")
@click.option("--overwrite", is_flag=True, help="Replace the page if it exists.")
def report(file: str, output: str | None, overwrite: bool) -> None:
    """Write sizes, ranks, quality by depth and spectra of FILE as one HTML page that needs nothing else."""
    from sctconv.report.conversion import write_report

    target = output or str(Path(file).with_name(f"{Path(file).name.removesuffix('.sct')}.report.html"))
    write_report(file, target, overwrite=overwrite)
    click.echo(target)
