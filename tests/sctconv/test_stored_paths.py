"""Paths and addresses that stand in a .sct file are text: no command opens, fetches or runs what they name."""

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

from sctconv.formats.reader import SctFile
from sctconv.formats.writer import SctWriter
from tests.formats.parts import Parts
from tests.models import tiny_tokenizer
from tests.sctconv.opened_files import opened_in

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")

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
        stdin=subprocess.DEVNULL,
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


def test_no_command_follows_a_path_that_a_file_holds(tiny_sct: Path, bait: Path, tmp_path: Path, text: str) -> None:
    paths = {}
    for kind in ("absolute", "relative", "address"):
        changes = fields(kind, bait)
        there = changes["config.json"]["_name_or_path"]
        metadata: dict[str, Any] = {"source": {"source": there}, "path": f"{there}/config.json"}
        names = (there, f"{there}/model.safetensors", f"file://{there}/config.json", f"{there}/modeling_evil.py")
        paths[kind] = str(hostile(tiny_sct, tmp_path / f"{kind}.sct", changes, metadata, names))
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


def test_what_may_be_refused_follows_nothing_either(tiny_sct: Path, bait: Path, tmp_path: Path) -> None:
    commands = []
    for number, (file, changed) in enumerate(MAY_BE_REFUSED):
        changes = {file: json.loads(json.dumps(changed).replace("BAIT", str(bait)))}
        path = hostile(tiny_sct, tmp_path / f"{number}.sct", changes, {})
        commands.append(["generate", str(path), "--chat", "-p", "Hi", "--max-new-tokens", "3"])
    parts, name = Parts(), str(bait / "model.safetensors")  # a layer called so
    for letter in ("U", "s", "V"):
        parts.at("tensors", f"l.{letter}")["name"] = f"{name}.{letter}"
    parts.at("layers", "l")["name"] = name
    (tmp_path / "layer.sct").write_bytes(parts.build())
    commands += [[command, str(tmp_path / "layer.sct")] for command in ("inspect", "verify", "report", "generate")]
    with opened_in(bait) as names:
        _, output = run(commands, tmp_path)
    assert "EVENT" not in output, output
    assert names == set() and not (bait / "ran").exists()


def test_the_watch_sees_who_opens_what(bait: Path) -> None:
    from tokenizers import Tokenizer

    with opened_in(bait) as names:
        Tokenizer.from_file(str(bait / "tokenizer.json"))
    assert names == {"tokenizer.json"}
