"""`sctconv inspect`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from .common import count, print_json, size

if TYPE_CHECKING:
    from sctconv.formats.reader import SctFile


@click.command(short_help="Say what a .sct file holds.")
@click.argument("file", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--tensors", is_flag=True, help="List every tensor, too.")
def inspect(file: str, as_json: bool, tensors: bool) -> None:
    """Print layers, sizes and provenance of FILE. Reads its index and no tensor."""
    from sctconv.formats.reader import SctFile

    with SctFile(file, allow_incomplete=True) as opened:
        facts = _facts(opened)
    print_json(facts) if as_json else _print(facts, tensors)


def _facts(file: SctFile) -> dict[str, Any]:
    index = file.index
    distinct = {entry.offset: entry for entry in index.tensors.values()}.values()  # tied tensors share a blob
    parameters = sum(math.prod(entry.shape) for entry in distinct)
    factored = sum(record.rank * (record.out + record.in_ + 1) for record in index.layers.values())
    return {
        "path": str(file.path),
        "version": f"{file.head.major}.{file.head.minor}",
        "complete": index.complete,
        "bytes": file.nbytes,
        "parameters": parameters,
        "dense_parameters": parameters - factored + sum(record.out * record.in_ for record in index.layers.values()),
        "layers": [record.to_json() for record in index.layers.values()],
        "tensors": [entry.to_json() for entry in index.tensors.values()],
        "files": [entry.to_json() for entry in index.files.values()],
        "metadata": index.metadata,
    }


def _print(facts: dict[str, Any], tensors: bool) -> None:
    metadata = facts["metadata"]
    state = "" if facts["complete"] else ", NOT COMPLETE"
    click.echo(f"{facts['path']}: .sct {facts['version']}, {size(facts['bytes'])}{state}")
    click.echo(f"parameters   {count(facts['parameters'])} (dense {count(facts['dense_parameters'])})")
    source, conversion = _object(metadata.get("source")), _object(metadata.get("conversion"))
    click.echo(_line(f"source       {source.get('source', 'unknown')} {source.get('revision', '')}"))
    click.echo(_line(f"conversion   {', '.join(f'{key} {value}' for key, value in conversion.items()) or 'unknown'}"))
    click.echo(_line(f"made by      {metadata.get('generator', 'unknown')}"))
    click.echo(f"files        {', '.join(file['name'] for file in facts['files']) or 'none'}")
    layers = facts["layers"]
    width = max([len(layer["name"]) for layer in layers], default=5)
    click.echo(f"\n{'layer':<{width}}  {'out x in':>14}  {'rank':>5}  {'energy':>7}  {'error':>7}  dtype")
    for layer in layers:
        energy, error = (f"{layer[key]:.4f}" if layer[key] is not None else "-" for key in ("energy", "error"))
        shape = f"{layer['out']} x {layer['in']}"
        click.echo(
            f"{layer['name']:<{width}}  {shape:>14}  {layer['rank']:>5}  {energy:>7}  {error:>7}  {layer['dtype']}"
        )
    dense_layers = metadata.get("dense_layers")
    for layer in map(_object, dense_layers if isinstance(dense_layers, list) else []):
        name, out, in_, reason = (str(layer.get(key, "?")) for key in ("name", "out", "in", "reason"))
        click.echo(_line(f"{name:<{width}}  {out} x {in_}  dense: {reason}"))
    if tensors:
        click.echo("")
        for tensor in facts["tensors"]:
            click.echo(f"{tensor['dtype']:>8}  {tensor['shape']!s:<20}  {tensor['name']}")


def _object(value: Any) -> dict[str, Any]:
    """What should be an object; metadata is free, so it may be anything."""
    return value if isinstance(value, dict) else {}


def _line(text: str) -> str:
    """Text of the metadata on one line, without what would drive a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text).rstrip()
