"""Calibrated conversion: blocks found by structure in every family, exact where it can be, better where it cannot."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import sctconv
from sctconv import SctFile
from sctconv.cli import main
from sctconv.convert import ConvertOptions, convert
from sctconv.convert.allocate import TRIALS, Sensitivity, knapsack
from sctconv.convert.budget import MemoryPlan
from sctconv.convert.calibration import load_calibration
from sctconv.convert.decoder import Decoder
from sctconv.convert.plan import LayerPlan
from sctconv.convert.sweep import Sweep
from sctconv.formats.errors import SctError
from sctconv.runtime.skeleton import linear_layers, load_tokenizer
from sctconv.runtime.verify import verify
from sctconv.sources import open_source
from sctconv.sources.weights import DenseModel
from tests.models import FAMILIES, logits, tiny_model
from tests.sctconv.calibrating import TEXT, calibrated_options, source_with_text


def _tokenizer(source: Path) -> Any:
    return load_tokenizer(open_source(str(source)).files)


@pytest.mark.parametrize("family", FAMILIES)
def test_at_full_rank_the_student_is_the_teacher(family: str, tmp_path: Path) -> None:
    source = source_with_text(family, tmp_path)
    report = convert(str(source), tmp_path / "o.sct", calibrated_options(source, rank=32), must_shrink=False)
    assert report.layers and report.quality is not None
    assert max(report.quality["held_out"]["distances"]) < 1e-3 and report.quality["held_out"]["kl"] < 1e-4
    expected = logits(tiny_model(family, vocab_size=260))
    assert (logits(sctconv.load(tmp_path / "o.sct").model) - expected).abs().max() < 2e-3 * expected.abs().max()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_in_bfloat16_the_student_is_the_teacher_but_for_its_rounding(family: str, tmp_path: Path) -> None:
    source = source_with_text(family, tmp_path)
    made = []
    for name, bf16 in (("exact", False), ("fast", True)):
        options = calibrated_options(source, rank=32, bf16=bf16)
        report = convert(str(source), tmp_path / f"{name}.sct", options, must_shrink=False)
        assert report.quality is not None and report.quality["bf16"] is bf16
        made.append(report.quality["held_out"])
    exact, fast = made
    assert exact["teacher_perplexity"] == fast["teacher_perplexity"], "what is measured is measured in float32"
    assert max(exact["distances"]) < max(fast["distances"]) < 2e-2 and fast["kl"] < 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_nearer_to_the_teacher_than_truncation(family: str, tmp_path: Path) -> None:
    source = source_with_text(family, tmp_path)
    convert(str(source), tmp_path / "plain.sct", ConvertOptions(rank=6, modules="all"))
    report = convert(str(source), tmp_path / "fitted.sct", calibrated_options(source))
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
    source = source_with_text("llama", tmp_path)
    options = calibrated_options(source)
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
    source = source_with_text("qwen2", tmp_path)
    for name in "ab":
        convert(str(source), tmp_path / f"{name}.sct", calibrated_options(source))
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
    model = DenseModel(open_source(str(source_with_text(family, tmp_path))))
    decoder = Decoder(model, list(linear_layers(model.skeleton)))
    (state,) = decoder.embed([torch.arange(2 * 32).reshape(2, 32)])
    block = decoder.block(0, state)
    assert {name: writer.place for name, writer in block.writers.items()} == expected
    assert all(writer.scale == pytest.approx(1.0, abs=1e-3) for writer in block.writers.values())


def test_layers_with_one_input_stand_together(tmp_path: Path) -> None:
    model = DenseModel(open_source(str(source_with_text("llama", tmp_path))))
    decoder = Decoder(model, list(linear_layers(model.skeleton)))
    (state,) = decoder.embed([torch.arange(2 * 32).reshape(2, 32)])
    groups = [[name.rpartition(".")[2] for name in group] for group in decoder.block(1, state).groups]
    assert groups == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_a_dense_block_runs_as_in_the_model(tmp_path: Path) -> None:
    for family in FAMILIES:
        model = DenseModel(open_source(str(source_with_text(family, tmp_path))))
        decoder = Decoder(model, list(linear_layers(model.skeleton)))
        ids = torch.arange(2 * 40).reshape(2, 40) % 256
        states = list(decoder.embed([ids]))
        for place in range(len(decoder)):
            states = [decoder.block(place, states[0]).run(states[0])]
        (found,) = decoder.head(states, [ids])
        torch.testing.assert_close(found, logits(tiny_model(family, vocab_size=260), ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", [MemoryPlan(batch=4), MemoryPlan(batch=1)])
def test_hidden_states_on_disk_are_those_in_memory(plan: MemoryPlan, tmp_path: Path) -> None:
    source = source_with_text("llama", tmp_path)
    for spill in (None, tmp_path):
        _sweep(source, replace(plan, spill=spill), tmp_path / f"{bool(spill)}.pt")
    kept, spilled = (torch.load(tmp_path / f"{name}.pt") for name in ("False", "True"))
    for name, W in kept.items():
        assert torch.equal(W, spilled[name]), name


def test_layers_too_wide_for_a_gram_matrix_are_fitted_from_tokens(tmp_path: Path) -> None:
    source = source_with_text("olmo2", tmp_path)  # no biases, which tokens leave as they are and moments correct
    _sweep(source, MemoryPlan(), tmp_path / "moments.pt")
    _sweep(source, MemoryPlan(gram_side=8, dual_tokens=1 << 20), tmp_path / "tokens.pt")
    moments, tokens = (torch.load(tmp_path / f"{name}.pt") for name in ("moments", "tokens"))
    for name, W in moments.items():
        assert float((W - tokens[name]).norm()) < 1e-3 * float(W.norm()), name


def _sweep(source: Path, memory: MemoryPlan, out: Path) -> None:
    """Runs a sweep and saves the products of all factors."""
    model = DenseModel(open_source(str(source)))
    texts = load_calibration((str(source.parent / "text.txt"),), _tokenizer(source), tokens=2048, context=64)
    decoder = Decoder(model, list(linear_layers(model.skeleton)))
    fits: dict[str, Any] = {}
    for block in Sweep(decoder, dict.fromkeys(decoder.layers, 8), texts, memory).run():
        fits |= block.fits
    torch.save({name: (fit.U * fit.s) @ fit.V.T for name, fit in fits.items()}, out)


def test_dense_layers_are_fitted_too_unless_told_not_to(tmp_path: Path) -> None:
    source = source_with_text("gpt2", tmp_path)
    kl = []
    for refit in (False, True):
        report = convert(str(source), tmp_path / f"{refit}.sct", calibrated_options(source, modules="mlp", refit=refit))
        assert report.quality is not None
        kl.append(report.quality["held_out"]["kl"])
        dense = tiny_model("gpt2", vocab_size=260).state_dict()["transformer.h.1.attn.c_proj.weight"]
        with SctFile(tmp_path / f"{refit}.sct") as file:
            stored = torch.from_numpy(file.tensor("transformer.h.1.attn.c_proj.weight").copy())
        assert torch.equal(stored, dense) is not refit
    assert kl[1] < kl[0]


def test_energy_is_of_the_outputs(tmp_path: Path) -> None:
    source = source_with_text("llama", tmp_path)
    report = convert(str(source), tmp_path / "o.sct", calibrated_options(source, rank=None, energy=0.6))
    assert report.layers and all(record.rank < 16 for record in report.layers)
    assert len({record.rank for record in report.layers}) > 1
    report = convert(str(source), tmp_path / "p.sct", calibrated_options(source, rank=None, energy=0.999999))
    assert report.dense and all("energy 0.999999 asks for a rank" in str(layer.reason) for layer in report.dense)


def test_mixtures_take_equal_shares_and_jsonl_its_text(tmp_path: Path) -> None:
    source = source_with_text("llama", tmp_path)
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
        ("bad.jsonl", b'{"text": "a"}\n{"txt": 1}\n', "the text field of record 2 is missing"),
        ("number.jsonl", b'{"text": 3}\n', "the text field of record 1 is not a string"),
    ],
)
def test_texts_that_cannot_be_used_are_one_line(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    source = source_with_text("llama", tmp_path)
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SctError, match=message) as caught:
        convert(str(source), tmp_path / "o.sct", calibrated_options(source).__class__(rank=4, calibration=(str(path),),
                calibration_tokens=4096, calibration_context=64))  # fmt: skip
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.sct"))


def test_the_command_line(tmp_path: Path) -> None:
    source = source_with_text("llama", tmp_path)
    args = ["convert", str(source), "-o", str(tmp_path / "o.sct"), "--rank", "6", "--calibration-tokens", "2048"]
    result = CliRunner().invoke(main, [*args, "--calibration", str(tmp_path / "text.txt")])
    assert result.exit_code == 0, result.output
    assert "output error" in result.stdout and "held-out calibration tokens: perplexity" in result.stdout
    both = CliRunner().invoke(main, [*args, "--calibration", str(tmp_path / "text.txt"), "--data-free", "--overwrite"])
    assert both.exit_code == 2 and "exclude each other" in both.stderr
    again = CliRunner().invoke(main, [*args, "--data-free", "--dry-run", "--resume"])
    assert again.exit_code == 2 and "leave one out" in again.stderr
    small = CliRunner().invoke(main, [*args, "--calibration", "x.txt", "--max-memory", "8 Gib", "--overwrite"])
    assert small.exit_code == 2 and "'8 Gib'" in small.stderr and "8GiB" in small.stderr


def test_without_text_and_without_a_way_to_it_one_line_names_both_options(tmp_path: Path) -> None:
    source = source_with_text("llama", tmp_path)
    result = CliRunner().invoke(main, ["convert", str(source), "-o", str(tmp_path / "o.sct"), "--rank", "6"])
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
    assert "--calibration FILE" in result.stderr and "--data-free" in result.stderr and "wikitext" in result.stderr
    assert not list(tmp_path.glob("*.sct*"))


def test_the_report_lies_beside_the_file(tmp_path: Path) -> None:
    source = source_with_text("llama", tmp_path)
    text = str(tmp_path / "text.txt")
    args = ["convert", str(source), "-o", str(tmp_path / "o.sct"), "--rank", "6", "--calibration-tokens", "2048"]
    assert CliRunner().invoke(main, [*args, "--calibration", text]).exit_code == 0
    assert "mlp.up_proj" in (tmp_path / "o.report.html").read_text()
    (tmp_path / "o.sct").unlink()
    again = CliRunner().invoke(main, [*args, "--calibration", text])
    assert again.exit_code == 1 and "o.report.html" in again.stderr and not (tmp_path / "o.sct").exists()
    assert CliRunner().invoke(main, [*args, "--calibration", text, "--no-report"]).exit_code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rank", "4", "--target-size", "1MB"], ["exactly one of", "--rank and --target-size"]),
        (["--rank", "4", "--data-free", "--allocate", "measured"], ["--allocate measured needs calibration"]),
        (["--rank", "4", "--data-free", "--refine", "5"], ["--refine needs calibration"]),
        (["--energy", "0.5", "--allocate", "measured"], ["--allocate measured and --energy"]),
        (
            ["--target-size", "1kB", "--data-free"],
            ["--target-size 1000: at rank 1 the file still takes up to", "allow more"],
        ),
        (["--target-size", "1TB", "--data-free"], ["--target-size 1000000000000: factored at any rank it is smaller"]),
    ],
)
def test_options_that_do_not_go_together(options: list[str], words: list[str], tmp_path: Path) -> None:
    source = source_with_text("llama", tmp_path)
    result = CliRunner().invoke(main, ["convert", str(source), "-o", str(tmp_path / "o.sct"), *options])
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_refinement_and_measured_ranks(family: str, tmp_path: Path) -> None:
    """Never worse than what they start from, on held-out text; the same parameters; all of it in the index."""
    source = source_with_text(family, tmp_path)
    plain = convert(str(source), tmp_path / "plain.sct", calibrated_options(source))
    options = calibrated_options(source, allocate="measured", refine=10)
    report = convert(str(source), tmp_path / "o.sct", options)
    assert report.quality is not None and plain.quality is not None
    assert report.parameters <= plain.parameters
    trials = report.quality["allocation"]["trials"]
    assert min(trial["kl"] for trial in trials) <= trials[0]["kl"]
    assert len(trials) == TRIALS
    assert set(report.quality["allocation"]["layer_kl"]) >= {record.name for record in report.layers}
    assert all(min(losses) <= losses[0] for losses in report.quality["refinement"])
    assert min(report.quality["tuning"]) <= report.quality["tuning"][0]
    verify(tmp_path / "o.sct")
    loaded = sctconv.load(tmp_path / "o.sct")
    texts = load_calibration(options.calibration, loaded.tokenizer, tokens=4096, context=64)
    log = torch.log_softmax(logits(loaded.model, texts.held_out)[:, :-1].double(), -1)
    nll = -float(log.gather(2, texts.held_out[:, 1:, None]).mean())
    assert math.exp(nll) == pytest.approx(report.quality["held_out"]["tuned_perplexity"], rel=1e-4)


def test_knapsack_spends_where_harm_is_and_keeps_floors() -> None:
    layers = {name: LayerPlan(name, 32, 64, False, False, rank=8) for name in "abc"}
    tail = torch.linspace(1.0, 0.0, 33, dtype=torch.float64).square()
    sensitivities = {name: Sensitivity(kl, 8, tail, 0.5) for name, kl in zip("abc", (1.0, 0.01, 0.0), strict=True)}
    budget = 3 * layers["a"].parameters
    ranks = knapsack(layers, sensitivities, budget, 0.0, 1.0)
    sizes = {name: layers[name].out * 64 if rank is None else rank * 97 for name, rank in ranks.items()}
    assert sum(sizes.values()) <= budget and sizes["a"] > sizes["b"] >= sizes["c"] >= 2 * 97
    assert knapsack(layers, sensitivities, 10**6, 0.0, 1.0) == dict.fromkeys("abc"), "all dense where all fits"
    late = {name: replace(sensitivities["a"], depth=depth) for name, depth in zip("abc", (0.0, 0.5, 1.0), strict=True)}
    tilted = [rank or 32 for rank in knapsack(layers, late, budget, 3.0, 1.0).values()]
    assert tilted == sorted(tilted) and tilted[0] < tilted[2]
