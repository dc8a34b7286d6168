"""Loading a .sct file: shared memory, ties, dtypes, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import sctconv
from sctconv import SctFile, SpectralLinear
from sctconv.convert import ConvertOptions, convert
from sctconv.formats.errors import ChecksumError
from sctconv.formats.writer import rewrite
from sctconv.runtime.skeleton import ModelError, build_skeleton, linear_layers, load_config
from tests.models import logits, save, tiny_model


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.sct"
    convert(str(save(tiny_model("qwen2"), tmp_path / "dense")), path, ConvertOptions(rank=6))
    return path


def test_parameters_are_views_of_the_mapping_and_writing_never_reaches_the_file(converted: Path) -> None:
    before = converted.read_bytes()
    model = sctconv.load(converted).model
    again = sctconv.load(converted).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    assert converted.read_bytes() == before
    name, factor = next((name, module) for name, module in again.named_modules() if isinstance(module, SpectralLinear))
    with SctFile(converted) as file:
        assert torch.equal(factor.U, torch.tensor(file.tensor(f"{name}.U")))


def test_one_training_step_works_on_the_mapping(converted: Path) -> None:
    model = sctconv.load(converted).model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.arange(20)[None] % 96
    first = model(input_ids=ids, labels=ids).loss
    first.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step()
    assert model(input_ids=ids, labels=ids).loss < first


def test_tied_weights_are_one_parameter(converted: Path) -> None:
    model = sctconv.load(converted).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_equal_but_untied_weights_are_two_parameters(tmp_path: Path) -> None:
    model = tiny_model("mistral")
    assert not model.config.tie_word_embeddings
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    path = tmp_path / "equal.sct"
    convert(str(save(model, tmp_path / "dense")), path, ConvertOptions(rank=6))
    with SctFile(path) as file:
        head, embedding = file.entry("lm_head.weight"), file.entry("model.embed_tokens.weight")
        assert head.offset == embedding.offset, "stored once, by value"
    loaded = sctconv.load(path).model
    with torch.no_grad():
        loaded.lm_head.weight.zero_()
    assert loaded.model.embed_tokens.weight.abs().max() > 0


def test_tied_by_flag_but_different_by_value_stays_apart(tmp_path: Path) -> None:
    model = tiny_model("mistral")
    source = save(model, tmp_path / "dense")
    config = source / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    path = tmp_path / "apart.sct"
    convert(str(source), path, ConvertOptions(rank=32), must_shrink=False)
    torch.testing.assert_close(logits(sctconv.load(path).model), logits(model), rtol=1e-4, atol=1e-4)


def test_dtype_casts_all_but_singular_values(converted: Path) -> None:
    model = sctconv.load(converted, dtype=torch.bfloat16).model
    dtypes = {name.rpartition(".")[2]: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes.pop("s") == torch.float32 and set(dtypes.values()) == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16
    full = logits(sctconv.load(converted).model)
    assert (logits(model).float() - full).abs().max() < 0.05 * full.abs().max()


def test_verify_on_load_finds_a_flipped_bit(converted: Path) -> None:
    with SctFile(converted) as file:
        offset = file.entry("model.norm.weight").offset
    data = bytearray(converted.read_bytes())
    data[offset] ^= 1
    converted.write_bytes(data)
    sctconv.load(converted)
    with pytest.raises(ChecksumError, match=r"model\.norm\.weight does not match its checksum"):
        sctconv.load(converted, verify=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"{}", "refuses its config.json"),
        (b"not json", "config.json cannot be read"),
        (b'{"model_type": "no_such_model"}', "no_such_model"),
        (b'{"model_type": "llama", "num_attention_heads": 0}', "num_attention_heads 0, which no model has"),
    ],
)
def test_a_config_that_makes_no_model_is_one_line(converted: Path, config: bytes, message: str) -> None:
    bad = converted.with_name("bad.sct")
    with SctFile(converted) as file:
        rewrite(file, bad, files={"config.json": config})
    with pytest.raises(ModelError, match=message) as caught:
        sctconv.load(bad)
    assert str(bad) in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_of_another_size_is_refused(converted: Path) -> None:
    bad = converted.with_name("bad.sct")
    with SctFile(converted) as file:
        config = file.file("config.json").replace(b'"vocab_size": 96', b'"vocab_size": 97')
        rewrite(file, bad, files={"config.json": config})
    with pytest.raises(ModelError, match=r"embed_tokens\.weight is \[96, 32\], but the model needs \[97, 32\]"):
        sctconv.load(bad)


def test_more_layers_than_tensors_is_refused(converted: Path) -> None:
    bad = converted.with_name("bad.sct")
    with SctFile(converted) as file:
        config = file.file("config.json").replace(b'"num_hidden_layers": 2', b'"num_hidden_layers": 3')
        config = config.replace(b'"full_attention",', b'"full_attention", "full_attention",', 1)
        rewrite(file, bad, files={"config.json": config})
    with pytest.raises(ModelError, match=r"lacks \d+ of the model's \d+ tensors, the first model\.layers\.2"):
        sctconv.load(bad)


def test_a_skeleton_takes_no_memory_for_parameters_and_real_buffers() -> None:
    config = tiny_model("llama").config
    model = build_skeleton(load_config({"config.json": config.to_json_string().encode()}, "tiny"), "tiny")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert nn.Module.register_parameter.__qualname__ == "Module.register_parameter", (
        "the patch must not outlive the build"
    )


def test_linear_layers_have_the_shapes_of_the_weights() -> None:
    for family in ("gpt2", "phi3"):
        model = tiny_model(family)
        for name, shape in linear_layers(model).items():
            weight = model.get_submodule(name).weight
            assert (shape.out, shape.in_) == tuple(weight.T.shape if shape.transposed else weight.shape)
