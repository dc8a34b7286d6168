"""`sctconv generate`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from .common import DTYPE, SEED, VERIFY

if TYPE_CHECKING:
    from sctconv.runtime.generate import GenerateOptions
    from sctconv.runtime.model import Loaded


@click.command(short_help="Generate text from a model.")
@click.argument("model")
@click.option("-p", "--prompt", help="What to continue or answer.  [default: read from stdin]")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template; on a terminal, converse.")
@click.option("--system", help="With --chat: the system message.")
@click.option(
    "--max-new-tokens", default=256, show_default=True, help="Stop after so many, or where the context is full."
)
@click.option("--temperature", type=float, help="0 takes the likeliest token each time.  [default: the model's own]")
@click.option("--top-p", type=float, help="Sample from the likeliest tokens with this probability together.")
@click.option("--top-k", type=int, help="Sample from this many likeliest tokens.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the sampling.")
@click.option("--dtype", type=DTYPE, help="Compute in this dtype.  [default: as stored]")
@click.option("--device", default="cpu", show_default=True, help="Where the model runs, e.g. cuda.")
@VERIFY
def generate(
    model: str,
    prompt: str | None,
    chat: bool,
    system: str | None,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int,
    dtype: str | None,
    device: str,
    verify: bool,
) -> None:
    """Generate from MODEL (a .sct file, an exported or checkpoint directory, a GGUF file or a Hub id), printing the text as it comes."""
    from sctconv.errors import OptionError
    from sctconv.runtime.generate import GenerateOptions, GenerationError
    from sctconv.runtime.texts import NO_TOKENIZER, check_characters
    from sctconv.sources.model import load_any

    if system is not None and not chat:
        raise OptionError("--system goes with --chat")
    options = GenerateOptions(max_new_tokens, temperature, top_p, top_k, seed)
    converse = chat and prompt is None and sys.stdin.isatty()
    if prompt is None and not converse:
        prompt = _read_stdin()
    for text, what in ((prompt, "the prompt"), (system, "--system")):
        check_characters(text or "", what)
    if chat and not converse and not (prompt or "").strip():
        raise GenerationError("the prompt is empty")
    loaded = load_any(model, dtype=dtype, device=device, verify=verify)
    if loaded.tokenizer is None:
        raise GenerationError(f"{model}: {NO_TOKENIZER}")
    messages = [{"role": "system", "content": system}] if system is not None else []
    if converse:
        _converse(loaded, messages, options)
    elif chat:
        _answer(loaded, [*messages, {"role": "user", "content": prompt or ""}], options)
    else:
        _stream(loaded, list(loaded.tokenizer(prompt).input_ids), options)


def _read_stdin() -> str:
    from sctconv.errors import OptionError

    if sys.stdin is None:  # closed by the shell, as by `<&-`
        raise OptionError("no prompt: standard input is closed; give -p TEXT")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise OptionError(f"the prompt on standard input is not {error.encoding} (byte {error.start})") from None


def _converse(loaded: Loaded, messages: list[dict[str, str]], options: GenerateOptions) -> None:
    """Turn by turn until end of file (Ctrl-D)."""
    from sctconv.runtime.texts import check_characters

    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            click.echo("")
            return
        if line:
            check_characters(line, "what was typed")
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": _answer(loaded, messages, options)})


def _answer(loaded: Loaded, messages: list[dict[str, str]], options: GenerateOptions) -> str:
    from sctconv.runtime.generate import chat_ids

    return _stream(loaded, chat_ids(loaded.tokenizer, messages), options)


def _stream(loaded: Loaded, ids: list[int], options: GenerateOptions) -> str:
    from sctconv.runtime.generate import generate as run

    pieces = []
    for piece in run(loaded.model, loaded.tokenizer, ids, options):
        click.echo(piece, nl=False)
        sys.stdout.flush()
        pieces.append(piece)
    click.echo("")
    return "".join(pieces)
