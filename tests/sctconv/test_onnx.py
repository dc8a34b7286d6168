"""Exported graphs: every family's numbers, nothing dense of what is factored, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from click.testing import CliRunner

import sctconv
from sctconv.cli import main
from sctconv.convert import ConvertOptions, convert
from sctconv.convert.scratch import initial_files, initialise
from sctconv.errors import OptionError
from sctconv.export import ExportOptions, export_onnx
from sctconv.export.decoder_spec import FAMILIES, read_spec
from sctconv.export.onnx_profiles import PROFILES
from sctconv.export.quantize import quantised
from sctconv.formats.errors import OutputError
from sctconv.runtime.onnx_model import OnnxDecoder, OnnxError
from sctconv.runtime.skeleton import linear_layers
from sctconv.sources.model import load_any
from tests import models
from tests.models import save, tiny_model, tiny_tokenizer

_SHAPE = models._SHAPE
MORE: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(
        **_SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
        rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    ),
    "qwen3": lambda: transformers.Qwen3Config(
        **_SHAPE, head_dim=16,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32},
    ),
    "mistral": lambda: transformers.MistralConfig(**_SHAPE, sliding_window=8),
    "gemma2": lambda: transformers.Gemma2Config(
        **_SHAPE, head_dim=8, sliding_window=8, query_pre_attn_scalar=16, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
    ),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**_SHAPE, head_dim=8, sliding_window=8),
    "granite": lambda: transformers.GraniteConfig(
        **_SHAPE, attention_multiplier=0.3, embedding_multiplier=2.0, residual_multiplier=0.5, logits_scaling=4.0
    ),
    "stablelm": lambda: transformers.StableLmConfig(**_SHAPE, use_qkv_bias=True, pad_token_id=0),
    "smollm3": lambda: transformers.SmolLM3Config(**_SHAPE, no_rope_layers=[1, 0], pad_token_id=0),
}  # fmt: skip
"""Families, or what is peculiar to them, that the other tests' configurations lack."""


def _model(family: str) -> Any:
    if family in MORE:
        models.CONFIGS[f"{family} for onnx"] = MORE[family]
        return tiny_model(f"{family} for onnx")
    return tiny_model(family)


def _converted(family: str, directory: Path, rank: int = 6) -> Path:
    source = save(_model(family), directory / f"{family}-{rank}")
    convert(str(source), directory / f"{family}-{rank}.sct", ConvertOptions(rank=rank, modules="all"))
    return directory / f"{family}-{rank}.sct"


@pytest.mark.parametrize("rank", [3, 11])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_computes_what_torch_does(family: str, rank: int, tmp_path: Path) -> None:
    model = _converted(family, tmp_path, rank)
    for profile in PROFILES:
        report = export_onnx(model, tmp_path / profile, ExportOptions(profile))
        assert report.comparison is not None and report.comparison.worst < 1e-4, (profile, report.comparison)
        assert ("padded" in report.comparison.differences) == (profile != "ort")
        assert report.layers > 0


@pytest.mark.parametrize("profile", sorted(PROFILES))
@pytest.mark.parametrize("family", ["gemma2", "gpt2", "qwen2"])
def test_half_precision_and_quantised_graphs_compute_what_their_weights_say(
    family: str, profile: str, tmp_path: Path
) -> None:
    model = _converted(family, tmp_path, 11)  # no multiple of a block
    half = export_onnx(model, tmp_path / "half", ExportOptions(profile, dtype="float16")).comparison
    assert half is not None and half.worst < 1e-2
    for kind in ("int8", "int4"):
        found = export_onnx(model, tmp_path / kind, ExportOptions(profile, quantize=kind)).comparison
        assert found is not None and found.worst < 1e-4, (kind, found)
        shapes = {
            tensor.data_type
            for tensor in onnx.load(tmp_path / kind / "model.onnx").graph.initializer
            if len(tensor.dims) == 2
        }
        codes = {onnx.TensorProto.UINT8} | ({onnx.TensorProto.UINT4} if kind == "int4" else set())
        assert codes <= shapes


