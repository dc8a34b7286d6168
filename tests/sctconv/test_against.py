"""`verify --deep --against SRC`: errors and dense tensors computed again from the source, and what does not agree named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from sctconv.cli import main
from sctconv.convert import ConvertOptions, convert
from sctconv.convert.against import DifferenceError, compare_with_source
from sctconv.formats.reader import SctFile
from sctconv.formats.writer import rewrite
from tests.gguf_files import write_gguf
from tests.models import save, tiny_model, tiny_tokenizer


def verify(file: Path, source: object, *more: str) -> Result:
    return CliRunner().invoke(main, ["verify", str(file), "--deep", "--against", str(source), *more])


def differs(file: Path, source: object) -> str:
    """The one line on stderr with which a comparison fails."""
    result = verify(file, source)
    assert result.exit_code == 1 and result.stdout == "", result.output
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model with a tokenizer in `dense`, and its conversion, mlp at rank 6, in `m.sct`."""
    room = tmp_path_factory.mktemp("room")
    save(tiny_model("llama", vocab_size=260), room / "dense", shard="1GB")
    tiny_tokenizer(room / "dense")
    convert(str(room / "dense"), room / "m.sct", ConvertOptions(rank=6))
    (room / "text.txt").write_text("".join(f"{place} apples and {place % 5} pears. " for place in range(900)))
    return room


