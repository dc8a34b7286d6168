"""A run that is interrupted at the worst moment: what it leaves is gone on with bit for bit."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sctconv
from sctconv.formats.errors import OutputError
from sctconv.runtime.head import Halves
from sctconv.runtime.train import Files, run
from sctconv.runtime.train.optimizer import SpectralAdam
from sctconv.runtime.train.run import _Log
from tests.training import quick


def _text(factored: Path) -> list[str]:
    return [str(factored.parent / "text.txt")]


def _step(path: Path) -> int:
    return int(sctconv.SctFile(path).index.metadata["training"]["step"])


def _interrupt_at(call: int, function: Callable[..., Any], after: list[Any]) -> Callable[..., Any]:
    """The function; after its n-th call in the seventh step, the user presses Ctrl-C."""
    calls = []

    def called(*args: Any, **more: Any) -> Any:
        done = function(*args, **more)
        if len(after) == 6:
            calls.append(0)
        if len(calls) == call:
            raise KeyboardInterrupt
        return done

    return called


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ((SpectralAdam, "_put", 3), 4),  # some parameters have moved and others have not
        ((SpectralAdam, "step", 1), 4),  # all have, and the step is not counted
        ((Halves, "hidden", 1), 6),  # nothing has
        ((_Log, "add", 1), 4),  # all have, and it is counted
    ],
    ids=["moving", "moved", "forward", "logged"],
)
@pytest.mark.parametrize("changes", [{}, {"step_in_backward": True}], ids=["plain", "step in backward"])
def test_interrupted_anywhere_in_a_step_a_checkpoint_is_of_whole_steps(
    factored: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: tuple[type, str, int],
    kept: int,
    changes: dict[str, Any],
) -> None:
    options = quick(steps=10, eval_every=5, **changes)
    whole, files = (Files(factored, tmp_path / name, save_every=4) for name in ("whole.sct", "part.sct"))
    run(whole, _text(factored), options)
    owner, name, call = where
    done: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _interrupt_at(call, getattr(owner, name), done))
        with pytest.raises(KeyboardInterrupt) as caught:
            run(files, _text(factored), options, on_step=done.append)
    best, checkpoint = (
        f"the best so far is {files.output}",
        f"a checkpoint is kept; go on with --resume {files.checkpoint}",
    )
    assert caught.value.__notes__ == [f"{best}; {checkpoint}"] and files.output.exists()
    assert _step(files.checkpoint) == kept
    run(Files(factored, files.output, resume=files.checkpoint, save_every=4), _text(factored), options)
    assert files.output.read_bytes() == whole.output.read_bytes()
    assert files.checkpoint.read_bytes() == whole.checkpoint.read_bytes()


def test_interrupted_before_the_first_checkpoint_none_is_promised(factored: Path, tmp_path: Path) -> None:
    files = Files(factored, tmp_path / "n.sct", save_every=4)

    def interrupt(done: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        run(files, _text(factored), quick(), on_step=interrupt)
    assert not files.checkpoint.exists() and caught.value.__notes__ == [f"the best so far is {files.output}"]


def test_stopped_before_the_first_step_nothing_of_the_run_is_left(
    factored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk without room for the output."""

    def full(*_: Any, **__: Any) -> None:
        raise OutputError("no room")

    monkeypatch.setitem(run.__globals__["_run"].__globals__, "save_model", full)
    with pytest.raises(OutputError, match=r"no room$"):
        run(Files(factored, tmp_path / "n.sct"), _text(factored), quick())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("torn", [0, 1, 30])
def test_a_line_of_the_log_that_was_cut_short_is_let_go(factored: Path, tmp_path: Path, torn: int) -> None:
    options = quick(steps=6)
    files = Files(factored, tmp_path / "n.sct", save_every=4)
    run(files, _text(factored), options)
    assert _step(files.checkpoint) == 4
    lines = files.metrics.read_text().splitlines(keepends=True)
    files.metrics.write_text("".join(lines[:5]) + lines[5][:torn])
    run(Files(factored, files.output, resume=files.checkpoint), _text(factored), options)
    steps = [json.loads(line)["step"] for line in files.metrics.read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_disk_that_is_full_for_the_log_is_one_line_that_names_it(factored: Path, tmp_path: Path) -> None:
    files = Files(factored, tmp_path / "n.sct", save_every=1)
    files.metrics.symlink_to("/dev/full")
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with pytest.raises(
        OutputError, match=r"no space left on the disk; free some or write elsewhere\nthe best so far is .*n.sct$"
    ) as caught:
        run(files, _text(factored), quick())
    assert str(caught.value).startswith(f"{files.metrics}: ")


def test_a_disk_that_is_full_for_tensorboard_is_one_line_too(
    factored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    files = Files(factored, tmp_path / "n.sct", save_every=1)
    with pytest.raises(
        OutputError,
        match=r"tensorboard: no space left on the disk; free some or write elsewhere\nthe best so far is .*n.sct",
    ):
        run(files, _text(factored), quick(steps=300))
    assert "Traceback" not in capfd.readouterr().err