@pytest.mark.parametrize("bits", [4, 8])
def test_a_block_is_rounded_to_its_own_scale(bits: int) -> None:
    sizes = np.array([[1e-6], [1.0], [1e6], [0.0], [3.0]])
    rows = (np.random.default_rng(0).standard_normal((5, 70)) * sizes).astype(np.float32)
    found = quantised(rows, bits)
    assert found.codes.shape == (5, 3, 32) and found.codes.max() == 2**bits - 1 and found.codes.min() == 0
    assert found.scales.shape == found.zeros.shape == (5, 3)
    assert (
        np.abs(found.values(70) - rows) <= np.repeat(found.scales, 32, 1)[:, :70]
    ).all()  # half, and as much by the zero
    assert (quantised(np.zeros((2, 40), np.float32), bits).values(40) == 0.0).all()
    levels = np.linspace(0, 2**bits - 1, 32).round().astype(np.float32)[None] * 0.25
    assert (quantised(levels, bits).values(32) == levels).all(), "what has no more values than codes stays"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_nothing_of_a_factored_layers_dense_shape_is_there(family: str, tmp_path: Path) -> None:
    model = _model(family)
    export_onnx(_converted(family, tmp_path), tmp_path / "onnx")
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    with sctconv.SctFile(tmp_path / f"{family}-6.sct") as file:
        factored, entries = set(file.index.layers), file.index.tensors
        expected = {tuple(entry.shape) for name, entry in entries.items() if name.endswith(".weight")}
        kept = sum(4 * int(np.prod(entry.shape)) for entry in entries.values())
    shapes = {tuple(tensor.dims) for tensor in graph.initializer if len(tensor.dims) == 2}
    for name, shape in linear_layers(model).items():
        dense = {(shape.out, shape.in_), (shape.in_, shape.out)}
        if name in factored and not dense & expected:  # a dense matrix may have the same shape by chance
            assert not dense & shapes, name
    written = sum(
        4 * int(np.prod(tensor.dims)) for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT
    )
    assert written <= kept * 1.01 + 1024


def test_factored_embeddings_are_exported_too(tmp_path: Path) -> None:
    for family in ("qwen2", "llama"):
        source = save(tiny_model(family), tmp_path / family)
        initialise(initial_files(str(source)), tmp_path / f"{family}.sct", rank=4, embeddings=True)
        report = export_onnx(tmp_path / f"{family}.sct", tmp_path / f"{family}-onnx")
        assert report.comparison is not None and report.comparison.worst < 1e-4


@pytest.mark.parametrize("family", ["BertConfig", "DistilBertConfig", "ModernBertConfig"])
def test_encoders_are_traced_and_stay_factored(family: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    more = (
        {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4} if "Distil" in family else {"intermediate_size": 64}
    )
    ids = {"cls_token_id": 1, "sep_token_id": 2} if "Modern" in family else {}
    torch.manual_seed(0)
    config = getattr(transformers, family)(**sizes, **more, **ids, max_position_embeddings=50)
    source = save(transformers.AutoModelForMaskedLM.from_config(config), tmp_path / "m")
    convert(str(source), tmp_path / "m.sct", ConvertOptions(rank=6, modules="all"))
    report = export_onnx(tmp_path / "m.sct", tmp_path / "onnx")
    assert report.comparison is not None and report.comparison.worst < 1e-5
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    assert [item.name for item in graph.input] == ["input_ids", "attention_mask"]
    assert [item.name for item in graph.output] == ["last_hidden_state"]
    assert not {(32, 64), (64, 32), (128, 32), (32, 128)} & {tuple(tensor.dims) for tensor in graph.initializer}
    with pytest.raises(OptionError, match=r"is an encoder, .* leave out --profile"):
        export_onnx(tmp_path / "m.sct", tmp_path / "other", ExportOptions("ort"))
    wrong = CliRunner().invoke(main, ["generate", str(tmp_path / "onnx"), "-p", "x"])
    assert wrong.exit_code == 1 and "no decoder with a KV cache" in wrong.stderr and len(wrong.stderr.splitlines()) == 1


def test_onnxruntime_genai_generates_what_we_do(tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai has no wheel for this platform")
    _with_tokenizer(tmp_path, "ort")
    loaded = load_any(str(tmp_path / "onnx"))
    prompt = loaded.tokenizer("It was").input_ids
    expected = loaded.model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0].tolist()
    model = genai.Model(str(tmp_path / "onnx"))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 24, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0).tolist() == expected and len(expected) == len(prompt) + 24


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_a_cache_that_grows_and_one_that_is_filled_in_pieces_agree(profile: str, tmp_path: Path) -> None:
    export_onnx(_converted("qwen3", tmp_path), tmp_path / "onnx", ExportOptions(profile))
    decoder = OnnxDecoder(tmp_path / "onnx")
    batch = 1 if profile == "ort" else 2  # all that GroupQueryAttention takes in pieces longer than a token
    ids = np.random.default_rng(0).integers(0, 96, (batch, 120), np.int64)
    whole = decoder.logits(ids)
    decoder.reset()
    monkey = pytest.MonkeyPatch()
    monkey.setattr("sctconv.runtime.onnx_model._ROOM", 4)
    pieces = [decoder.logits(part) for part in np.split(ids, [3, 4, 5, 40, 41, 100], 1)]
    monkey.undo()
    assert np.abs(np.concatenate(pieces, 1) - whole).max() < 1e-4 * np.abs(whole).max()


