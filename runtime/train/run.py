"""A whole run: a file in, a better file out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sctconv.formats.atomic import check_target
from sctconv.formats.reader import SctFile

from ..model import load
from ..texts import TextError
from .checkpoint import restore, save_checkpoint, save_model
from .data import load_data
from .loop import Progress, TrainState, start, train
from .options import TrainOptions


@dataclass(frozen=True)
class Files:
    """What a run reads and writes.

    Attributes:
        model: the .sct file to train.
        output: the .sct file to write: always the best so far, whole.
        resume: a checkpoint to go on from, or None.
        save_every: steps between checkpoints, 0 for none.
        overwrite: whether a file that stands at `output` may be replaced.
    """

    model: Path
    output: Path
    resume: Path | None = None
    save_every: int = 0
    overwrite: bool = False

    @property
    def checkpoint(self) -> Path:
        """`NEW.checkpoint.sct`."""
        return self.output.with_suffix(".checkpoint.sct")

    @property
    def metrics(self) -> Path:
        """`NEW.metrics.jsonl`."""
        return self.output.with_suffix(".metrics.jsonl")


def run(
    files: Files,
    texts: Sequence[str],
    options: TrainOptions,
    *,
    teacher: Any = None,
    device: torch.device | str = "cpu",
    on_step: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Trains a model and keeps the best iterate; interrupted, it leaves the best so far and, if asked for, a checkpoint.

    Args:
        files: see there.
        texts: see `load_data`.
        options: see there.
        teacher: a model to distil from, or None.
        device: where to train.
        on_step: called after every step.

    Returns:
        A summary for people and scripts.

    Raises:
        FormatError: a file is damaged. TextError: a text cannot be read. TrainError: see `train` and `restore`.
        OutputError: the output exists or cannot be written.
    """
    check_target(files.output, overwrite=files.overwrite or files.resume is not None)
    began = time.perf_counter()
    model, tokenizer = load(files.model, dtype=torch.float32, device=device)
    if tokenizer is None:
        raise TextError(f"{files.model}: has no tokenizer, which training needs")
    data = load_data(texts, tokenizer, context=options.context, held_out=options.held_out)
    state = start(model, options)
    if files.resume is not None:
        state = restore(model, state, options, data, files.resume)
    facts = {
        "options": options.to_json(),
        "texts": [{"source": name, "tokens": tokens} for name, tokens in data.sources],
        "teacher": teacher is not None,
    }
    first = state.best
    with SctFile(files.model) as source, files.metrics.open("a" if files.resume else "w", encoding="utf-8") as metrics:

        def step(done: Progress) -> None:
            metrics.write(json.dumps(asdict(done)) + "\n")
            metrics.flush()
            if files.save_every and done.step % files.save_every == 0:
                save_checkpoint(model, source, state, options, data, files.checkpoint)
            if on_step:
                on_step(done)

        def best(reached: TrainState) -> None:
            nonlocal first
            first = reached.best if reached.step == 0 else first
            training = {**facts, "step": reached.step, "held_out_loss": reached.best}
            save_model(model, source, files.output, training=training, overwrite=True)

        try:
            state = train(model, data, options, teacher=teacher, state=state, on_step=step, on_best=best)
        except KeyboardInterrupt:
            if files.save_every:
                save_checkpoint(model, source, state, options, data, files.checkpoint)
            raise
    return {
        "output": str(files.output),
        "metrics": str(files.metrics),
        "steps": state.step,
        "best_step": state.best_step,
        "perplexity": math.exp(min(state.best, 700.0)),
        "perplexity_before": math.exp(min(first, 700.0)),
        "tokens": state.step * options.batch * options.context,
        "seconds": time.perf_counter() - began,
    }
