"""Model directories that lie, wait or bring code: one line from the command line, nothing run, nothing written."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from sctconv.cli import main
from sctconv.convert import ConvertOptions, convert
from sctconv.formats.reader import SctFile
from sctconv.formats.writer import rewrite
from sctconv.sources import open_source
from sctconv.sources.weights import DenseModel
from tests.gguf_files import write_gguf
from tests.models import save, tiny_model, tiny_tokenizer

CODE = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModel": "evil.Evil",
    "AutoModelForCausalLM": "evil.Evil",
    "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
}


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a sound model with a tokenizer in `m`. Whoever asks a question fails."""

    def asked(*arguments: Any) -> str:
        raise AssertionError(f"asked: {arguments}")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.chdir(tmp_path)
    save(tiny_model("llama", vocab_size=260), tmp_path / "m", shard="1GB")
    tiny_tokenizer(tmp_path / "m")
    return tmp_path


def change(path: Path, **changes: Any) -> None:
    item = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**item, **changes}))


def bring_code(directory: Path) -> None:
    """Code that leaves a mark when it is imported."""
    mark = f"open({str(directory.absolute() / 'ran')!r}, 'w')\n"
    (directory / "evil.py").write_text(f"{mark}class EvilConfig: pass\nclass Evil: pass\nclass EvilTokenizer: pass\n")


def fails(room: Path, source: str, *words: str, command: tuple[str, ...] = ()) -> None:
    before = sorted(path.name for path in room.iterdir())
    result = CliRunner().invoke(main, list(command) or ["convert", source, "-o", "o.sct", "--rank", "4", "--data-free"])
    assert isinstance(result.exception, SystemExit) and result.exit_code == 1, repr(result.exception)
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1, result.output
    assert result.stderr.strip().isprintable() and all(word in result.stderr for word in words), result.stderr
    assert sorted(path.name for path in room.iterdir()) == before


def test_a_sound_directory_converts(room: Path) -> None:
    result = CliRunner().invoke(main, ["convert", "m", "-o", "o.sct", "--rank", "4", "--data-free", "--no-report"])
    assert result.exit_code == 0, result.output


# --- what is no file, or too large a one


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "m.gguf"])
@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_a_pipe_or_a_device_is_not_read(kind: str, name: str, room: Path) -> None:
    (room / "m" / "model.safetensors").unlink()
    path = room / "m" / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    fails(room, "m", name)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_small_file_that_is_none_is_not_there(name: str, room: Path) -> None:
    (room / "m" / name).unlink()
    os.mkfifo(room / "m" / name)
    assert name not in (open_source("m").files if name == "tokenizer.json" else {})
    if name == "config.json":
        fails(room, "m", "has no config.json")


@pytest.mark.parametrize("target", ["pipe", "/dev/zero", "loop", "x" * 5000])
def test_a_source_that_is_no_file(target: str, room: Path) -> None:
    if target == "pipe":
        os.mkfifo(room / target)
    if target == "loop":
        (room / target).symlink_to(target)
    fails(room, target, target[:20])


def test_a_configuration_larger_than_any_is_refused(room: Path) -> None:
    (room / "m" / "config.json").write_text(" " * (17 << 20) + "{}")
    fails(room, "m", "config.json has 17825794 bytes")


