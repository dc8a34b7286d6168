"""Checkpoints on the Hub that cannot be had: one line each."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants, file_download

from sctconv.formats.checkpoint import read_tensor
from sctconv.formats.errors import CorruptShardError, UnsupportedCheckpointError
from sctconv.sources.hub import open_hub
from sctconv.sources.hub_errors import HubError, HubUnreachableError
from sctconv.sources.local import SAFETENSORS_INDEX, open_local

from .checks import REPO, assert_same, cached, refused, shards
from .server import Answer, FakeHub


def test_a_server_in_trouble_after_the_start(server: FakeHub) -> None:
    server.refuse = lambda method, path: (500, {}) if method == "HEAD" and path.endswith(".safetensors") else None
    refused(HubUnreachableError, "answers 500 for model-0", "try again later")


def _gated(method: str, path: str) -> Answer | None:
    return (403, {"X-Error-Code": "GatedRepo"}) if "/resolve/" in path else None


def test_gated(server: FakeHub) -> None:
    server.refuse = _gated
    refused(HubError, f"{server.url}/{REPO}", "licence", "hf auth login", "HF_TOKEN")


@pytest.mark.parametrize("status", [401, 404])
def test_missing_repository(status: int, server: FakeHub) -> None:
    server.refuse = lambda method, path: (status, {"X-Error-Code": "RepoNotFound"})
    refused(HubError, "no such model", "private", "hf auth login", repo="org/nothing")


def test_refused_token(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_stale")
    server.refuse = lambda method, path: (401, {"X-Error-Message": "Invalid credentials in Authorization header"})
    refused(HubError, "401", "Invalid credentials", "HF_TOKEN")
    assert server.seen[-1].authorization == "Bearer hf_stale"


def test_missing_revision(server: FakeHub) -> None:
    refused(HubError, "no revision 'v9'", f"{server.url}/{REPO}/tree/main", revision="v9")


def test_a_name_that_the_hub_forbids(server: FakeHub) -> None:
    refused(HubError, "org/name", repo="org/two--dashes")
    assert not server.seen


def test_missing_shard(server: FakeHub, files: dict[str, bytes]) -> None:
    missing = shards(files)[2]
    del files[missing]
    refused(HubError, "1 of the", missing, "another revision")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_in_trouble(status: int, server: FakeHub) -> None:
    server.refuse = lambda method, path: (status, {})
    refused(HubUnreachableError, str(status), "try again later")


def test_a_server_that_does_not_answer(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    server.stall = threading.Event()
    refused(HubUnreachableError, "ReadTimeout", "check the network")


def test_a_server_that_is_not_the_hub(server: FakeHub) -> None:
    server.refuse = lambda method, path: (200, {"Content-Type": "text/html"})
    refused(HubUnreachableError, "HF_ENDPOINT")


def test_nothing_listens(nothing_listens: None) -> None:
    refused(HubUnreachableError, "ConnectError", "not in the cache", "check the network", "HF_ENDPOINT")


def test_offline_and_nothing_cached(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(HubUnreachableError, "HF_HUB_OFFLINE", "not in the cache", "unset")
    assert not server.seen


def test_a_damaged_shard(server: FakeHub, files: dict[str, bytes], directory: Path) -> None:
    file = shards(files)[0]
    server.damaged = {file: files[file][:-1] + bytes([files[file][-1] ^ 1])}
    text = refused(CorruptShardError, file, "sha256", "run the command again")
    server.damaged = {}
    refused(CorruptShardError, file)  # it is in the cache now
    Path(text.partition("delete ")[2].partition(" and run")[0]).unlink()
    assert_same(open_hub(REPO, None), open_local(directory, "local"))


@pytest.mark.filterwarnings("ignore:Not enough free disk space")  # huggingface_hub warns and goes on
def test_no_room_for_a_shard(server: FakeHub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    refused(HubError, shards(files)[0], "10 left", "HF_HOME", "--low-disk")
    assert not cached(files)


def test_the_disk_fills_up(server: FakeHub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = open_hub(REPO, None)
    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(HubError, match=rf"{REPO}: no space left in .* HF_HOME .* --low-disk"):
        read_tensor(source, next(iter(source.tensors)))


def test_a_cache_that_cannot_be_written(server: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def read_only(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(file_download, "http_get", read_only)
    refused(HubError, "config.json", "Read-only", "HF_HOME")


def test_quantised_is_refused_before_anything_large(server: FakeHub, files: dict[str, bytes]) -> None:
    files["config.json"] = json.dumps({"quantization_config": {"quant_method": "gptq"}}).encode()
    refused(UnsupportedCheckpointError, "gptq", "unquantised")
    assert not any("/cdn/" in seen.path or "tokenizer" in seen.path for seen in server.seen)


def test_an_index_that_contradicts_the_shards(server: FakeHub, files: dict[str, bytes]) -> None:
    index = json.loads(files[SAFETENSORS_INDEX])
    index["weight_map"]["lm_head.weight"], other = shards(files)[0], index["weight_map"]["lm_head.weight"]
    index["weight_map"]["model.embed_tokens.weight"] = other
    files[SAFETENSORS_INDEX] = json.dumps(index).encode()
    refused(CorruptShardError, "lacks the tensor")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 1}', '{"weight_map": {"a": []}}'])
def test_an_index_that_is_none(text: str, server: FakeHub, files: dict[str, bytes]) -> None:
    files[SAFETENSORS_INDEX] = text.encode()
    refused(CorruptShardError, "not a checkpoint index")


@pytest.mark.parametrize("data", [b"", b"\xff" * 100, (20).to_bytes(8, "little") + b"not JSON" * 3])
def test_a_file_that_is_no_safetensors(data: bytes, server: FakeHub, files: dict[str, bytes]) -> None:
    server.repos["org/bad"] = {"config.json": files["config.json"], "model.safetensors": data}
    refused(CorruptShardError, "model.safetensors", "safetensors file", repo="org/bad")


def test_a_dtype_that_is_not_supported(server: FakeHub, files: dict[str, bytes]) -> None:
    header = json.dumps({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    data = len(header).to_bytes(8, "little") + header + b"0"
    server.repos["org/bad"] = {"config.json": files["config.json"], "model.safetensors": data}
    refused(UnsupportedCheckpointError, "F4", repo="org/bad")


def test_several_ggufs(server: FakeHub) -> None:
    server.repos["org/ggufs"] = {"a.Q8_0.gguf": b"8", "a.Q4_0.gguf": b"4"}
    refused(HubError, "a.Q4_0.gguf, a.Q8_0.gguf", "hf download org/ggufs a.Q4_0.gguf", repo="org/ggufs")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["README.md"], ["no checkpoint", "pytorch_model.bin"]),
        (["config.json", "a.safetensors", "b.safetensors"], ["a.safetensors, b.safetensors", "hf download"]),
        (["adapter_model.safetensors"], ["config.json"]),
        (["pytorch_model.bin"], ["config.json"]),
    ],
)
def test_no_whole_checkpoint(names: list[str], words: list[str], server: FakeHub) -> None:
    server.repos["org/part"] = dict.fromkeys(names, b"{}")
    refused(HubError, *words, repo="org/part")
