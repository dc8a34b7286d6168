"""A conversion that is stopped, and gone on with: the same file to the byte, or a refusal that names what differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from sctconv.cli import main
from sctconv.convert import ConvertOptions, convert
from sctconv.convert.fit_store import FitStore
from sctconv.convert.resume import fits_path
from sctconv.errors import OptionError
from sctconv.formats.atomic import part_path
from sctconv.formats.errors import IncompleteError, OutputError, SctError
from sctconv.formats.reader import SctFile
from sctconv.formats.unfinished import is_unwinding
from tests.models import save, tiny_model, tiny_tokenizer

TEXT = "".join(f"Item {place}: {place * place} apples, {place % 7} pears.\n" for place in range(300))

CALIBRATED: dict[str, Any] = {"calibration_tokens": 1024, "calibration_context": 64, "bf16": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"rank": 6, "modules": "all"},
    "plain, by energy": {"energy": 0.9, "modules": "all"},
    "plain, float16": {"ratio": 0.5, "dtype": "float16"},
    "calibrated": {"rank": 6, "modules": "all", **CALIBRATED},
    "calibrated, by energy": {"energy": 0.9, **CALIBRATED},
    "calibrated, measured": {"rank": 6, "allocate": "measured", **CALIBRATED},
    "calibrated, refined": {"rank": 6, "refine": 3, **CALIBRATED},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = save(tiny_model("llama", vocab_size=260), tmp_path_factory.mktemp("source") / "llama")
    tiny_tokenizer(source)
    (source.parent / "text.txt").write_text(TEXT)
    return source


def _options(source: Path, name: str) -> ConvertOptions:
    settings = dict(SETTINGS[name])
    if "calibration_tokens" in settings:
        settings["calibration"] = (str(source.parent / "text.txt"),)
    return ConvertOptions(**settings)


class _Stop:
    """Interrupts a conversion at its n-th word on progress, shards' checksums apart."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, done: float, total: float, what: str) -> None:
        self.left -= not what.startswith("checksum of ")
        if self.left < 0:
            raise KeyboardInterrupt


def _run(
    source: Path, output: Path, options: ConvertOptions, stop: Callable[..., None] | None = None, **how: Any
) -> Any:
    torch.manual_seed(1)  # what the process drew before decides nothing
    return convert(str(source), output, options, progress=stop, journal_seconds=0.0, **how)


@pytest.mark.parametrize("name", SETTINGS)
def test_stopped_again_and_again_the_file_is_the_same(source: Path, tmp_path: Path, name: str) -> None:
    options = _options(source, name)
    whole = _run(source, tmp_path / "whole.sct", options)
    output, stops = tmp_path / "out.sct", 0
    for after in range(3, 10_000, 7):  # further each time, so that it ends
        try:
            resumed = _run(source, output, options, _Stop(after), resume=True)
            break
        except KeyboardInterrupt as error:
            stops += 1
            assert not output.exists()
            if part_path(output).exists():
                assert "go on with --resume" in error.__notes__[0]
    assert stops >= 2
    assert output.read_bytes() == (tmp_path / "whole.sct").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole.sct", "out.sct"}
    for report in (whole, resumed):
        report.__dict__.update(output="", seconds=0.0, peak_rss_bytes=0, memory_limit_bytes=0)
    assert resumed == whole


def _stopped(source: Path, output: Path, name: str, after: int = 12) -> ConvertOptions:
    options = _options(source, name)
    with pytest.raises(KeyboardInterrupt):
        _run(source, output, options, _Stop(after))
    return options