# --- sizes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers 1000000000", "35 tensors"]),
        ({"hidden_size": 10**9}, ["hidden_size 1000000000", "wider than 260"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads 4", "num_key_value_heads 3"]),
        ({"hidden_size": 64}, ["lm_head.weight is [260, 32]", "config.json makes it [260, 64]"]),
    ],
)
def test_sizes_are_named_with_the_checkpoints(changes: dict[str, Any], words: list[str], room: Path) -> None:
    change(room / "m" / "config.json", **changes)
    fails(room, "m", *words)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("llama.block_count", 1 << 31, ["num_hidden_layers 2147483648", "tensors"]),
        ("llama.embedding_length", 1 << 31, ["hidden_size 2147483648", "wider than 96"]),
        ("llama.attention.head_count_kv", 3, ["num_key_value_heads 3"]),
        ("llama.attention.head_count", 0, ["num_attention_heads 0"]),
        ("llama.attention.head_count", 32, ["attn_q.weight of shape [32, 32]", "as many heads"]),
    ],
)
def test_sizes_in_the_metadata_of_a_gguf_file(key: str, value: int, words: list[str], room: Path) -> None:
    path = _gguf(room)
    data = path.read_bytes()
    place = data.index(struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", 4)) + 8 + len(key) + 4
    path.write_bytes(data[:place] + struct.pack("<I", value) + data[place + 4 :])
    fails(room, str(path), *words)


def test_a_sct_file_whose_config_lies_is_not_loaded(room: Path) -> None:
    convert("m", "m.sct", ConvertOptions(rank=4))
    with SctFile("m.sct") as file:
        lie = json.loads(file.file("config.json")) | {"num_hidden_layers": 10**9}
        rewrite(file, "lie.sct", files={"config.json": json.dumps(lie).encode()})
    for command in (
        ("generate", "lie.sct", "-p", "x"),
        ("export-onnx", "lie.sct", "-o", "o"),
        ("train", "lie.sct", "--plan"),
    ):
        (room / "t.txt").write_text("x")
        data = ("--data", "t.txt") if command[0] == "train" else ()
        fails(room, "", "num_hidden_layers 1000000000", command=(*command, *data))


# --- code


def _gguf(room: Path) -> Path:
    import transformers

    model = tiny_model("llama")
    config = transformers.LlamaConfig(**{**model.config.to_dict(), "attention_bias": False, "mlp_bias": False})
    (room / "g").mkdir()
    return write_gguf(transformers.LlamaForCausalLM(config), "llama", room / "g" / "m.gguf")


def test_code_beside_a_model_that_transformers_knows_is_not_run(room: Path) -> None:
    bring_code(room / "m")
    change(room / "m" / "config.json", auto_map=CODE)
    change(room / "m" / "tokenizer_config.json", auto_map=CODE)
    convert("m", "m.sct", ConvertOptions(rank=4))
    for model in ("m", "m.sct"):
        result = CliRunner().invoke(main, ["generate", model, "-p", "x", "--max-new-tokens", "1"])
        assert result.exit_code == 0, result.output
    assert not (room / "m" / "ran").exists()
    with SctFile("m.sct") as file:
        assert "auto_map" in json.loads(file.file("config.json")), "it travels as it was"


def test_a_model_that_needs_its_code_is_refused(room: Path) -> None:
    bring_code(room / "m")
    change(room / "m" / "config.json", auto_map=CODE, model_type="evil")
    fails(room, "m", "needs code of its own ('evil.EvilConfig'), which is never run")
    fails(room, "", "needs code of its own", command=("init", "m", "--rank", "4", "-o", "n.sct"))
    assert not (room / "m" / "ran").exists()


def test_code_beside_a_gguf_file_is_not_run_nor_asked_about(room: Path) -> None:
    path = _gguf(room)
    bring_code(room / "g")
    change(room / "g" / "config.json", auto_map=CODE, model_type="evil")
    change(room / "g" / "tokenizer_config.json", auto_map=CODE, tokenizer_class="EvilTokenizer")
    assert DenseModel(open_source(str(path))).config.model_type == "llama"
    assert not (room / "g" / "ran").exists()


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def _pickled(path: Path, payload: Any) -> None:
    path.write_bytes(pickle.dumps({"w": payload}))


def _zipped(path: Path, payload: Any) -> None:
    torch.save({"w": payload}, path)


def _legacy(path: Path, payload: Any) -> None:
    torch.save({"w": payload}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [_pickled, _zipped, _legacy])
def test_code_in_a_torch_file_is_not_run(write: Callable[[Path, Any], None], room: Path) -> None:
    (room / "m" / "model.safetensors").unlink()
    write(room / "m" / "pytorch_model.bin", _Payload(room / "ran"))
    fails(room, "m", "pytorch_model.bin")
    assert not (room / "ran").exists()


def test_a_torch_file_that_says_more_than_it_holds(room: Path) -> None:
    (room / "m" / "model.safetensors").unlink()
    state = {name: tensor.clone() for name, tensor in tiny_model("llama", vocab_size=260).state_dict().items()}
    torch.save(state, room / "m" / "pytorch_model.bin")
    assert DenseModel(open_source("m")).tensors
    state["model.norm.weight"] = torch.zeros(1).expand(1 << 40)
    torch.save(state, room / "m" / "pytorch_model.bin")
    fails(room, "m", "tensor 'model.norm.weight' is [1099511627776], more than the", "bytes of the file")
