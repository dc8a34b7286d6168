"""Every kind of dense checkpoint gives the tensors that transformers would load from it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from sctconv.formats.checkpoint import read_tensor
from sctconv.formats.errors import CheckpointError, CorruptShardError, MissingFileError, UnsupportedCheckpointError
from sctconv.runtime.skeleton import ModelError
from sctconv.sources import open_source
from sctconv.sources.model import load_any
from sctconv.sources.weights import DenseModel
from tests.gguf_files import write_gguf
from tests.models import FAMILIES, logits, save, tiny_model


def _tensors(source: Path) -> dict[str, np.ndarray]:
    model = DenseModel(open_source(str(source)))
    return {name: read_tensor(model, name) for name in model.tensors}


def _same_as(model: Any, tensors: dict[str, np.ndarray]) -> None:
    state = model.state_dict()
    tied = set(model.all_tied_weights_keys)
    assert set(state) - tied <= set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, state[name].float().numpy(), err_msg=name)


@pytest.mark.parametrize("shard", ["20KB", "1GB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_safetensors(family: str, shard: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    _same_as(model, _tensors(save(model, tmp_path / "m", shard=shard)))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_torch_bin(sharded: bool, legacy: bool, tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    save(model, tmp_path / "m")
    for file in (tmp_path / "m").glob("*safetensors*"):
        file.unlink()
    items = list(model.state_dict().items())
    parts = [dict(items[:9]), dict(items[9:])] if sharded else [dict(items)]
    names = [f"pytorch_model-{place}.bin" for place in range(2)] if sharded else ["pytorch_model.bin"]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, tmp_path / "m" / name, _use_new_zipfile_serialization=not legacy)
    if sharded:
        weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (tmp_path / "m" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _same_as(model, _tensors(tmp_path / "m"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_come_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("qwen3").to(dtype)
    dense = DenseModel(open_source(str(save(model, tmp_path / "m"))))
    assert {info.dtype for info in dense.tensors.values()} == {"BF16" if dtype == torch.bfloat16 else "F16"}
    for name in dense.tensors:
        np.testing.assert_array_equal(read_tensor(dense, name, np.float32), model.state_dict()[name].float().numpy())


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_gguf_is_what_transformers_loads(family: str, kind: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    if family == "llama":  # GGUF has no biases for llama's mlp
        config = transformers.LlamaConfig(**{**model.config.to_dict(), "attention_bias": False, "mlp_bias": False})
        model = transformers.LlamaForCausalLM(config).eval()
    path = write_gguf(model, family, tmp_path / "m.gguf", gguf.GGMLQuantizationType[kind])
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).eval()
    loaded = load_any(str(path))
    _same_as(expected, _tensors(path))
    torch.testing.assert_close(logits(loaded.model), logits(expected), rtol=0, atol=0)
    if kind == "F32":
        torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-5, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert loaded.tokenizer("abcd Z").input_ids == tokenizer("abcd Z").input_ids
    assert loaded.tokenizer.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert loaded.model.generation_config.eos_token_id == [95, 93], "every id that ends a turn"


@pytest.mark.parametrize("kind", ["F16", "BF16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_a_narrow_gguf_is_a_model_of_one_dtype(family: str, kind: str, tmp_path: Path) -> None:
    """Its norms and biases stand there in F32 beside narrow matrices, as llama.cpp writes them."""
    model = tiny_model(family)
    if family == "llama":
        config = transformers.LlamaConfig(**{**model.config.to_dict(), "attention_bias": False, "mlp_bias": False})
        model = transformers.LlamaForCausalLM(config).eval()
    path = write_gguf(model, family, tmp_path / "m.gguf", gguf.GGMLQuantizationType[kind])
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).eval()
    dense = DenseModel(open_source(str(path)))
    assert {info.dtype for info in dense.tensors.values()} == {kind}
    for name, info in dense.tensors.items():
        if len(info.shape) > 1:
            np.testing.assert_array_equal(read_tensor(dense, name, np.float32), expected.state_dict()[name].numpy())
    found, wanted = logits(load_any(str(path)).model).float(), logits(expected)
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_names_that_transformers_changes_are_changed_alike(tmp_path: Path) -> None:
    """GPT-2's own checkpoint has no `transformer.` prefix, and buffers that the model no longer has."""
    from safetensors.torch import save_file

    model = tiny_model("gpt2")
    save(model, tmp_path / "m", shard="1GB")
    state = {name.removeprefix("transformer."): tensor.clone() for name, tensor in model.state_dict().items()}
    del state["lm_head.weight"]
    state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(state, tmp_path / "m" / "model.safetensors")
    dense = DenseModel(open_source(str(tmp_path / "m")))
    assert dense.unused == ["h.0.attn.masked_bias"]
    torch.testing.assert_close(logits(load_any(str(tmp_path / "m")).model), logits(model))