def test_names_are_those_that_all_agree_on(tmp_path: Path) -> None:
    export_onnx(_converted("llama", tmp_path), tmp_path / "onnx")
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    past = [f"past_key_values.{place}.{kind}" for place in range(2) for kind in ("key", "value")]
    assert [item.name for item in graph.input] == ["input_ids", "attention_mask", "position_ids", *past]
    assert [item.name for item in graph.output] == [
        "logits",
        *(name.replace("past_key_values", "present") for name in past),
    ]
    assert (tmp_path / "onnx" / "config.json").exists()


def test_a_family_without_a_graph_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"m: no ONNX graph is known for a opt; there is one for gemma2, gemma3_text, gpt2"
    ):
        read_spec(transformers.OPTConfig(), "m")


def test_a_graph_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _converted("llama", tmp_path)
    monkeypatch.setattr("sctconv.export.onnx_graph.Decoder.rotated", lambda self, x, rotary: x)
    with pytest.raises(OnnxError, match=r"the exported graph differs from the model by .* nothing was kept"):
        export_onnx(model, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists() and not list(tmp_path.glob(".onnx*"))


def test_what_stands_there_is_kept(tmp_path: Path) -> None:
    model = _converted("llama", tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="exists already"):
        export_onnx(model, tmp_path / "mine")
    with pytest.raises(OutputError, match="no exported model"):
        export_onnx(model, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    export_onnx(model, tmp_path / "onnx")
    export_onnx(model, tmp_path / "onnx", overwrite=True)


def test_the_command_line(tmp_path: Path) -> None:
    model = _converted("llama", tmp_path)
    result = CliRunner().invoke(main, ["export-onnx", str(model), "-o", str(tmp_path / "onnx"), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["layers"] == 14 and report["comparison"]["top1"] == 1.0
    again = CliRunner().invoke(main, ["export-onnx", str(model), "-o", str(tmp_path / "onnx")])
    assert again.exit_code == 1 and len(again.stderr.splitlines()) == 1 and "exists already" in again.stderr


def _with_tokenizer(directory: Path, profile: str = "portable") -> Path:
    source = save(tiny_model("llama", vocab_size=260), directory / "m")
    tiny_tokenizer(source)
    convert(str(source), directory / "m.sct", ConvertOptions(rank=6, modules="all"))
    export_onnx(directory / "m.sct", directory / "onnx", ExportOptions(profile))
    (directory / "text.txt").write_text("It was a dark and stormy night. " * 20)
    return directory


def test_the_directory_generates_and_evaluates_like_the_file(tmp_path: Path) -> None:
    _with_tokenizer(tmp_path)
    texts = []
    for model in ("m.sct", "onnx"):
        for more in (["--temperature", "0"], ["--temperature", "0.9", "--top-k", "40", "--seed", "3"]):
            args = ["generate", str(tmp_path / model), "-p", "It was", "--max-new-tokens", "24", *more]
            result = CliRunner().invoke(main, args)
            assert result.exit_code == 0, result.output
            texts.append(result.stdout)
    assert texts[0] == texts[2] and texts[1] == texts[3], "one sampling code for both"
    found = []
    for model in ("m.sct", "onnx"):
        args = ["evaluate", str(tmp_path / model), "--text", str(tmp_path / "text.txt"), "--context", "64", "--json"]
        result = CliRunner().invoke(main, args)
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.stdout)["perplexity"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    wrong = CliRunner().invoke(main, ["generate", str(tmp_path / "onnx"), "-p", "x", "--dtype", "bfloat16"])
    assert wrong.exit_code == 2 and "leave out --dtype" in wrong.stderr


def test_a_damaged_graph_is_one_line(tmp_path: Path) -> None:
    _with_tokenizer(tmp_path)
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"no graph")
    result = CliRunner().invoke(main, ["generate", str(tmp_path / "onnx"), "-p", "x"])
    assert result.exit_code == 1 and "cannot load it" in result.stderr and len(result.stderr.splitlines()) == 1