def spoiled(dense: Path, copy: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a source with other weights."""
    shutil.copytree(dense, copy)
    state = load_file(copy / "model.safetensors")
    change(state)
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def recorded(file: Path, copy: Path, error: float | None) -> Path:
    """A copy of a file whose first layer records another error."""
    with SctFile(file) as opened:
        name, record = next(iter(opened.index.layers.items()))
        opened.index.layers[name] = replace(record, error=error)
        rewrite(opened, copy)
    return copy


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"rank": 6, "modules": "all"}),
        ("gpt2", {"rank": 5, "modules": "all"}),
        ("qwen2", {"energy": 0.6}),
        ("gpt_neox", {"rank": 6, "dtype": "bfloat16"}),
        ("phi3", {"rank": 6, "dtype": "float16"}),
    ],
)
def test_a_conversion_agrees_with_its_source(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = save(tiny_model(family), tmp_path / "dense")
    convert(str(source), tmp_path / "m.sct", ConvertOptions(**options))
    seen: list[float] = []
    found = compare_with_source(
        tmp_path / "m.sct", str(source), progress=lambda done, total, _: seen.append(done / total)
    )
    with SctFile(tmp_path / "m.sct") as file:
        errors = [record.error or 0.0 for record in file.index.layers.values()]
        assert found.layers == len(errors) and found.tensors == len(file.index.tensors) - 3 * len(errors)
    assert found.worst_error == pytest.approx(max(errors), rel=1e-6)
    assert found.differences == [] and found.shards_recorded is True and found.unrecorded == found.fitted == 0
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] < 1


def test_a_gguf_file_is_a_source_too(tmp_path: Path) -> None:
    source = write_gguf(tiny_model("qwen3"), "qwen3", tmp_path / "m.gguf")
    convert(str(source), tmp_path / "m.sct", ConvertOptions(rank=6))
    result = verify(tmp_path / "m.sct", source)
    assert result.exit_code == 0 and "the errors of 6 layers are as recorded" in result.stdout, result.output


def test_of_a_calibrated_file_what_was_fitted_may_differ_and_nothing_else(room: Path, tmp_path: Path) -> None:
    options = ConvertOptions(rank=6, calibration=(str(room / "text.txt"),), calibration_tokens=4096)
    convert(str(room / "dense"), tmp_path / "m.sct", replace(options, calibration_context=64))
    result = verify(tmp_path / "m.sct", room / "dense")
    assert result.exit_code == 0 and "that calibration fitted" in result.stdout, result.output
    other = spoiled(room / "dense", tmp_path / "other", lambda state: state["model.norm.weight"].add_(1))
    assert "model.norm.weight has" in differs(tmp_path / "m.sct", other)


def test_the_source_saved_in_other_shards_is_the_same(room: Path, tmp_path: Path) -> None:
    save(tiny_model("llama", vocab_size=260), tmp_path / "dense", shard="20KB")
    assert compare_with_source(room / "m.sct", str(tmp_path / "dense")).shards_recorded is False
    assert verify(room / "m.sct", tmp_path / "dense").exit_code == 0


def test_an_error_that_is_not_the_recorded_one_is_named_with_both(room: Path, tmp_path: Path) -> None:
    with SctFile(room / "m.sct") as file:
        name, record = next(iter(file.index.layers.items()))
    line = differs(recorded(room / "m.sct", tmp_path / "m.sct", 0.123), room / "dense")
    assert f"1 of 35 layers and tensors do not agree with {room}/dense" in line
    assert f": {name} has an error of {record.error:.6g}, recorded as 0.123" in line


def test_a_layer_without_an_error_on_record_is_counted(room: Path, tmp_path: Path) -> None:
    result = verify(recorded(room / "m.sct", tmp_path / "m.sct", None), room / "dense")
    assert result.exit_code == 0 and "(1 have none on record)" in result.stdout


def test_another_weight_and_another_dense_tensor_are_named(room: Path, tmp_path: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state["model.layers.1.mlp.up_proj.weight"][3, 4] += 0.5
        state["model.layers.0.self_attn.q_proj.weight"][0, 0] = 17

    line = differs(room / "m.sct", spoiled(room / "dense", tmp_path / "other", change))
    assert "2 of 35 layers and tensors" in line and "(whose shards are not those of the file's metadata)" in line
    assert "model.layers.1.mlp.up_proj has an error of " in line and "q_proj.weight has " in line
    assert "where the source has 17" in line


def test_of_many_the_first_are_named(room: Path, tmp_path: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        for tensor in state.values():
            tensor.mul_(1.5)

    line = differs(room / "m.sct", spoiled(room / "dense", tmp_path / "other", change))
    assert line.count(" where the source has ") == 4 and "; and 31 more" in line


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_another_model_is_one_line(family: str, room: Path, tmp_path: Path) -> None:
    """Of another vocabulary, another family, or names of its own."""
    line = differs(room / "m.sct", save(tiny_model(family), tmp_path / "other"))
    assert f"{tmp_path}/other: another model than {room}/m.sct was made of: " in line and " there and " in line


def test_a_trained_file_is_said_to_follow_its_source_no_longer(room: Path, tmp_path: Path) -> None:
    trained = tmp_path / "t.sct"
    options = ["--data", str(room / "text.txt"), "--steps", "4", "--batch", "2", "--context", "32", "--eval-every", "2"]
    assert CliRunner().invoke(main, ["train", str(room / "m.sct"), "-o", str(trained), *options]).exit_code == 0
    result = verify(trained, room / "dense")
    assert result.exit_code == 0 and "trained since, so neither errors nor dense tensors follow it" in result.stdout
    other = spoiled(room / "dense", tmp_path / "other", lambda state: state["model.norm.weight"].add_(1))
    assert f"was trained, and not from {other}" in differs(trained, other)


def test_as_json(room: Path, tmp_path: Path) -> None:
    found = json.loads(verify(room / "m.sct", room / "dense", "--json").stdout)
    assert found["layers"] == 6 and found["against"]["differences"] == [] and found["against"]["layers"] == 6
    result = verify(recorded(room / "m.sct", tmp_path / "m.sct", 0.5), room / "dense", "--json")
    (difference,) = json.loads(result.stdout)["against"]["differences"]
    assert result.exit_code == 1 and (difference["kind"], difference["recorded"]) == ("layer", 0.5)
    assert len(result.stderr.splitlines()) == 1


def test_a_damaged_file_is_found_before_the_source_is_asked(room: Path, tmp_path: Path) -> None:
    data = bytearray((room / "m.sct").read_bytes())
    data[4096] ^= 1
    (tmp_path / "m.sct").write_bytes(data)
    assert "does not match its checksum" in differs(tmp_path / "m.sct", "no/such/source")


def test_deep_needs_a_source(room: Path) -> None:
    result = CliRunner().invoke(main, ["verify", str(room / "m.sct"), "--deep"])
    assert result.exit_code == 2 and "give --against SRC too" in result.stderr
    assert CliRunner().invoke(main, ["verify", str(room / "m.sct"), "--against", str(room / "dense")]).exit_code == 0


def test_nan_is_never_as_recorded(room: Path, tmp_path: Path) -> None:
    other = spoiled(
        room / "dense", tmp_path / "other", lambda state: state["model.layers.0.mlp.up_proj.weight"].fill_(np.nan)
    )
    with pytest.raises(DifferenceError, match="has an error of nan"):
        compare_with_source(room / "m.sct", str(other)).check("m.sct")