def test_experts_stored_one_by_one_are_stacked_as_transformers_stacks_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    source = save(model, tmp_path / "m", shard="30KB")
    stored = open_source(str(source)).tensors
    assert any("experts.3.w1" in name for name in stored), "the checkpoint must have them apart"
    _same_as(model, _tensors(source))
    torch.testing.assert_close(logits(load_any(str(source)).model), logits(model))


def _directory(tmp_path: Path, **files: Any) -> Path:
    directory = save(tiny_model("llama"), tmp_path / "m", shard="1GB")
    for name, content in files.items():
        path = directory / name.replace("__", ".")
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    return directory


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ("{", ModelError, "config.json"),
        ('{"model_type": "frobnicator"}', ModelError, "frobnicator"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}', CheckpointError, "gptq"),
    ],
)
def test_bad_configs(config: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    source = _directory(tmp_path)
    (source / "config.json").write_text(config)
    with pytest.raises((error, CorruptShardError), match=message) as caught:
        DenseModel(open_source(str(source)))
    assert "\n" not in str(caught.value)


def test_a_config_of_another_size_names_the_tensor(tmp_path: Path) -> None:
    source = _directory(tmp_path)
    config = (source / "config.json").read_text().replace('"intermediate_size": 64', '"intermediate_size": 65')
    (source / "config.json").write_text(config)
    with pytest.raises(UnsupportedCheckpointError, match=r"down_proj\.weight is \[32, 64\] .* makes it \[32, 65\]"):
        DenseModel(open_source(str(source)))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = _directory(tmp_path)
    state = load_file(source / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, source / "model.safetensors")
    with pytest.raises(MissingFileError, match=r"lacks 1 of the model's \d+ tensors, the first model\.norm\.weight"):
        DenseModel(open_source(str(source)))


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code ran",)


def test_code_in_a_bin_is_refused_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _directory(tmp_path)
    (source / "model.safetensors").unlink()
    torch.save({"weight": _Payload()}, source / "pytorch_model.bin")
    with pytest.raises(UnsupportedCheckpointError, match="not run"):
        open_source(str(source))
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(_Payload()))
    with pytest.raises(CheckpointError):
        open_source(str(source))
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_lfs_pointers_are_called_so(name: str, tmp_path: Path) -> None:
    source = _directory(tmp_path)
    if name == "pytorch_model.bin":
        (source / "model.safetensors").unlink()
    (source / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git-lfs pointer") as caught:
        open_source(str(source))
    assert name in str(caught.value)


def test_licences_and_tokenizer_travel(tmp_path: Path) -> None:
    files = {"LICENSE": "terms", "NOTICE.txt": "notice", "README.md": "no", "tokenizer.json": "{}", "other.json": "no"}
    source = _directory(tmp_path)
    for name, text in files.items():
        (source / name).write_text(text)
    taken = open_source(str(source)).files
    assert {"LICENSE", "NOTICE.txt", "tokenizer.json", "config.json", "generation_config.json"} == set(taken)
    assert taken["LICENSE"] == b"terms"


@pytest.mark.parametrize("text", ["no/such/path/here", "nothing here", "./x.gguf", "/"])
def test_what_is_not_there_is_one_line(text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_source(text)
    assert "\n" not in str(caught.value)


def test_two_ggufs_ask_for_one(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UnsupportedCheckpointError, match=r"2 GGUF files; name one, .*a\.gguf"):
        open_source(str(tmp_path))


def test_an_unknown_gguf_architecture_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedCheckpointError, match=r"'mamba' is not read \(only llama"):
        open_source(str(tmp_path / "m.gguf"))
