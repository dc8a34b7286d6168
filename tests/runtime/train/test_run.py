"""A run as the user sees it: files, resuming, interruptions, and the Trainer of transformers."""

from __future__ import annotations

import errno
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

import sctconv
from sctconv.cli import main
from sctconv.formats.errors import OutputError
from sctconv.runtime.retraction import drift
from sctconv.runtime.train import Files, RetractionCallback, TrainError, run
from sctconv.runtime.verify import verify
from tests.training import quick, windows


def _text(factored: Path) -> list[str]:
    return [str(factored.parent / "text.txt")]


def _lines(files: Files) -> list[dict[str, Any]]:
    return [json.loads(line) for line in files.metrics.read_text().splitlines()]


class _Stop(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("taught", [False, True])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(taught: bool, factored: Path, tmp_path: Path) -> None:
    options = quick(patience=3)
    teacher = None
    if taught:
        from sctconv.runtime.train import TeacherSource
        from tests.models import tiny_model

        teacher = TeacherSource("dense", lambda: tiny_model("llama", vocab_size=260), tmp_path / "cache.sct")
    whole = Files(factored, tmp_path / "whole.sct")
    run(whole, _text(factored), options, teacher=teacher)

    def stop(done: Any) -> None:
        if done.step == 7:
            raise _Stop

    files = Files(factored, tmp_path / "part.sct", save_every=5)
    with pytest.raises(_Stop):
        run(files, _text(factored), options, teacher=teacher, on_step=stop)
    assert [line["step"] for line in _lines(files)] == [1, 2, 3, 4, 5, 6, 7]
    resumed = Files(factored, tmp_path / "part.sct", resume=files.checkpoint, save_every=5)
    run(resumed, _text(factored), options, teacher=teacher)
    assert whole.output.read_bytes() == files.output.read_bytes()
    keys = ("step", "loss", "rate", "gradient", "drift", "held_out")
    assert [[line[key] for key in keys] for line in _lines(files)] == [
        [line[key] for key in keys] for line in _lines(whole)
    ], "no step is missing and none is there twice"


def test_the_last_is_kept_beside_the_best(factored: Path, tmp_path: Path) -> None:
    files = Files(factored, tmp_path / "n.sct")
    summary = run(
        files, _text(factored), quick(steps=40, angle=1.5, singular_rate=1.0, rate=0.5, eval_every=1, patience=2)
    )
    assert summary["best_step"] + 2 == summary["steps"] < 40 and summary["last"] == str(files.last)
    verify(files.output)
    verify(files.last)
    steps = [sctconv.SctFile(path).index.metadata["training"]["step"] for path in (files.output, files.last)]
    assert steps == [summary["best_step"], summary["steps"]]


def test_tensorboard_has_the_same_curves(factored: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = Files(factored, tmp_path / "n.sct")
    run(files, _text(factored), quick())
    events = EventAccumulator(str(files.board))
    events.Reload()
    for name in ("loss", "held_out"):
        told = [(event.step, event.value) for event in events.Scalars(name)]
        ours = [(line["step"], line[name]) for line in _lines(files) if line[name] is not None]
        assert [step for step, _ in told] == [step for step, _ in ours]
        assert [value for _, value in told] == pytest.approx([value for _, value in ours])


def test_without_tensorboard_there_is_none(factored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.__globals__["_Log"], "_TENSORBOARD", "a_package_that_is_not_there")
    files = Files(factored, tmp_path / "n.sct")
    run(files, _text(factored), quick(steps=2))
    assert not files.board.exists() and len(_lines(files)) == 2


@pytest.mark.parametrize("kind", ["output", "checkpoint"])
def test_a_full_disk_leaves_what_was_whole(
    kind: str, factored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files(factored, tmp_path / "n.sct", save_every=1, overwrite=True)
    run(files, _text(factored), quick(steps=3))
    before = {path: path.read_bytes() for path in (files.output, files.checkpoint)}
    from sctconv.formats.writer import SctWriter

    commit = SctWriter.commit

    def full(self: SctWriter) -> None:
        if ("checkpoint" in str(self.path)) == (kind == "checkpoint"):
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        commit(self)

    monkeypatch.setattr(SctWriter, "commit", full)
    with pytest.raises((OutputError, OSError), match="No space left"):
        run(files, _text(factored), quick(steps=3))
    monkeypatch.undo()
    for path in before:
        verify(path)
    assert before[getattr(files, kind)] == getattr(files, kind).read_bytes()
    assert not list(tmp_path.glob("*.tmp*")) and not list(tmp_path.glob(".*"))


def test_a_loss_that_is_not_finite_leaves_the_last_good_files(
    factored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files(factored, tmp_path / "n.sct", save_every=2)

    def poison(done: Any) -> None:
        if done.step == 5:  # as a diverging run would have it
            factor = next(parameter for parameter in trained[0].parameters() if parameter.requires_grad)
            factor.data.fill_(float("nan"))

    trained: list[torch.nn.Module] = []
    load = run.__globals__["load"]

    def watched(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        trained.append(loaded.model)
        return loaded

    monkeypatch.setitem(run.__globals__, "load", watched)
    with pytest.raises(TrainError, match="step 6: the loss is nan; lower the rates"):
        run(files, _text(factored), quick(), on_step=poison)
    verify(files.output)
    verify(files.checkpoint)
    assert sctconv.SctFile(files.checkpoint).index.metadata["training"]["step"] == 4


def test_what_is_wrong_is_one_line(factored: Path, tmp_path: Path) -> None:
    text = _text(factored)[0]
    (tmp_path / "short.txt").write_text("Too short.")
    base = ["train", str(factored), "-o", str(tmp_path / "n.sct"), "--context", "32", "--steps", "2"]
    directory = CliRunner().invoke(main, ["train", str(factored.parent / "m"), "--data", text])
    assert directory.exit_code == 1 and "not a .sct file, but a directory" in directory.stderr
    for args, words, code in (
        (["--data", str(tmp_path / "no.txt")], "cannot be read", 1),
        (["--data", str(tmp_path / "short.txt")], "10 tokens, less than two windows of 32", 1),
        (["--data", text, "--teacher", str(tmp_path / "nobody")], "nobody", 1),
        (["--data", text, "--resume", str(tmp_path / "no.sct")], "no.sct", 1),
        (["--data", text, "--resume", str(factored)], "a model, not a checkpoint", 1),
        (["--data", text, "--context", "129"], "--context 129: the model takes 128 tokens at most", 1),
        (["--data", text, "--patience", "2", "--eval-every", "0"], "--patience 2", 1),
        (["--data", text, "--device", "cuda:77"], "--device cuda:77", 2),
    ):
        result = CliRunner().invoke(main, [*base, *args])
        assert result.exit_code == code and words in result.stderr, (args, result.output)
        assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "n.sct").exists()


def test_killed_at_any_moment_whole_files_stand(factored: Path, tmp_path: Path) -> None:
    files = Files(factored, tmp_path / "n.sct")
    command = [sys.executable, "-m", "sctconv", "train", str(factored), "--data", _text(factored)[0], "-o"]
    command += [str(files.output), "--context", "32", "--steps", "5000", "--save-every", "1", "--eval-every", "1"]
    pauses = random.Random(0)
    for kill in range(4):
        files.checkpoint.unlink(missing_ok=True)
        again = ["--overwrite"] if kill else []
        with subprocess.Popen([*command, *again], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 120
            while not files.checkpoint.exists():
                assert process.poll() is None and time.monotonic() < deadline, "it ended by itself, or never began"
                time.sleep(0.01)
            time.sleep(pauses.uniform(0.0, 0.3))
            process.kill()
        verify(files.output)
        verify(files.checkpoint)
        for line in files.metrics.read_text().splitlines()[:-1]:
            json.loads(line)


def test_the_trainer_of_transformers_with_a_callback(factored: Path, tmp_path: Path) -> None:
    model, data = sctconv.load(factored).model, windows(factored)
    rows = [{"input_ids": row, "labels": row} for row in data.training.windows]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=5, learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, per_device_train_batch_size=4,
    )  # fmt: skip
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for callbacks, near in (([], False), ([RetractionCallback()], True)):
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=rows, callbacks=callbacks
        )  # fmt: skip
        trainer.train()
        assert (drift(model) < 1e-5) == near
    assert any(not torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
