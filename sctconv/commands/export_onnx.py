"""`sctconv export-onnx`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from .common import print_json, progress_bar, size

_WHAT: Final = {"prefill": "prompt", "decode": "cached steps", "padded": "padded batch", "states": "hidden states"}


@click.command("export-onnx", short_help="Write a graph for onnxruntime.")
@click.argument("model")
@click.option("-o", "--output", metavar="DIR", help="Directory to make.  [default: MODEL-onnx]")
@click.option(
    "--profile",
    type=click.Choice(["portable", "standard", "ort"]),
    default="portable",
    show_default=True,
    help="Plain nodes for any onnxruntime since 1.20; opset 23's larger ones (1.23); or onnxruntime's own, with a shared cache "
    "and genai_config.json for onnxruntime-genai.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Of weights and cache.",
)
@click.option(
    "--quantize", type=click.Choice(["int8", "int4"]), help="Matrices in blocks of 32; embeddings and head stay int8."
)
@click.option("--verify/--no-verify", default=True, show_default=True, help="Run it against torch before it is kept.")
@click.option("--overwrite", is_flag=True, help="Replace DIR if it is an exported model.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def export_onnx(
    model: str,
    output: str | None,
    profile: str,
    dtype: str,
    quantize: str | None,
    verify: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Export MODEL.sct as a decoder with a KV cache (or an encoder) whose factored layers stay factored.

    DIR holds model.onnx, its weights in model.onnx.data, configuration and tokenizer.
    """
    from sctconv.export import ExportOptions
    from sctconv.export import export_onnx as run

    target = output or f"{Path(model).stem}-onnx"
    with progress_bar("exporting", quiet=as_json) as progress:
        options = ExportOptions(profile, dtype, quantize, verify)
        report = run(model, target, options, overwrite=overwrite, progress=progress)
    found = report.comparison
    if as_json:
        comparison = found.to_json() if found else None
        print_json({"directory": target, "bytes": report.bytes, "layers": report.layers, "comparison": comparison})
        return
    click.echo(f"{target}: {size(report.bytes)}, {report.layers} factored layers")
    if found:
        click.echo(
            f"against torch{' with rounded weights' if quantize else ''}, largest difference over the largest number: "
            + ", ".join(f"{_WHAT[name]} {value:.1e}" for name, value in found.differences.items())
            + ("" if found.top1 is None else f"; likeliest token the same {found.top1:.1%}")
        )
