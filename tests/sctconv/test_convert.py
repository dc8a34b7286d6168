"""Conversion: ranks, selection, storage, determinism, and an independent truncation."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import sctconv
from sctconv import SctFile
from sctconv.cli import main
from sctconv.convert import ConvertOptions, convert, make_plan
from sctconv.convert.plan import read_ranks
from sctconv.errors import OptionError
from sctconv.formats.checkpoint import read_tensor
from sctconv.formats.errors import OutputError
from sctconv.runtime.linalg import NonFiniteError
from sctconv.runtime.verify import verify
from sctconv.sources import open_source
from sctconv.sources.weights import DenseModel
from tests.models import FAMILIES, logits, save, tiny_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tiny_model("llama"), tmp_path / "tiny", files={"LICENSE": "terms"})


def _run(source: Path, name: str = "out.sct", **options: Any) -> Path:
    output = source.parent / name
    convert(str(source), output, ConvertOptions(**options))
    return output


def _dense(source: Path) -> dict[str, np.ndarray]:
    model = DenseModel(open_source(str(source)))
    return {name: read_tensor(model, name) for name in model.tensors}


@pytest.mark.parametrize("rank", [1, 7, 20])
def test_factors_are_numpys_truncation(source: Path, rank: int) -> None:
    dense = _dense(source)
    with SctFile(_run(source, rank=rank, modules="all")) as file:
        assert file.index.layers
        for name, record in file.index.layers.items():
            W = dense[f"{name}.weight"].astype(np.float64)
            U, s, Vt = np.linalg.svd(W, full_matrices=False)
            expected = (U[:, :rank] * s[:rank]) @ Vt[:rank]
            factors = [file.tensor(f"{name}.{letter}").astype(np.float64) for letter in "UsV"]
            found = (factors[0] * factors[1]) @ factors[2].T
            assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
            assert record.error == pytest.approx(np.linalg.norm(W - found) / np.linalg.norm(W), rel=1e-6)
            assert record.energy == pytest.approx((s[:rank] ** 2).sum() / (s**2).sum(), rel=1e-5)
        factored = {f"{name}.weight" for name in file.index.layers}
        for name in set(dense) - factored:
            np.testing.assert_array_equal(file.tensor(name), dense[name], err_msg=name)
        assert not factored & set(file.index.tensors), "a factored weight must not be there"


def test_two_runs_give_the_same_bytes(source: Path) -> None:
    one, two = (_run(source, f"{name}.sct", rank=5, modules="all") for name in "ab")
    assert one.read_bytes() == two.read_bytes()


def test_what_travels_is_verbatim_and_provenance_is_complete(source: Path) -> None:
    with SctFile(_run(source, rank=5)) as file:
        for name in ("config.json", "generation_config.json", "LICENSE"):
            assert file.file(name) == (source / name).read_bytes()
        metadata = file.index.metadata
        shards = {entry["name"]: entry["sha256"] for entry in metadata["source"]["shards"]}
        assert shards == {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in source.glob("*.safetensors")
        }
        assert metadata["source"]["source"] == "tiny" and metadata["source"]["format"] == "safetensors"
        assert metadata["conversion"] == {"method": "svd", "rank": 5, "modules": "mlp", "seed": 0}
        assert metadata["generator"] == f"sctconv {sctconv.__version__}"
        assert str(source.parent) not in file.index.pack().decode(), "no path of this machine"


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("all", {"gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj"}),
        (r"layers\.0\..*(up|q)_proj", {"up_proj", "q_proj"}),
        ("lm_head", {"lm_head"}),
    ],
)
def test_selection(source: Path, modules: str, expected: set[str]) -> None:
    with SctFile(_run(source, rank=4, modules=modules)) as file:
        assert {name.rpartition(".")[2] for name in file.index.layers} == expected
        if "layers" in modules:
            assert all(name.startswith("model.layers.0.") for name in file.index.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_mlp_and_attention_are_told_apart_by_structure(family: str, tmp_path: Path) -> None:
    model = DenseModel(open_source(str(save(tiny_model(family), tmp_path / "m"))))
    mlp, attention, both = (
        set(make_plan(model, ConvertOptions(rank=2, modules=modules)).layers) for modules in ("mlp", "attention", "all")
    )
    assert mlp and attention and not mlp & attention and mlp | attention == both
    assert all("attn" in name or "attention" in name for name in attention)
    assert not any("lm_head" in name or "embed_out" in name for name in both)


def test_ratio_keeps_at_most_that_share(source: Path) -> None:
    for ratio in (0.1, 0.5, 0.9):
        plan = make_plan(DenseModel(open_source(str(source))), ConvertOptions(ratio=ratio, modules="all"))
        for layer in plan.layers.values():
            assert layer.rank is not None
            assert layer.parameters <= max(ratio * layer.out * layer.in_, layer.out + layer.in_ + 1)
            assert (layer.rank + 1) * (layer.out + layer.in_ + 1) > ratio * layer.out * layer.in_


def test_energy_keeps_at_least_that_share_with_the_least_rank(source: Path) -> None:
    dense = _dense(source)
    with SctFile(_run(source, energy=0.6)) as file:
        assert file.index.layers
        for name, record in file.index.layers.items():
            s = np.linalg.svd(dense[f"{name}.weight"].astype(np.float64), compute_uv=False)
            share = (s**2).cumsum() / (s**2).sum()
            assert share[record.rank - 1] >= 0.6 - 1e-9 and (record.rank == 1 or share[record.rank - 2] < 0.6)


def test_ranks_of_another_conversion_or_of_a_plan_are_taken(source: Path, tmp_path: Path) -> None:
    first = _run(source, energy=0.5, modules="all")
    ranks = read_ranks(first)
    assert len(set(ranks.values())) > 1
    second = _run(source, "again.sct", ranks=ranks, modules="all")
    assert read_ranks(second) == ranks
    printed = CliRunner().invoke(main, ["convert", str(source), "--data-free", "--rank", "5", "--dry-run", "--json"])
    (tmp_path / "plan.json").write_text(printed.stdout)
    args = [
        "convert",
        str(source),
        "--data-free",
        "--ranks",
        str(tmp_path / "plan.json"),
        "-o",
        str(tmp_path / "p.sct"),
    ]
    assert CliRunner().invoke(main, args).exit_code == 0
    assert set(read_ranks(tmp_path / "p.sct").values()) == {5}
    some = dict(list(ranks.items())[:2])
    with SctFile(_run(source, "some.sct", ranks=some, modules="all")) as file:
        assert set(file.index.layers) == set(some)
        assert {item["reason"] for item in file.index.metadata["dense_layers"]} == {"--ranks gives it none"}


@pytest.mark.parametrize(
    "content", ["", "[]", '{"layers": 3}', '{"layers": [{"name": "a", "rank": "b"}]}', '{"layers": []}']
)
def test_a_file_without_ranks_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(OptionError, match=r"r.json: neither a .sct file nor what"):
        read_ranks(tmp_path / "r.json")


def test_what_would_not_shrink_stays_dense_and_is_listed(source: Path) -> None:
    output = source.parent / "out.sct"
    report = convert(str(source), output, ConvertOptions(rank=18, modules="all"))
    reasons = {layer.name.rpartition(".")[2]: layer.reason for layer in report.dense}
    assert reasons["q_proj"] == "rank 18 would not shrink it (up to 15 would)"
    assert reasons["k_proj"] == "rank 18 is beyond min(16, 32)"
    assert {record.name.rpartition(".")[2] for record in report.layers} == {"gate_proj", "up_proj", "down_proj"}
    with SctFile(output) as file:
        assert {item["name"] for item in file.index.metadata["dense_layers"]} == {layer.name for layer in report.dense}
        assert "model.layers.0.self_attn.q_proj.weight" in file.index.tensors


def test_energy_that_needs_nearly_everything_leaves_layers_dense(source: Path) -> None:
    output = source.parent / "out.sct"
    report = convert(str(source), output, ConvertOptions(energy=0.9999))
    assert not report.layers and len(report.dense) == 6
    torch.testing.assert_close(logits(sctconv.load(output).model), logits(tiny_model("llama")))


def test_a_tied_head_is_never_factored(tmp_path: Path) -> None:
    source = save(tiny_model("qwen2"), tmp_path / "m")
    with pytest.raises(OptionError, match="tied to"):
        _run(source, rank=4, modules="lm_head")
    report = convert(str(source), tmp_path / "o.sct", ConvertOptions(rank=4, modules="lm_head|mlp"))
    assert [layer.name for layer in report.dense if layer.name == "lm_head"] == [] or "tied" in str(
        report.dense[0].reason
    )


@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")])
def test_dtype_is_that_of_every_floating_tensor_but_s(source: Path, dtype: str, name: str) -> None:
    path = _run(source, rank=6, dtype=dtype)
    with SctFile(path) as file:
        kinds = {entry.name.rpartition(".")[2] == "s": entry.dtype for entry in file.index.tensors.values()}
        assert kinds == {True: "F32", False: name}
        assert {record.dtype for record in file.index.layers.values()} == {name}
    verify(path)
    full, narrow = (logits(sctconv.load(p, dtype=torch.float32).model) for p in (_run(source, "f.sct", rank=6), path))
    assert (full - narrow).abs().max() < 0.03 * full.abs().max()


def test_the_error_in_the_report_is_that_of_what_is_stored(source: Path) -> None:
    dense = _dense(source)
    with SctFile(_run(source, rank=20, dtype="bfloat16")) as file:
        for name, record in file.index.layers.items():
            U, s, V = (file.tensor(f"{name}.{letter}").astype(np.float64) for letter in "UsV")
            W = dense[f"{name}.weight"].astype(np.float64)
            assert record.error == pytest.approx(np.linalg.norm(W - (U * s) @ V.T) / np.linalg.norm(W), rel=1e-9)


def test_progress_is_monotone_and_ends_at_the_whole(source: Path) -> None:
    seen: list[tuple[float, float, str]] = []
    options = ConvertOptions(rank=4)
    convert(str(source), source.parent / "o.sct", options, progress=lambda *words: seen.append(words))
    sums = [place for place, (_, _, what) in enumerate(seen) if what.startswith("checksum of ")]
    assert sums == list(range(len(list(source.glob("*.safetensors"))))), "first, shard by shard"
    for part in (seen[: len(sums)], seen[len(sums) :]):
        done = [item[0] for item in part]
        assert done == sorted(done) and len({total for _, total, _ in part}) == 1
    assert done[-1] == pytest.approx(seen[-1][1])


def _poison(source: Path, name: str, value: float) -> None:
    from safetensors.torch import load_file, save_file

    for shard in source.glob("*.safetensors"):
        state = load_file(shard)
        if name in state:
            state[name].view(-1)[3] = value
            save_file(state, shard, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_not_finite_weights_are_refused_by_name_and_leave_nothing(source: Path, name: str, value: float) -> None:
    _poison(source, name, value)
    before = sorted(path.name for path in source.parent.iterdir())
    with pytest.raises(NonFiniteError, match=name.replace(".", r"\.")):
        _run(source, rank=4)
    assert sorted(path.name for path in source.parent.iterdir()) == before


def test_too_large_for_float16_is_refused(source: Path) -> None:
    _poison(source, "model.embed_tokens.weight", 1e6)
    with pytest.raises(NonFiniteError, match=r"entries up to 1e\+06, too large for F16; use bfloat16"):
        _run(source, rank=4, dtype="float16")


def test_an_existing_output_is_kept(source: Path) -> None:
    output = source.parent / "out.sct"
    output.write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        _run(source, rank=4)
    assert output.read_text() == "precious"
    convert(str(source), output, ConvertOptions(rank=4), overwrite=True)
    verify(output)


def test_too_little_space_is_said_before_any_work(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OutputError, match=r"needs \d+ bytes, but only 0 are free"):
        _run(source, rank=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of --rank, --energy, --ratio, --target-size and --ranks; found none"),
        ({"rank": 4, "energy": 0.5}, "found --rank and --energy"),
        ({"rank": 0}, "--rank 0"),
        ({"energy": 1.0}, "--energy 1"),
        ({"ratio": -0.5}, "--ratio -0.5"),
        ({"rank": 4, "modules": "("}, "not a regular expression"),
        ({"rank": 4, "modules": "nothing_like_it"}, "matches none of the 15 linear layers"),
        ({"rank": 33}, "beyond min"),
        ({"rank": 30}, "would shrink none of the 6 selected layers; the largest rank that does is 21"),
        ({"ranks": {"lm_head": 4}}, "--ranks: lm_head is not among the 6 layers of --modules mlp"),
        ({"ranks": {"model.layers.0.mlp.up_proj": 30}}, "up_proj cannot have rank 30: rank 30 would not shrink it"),
        ({"ranks": {}, "rank": 4}, "found --rank and --ranks"),
        ({"rank": 4, "dtype": "int3"}, "--dtype int3"),
        ({"rank": 4, "device": "warp:9"}, "--device warp:9: not usable here"),
    ],
)
def test_options_that_do_not_fit_are_one_line(source: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        _run(source, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (source.parent / "out.sct").exists()
