"""Checkpoints on the Hub: what is downloaded, when, and that it is what a directory would be."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants, hf_hub_download
from safetensors.numpy import save as safetensors_bytes

from sctconv.formats.checkpoint import read_tensor
from sctconv.formats.errors import UnsupportedCheckpointError
from sctconv.sources import Source, hub, open_source
from sctconv.sources.hub import open_hub
from sctconv.sources.hub_errors import HubUnreachableError
from sctconv.sources.local import BIN_INDEX, open_local
from sctconv.sources.weights import DenseModel
from tests.models import tiny_model

from .checks import REPO, assert_same, cached, point_at, refused, shards
from .server import SHA, FakeHub


def test_sharded_safetensors_are_those_of_the_directory(server: FakeHub, directory: Path) -> None:
    source = open_source(REPO)
    assert source.label == REPO
    assert source.name == "tiny-llama"
    assert source.origin == {"source": REPO, "revision": SHA, "format": "safetensors"}
    assert set(source.files) == {"config.json", "generation_config.json", "LICENSE", "tokenizer.json"}
    assert_same(source, open_local(directory, "local"))


@pytest.mark.parametrize("revision", ["main", SHA])
def test_a_revision_is_resolved_to_its_commit(server: FakeHub, revision: str) -> None:
    source = open_source(f"{REPO}@{revision}")
    assert source.label == f"{REPO}@{revision}"
    assert source.origin["revision"] == SHA
    read_tensor(source, next(iter(source.tensors)))
    assert all(seen.path.startswith(f"/{REPO}/resolve/{SHA}/") for seen in server.seen if "/resolve/" in seen.path)


def test_opening_downloads_no_shard(server: FakeHub, files: dict[str, bytes]) -> None:
    source = open_hub(REPO, None)
    DenseModel(source)
    assert len(shards(files)) >= 4
    assert not cached(files)
    for file in shards(files):
        assert source.sha256(Path(file)) == hashlib.sha256(files[file]).hexdigest()
        assert [seen.range for seen in server.content_requests(file)] == ["bytes=0-100000"]


def test_opening_costs_headers_only(server: FakeHub, files: dict[str, bytes]) -> None:
    large = safetensors_bytes({"b": np.zeros((1000, 1000), np.float32), "a": np.ones(3, np.float16)})
    elsewhere = {"original/a.safetensors": b"", "onnx/model.onnx": b""}
    server.repos["org/single"] = {"config.json": files["config.json"], "weights.safetensors": large, **elsewhere}
    source = open_hub("org/single", None)
    assert [(info.dtype, info.shape) for info in source.tensors.values()] == [("F32", (1000, 1000)), ("F16", (3,))]
    assert sum(seen.sent for seen in server.content_requests("weights.safetensors")) <= 100_001
    np.testing.assert_array_equal(read_tensor(source, "a"), np.ones(3, np.float16))


def test_a_shard_is_downloaded_when_first_needed(server: FakeHub, files: dict[str, bytes]) -> None:
    source = open_hub(REPO, None)
    name, info = next(iter(source.tensors.items()))
    for _ in range(2):
        read_tensor(source, name)
        assert cached(files) == {info.shard.name}
    source.release(info.shard)
    assert cached(files) == {info.shard.name}
    assert [seen.range for seen in server.content_requests(info.shard.name)] == ["bytes=0-100000", None]


def test_low_disk_keeps_one_shard_and_what_was_there(server: FakeHub, files: dict[str, bytes], directory: Path) -> None:
    kept = shards(files)[1]
    hf_hub_download(REPO, kept, revision=SHA)
    source = open_hub(REPO, None, low_disk=True)
    model, local = DenseModel(source), DenseModel(open_local(directory, "local"))
    used = set()
    for name in model.tensors:
        np.testing.assert_array_equal(read_tensor(model, name), read_tensor(local, name))
        used |= cached(files) - {kept}
        assert len(cached(files) - {kept}) <= 1
        for shard in model.shards_done_after(name):
            source.release(shard)
    assert used == set(shards(files)) - {kept}
    assert cached(files) == {kept}
    assert all(path.exists() for path in Path(constants.HF_HUB_CACHE).rglob("*")), "a dangling link is left"


def test_low_disk_removes_what_a_blob_links_to(server: FakeHub) -> None:
    source = open_hub(REPO, None, low_disk=True)
    name, info = next(iter(source.tensors.items()))
    before = read_tensor(source, name)
    cache = Path(constants.HF_HUB_CACHE)
    (blob,) = (path.resolve() for path in cache.rglob(info.shard.name))
    shared = cache / "blobs" / "ab"  # as huggingface_hub does with files from Xet
    shared.parent.mkdir()
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    np.testing.assert_array_equal(read_tensor(source, name), before)
    source.release(info.shard)
    assert not shared.exists() and not blob.is_symlink()
    np.testing.assert_array_equal(read_tensor(source, name), before)


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_cut_download_is_completed(reset: bool, server: FakeHub, files: dict[str, bytes], directory: Path) -> None:
    file = max(shards(files), key=lambda name: len(files[name]))
    cut = len(files[file]) // 2
    server.reset, server.cut = reset, {file: cut}
    assert_same(open_hub(REPO, None), open_local(directory, "local"))
    assert not server.cut
    _, first, second = server.content_requests(file)
    assert first.range is None and first.sent == cut
    if reset:  # huggingface_hub begins again after this one
        assert second.range is None
    else:
        assert second.range == f"bytes={cut // 1024 * 1024}-"


def test_a_download_that_never_succeeds(server: FakeHub, files: dict[str, bytes]) -> None:
    server.refuse = lambda method, path: (503, {}) if "/cdn/" in path and server.seen[-1].range is None else None
    refused(HubUnreachableError, "503", "try again later")
    assert len(server.content_requests(shards(files)[0])) == 1 + hub.ATTEMPTS
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


def _open_and_read(**kwargs: Any) -> Source:
    source = open_hub(REPO, None, **kwargs)
    for name in source.tensors:
        read_tensor(source, name)
    return source


@pytest.mark.parametrize("how", ["offline", "nothing listens", "500"])
def test_without_a_connection_the_cache_will_do(
    how: str, server: FakeHub, directory: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    online = _open_and_read()
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "500":
        server.refuse = lambda method, path: (500, {})
    else:
        point_at("http://127.0.0.1:1", monkeypatch)
    later = open_hub(REPO, None, low_disk=True)
    assert (later.origin, later.name, later.files) == (online.origin, online.name, online.files)
    assert_same(later, open_local(directory, "local"))
    for info in later.tensors.values():
        later.release(info.shard)
    assert cached(files) == set(shards(files))


def test_a_part_in_the_cache_will_not_do(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    open_hub(REPO, None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(HubUnreachableError, "HF_HUB_OFFLINE", "unset", "shards are missing")


def _torch_repository(directory: Path, sharded: bool) -> dict[str, bytes]:
    state = tiny_model("llama").state_dict()
    names = sorted(state)
    parts = [names[::2], names[1::2]] if sharded else [names]
    index: dict[str, str] = {}
    for number, part in enumerate(parts):
        file = f"pytorch_model-{number}.bin" if sharded else "pytorch_model.bin"
        torch.save({name: state[name] for name in part}, directory / file)
        index |= dict.fromkeys(part, file)
    if sharded:
        (directory / BIN_INDEX).write_text(json.dumps({"weight_map": index}))
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_torch_bin(sharded: bool, server: FakeHub, files: dict[str, bytes], tmp_path: Path) -> None:
    local = tmp_path / "torch"
    local.mkdir()
    for name in ("config.json", "generation_config.json", "LICENSE"):
        (local / name).write_bytes(files[name])
    server.repos["org/old"] = _torch_repository(local, sharded)
    source = open_hub("org/old", "main")
    assert (source.label, source.name) == ("org/old@main", "old")
    assert source.origin == {"source": "org/old", "revision": SHA, "format": "torch"}
    assert_same(source, open_local(local, "local"))
    refused(UnsupportedCheckpointError, "--low-disk", "safetensors", repo="org/old", low_disk=True)


def test_one_gguf(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos["org/ggufs"] = {"a.Q8_0.gguf": b"GGUF....", "README.md": b""}
    opened = []

    def open_gguf(path: Path, label: str) -> Source:
        opened.append(path)
        origin = {"source": path.name, "format": "gguf", "general.name": "A"}
        return Source(label, path.stem, {}, SimpleNamespace(tensors={}), origin)

    monkeypatch.setattr(hub, "open_local", open_gguf)
    source = open_hub("org/ggufs", None)
    assert source.name == "ggufs"
    assert source.origin == {"source": "org/ggufs", "revision": SHA, "format": "gguf", "general.name": "A"}
    assert opened[0].name == "a.Q8_0.gguf" and opened[0].read_bytes() == b"GGUF...."
    refused(UnsupportedCheckpointError, "--low-disk", repo="org/ggufs", low_disk=True)


def test_the_environment_is_respected(server: FakeHub, tmp_path: Path) -> None:
    code = f"from sctconv.sources import open_source; print(len(open_source({REPO!r}).tensors))"
    settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_mine"}
    environment = {**os.environ, **settings, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    root = Path(__file__).parent.parent.parent
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert result.stdout.strip() == str(len(open_hub(REPO, None).tensors)), result.stderr
    assert (tmp_path / "home" / "hub" / "models--org--tiny-llama").is_dir()
    assert any(seen.authorization == "Bearer hf_mine" for seen in server.seen)
    assert not any(seen.authorization for seen in server.seen if "/cdn/" in seen.path), "the token left the Hub"
