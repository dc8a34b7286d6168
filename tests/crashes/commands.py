"""The commands that write: what each is told, what it may leave, and how it is gone on with."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from tqdm import tqdm

from sctconv.convert import ConvertOptions, convert, pipeline
from sctconv.formats import writer
from tests.models import save, tiny_model, tiny_tokenizer

TEXT: Final = "".join(f"{place} apples and {place % 5} pears. " for place in range(400))

LEFTOVER: Final = re.compile(r"\..*\.(tmp|lock)")
"""Names of temporaries, and of a lock that its killed holder left."""


@dataclass
class Command:
    """A command under attack.

    Attributes:
        name: for people.
        words: its arguments, without `--overwrite`; it is run in the directory that it writes to.
        other: arguments that make what stands there beforehand, where something does.
        whole: names that appear whole or not at all.
        every: arguments under which an undisturbed run puts there all that an interrupted one may.
        loose: names that grow, or hold times.
        parts: names of files that say of themselves that they are not finished.
        go_on: of the directory and of what it may hold of this run, the arguments to go on with.
        same: of two directories, what differs in the loose files, if anything does.
        new: name -> digest after an undisturbed run.
        old: the same of `other`.
        versions: digests of all that an undisturbed run puts in a place, of whatever name.
    """

    name: str
    words: list[str]
    other: list[str]
    whole: tuple[str, ...]
    go_on: Callable[[Path, Command], list[str]]
    every: tuple[str, ...] = ()
    loose: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    same: Callable[[Path, Path], str | None] = lambda one, other: None
    new: Mapping[str, str] = field(default_factory=dict)
    old: Mapping[str, str] = field(default_factory=dict)
    versions: frozenset[str] = frozenset()


def digest(path: Path) -> str:
    """Of a file's content, or of a directory's names and contents."""
    sha256 = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        sha256.update(f"{file.relative_to(path)}".encode())
        sha256.update(file.read_bytes() if file.is_file() else b"/")
    return sha256.hexdigest()


def snapshot(room: Path) -> dict[str, str]:
    """Name -> digest of all that stands in a directory."""
    return {path.name: digest(path) for path in room.iterdir()}


def build(home: Path) -> list[Command]:
    """The commands, on a small model that is made in `home`."""
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread in the process that forks
    tqdm.set_lock(threading.RLock())  # nor a lock that all children share, and one is killed with
    transformers.utils.logging.disable_progress_bar()
    pipeline.convert = functools.partial(convert, journal_seconds=0.0)
    writer._AHEAD = 4096  # type: ignore[misc]
    source = save(tiny_model("llama", vocab_size=260), home / "llama")
    tiny_tokenizer(source)
    text, model = home / "text.txt", home / "model.sct"
    text.write_text(TEXT)
    convert(str(source), model, ConvertOptions(rank=6, modules="all"))

    def convert_with(name: str, *more: str) -> Command:
        words = ["convert", str(source), "-o", "out.sct", "--modules", "all", *more, "--json", "--rank"]
        whole = ("out.sct", "out.report.html")
        parts = ("out.sct.part", "out.sct.fits.part")
        return Command(name, [*words, "6"], [*words, "4"], whole, _resume_conversion, parts=parts)

    calibration = ["--calibration", str(text), "--calibration-tokens", "256", "--no-bf16"]
    train = ["train", str(model), "--data", str(text), "-o", "out.sct", "--context", "32", "--batch", "2", "--no-bf16"]
    train += [
        "--save-every",
        "2",
        "--eval-every",
        "1",
        "--held-out",
        "0.1",
        "--angle",
        "0.5",
        "--json",
        "--rate",
        "0.05",
    ]
    export = ["export-onnx", str(model), "-o", "onnx", "--json"]
    return [
        convert_with("convert", "--data-free"),
        convert_with("convert, calibrated", *calibration),
        Command(
            "train",
            [*train, "--steps", "6"],
            [*train, "--steps", "3", "--seed", "1"],
            ("out.sct", "out.checkpoint.sct", "out.last.sct"),
            _resume_training,
            every=("--save-every", "1"),  # Ctrl-C writes a checkpoint at whatever step it comes
            loose=("out.metrics.jsonl", "out.train.html", "out.tensorboard"),
            same=_same_metrics,
        ),
        Command("export-onnx", export, [*export, "--quantize", "int8"], ("onnx",), _again),
    ]


def _again(room: Path, command: Command) -> list[str]:
    return [*command.words, *(["--overwrite"] if any((room / name).exists() for name in command.whole) else [])]


def _resume_conversion(room: Path, command: Command) -> list[str]:
    return [*_again(room, command), "--resume"]


def _resume_training(room: Path, command: Command) -> list[str]:
    """From the checkpoint, unless that is another run's."""
    checkpoint = room / "out.checkpoint.sct"
    if checkpoint.exists() and digest(checkpoint) in command.versions:
        return [*command.words, "--resume", checkpoint.name]
    return _again(room, command)


def _same_metrics(one: Path, other: Path) -> str | None:
    """No line is missing, none is there twice, and all say the same, but for the time they took."""

    def lines(room: Path) -> list[Any]:
        text = (room / "out.metrics.jsonl").read_text()
        return [{**json.loads(line), "tokens_per_second": 0} for line in text.splitlines()]

    return None if lines(one) == lines(other) else "out.metrics.jsonl differs"
