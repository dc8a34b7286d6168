"""`sctconv export-onnx`."""

from __future__ import annotations

from pathlib import Path

import click

from .common import print_json, progress_bar, size


@click.command("export-onnx", short_help="Write a graph for onnxruntime.")
@click.argument("model")
@click.option("-o", "--output", metavar="DIR", help="Directory to make.  [default: MODEL-onnx]")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Run it against torch before it is kept.")
@click.option("--overwrite", is_flag=True, help="Replace DIR if it is an exported model.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def export_onnx(model: str, output: str | None, verify: bool, overwrite: bool, as_json: bool) -> None:
    """Export MODEL.sct as a decoder with a KV cache whose factored layers stay factored, float32, for any onnxruntime.

    DIR holds model.onnx, its weights in model.onnx.data, configuration and tokenizer.
    """
    from sctconv.export import ExportOptions
    from sctconv.export import export_onnx as run

    target = output or f"{Path(model).stem}-onnx"
    with progress_bar("exporting", quiet=as_json) as progress:
        report = run(model, target, ExportOptions(verify), overwrite=overwrite, progress=progress)
    found = report.comparison
    if as_json:
        comparison = found.to_json() if found else None
        print_json({"directory": target, "bytes": report.bytes, "layers": report.layers, "comparison": comparison})
        return
    click.echo(f"{target}: {size(report.bytes)}, {report.layers} factored layers")
    if found:
        click.echo(
            f"against torch, largest difference over the largest logit: prefill {found.prefill:.1e}, cached steps "
            f"{found.decode:.1e}, left-padded batch {found.padded:.1e}; likeliest token the same {found.top1:.1%}"
        )
