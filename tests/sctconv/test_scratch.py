"""Models from their configuration alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import sctconv
from sctconv import SctFile
from sctconv.cli import main
from sctconv.runtime.skeleton import linear_layers
from sctconv.runtime.spectral import SpectralEmbedding
from sctconv.runtime.train import Files, TrainOptions, run
from sctconv.runtime.train.options import SCRATCH, TUNING
from sctconv.runtime.verify import verify
from tests.models import FAMILIES, save, tiny_model, tiny_tokenizer
from tests.training import TEXT, quick


def _run(*args: Any) -> Any:
    return CliRunner().invoke(main, ["init", *(str(arg) for arg in args)])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_begins_as_undecided_as_transformers_own(family: str, tmp_path: Path) -> None:
    source = save(tiny_model(family, vocab_size=260), tmp_path / "m")
    tiny_tokenizer(source)
    result = _run(source, "--rank", 4, "-o", tmp_path / "n.sct")
    assert result.exit_code == 0, result.output
    verify(tmp_path / "n.sct")
    model, tokenizer = sctconv.load(tmp_path / "n.sct")
    assert tokenizer is not None
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss == pytest.approx(math.log(260), rel=0.15)
    assert not list(tmp_path.glob("*.tmp"))


def test_outputs_have_the_variance_of_the_dense_layer(tmp_path: Path) -> None:
    source = save(tiny_model("llama", vocab_size=260), tmp_path / "m")
    assert _run(source / "config.json", "--rank", 8, "-o", tmp_path / "n.sct", "--modules", "mlp").exit_code == 0
    model = sctconv.load(tmp_path / "n.sct").model
    sigma = model.config.initializer_range
    for name, shape in linear_layers(tiny_model("llama", vocab_size=260)).items():
        if "mlp" not in name:
            continue
        layer = model.get_submodule(name)
        x = torch.randn(4000, shape.in_, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            y = x @ layer.V * layer.s @ layer.U.T
        assert float(y.std()) == pytest.approx(sigma * shape.in_**0.5, rel=0.05)


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path: Path) -> None:
    source = save(tiny_model("gpt2", vocab_size=260), tmp_path / "m")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert _run(source, "--rank", 4, "-o", tmp_path / f"{name}.sct", "--seed", seed).exit_code == 0
    a, b, c = ((tmp_path / f"{name}.sct").read_bytes() for name in "abc")
    assert a == b and a != c


@pytest.mark.parametrize("family", FAMILIES)
def test_with_its_embeddings_factored(family: str, tmp_path: Path) -> None:
    source = save(tiny_model(family, vocab_size=260), tmp_path / "m")
    tiny_tokenizer(source)
    result = _run(source, "--rank", 4, "--embeddings", "-o", tmp_path / "n.sct")
    assert result.exit_code == 0, result.output
    verify(tmp_path / "n.sct")
    model = sctconv.load(tmp_path / "n.sct").model
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if family != "gemma3":  # its table is also scaled, which factors do not do
        assert isinstance(table, SpectralEmbedding) and isinstance(head, sctconv.SpectralLinear)
        assert (head.U is table.U) == bool(model.config.tie_word_embeddings), "tied where the model ties"
        assert not any(0 < dim == 260 * 32 for dim in (tensor.numel() for tensor in model.state_dict().values()))
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss == pytest.approx(math.log(260), rel=0.15)


def test_rates_suit_a_model_that_was_begun_and_one_that_knows_something(tmp_path: Path) -> None:
    source = save(tiny_model("llama", vocab_size=260), tmp_path / "m")
    tiny_tokenizer(source)
    assert _run(source, "--rank", 4, "-o", tmp_path / "n.sct").exit_code == 0
    (tmp_path / "text.txt").write_text(TEXT)
    options = TrainOptions(steps=10, context=32)
    used = []
    for before, after in (("n", "once"), ("once", "twice")):
        run(Files(tmp_path / f"{before}.sct", tmp_path / f"{after}.sct"), [str(tmp_path / "text.txt")], options)
        with SctFile(tmp_path / f"{after}.sct") as file:
            used.append(file.index.metadata["training"]["options"])
    for rates, options_used in zip((SCRATCH, TUNING), used, strict=True):
        assert {name: options_used[name] for name in rates} == rates
    adamw = TrainOptions(optimizer="adamw", rate=5e-4).resolved(torch.device("cpu"))
    assert (adamw.norm_rate, adamw.embedding_rate) == (5e-4, 5e-4), "one rate for everything"
    adamw = TrainOptions(optimizer="adamw").resolved(torch.device("cpu"))
    assert adamw.norm_rate == adamw.rate == TUNING["rate"]


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_factored_embeddings_train_and_are_saved(family: str, tmp_path: Path) -> None:
    source = save(tiny_model(family, vocab_size=260), tmp_path / "m")
    tiny_tokenizer(source)
    assert _run(source, "--rank", 4, "--embeddings", "-o", tmp_path / "n.sct").exit_code == 0
    (tmp_path / "text.txt").write_text(TEXT)
    options = quick(embedding_rate=1.0, steps=20, angle=0.05, singular_rate=0.05)
    summary = run(Files(tmp_path / "n.sct", tmp_path / "t.sct"), [str(tmp_path / "text.txt")], options)
    assert summary["perplexity"] < 0.9 * summary["perplexity_before"]
    verify(tmp_path / "t.sct")
    before, after = (sctconv.load(tmp_path / f"{name}.sct").model.get_input_embeddings() for name in "nt")
    assert (after.U - before.U).abs().max() > 1e-3, "the embedding moved"


def test_a_configuration_alone_and_a_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    source = save(tiny_model("llama", vocab_size=260), tmp_path / "m")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    result = _run(tmp_path / "config.json", "--rank", 4, "-o", tmp_path / "n.sct")
    assert result.exit_code == 0 and "no tokenizer" in result.output
    tiny_tokenizer(source)
    result = _run(tmp_path / "config.json", "--rank", 4, "-o", tmp_path / "t.sct", "--tokenizer", source)
    assert result.exit_code == 0 and "no tokenizer" not in result.output
    with SctFile(tmp_path / "t.sct") as file:
        assert "tokenizer.json" in file.index.files and file.index.metadata["initialisation"]["rank"] == 4


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        (["--rank", "0"], ["--rank 0", "at least 1"], 2),
        (["--rank", "5000"], ["--rank 5000", "shrink none"], 2),
        (["--rank", "4", "--modules", "nothing"], ["matches none"], 2),
    ],
)
def test_wrong_options(options: list[str], words: list[str], code: int, tmp_path: Path) -> None:
    source = save(tiny_model("llama", vocab_size=260), tmp_path / "m")
    result = _run(source, "-o", tmp_path / "n.sct", *options)
    assert result.exit_code == code and len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in words) and not (tmp_path / "n.sct").exists()
