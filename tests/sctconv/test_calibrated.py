"""Calibrated conversion: blocks found by structure in every family, exact where it can be, better where it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import sctconv
from sctconv import SctFile
from sctconv.cli import main
from sctconv.convert import ConvertOptions, convert
from sctconv.convert.blocks import Decoder
from sctconv.convert.calibration import CalibrationError, load_calibration
from sctconv.runtime.skeleton import linear_layers, load_tokenizer
from sctconv.runtime.verify import verify
from sctconv.sources import open_source
from sctconv.sources.weights import DenseModel
from tests.models import FAMILIES, logits, save, tiny_model, tiny_tokenizer

TEXT = "".join(
    f"Item {place}: {place * place} apples, {place % 7} pears; the {place}th of many.\n" for place in range(400)
)


def _source(family: str, directory: Path) -> Path:
    source = save(tiny_model(family, vocab_size=260), directory / family)
    tiny_tokenizer(source)
    (directory / "text.txt").write_text(TEXT)
    return source


def _tokenizer(source: Path) -> Any:
    return load_tokenizer(open_source(str(source)).files)


def _options(source: Path, **changes: Any) -> ConvertOptions:
    settings: dict[str, Any] = {
        "rank": 6,
        "modules": "all",
        "calibration_tokens": 4096,
        "calibration_context": 64,
        **changes,
    }
    return ConvertOptions(calibration=(str(source.parent / "text.txt"),), **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_at_full_rank_the_student_is_the_teacher(family: str, tmp_path: Path) -> None:
    source = _source(family, tmp_path)
    report = convert(str(source), tmp_path / "o.sct", _options(source, rank=32), must_shrink=False)
    assert report.layers and report.quality is not None
    assert max(report.quality["held_out"]["distances"]) < 1e-3 and report.quality["held_out"]["kl"] < 1e-4
    expected = logits(tiny_model(family, vocab_size=260))
    assert (logits(sctconv.load(tmp_path / "o.sct").model) - expected).abs().max() < 2e-3 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_nearer_to_the_teacher_than_truncation(family: str, tmp_path: Path) -> None:
    source = _source(family, tmp_path)
    convert(str(source), tmp_path / "plain.sct", ConvertOptions(rank=6, modules="all"))
    report = convert(str(source), tmp_path / "fitted.sct", _options(source))
    verify(tmp_path / "fitted.sct")
    ids = torch.tensor(_tokenizer(source)(TEXT[-500:]).input_ids)[None, :120]
    dense = torch.log_softmax(logits(tiny_model(family, vocab_size=260), ids), -1)
    kl = []
    for name in ("plain", "fitted"):
        log = torch.log_softmax(logits(sctconv.load(tmp_path / f"{name}.sct").model, ids), -1)
        kl.append(float(torch.nn.functional.kl_div(log, dense, log_target=True, reduction="batchmean")))
    assert kl[1] < 0.8 * kl[0]
    with SctFile(tmp_path / "fitted.sct") as file:
        facts = file.index.metadata["conversion"]
        assert (
            facts["method"] == "calibrated"
            and report.quality is not None
            and facts["held_out"] == report.quality["held_out"]
        )
        assert facts["calibration"][0]["source"] == "text.txt", "a name, no path of this machine"
        assert all(0 <= record.extra["output_error"] < 1 for record in file.index.layers.values())


def test_what_the_converter_measured_is_what_the_file_gives(tmp_path: Path) -> None:
    source = _source("llama", tmp_path)
    options = _options(source)
    report = convert(str(source), tmp_path / "o.sct", options)
    loaded = sctconv.load(tmp_path / "o.sct")
    texts = load_calibration(options.calibration, loaded.tokenizer, tokens=4096, context=64)
    total, count = 0.0, 0
    for window in texts.held_out:
        log = torch.log_softmax(logits(loaded.model, window[None])[0, :-1].double(), -1)
        total -= float(log.gather(1, window[1:, None]).sum())
        count += len(window) - 1
    assert report.quality is not None
    assert report.quality["held_out"]["perplexity"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    source = _source("qwen2", tmp_path)
    for name in "ab":
        convert(str(source), tmp_path / f"{name}.sct", _options(source))
    assert (tmp_path / "a.sct").read_bytes() == (tmp_path / "b.sct").read_bytes()


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": ""}),
        ("phi3", {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": ""}),
        ("gpt2", {"attn.c_proj": "ln_2", "mlp.c_proj": ""}),
        ("gpt_neox", {"attention.dense": "", "mlp.dense_4h_to_h": ""}),  # both halves of the block are added at its end
    ],
)
def test_writers_to_the_residual_stream_are_found(family: str, expected: dict[str, str], tmp_path: Path) -> None:
    model = DenseModel(open_source(str(_source(family, tmp_path))))
    decoder = Decoder(model, list(linear_layers(model.skeleton)))
    (state,) = decoder.embed([torch.arange(2 * 32).reshape(2, 32)])
    block = decoder.block(0, state)
    assert {name: writer.place for name, writer in block.writers.items()} == expected
    assert all(writer.scale == pytest.approx(1.0, abs=1e-3) for writer in block.writers.values())


def test_layers_with_one_input_stand_together(tmp_path: Path) -> None:
    model = DenseModel(open_source(str(_source("llama", tmp_path))))
    decoder = Decoder(model, list(linear_layers(model.skeleton)))
    (state,) = decoder.embed([torch.arange(2 * 32).reshape(2, 32)])
    groups = [[name.rpartition(".")[2] for name in group] for group in decoder.block(1, state).groups]
    assert groups == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_a_dense_block_runs_as_in_the_model(tmp_path: Path) -> None:
    for family in FAMILIES:
        model = DenseModel(open_source(str(_source(family, tmp_path))))
        decoder = Decoder(model, list(linear_layers(model.skeleton)))
        ids = torch.arange(2 * 40).reshape(2, 40) % 256
        states = decoder.embed([ids])
        for place in range(len(decoder)):
            states = [decoder.block(place, states[0]).run(states[0])]
        (found,) = decoder.head(states, [ids])
        torch.testing.assert_close(found, logits(tiny_model(family, vocab_size=260), ids), rtol=1e-4, atol=1e-4)


def test_mixtures_take_equal_shares_and_jsonl_its_text(tmp_path: Path) -> None:
    source = _source("llama", tmp_path)
    tokenizer = _tokenizer(source)
    lines = [json.dumps({"text": f"line {place} of another text altogether. " * 4}) for place in range(200)]
    (tmp_path / "more.jsonl").write_text("\n".join(lines))
    sources = [str(tmp_path / "text.txt"), str(tmp_path / "more.jsonl")]
    texts = load_calibration(sources, tokenizer, tokens=4096, context=64)
    assert dict(texts.sources) == {"text.txt": 2048, "more.jsonl": 2048} and texts.tokens == 4096
    assert "another text" in tokenizer.decode(texts.fit[-1])
    fitted = {tuple(window.tolist()) for window in texts.fit}
    assert len(texts.held_out) and not any(tuple(window.tolist()) in fitted for window in texts.held_out)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.txt", b"too short", "less than two windows of 64"),
        ("empty.txt", b"  \n", "an empty text"),
        ("broken.txt", b"abc\xff\xfe", r"not UTF-8 text \(byte 3\)"),
        ("missing.txt", None, "cannot be read"),
        ("bad.jsonl", b'{"text": "a"}\n{"txt": 1}\n', "line 2 is not a JSON object with a text field"),
        ("number.jsonl", b'{"text": 3}\n', "text field of line 1 is not a string"),
    ],
)
def test_texts_that_cannot_be_used_are_one_line(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    source = _source("llama", tmp_path)
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        convert(str(source), tmp_path / "o.sct", _options(source).__class__(rank=4, calibration=(str(path),),
                calibration_tokens=4096, calibration_context=64))  # fmt: skip
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.sct"))


def test_the_command_line(tmp_path: Path) -> None:
    source = _source("llama", tmp_path)
    args = ["convert", str(source), "-o", str(tmp_path / "o.sct"), "--rank", "6", "--calibration-tokens", "2048"]
    result = CliRunner().invoke(main, [*args, "--calibration", str(tmp_path / "text.txt")])
    assert result.exit_code == 0, result.output
    assert "output error" in result.stdout and "held-out calibration tokens: perplexity" in result.stdout
    both = CliRunner().invoke(main, [*args, "--calibration", str(tmp_path / "text.txt"), "--data-free", "--overwrite"])
    assert both.exit_code == 2 and "exclude each other" in both.stderr
    energy = CliRunner().invoke(main, ["convert", str(source), "--energy", "0.5", "--calibration", "x.txt"])
    assert energy.exit_code == 2 and "--energy" in energy.stderr
