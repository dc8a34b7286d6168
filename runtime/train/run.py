"""A whole run: a file in, a better file out."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TextIO

import torch

from sctconv.formats.atomic import atomic_file, check_target, output_error
from sctconv.formats.lock import output_lock
from sctconv.formats.reader import SctFile
from sctconv.formats.unfinished import last_work, noted

from ..memory import peak_rss_bytes
from ..model import load
from ..skeleton import load_config, load_tokenizer
from ..tensors import to_torch
from ..texts import NO_TOKENIZER, TextError
from .checkpoint import restore, save_checkpoint, save_model
from .data import TrainData, load_data
from .loop import Progress, TrainState, start, train
from .options import TrainError, TrainOptions
from .teacher import CachedTeacher, ModelTeacher, Teacher, cache_facts, write_cache


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
    def last(self) -> Path:
        """`NEW.last.sct`: the model after the last step, where that is not the best."""
        return self.output.with_suffix(".last.sct")

    @property
    def metrics(self) -> Path:
        """`NEW.metrics.jsonl`."""
        return self.output.with_suffix(".metrics.jsonl")

    @property
    def board(self) -> Path:
        """`NEW.tensorboard`, a directory, where TensorBoard is installed."""
        return self.output.with_suffix(".tensorboard")


@dataclass(frozen=True)
class TeacherSource:
    """Whom to distil from.

    Attributes:
        name: what it is called in what is written.
        load: makes the model; not called where a cache holds what it would say.
        cache: file for its most likely successors: with one, teacher and student are never in memory together.
    """

    name: str
    load: Callable[[], Any]
    cache: Path | None = None


def run(
    files: Files,
    texts: Sequence[str],
    options: TrainOptions,
    *,
    teacher: TeacherSource | None = None,
    device: torch.device | str = "cpu",
    on_step: Callable[[Progress], None] | None = None,
    on_asked: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Trains a model and keeps the best iterate; interrupted, it leaves the best so far and, if asked for, a checkpoint.

    Args:
        files: see there.
        texts: see `load_data`.
        options: see there.
        teacher: whom to distil from, or None.
        device: where to train.
        on_step: called after every step.
        on_asked: called while a teacher's cache is made, with windows done and windows in all.

    Returns:
        A summary for people and scripts.

    Raises:
        FormatError: a file is damaged. TextError: a text cannot be read. TrainError: see `load_data`, `train`, `restore`
            and `CachedTeacher`. OutputError: the output exists, cannot be written or is being written by another process.
    """
    check_target(files.output, overwrite=files.overwrite or files.resume is not None)
    with output_lock(files.output):
        return _run(files, texts, options, teacher, device, on_step, on_asked)


