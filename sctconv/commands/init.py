"""`sctconv init`."""

from __future__ import annotations

import click

from .common import DTYPE, SEED, count, print_json


@click.command(short_help="Begin a factored model from scratch.")
@click.argument("config")
@click.option("--rank", type=int, required=True, metavar="K", help="Rank of every factored layer.")
@click.option("-o", "--output", required=True, metavar="NEW.sct", help="File to write.")
@click.option(
    "--modules", default="all", show_default=True, metavar="mlp|attention|all|REGEX", help="Layers to factor."
)
@click.option("--embeddings", is_flag=True, help="Factor the input embedding and the head too.")
@click.option("--tokenizer", metavar="SRC", help="Model whose tokenizer goes along.  [default: that of CONFIG]")
@click.option("--dtype", type=DTYPE, default="float32", show_default=True, help="Store every tensor so.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of all random numbers.")
@click.option("--overwrite", is_flag=True, help="Replace NEW.sct if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def init(
    config: str,
    rank: int,
    output: str,
    modules: str,
    embeddings: bool,
    tokenizer: str | None,
    dtype: str,
    seed: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a model with random weights and factored layers, for `sctconv train`.

    CONFIG is a config.json, a model directory, a GGUF file or a Hub id, of which only configuration and tokenizer are taken.
    """
    from sctconv.convert.scratch import initial_files, initialise

    files = initial_files(config, tokenizer)
    made = initialise(
        files,
        output,
        rank=rank,
        modules=modules,
        embeddings=embeddings,
        dtype=dtype,
        seed=seed,
        overwrite=overwrite,
        label=config,
    )
    if as_json:
        print_json(made)
        return
    click.echo(f"{output}: {count(made['parameters'])} parameters, {made['layers']} layers factored at rank {rank}")
    if not any(name.startswith("tokenizer") for name in files):
        click.echo("it has no tokenizer, which training needs; give --tokenizer SRC")
