"""`sctconv evaluate`."""

from __future__ import annotations

import click

from .common import DTYPE, VERIFY, print_json, progress_bar


@click.command(short_help="Measure a model's perplexity on a text.")
@click.argument("model")
@click.option("--text", required=True, type=click.Path(), help="UTF-8 text file, or .jsonl with a text field.")
@click.option("--context", default=512, show_default=True, help="Tokens in a window.")
@click.option("--max-tokens", type=click.IntRange(min=2), help="Use only the first N tokens of the text.")
@click.option("--dtype", type=DTYPE, help="Compute in this dtype.  [default: as stored]")
@click.option("--device", default="cpu", show_default=True, help="Where the model runs, e.g. cuda.")
@VERIFY
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def evaluate(
    model: str,
    text: str,
    context: int,
    max_tokens: int | None,
    dtype: str | None,
    device: str,
    verify: bool,
    as_json: bool,
) -> None:
    """Perplexity of MODEL (a .sct file, an exported or checkpoint directory, a GGUF file or a Hub id) on a text.

    The text is cut into non-overlapping windows; every token but each window's first is predicted.
    """
    from dataclasses import asdict

    from sctconv.runtime.evaluate import EvaluationError, perplexity
    from sctconv.runtime.texts import NO_TOKENIZER, read_text
    from sctconv.sources.model import load_any

    words = read_text(text)
    loaded = load_any(model, dtype=dtype, device=device, verify=verify)
    if loaded.tokenizer is None:
        raise EvaluationError(f"{model}: {NO_TOKENIZER}")
    ids = loaded.tokenizer(words, verbose=False).input_ids[:max_tokens]
    with progress_bar("evaluating", quiet=as_json) as bar:
        result = perplexity(
            loaded.model,
            ids,
            context=context,
            progress=lambda done, total, so_far: bar(done, total, f"perplexity {so_far:.6g}"),
        )
    if as_json:
        print_json({"model": model, "text": text, **asdict(result)})
        return
    click.echo(
        f"perplexity {result.perplexity:.6g} +- {result.stderr:.2g}   nll {result.nll:.4f} nats a token   "
        f"{result.tokens} tokens in {result.windows} windows of {context}"
    )