def _run(
    files: Files,
    texts: Sequence[str],
    options: TrainOptions,
    teacher: TeacherSource | None,
    device: torch.device | str,
    on_step: Callable[[Progress], None] | None,
    on_asked: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    began = time.perf_counter()
    with SctFile(files.model) as file:
        file.verify_blobs()  # or what is damaged would be trained on and written with fresh checksums
        options = options.resolved(torch.device(device), scratch=is_fresh(file.index.metadata))
    data = _data(files.model, texts, options)
    taught_by = _teacher(teacher, data, options, on_asked)
    model = load_weights(files.model, options.weights, device)
    state = start(model, options)
    identity = {"data": data.fingerprint(), "teacher": teacher.name if teacher else None}
    if files.resume is not None:
        state = restore(model, state, options, identity, files.resume)
    facts = {
        "options": options.to_json(),
        "texts": [{"source": name, "tokens": tokens} for name, tokens in data.sources],
        "teacher": identity["teacher"],
    }
    first, kept = state.best, files.resume
    is_written = False
    with SctFile(files.model) as source, _Log(files, state.step) as log:

        def checkpoint() -> None:
            nonlocal kept
            save_checkpoint(model, source, state, options, identity, files.checkpoint)
            kept = files.checkpoint

        def step(done: Progress) -> None:
            log.add(done)
            if files.save_every and done.step % files.save_every == 0:
                checkpoint()
            if on_step:
                on_step(done)

        def best(reached: TrainState) -> None:
            nonlocal first, is_written
            first = reached.best if reached.step == 0 else first
            training = {**facts, "step": reached.step, "held_out_loss": reached.best}
            save_model(model, source, files.output, training=training, overwrite=True)
            is_written = True

        def what_stands() -> str:
            written = [f"the best so far is {files.output}"] if is_written else []
            return "; ".join([*written, *([f"a checkpoint is kept; go on with --resume {kept}"] if kept else [])])

        with noted(what_stands):
            try:
                train(model, data, options, teacher=taught_by, state=state, on_step=step, on_best=best)
            except KeyboardInterrupt:
                if (
                    files.save_every and state.is_whole and state.step
                ):  # in the middle of a step, what was kept before has to do
                    with last_work():
                        checkpoint()
                raise
        if state.step != state.best_step:
            save_model(model, source, files.last, training={**facts, "step": state.step}, overwrite=True)
    return {
        "output": str(files.output),
        "last": str(files.last if state.step != state.best_step else files.output),
        "metrics": str(files.metrics),
        "steps": state.step,
        "best_step": state.best_step,
        "perplexity": math.exp(min(state.best, 700.0)),
        "perplexity_before": math.exp(min(first, 700.0)),
        "tokens": state.step * options.batch * options.context,
        "seconds": time.perf_counter() - began,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def load_weights(path: Path, weights: str = "float32", device: torch.device | str = "cpu") -> Any:
    """A model to be trained: matrices in the given dtype, vectors in float32, where a small step is not rounded away.

    Raises:
        FormatError: the file is damaged. ModelError: transformers cannot build the model.
    """
    dtype = getattr(torch, weights)
    model = load(path, dtype=dtype, device=device).model
    if dtype != torch.float32:
        with SctFile(path) as file:
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 and name in file.index.tensors:
                    parameter.data = to_torch(file.read(name)).to(parameter.device, torch.float32)
    return model


def is_fresh(metadata: Mapping[str, Any]) -> bool:
    """Whether a model was begun from nothing and never trained."""
    return "initialisation" in metadata and "training" not in metadata


def _data(path: Path, texts: Sequence[str], options: TrainOptions) -> TrainData:
    with SctFile(path) as file:
        small = {name: file.file(name) for name in file.index.files}
    tokenizer = load_tokenizer(small)
    if tokenizer is None:
        raise TextError(f"{path}: {NO_TOKENIZER}")
    config = load_config(small, str(path)).get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest and options.context > longest:
        raise TrainError(f"--context {options.context}: the model takes {longest} tokens at most")
    return load_data(
        texts,
        tokenizer,
        context=options.context,
        held_out=options.held_out,
        document_masks=options.document_masks,
        vocabulary=config.vocab_size,
    )


def _teacher(
    source: TeacherSource | None,
    data: TrainData,
    options: TrainOptions,
    on_asked: Callable[[int, int], None] | None,
) -> Teacher | None:
    """Makes the cache, if one is wanted that is not there."""
    if source is None:
        return None
    if source.cache is None:
        return ModelTeacher(source.load(), options.temperature, bf16=options.bf16)
    facts = cache_facts(data, source.name, options.temperature, options.teacher_top)
    if not source.cache.exists():
        write_cache(source.load(), data, source.cache, facts, bf16=options.bf16, progress=on_asked)
    return CachedTeacher(source.cache, facts)


class _Log:
    """A run's measurements: a line a step in `metrics.jsonl`, and the same for TensorBoard if it is installed.

    A resumed run goes on after the last step of its checkpoint; lines of steps that it will take again are let go. Before
    there is a step nothing is written.
    """

    _TENSORBOARD: Final = "torch.utils.tensorboard"

    def __init__(self, files: Files, done: int) -> None:
        self._files, self._done = files, done
        self._file: TextIO | None = None
        self._board: Any = None
        self._hook, threading.excepthook = threading.excepthook, self._failed

    def _open(self) -> TextIO:
        files, done = self._files, self._done
        if done and files.metrics.exists():
            lines = files.metrics.read_text(encoding="utf-8").splitlines()
            with atomic_file(files.metrics, overwrite=True) as out:
                out.writelines(f"{line}\n".encode() for line in lines if _step(line) <= done)
        self._file = files.metrics.open("a" if done else "w", encoding="utf-8")
        try:
            with contextlib.suppress(ImportError):  # TensorBoard is not installed
                self._board = importlib.import_module(self._TENSORBOARD).SummaryWriter(files.board, purge_step=done + 1)
        except OSError as error:
            raise output_error(files.board, error, is_kept=True) from error
        return self._file

    def add(self, done: Progress) -> None:
        """Raises OutputError where there is no room for it; what the run kept is as it was."""
        values = asdict(done)
        try:
            self._file = self._file or self._open()
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as error:
            raise output_error(self._files.metrics, error, is_kept=True) from error
        if self._board is None:
            return
        try:
            for name, value in values.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, done.step)
        except OSError as error:  # of an earlier step: a thread writes
            raise output_error(self._files.board, error, is_kept=True) from error

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # the rest of what found no room, which was told
                self._file.close()
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()
        for thread in threading.enumerate():
            if type(thread).__name__ == "_AsyncWriterThread":  # TensorBoard's, which has failed and is about to say so
                thread.join(1.0)
        threading.excepthook = self._hook

    def _failed(self, args: Any) -> None:
        """TensorBoard's thread: what the system says to it is raised by the next `add`, and needs no traceback besides."""
        if not issubclass(args.exc_type, OSError):
            self._hook(args)


def _step(line: str) -> float:
    """The step that a line of `metrics.jsonl` is of; infinite of one that was cut short."""
    try:
        return int(json.loads(line)["step"])
    except ValueError:
        return math.inf