def test_stopped_before_anything_was_kept_nothing_is_left(source: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(str(source), tmp_path / "out.sct", _options(source, "plain"), progress=_Stop(12))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["plain", "calibrated"])
def test_a_stopped_conversion_is_not_begun_anew_unasked(source: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out.sct"
    options = _stopped(source, output, name, 40)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before
    with pytest.raises(OutputError, match=r"a stopped run's, \d+ bytes; go on with --resume, or pass --overwrite"):
        _run(source, output, options)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    _run(source, output, options, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.sct"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("plain", {"rank": 5}, "was begun with --rank 6, not 5"),
        ("plain", {"rank": None, "ratio": 0.5}, "was begun with --rank 6, not none"),
        ("plain", {"modules": "mlp"}, "was begun with --modules all, not mlp"),
        ("plain", {"dtype": "float16"}, "was begun with --dtype none, not float16"),
        ("plain", {"seed": 1}, "was begun with --seed 0, not 1"),
        ("calibrated", {"refit": False}, "was begun with --refit True, not False"),
        ("calibrated", {"calibration_tokens": 512}, "was begun with --calibration-tokens 1024, not 512"),
    ],
    ids=str,
)
def test_other_options_are_refused_by_name(
    source: Path, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    output = tmp_path / "out.sct"
    options = _stopped(source, output, name, 40)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OptionError, match=message):
        _run(source, output, ConvertOptions(**{**options.__dict__, **changes}), resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert _run(source, output, options, resume=True).bytes


def test_fits_alone_are_not_thrown_away_by_a_conversion_without_data(source: Path, tmp_path: Path) -> None:
    """Stopped within the sweep there is nothing else yet that a plain conversion could be held against."""
    output = tmp_path / "out.sct"
    options = _stopped(source, output, "calibrated", 20)
    kept = part_path(fits_path(output))
    part_path(output).unlink()  # which is there only once ten seconds have passed
    assert list(tmp_path.iterdir()) == [kept]
    before = kept.read_bytes()
    with pytest.raises(OptionError, match=r"was begun with calibration text .*, not none; take that again") as caught:
        _run(source, output, replace(options, calibration=()), resume=True)
    assert not getattr(caught.value, "__notes__", [])  # that it is to be gone on with by --resume, say
    assert list(tmp_path.iterdir()) == [kept] and kept.read_bytes() == before


@pytest.mark.parametrize("changed", ["shard", "config.json", "tokenizer.json", "calibration text"])
def test_another_source_or_text_is_refused_by_name(source: Path, tmp_path: Path, changed: str) -> None:
    copy = save(tiny_model("llama", vocab_size=260), tmp_path / "copy")
    tiny_tokenizer(copy)
    (copy.parent / "text.txt").write_text(TEXT)
    output = tmp_path / "out.sct"
    options = _stopped(copy, output, "calibrated", 40)
    shard = max(copy.glob("*.safetensors"))
    file = {"shard": shard, "calibration text": copy.parent / "text.txt"}.get(changed, copy / changed)
    data = bytearray(file.read_bytes())
    data[-1:] = bytes([data[-1] ^ 1]) if changed == "shard" else data[-1:] + b"\n"
    data[:1] = b"J" if changed == "calibration text" else data[:1]
    file.write_bytes(data)
    with pytest.raises(OptionError, match=f"was begun with {shard.name if changed == 'shard' else changed} [0-9a-f]+"):
        _run(copy, output, options, resume=True)


def test_a_stopped_file_is_described_and_otherwise_refused(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.sct"
    _stopped(source, output, "plain")
    part = part_path(output)
    run = lambda *words: CliRunner().invoke(main, list(words))  # noqa: E731
    shown = run("inspect", str(part))
    assert shown.exit_code == 0 and "NOT COMPLETE" in shown.output
    with SctFile(part, allow_incomplete=True) as file:
        tensors, layers = len(file.index.tensors), len(file.index.layers)
    assert tensors > layers > 0
    checked = run("verify", str(part))
    assert checked.exit_code == 1
    assert f"{tensors} tensors and {layers} layers that are there are good" in checked.output
    assert "--resume" in checked.output
    text = str(source.parent / "text.txt")
    for words in (
        ["evaluate", str(part), "--text", text],
        ["generate", str(part), "-p", "a"],
        ["train", str(part), "--data", text, "-o", str(tmp_path / "t.sct")],
        ["export-onnx", str(part), "-o", str(tmp_path / "onnx")],
        ["report", str(part)],
        ["convert", str(source), "--ranks", str(part), "-o", str(tmp_path / "r.sct"), "--data-free"],
    ):
        refused = run(*words)
        assert refused.exit_code == 1, words
        assert refused.output.count("\n") == 1 and "not finished" in refused.output, refused.output
    with pytest.raises(IncompleteError):
        SctFile(part)


def test_resume_without_anything_to_go_on_from_begins(source: Path, tmp_path: Path) -> None:
    options = _options(source, "plain")
    _run(source, tmp_path / "a.sct", options, resume=True)
    with pytest.raises(SctError, match="exists already"):
        _run(source, tmp_path / "a.sct", options, resume=True)
    assert _run(source, tmp_path / "a.sct", options, resume=True, overwrite=True).layers


def test_damage_in_what_was_kept_is_found(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.sct"
    options = _stopped(source, output, "calibrated", 40)
    for part in tmp_path.iterdir():
        with SctFile(part, allow_incomplete=True) as file:
            entry = max(file.index.tensors.values(), key=lambda entry: entry.nbytes)
        data = bytearray(part.read_bytes())
        data[entry.offset] ^= 1
        part.write_bytes(data)
        with pytest.raises(SctError, match="does not match its checksum"):
            _run(source, output, options, resume=True)
        assert not is_unwinding() and part.read_bytes() == data
        data[entry.offset] ^= 1
        part.write_bytes(data)
    assert _run(source, output, options, resume=True).layers


def test_stopped_before_the_last_step_its_fits_go_too(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = _options(source, "calibrated")
    _run(source, tmp_path / "whole.sct", options)
    with monkeypatch.context() as patch:

        def stop(store: FitStore, *_: object) -> None:
            error = KeyboardInterrupt()
            store._out.__exit__(KeyboardInterrupt, error, None)
            raise error

        patch.setattr(FitStore, "__exit__", stop)
        with pytest.raises(KeyboardInterrupt):
            _run(source, tmp_path / "out.sct", options)
    assert part_path(tmp_path / "out.sct").exists() and part_path(tmp_path / "out.sct.fits").exists()
    _run(source, tmp_path / "out.sct", options, resume=True)
    assert (tmp_path / "out.sct").read_bytes() == (tmp_path / "whole.sct").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole.sct", "out.sct"}


def test_what_is_overwritten_takes_its_fits_along(source: Path, tmp_path: Path) -> None:
    _stopped(source, tmp_path / "out.sct", "calibrated", 40)
    assert part_path(tmp_path / "out.sct.fits").exists()
    _run(source, tmp_path / "out.sct", _options(source, "plain"), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.sct"]
