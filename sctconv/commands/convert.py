"""`sctconv convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from .common import DTYPE, Size, count, duration, print_json, progress_bar, size

if TYPE_CHECKING:
    from sctconv.convert.forecast import Forecast
    from sctconv.convert.pipeline import ConvertReport
    from sctconv.convert.plan import Plan


_FAR: Final = 4.0
"""Perplexity over the dense model's above which a way out is named."""

_DEFAULT_CALIBRATION: Final = "hub:Salesforce/wikitext:wikitext-2-raw-v1"


@click.command(short_help="Make a .sct file of a dense checkpoint.")
@click.argument("source")
@click.option("-o", "--output", metavar="OUT.sct", help="File to write.  [default: NAME-r128.sct here]")
@click.option("--rank", type=int, metavar="K", help="Rank of every factored layer.")
@click.option(
    "--energy", type=float, metavar="E", help="Least rank that keeps this share of a layer's outputs' energy."
)
@click.option("--ratio", type=float, metavar="R", help="Share of its parameters that each layer keeps.")
@click.option("--target-size", type=Size(), metavar="SIZE", help="Largest rank whose file is within, e.g. 300MB.")
@click.option(
    "--ranks",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Each layer's rank as in another .sct file, or as `convert --dry-run --json` printed it.",
)
@click.option(
    "--allocate",
    type=click.Choice(["uniform", "measured"]),
    default="uniform",
    show_default=True,
    help="measured: as many parameters, but each layer the rank that is best for the whole.",
)
@click.option(
    "--modules", default="mlp", show_default=True, metavar="mlp|attention|all|REGEX", help="Layers to factor."
)
@click.option(
    "--calibration",
    multiple=True,
    metavar="TEXT",
    help="Text to fit on: .txt, .jsonl or hub:DATASET[:CONFIG]; repeatable.  [default: WikiText-2 from the Hub]",
)
@click.option(
    "--calibration-tokens",
    type=click.IntRange(min=2),
    default=131_072,
    show_default=True,
    help="Tokens to fit on, over all texts.",
)
@click.option("--data-free", is_flag=True, help="No text: truncate each weight by its SVD alone.")
@click.option("--refit/--no-refit", default=True, show_default=True, help="Also fit the linear layers that stay dense.")
@click.option("--refine", type=click.IntRange(min=0), default=0, metavar="N", help="Then tune by N steps of descent.")
@click.option(
    "--max-memory", type=Size(), metavar="SIZE", help="Keep within, e.g. 8GiB.  [default: 3/4 of the machine's]"
)
@click.option(
    "--bf16/--no-bf16",
    default=None,
    help="Multiply in bfloat16 on the text that is fitted on.  [default: where the processor does so faster]",
)
@click.option("--dtype", type=DTYPE, help="Store every floating tensor so.  [default: as in the source]")
@click.option("--device", default="cpu", show_default=True, help="Where the work is done, e.g. cuda.")
@click.option("--low-disk", is_flag=True, help="From the Hub: keep one shard on the disk at a time.")
@click.option("--report/--no-report", default=True, show_default=True, help="Write OUT.report.html beside OUT.sct.")
@click.option("--resume", is_flag=True, help="Go on from a stopped conversion to OUT.sct, if there is one.")
@click.option("--overwrite", is_flag=True, help="Replace OUT.sct, its report and a stopped conversion if they exist.")
@click.option("--dry-run", is_flag=True, help="Print the plan and the size, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def convert(
    source: str,
    output: str | None,
    ranks: str | None,
    calibration: tuple[str, ...],
    calibration_tokens: int,
    data_free: bool,
    low_disk: bool,
    report: bool,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Factor the linear layers of a dense checkpoint and write one .sct file.

    SOURCE is a Hugging Face directory (safetensors or torch .bin), a GGUF file, or ORG/NAME[@REVISION] on the Hub.
    Give one of --rank, --energy, --ratio, --target-size, --ranks. A layer that factors would not shrink stays dense.

    The factors are fitted, block by block, to reproduce the dense model on calibration text. With --data-free each
    weight is truncated by its SVD alone, which costs most of a model's quality.
    """
    from sctconv.convert.options import ConvertOptions
    from sctconv.errors import OptionError
    from sctconv.formats.atomic import check_target

    if data_free and calibration:
        raise OptionError("--data-free and --calibration exclude each other; give one of them")
    if dry_run and resume:
        raise OptionError("--dry-run tells of a whole conversion, not of what --resume would still do; leave one out")
    if output and not dry_run:
        check_target(Path(output), overwrite=overwrite)  # before what takes seconds to import
    listed = None
    if ranks:
        from sctconv.convert.plan import read_ranks

        listed = read_ranks(ranks)
    options = ConvertOptions(
        calibration=() if data_free else calibration or (_DEFAULT_CALIBRATION,),
        calibration_tokens=calibration_tokens,
        calibration_context=min(512, calibration_tokens),
        ranks=listed,
        **settings,
    )
    if dry_run:
        from sctconv.convert.pipeline import plan_conversion

        with progress_bar("planning", quiet=as_json) as progress:
            plan, expected = plan_conversion(source, options, low_disk=low_disk, progress=progress)
        print_json(_plan_json(plan, expected)) if as_json else _print_plan(plan, expected)
        return

    from sctconv.convert.pipeline import convert as run

    with progress_bar("converting", quiet=as_json) as progress:
        done = run(
            source, output, options,
            overwrite=overwrite, resume=resume, low_disk=low_disk, report=report, progress=progress,
        )  # fmt: skip
    print_json(_report_json(done)) if as_json else _print_report(done)


def _report_json(report: ConvertReport) -> dict[str, object]:
    return {
        "output": report.output,
        "bytes": report.bytes,
        "dense_bytes": report.dense_bytes,
        "parameters": report.parameters,
        "dense_parameters": report.dense_parameters,
        "layers": [record.to_json() for record in report.layers],
        "dense_layers": [
            {"name": layer.name, "out": layer.out, "in": layer.in_, "reason": layer.reason} for layer in report.dense
        ],
        "unused_tensors": report.unused,
        "seconds": report.seconds,
        "peak_rss_bytes": report.peak_rss_bytes,
        "memory_limit_bytes": report.memory_limit_bytes,
        "report": report.report,
        "quality": report.quality,
    }


def _print_report(report: ConvertReport) -> None:
    names = [record.name for record in report.layers] + [layer.name for layer in report.dense]
    width = max(map(len, names), default=5)
    measure = "output error" if report.quality else "energy kept"
    click.echo(f"{'layer':<{width}}  {'out x in':>14}  {'rank':>5}  {measure:>12}  {'weight error':>12}")
    for record in report.layers:
        shape = f"{record.out} x {record.in_}"
        number = record.extra.get("output_error", record.energy)
        click.echo(f"{record.name:<{width}}  {shape:>14}  {record.rank:>5}  {number:>12.4f}  {record.error:>12.4f}")
    for layer in report.dense:
        click.echo(f"{layer.name:<{width}}  {f'{layer.out} x {layer.in_}':>14}  dense  {layer.reason}")
    if report.unused:
        click.echo(
            f"{len(report.unused)} tensors that the model does not use were copied: {', '.join(report.unused[:5])}"
        )
    click.echo(
        f"\n{report.output}: {size(report.bytes)}, {count(report.parameters)} parameters "
        f"(dense {size(report.dense_bytes)}, {count(report.dense_parameters)}); "
        f"{len(report.layers)} layers factored, {len(report.dense)} selected layers left dense"
    )
    peak = f", peak memory {size(report.peak_rss_bytes)}" if report.peak_rss_bytes else ""
    allowed = f" of {size(report.memory_limit_bytes)} allowed" if peak and report.memory_limit_bytes else ""
    click.echo(f"{report.seconds:.1f} s{peak}{allowed}")
    if report.report:
        click.echo(f"pictures: {report.report}")
    if report.quality:
        held_out = report.quality["held_out"]
        click.echo(
            f"on {held_out['tokens']} held-out calibration tokens: perplexity {held_out['perplexity']:.4g} "
            f"(dense {held_out['teacher_perplexity']:.4g}), KL to the dense model {held_out['kl']:.3f} nats a token"
        )
        times = held_out["perplexity"] / held_out["teacher_perplexity"]
        if times > _FAR:
            click.echo(
                f"that is {times:.3g} times the dense model's: a higher rank, more --calibration-tokens or --refine bring it nearer"
            )
        if "tuned_perplexity" in held_out:
            click.echo(f"tuned as a whole: perplexity {held_out['tuned_perplexity']:.4g} on them")
        return
    click.echo(
        "Truncation without data costs quality, often all of it (leave out --data-free to keep most); measure it: "
        f"sctconv evaluate {report.output} --text FILE.txt"
    )


def _plan_json(plan: Plan, expected: Forecast) -> dict[str, object]:
    return {
        "layers": [
            {"name": layer.name, "out": layer.out, "in": layer.in_, "rank": layer.rank, "reason": layer.reason}
            for layer in plan.layers.values()
        ],
        "bytes": plan.file_bytes,
        "dense_bytes": plan.dense_bytes,
        "parameters": plan.parameters,
        "dense_parameters": plan.dense_parameters,
        "seconds": expected.seconds,
        "peak_rss_bytes": expected.peak_bytes,
    }


def _print_plan(plan: Plan, expected: Forecast) -> None:
    width = max(len(layer.name) for layer in plan.layers.values())
    for layer in plan.layers.values():
        verdict = f"dense  {layer.reason}" if layer.reason else f"rank {layer.rank or 'by energy'}"
        click.echo(f"{layer.name:<{width}}  {f'{layer.out} x {layer.in_}':>14}  {verdict}")
    click.echo(
        f"\nwould write {size(plan.file_bytes)}, {count(plan.parameters)} parameters "
        f"(dense {size(plan.dense_bytes)}, {count(plan.dense_parameters)}); nothing was written"
    )
    click.echo(
        f"would take about {duration(expected.seconds)} and {size(expected.peak_bytes)} of memory on this machine"
    )
    if any(layer.rank is None and layer.reason is None for layer in plan.layers.values()):
        click.echo("ranks by energy are known only after the SVD; their layers are counted as dense here")
