"""`sctconv train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import DTYPE, SEED, Size, given, print_json, progress_bar, size


@click.command(short_help="Go on training a model's factors.")
@click.argument("model")
@click.option(
    "--data",
    multiple=True,
    required=True,
    metavar="TEXT",
    help="Text: .txt, .jsonl, .parquet or hub:DATASET; repeatable.",
)
@click.option("-o", "--output", metavar="NEW.sct", help="File to write.  [default: MODEL-trained.sct]")
@click.option("--steps", default=300, show_default=True, help="Steps of the optimiser.")
@click.option("--batch", default=4, show_default=True, help="Windows of a step.")
@click.option("--micro-batch", default=2, show_default=True, help="Windows that go through the model at once.")
@click.option("--context", default=512, show_default=True, help="Tokens in a window.")
@click.option(
    "--optimizer",
    type=click.Choice(["spectral", "adamw"]),
    default="spectral",
    show_default=True,
    help="spectral: each kind of parameter in its own unit; adamw: the paper's, one --rate and QR after each step.",
)
@click.option(
    "--direction",
    type=click.Choice(["adam", "polar"]),
    help="Of a step of U and V: Adam's, or the polar factor of the momentum.  [default: adam; polar after init]",
)
@click.option(
    "--rate", type=float, help="Of dense matrices; with adamw of everything.  [default: 1e-4; 1e-3 after init]"
)
@click.option(
    "--angle", type=float, help="Radians that a column of U or V turns in a step.  [default: 0.003; 0.05 after init]"
)
@click.option("--singular-rate", type=float, help="Relative change of s in a step.  [default: 0.001; 0.01 after init]")
@click.option(
    "--norm-rate", type=float, help="Of norms and biases.  [default: 3e-4; 1e-3 after init; with adamw as --rate]"
)
@click.option(
    "--embedding-rate", type=float, help="Of embeddings and head.  [default: 0, they stay; as --rate after init]"
)
@click.option("--weight-decay", default=0.0, show_default=True, help="Of s.")
@click.option(
    "--clip",
    default=1.0,
    show_default=True,
    help="Largest norm of the gradient, with spectral in equal shares for all parameters; 0 for none.",
)
@click.option("--schedule", type=click.Choice(["cosine", "wsd", "constant"]), default="cosine", show_default=True)
@click.option("--warm-up", default=0.05, show_default=True, help="Share of the steps in which rates rise.")
@click.option(
    "--retraction",
    type=click.Choice(["qr", "householder", "polar", "absorb", "none"]),
    default="qr",
    show_default=True,
    help="How U and V come back to orthonormal columns; absorb: without changing the layer; none: only at the end.",
)
@click.option("--retract-every", default=1, show_default=True, help="With adamw: steps between retractions.")
@click.option(
    "--train", type=click.Choice(["all", "factors", "norms"]), default="all", show_default=True, help="What moves."
)
@click.option("--document-masks", is_flag=True, help="Tokens see only the record that they are of.")
@click.option(
    "--bf16/--no-bf16",
    default=None,
    help="Products in bfloat16; weights and moments stay float32.  [default: where the processor does so faster]",
)
@click.option(
    "--checkpointing",
    type=click.Choice(["none", "blocks", "factors"]),
    default="none",
    show_default=True,
    help="Compute activations again in the backward pass, from each block's input, or from what is between its factors.",
)
@click.option("--step-in-backward", is_flag=True, help="Move each parameter as its gradient comes, and keep none.")
@click.option(
    "--momentum",
    type=click.Choice(["float32", "bfloat16", "int8"]),
    default="float32",
    show_default=True,
    help="What the optimiser's first moments are kept in.",
)
@click.option(
    "--weights",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="What matrices are trained in; bfloat16 is rounded at random.",
)
@click.option(
    "--max-memory",
    type=Size(),
    metavar="SIZE",
    help="Pull as many of these levers as keep the run within it, e.g. 8GiB.",
)
@click.option("--plan", is_flag=True, help="Print what the run would need in memory, part by part, and end.")
@click.option("--teacher", metavar="SRC", help="Dense or factored model to learn the distribution of.")
@click.option(
    "--teacher-cache",
    metavar="FILE",
    help="Ask it once and keep its most likely tokens here; then it is never in memory beside MODEL.",
)
@click.option("--teacher-top", default=64, show_default=True, help="How many for each token.")
@click.option("--teacher-weight", default=0.5, show_default=True, help="Share of the loss that is the KL to it.")
@click.option("--teacher-dtype", type=DTYPE, help="The teacher's.  [default: as stored]")
@click.option("--teacher-device", metavar="DEVICE", help="Where the teacher is.  [default: --device]")
@click.option("--temperature", default=1.0, show_default=True, help="Of that KL.")
@click.option("--held-out", default=0.05, show_default=True, help="Share of the windows kept aside to measure on.")
@click.option("--eval-every", default=50, show_default=True, help="Steps between looks at them.")
@click.option(
    "--patience", default=0, show_default=True, help="End after so many looks without a better one; 0: never."
)
@click.option(
    "--save-every", default=0, show_default=True, help="Steps between checkpoints, NEW.checkpoint.sct; 0 for none."
)
@click.option("--resume", metavar="CHECKPOINT.sct", help="Go on exactly where a checkpoint is.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the order of the windows.")
@click.option("--device", default="cpu", show_default=True, help="Where, e.g. cuda.")
@click.option("--overwrite", is_flag=True, help="Replace NEW.sct if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def train(
    model: str,
    data: tuple[str, ...],
    output: str | None,
    teacher: str | None,
    teacher_dtype: str | None,
    teacher_device: str | None,
    teacher_cache: str | None,
    save_every: int,
    resume: str | None,
    device: str,
    overwrite: bool,
    max_memory: int | None,
    plan: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train U, s and V of MODEL.sct on text, and what is dense beside them; the dense matrix of a factored layer never exists.

    What is written is the iterate that did best on held-out windows, the model as it was counted among them. Beside NEW.sct
    stand NEW.metrics.jsonl, a line a step, NEW.train.html with curves, NEW.tensorboard if TensorBoard is installed, and
    NEW.last.sct if the last step was not the best.
    """
    from sctconv.runtime.memory import large_pages

    large_pages()  # before anything imports torch
    from sctconv.errors import OptionError
    from sctconv.report.training import write_training_report
    from sctconv.runtime.train import Files, TeacherSource, TrainOptions, estimate, fitted, run
    from sctconv.runtime.train.options import LEVERS
    from sctconv.sources.model import load_any, usable_device

    target = Path(output) if output else Path(Path(model).stem + "-trained.sct")
    options = TrainOptions(**settings)
    files = Files(Path(model), target, Path(resume) if resume else None, save_every, overwrite)
    place = usable_device(device)
    if max_memory is not None:
        options = fitted(model, options, max_memory, place)
        levers = {name: getattr(options, name) for name in LEVERS}
        click.echo(
            f"within {size(max_memory)}: " + ", ".join(f"{name} {value}" for name, value in levers.items()), err=True
        )
    if plan:
        _print_plan(estimate(model, options, place), as_json)
        return
    of_teacher = ("teacher_cache", "teacher_top", "teacher_weight", "teacher_dtype", "teacher_device", "temperature")
    if not teacher and (lone := given(*of_teacher)):
        raise OptionError(f"{lone}: of whom? give --teacher SRC too")
    taught_by = None
    if teacher:
        taught_by = TeacherSource(
            Path(teacher).name if Path(teacher).exists() else teacher,
            lambda: load_any(teacher, dtype=teacher_dtype, device=teacher_device or device).model,
            Path(teacher_cache) if teacher_cache else None,
        )
    looked = ""
    with progress_bar("training", quiet=as_json) as bar:

        def show(done: Any) -> None:
            nonlocal looked
            if done.held_out is not None:
                looked = f", held-out {done.held_out:.3f}, drift {done.drift:.0e}"
            speed = f"rate x{done.rate:.2f}, {done.tokens_per_second:.0f} tokens/s"
            bar(done.step, options.steps, f"loss {done.loss:.3f}, {speed}{looked}")

        def asked(done: int, windows: int) -> None:
            bar(0, 1, f"asking the teacher about window {done} of {windows}")

        summary = run(files, data, options, teacher=taught_by, device=place, on_step=show, on_asked=asked)
    summary["report"] = str(target.with_suffix(".train.html"))
    write_training_report(model, target, summary["metrics"], summary["report"], summary)
    if as_json:
        print_json(summary)
        return
    click.echo(
        f"{target}: held-out perplexity {summary['perplexity']:.5g} after {summary['best_step']} of {summary['steps']} steps "
        f"(before {summary['perplexity_before']:.5g}); {summary['tokens']} tokens, {summary['seconds']:.0f} s"
    )
    click.echo(f"metrics: {summary['metrics']}   pictures: {summary['report']}")


def _print_plan(parts: dict[str, int], as_json: bool) -> None:
    if as_json:
        print_json(parts)
        return
    for name, nbytes in parts.items():
        click.echo(f"{name:16}{size(nbytes):>10}")
