"""A stranger's .sct file: paths and addresses in it are text, which no command opens, fetches or runs; its template is
stopped; its metadata may be anything."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from sctconv.cli import main
from sctconv.formats.reader import SctFile
from sctconv.formats.writer import SctWriter, rewrite
from sctconv.runtime import chat_template
from tests.models import save, tiny_tokenizer
from tests.sctconv.opened_files import opened_in

linux = pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")

PROGRAM = """if True:
    import json, sys

    def hook(event, arguments):
        if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
            print("EVENT", event, arguments[-1], flush=True)
            raise OSError("no network in this test")
        if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
            command = " ".join(map(str, arguments[1])) if len(arguments) > 1 else str(arguments)
            if "chat_worker.py" not in command:
                print("EVENT", event, command, flush=True)

    sys.addaudithook(hook)
    from sctconv.cli import main

    for command in json.loads(sys.argv[1]):
        print("BEGIN", *command, flush=True)
        try:
            main(command)
        except SystemExit as end:
            print("\\nENDED", end.code, flush=True)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama as a .sct file."""
    import torch
    import transformers

    directory = tmp_path_factory.mktemp("source") / "tiny"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=128, eos_token_id=256, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    save(transformers.LlamaForCausalLM(config), directory)
    tiny_tokenizer(directory)
    path = directory.parent / "tiny.sct"
    result = CliRunner().invoke(main, ["convert", str(directory), "-o", str(path), "--rank", "6", "--data-free"])
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture
def bait(tmp_path: Path) -> Path:
    """A directory with what would be read or run if a path to it were followed."""
    directory = tmp_path / "bait"
    directory.mkdir()
    tiny_tokenizer(directory)
    for name in (
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "added_tokens.json",
        "config.json",
        "model.safetensors",
    ):
        (directory / name).write_text("{}")
    for name in ("evil.py", "configuration_evil.py", "modeling_evil.py", "tokenization_evil.py"):
        (directory / name).write_text(f"open({str(directory / 'ran')!r}, 'w')\nclass Evil: pass\n")
    return directory


def hostile(
    path: Path, target: Path, changes: dict[str, dict[str, Any]], metadata: dict[str, Any], names: tuple[str, ...] = ()
) -> Path:
    """A copy of a model with fields added to its embedded JSON files, metadata, and tensors of these names."""
    with SctFile(path) as file, SctWriter(target, metadata=metadata) as out:
        for entry in file.index.tensors.values():
            out.add_tensor(entry.name, file.tensor(entry.name))
        for place, name in enumerate(names):
            out.add_tensor(name, np.full(3, place, "<f4"))
        for record in file.index.layers.values():
            out.add_layer(record)
        for name in file.index.files:
            data = file.file(name)
            out.add_file(name, json.dumps(json.loads(data) | changes[name]).encode() if name in changes else data)
        out.commit()
    return target


def run(commands: list[list[str]], directory: Path) -> tuple[list[str], str]:
    """Runs commands in one process: their exit codes, and all that they print. None may end in a traceback."""
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        capture_output=True,
        text=True,
        env={**environment, "HF_HOME": str(directory / "hub"), "OMP_NUM_THREADS": "1"},
    )
    output = done.stdout + done.stderr
    codes = re.findall(r"^ENDED (\d+)$", done.stdout, re.MULTILINE)
    assert "Traceback" not in output and len(codes) == len(commands), output
    return codes, output


def fields(kind: str, bait: Path) -> dict[str, dict[str, Any]]:
    """Fields of the embedded files that name the bait, in one of the ways of naming it."""
    there = {
        "absolute": str(bait),
        "relative": os.path.relpath(bait),
        "address": "https://example.com/a/b",
    }[kind]
    code = {"AutoConfig": f"{there}--configuration_evil.Evil", "AutoModelForCausalLM": f"{there}/modeling_evil.Evil"}
    config = {
        "_name_or_path": there,
        "name_or_path": there,
        "auto_map": code,
        "tokenizer_file": f"{there}/tokenizer.json",
    }
    config |= {"transformers_weights": f"{there}/model.safetensors", "custom_generate": there, "base_model": there}
    names = {"vocab_file": "vocab.json", "merges_file": "merges.txt", "added_tokens_file": "added_tokens.json"}
    names |= {
        "tokenizer_file": "tokenizer.json",
        "special_tokens_map_file": "config.json",
        "spm_file": "tokenizer.model",
    }
    tokenizer: dict[str, Any] = {key: f"{there}/{name}" for key, name in names.items()}
    tokenizer |= {"name_or_path": there, "auto_map": {"AutoTokenizer": [f"{there}--tokenization_evil.Evil"] * 2}}
    tokenizer |= {
        "fast_tokenizer_files": [f"{there}/tokenizer.json"],
        "chat_template_file": f"{there}/chat_template.jinja",
    }
    generation = {"_from_model_config": True, "custom_generate": there, "assistant_model": there}
    return {"config.json": config, "tokenizer_config.json": tokenizer, "generation_config.json": generation}


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return str(path)


@linux
def test_no_command_follows_a_path_that_a_file_holds(model: Path, bait: Path, tmp_path: Path, text: str) -> None:
    paths = {}
    for kind in ("absolute", "relative", "address"):
        changes = fields(kind, bait)
        there = changes["config.json"]["_name_or_path"]
        metadata: dict[str, Any] = {"source": {"source": there}, "path": f"{there}/config.json"}
        names = (there, f"{there}/model.safetensors", f"file://{there}/config.json", f"{there}/modeling_evil.py")
        paths[kind] = str(hostile(model, tmp_path / f"{kind}.sct", changes, metadata, names))
    path = paths["absolute"]
    commands = [
        ["inspect", path, "--tensors"],
        ["inspect", path, "--json"],
        ["verify", path],
        ["report", path],
        ["evaluate", path, "--text", text, "--context", "32"],
        ["generate", path, "-p", "Hi", "--max-new-tokens", "3"],
        *(["generate", path, "--chat", "-p", "Hi", "--max-new-tokens", "3"] for path in paths.values()),
        ["train", path, "--data", text, "-o", f"{path}.trained", "--steps", "1", "--context", "16", "--batch", "2"],
        ["export-onnx", path, "-o", f"{path}.onnx"],
    ]
    with opened_in(bait) as opened:
        codes, output = run(commands, tmp_path)
    assert "EVENT" not in output and set(codes) == {"0"}, output
    assert opened == set() and not (bait / "ran").exists()


MAY_BE_REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("config.json", {"attn_implementation": "some-one/kernels", "_attn_implementation": "some-one/kernels"}),
    ("config.json", {"architectures": ["Evil"], "model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}),
    ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4, "dataset": "some-one/data"}}),
    ("tokenizer_config.json", {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}),
    ("tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "vocab_file": "BAIT/vocab.json"}),
    ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "vocab_file": "BAIT/tokenizer.model"}),
    ("tokenizer_config.json", {"gguf_file": "BAIT/tokenizer.model", "subfolder": "BAIT", "_commit_hash": "main"}),
    ("generation_config.json", {"cache_implementation": "BAIT", "assistant_model": "BAIT", "use_cache": "BAIT"}),
]


@linux
def test_what_may_be_refused_follows_nothing_either(model: Path, bait: Path, tmp_path: Path) -> None:
    commands = []
    for number, (file, changed) in enumerate(MAY_BE_REFUSED):
        changes = {file: json.loads(json.dumps(changed).replace("BAIT", str(bait)))}
        path = hostile(model, tmp_path / f"{number}.sct", changes, {})
        commands.append(["generate", str(path), "--chat", "-p", "Hi", "--max-new-tokens", "3"])
    with opened_in(bait) as names:
        _, output = run(commands, tmp_path)
    assert "EVENT" not in output, output
    assert names == set() and not (bait / "ran").exists()


@linux
def test_the_watch_sees_who_opens_what(bait: Path) -> None:
    from tokenizers import Tokenizer

    with opened_in(bait) as names:
        Tokenizer.from_file(str(bait / "tokenizer.json"))
    assert names == {"tokenizer.json"}


TEMPLATES = {
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ 'a' * 10**9 }}": "takes over 512 MiB of memory",
    "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}": "takes over 2 s",
    "{% for message in messages %}{{ message.content }}{% endfor %}": None,
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_hostile_template_ends_generate_and_train_in_one_line(
    model: Path, tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 2)
    path, chats = tmp_path / "hostile.sct", tmp_path / "chats.jsonl"
    with SctFile(model) as file:
        rewrite(file, path, files={"chat_template.jinja": template.encode()})
    record = {"messages": [{"role": "user", "content": "Hi " * 40}, {"role": "assistant", "content": "Ho " * 20}]}
    chats.write_text(f"{json.dumps(record)}\n" * 40)
    quick = ["--steps", "1", "--context", "16", "--batch", "2"]
    for command in (
        ["generate", path, "--chat", "-p", "Hi", "--max-new-tokens", "2"],
        ["train", path, "--data", chats, "-o", tmp_path / "trained.sct", *quick],
    ):
        result = CliRunner().invoke(main, [str(word) for word in command])
        refused = TEMPLATES[template]
        assert result.exit_code == (1 if refused else 0), result.output
        assert (tmp_path / "trained.sct").exists() == (command[0] == "train" and refused is None)
        if refused:
            assert isinstance(result.exception, SystemExit)
            (line,) = (line for line in result.stderr.splitlines() if line.startswith("sctconv: "))
            assert refused in line and "the chat template" in line


ANYTHING: list[Any] = [
    None,
    True,
    1,
    -1e308,
    "x",
    "\x1b]0;a\x07\u202e",
    [],
    [1],
    [[]],
    [{}],
    {},
    {"x": 1},
    {"source": {}},
]
ANYTHING += [[{"name": 1}], [{"name": "a\nb", "out": "x", "in": None, "reason": {}}]]
KEYS: list[tuple[str, ...]] = [
    ("source",),
    ("conversion",),
    ("generator",),
    ("dense_layers",),
    ("training",),
    ("parameters",),
]
KEYS += [("conversion", key) for key in ("method", "calibration", "held_out", "allocation", "refinement", "tuning")]


@pytest.mark.parametrize("key", KEYS)
def test_metadata_may_be_anything(model: Path, tmp_path: Path, key: tuple[str, ...]) -> None:
    path = tmp_path / "hostile.sct"
    for value in ANYTHING:
        metadata = {key[0]: {key[1]: value} if len(key) > 1 else value}
        with SctFile(model) as file:
            rewrite(file, path, metadata=metadata, overwrite=True)
        for command in (["inspect"], ["inspect", "--json"], ["report", "--overwrite"]):
            result = CliRunner().invoke(main, [command[0], str(path), *command[1:]], color=True)
            assert result.exit_code == 0, (value, result.exception)
            assert "\x1b" not in result.output


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("junk", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b"[]", b"1", b'{"a": NaN', b'"\\ud800"'])
def test_an_embedded_file_that_is_junk_is_one_line(model: Path, tmp_path: Path, name: str, junk: bytes) -> None:
    path = tmp_path / "hostile.sct"
    with SctFile(model) as file:
        rewrite(file, path, files={name: junk})
    result = CliRunner().invoke(main, ["generate", str(path), "-p", "Hi", "--max-new-tokens", "2"])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), (result.output, result.exception)
    assert len(result.stderr.strip().splitlines()) == 1 and result.stderr.startswith("sctconv: "), result.stderr
