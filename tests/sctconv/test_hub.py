"""Checkpoints on the Hub, against a Hub on this machine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import close_session, constants, file_download, hf_hub_download
from safetensors.numpy import save as safetensors_bytes

from sctconv.formats.checkpoint import read_tensor
from sctconv.formats.errors import CheckpointError, CorruptShardError, UnsupportedCheckpointError
from sctconv.sources import Source, hub, open_source
from sctconv.sources.hub import open_hub
from sctconv.sources.hub_errors import HubError, HubUnreachableError
from sctconv.sources.local import BIN_INDEX, SAFETENSORS_INDEX, open_local
from sctconv.sources.weights import DenseModel
from tests.models import save, tiny_model

from .hub_server import SHA, Answer, FakeHub, serve

REPO = "org/tiny-llama"
SMALL = {"LICENSE": "free", "tokenizer.json": "{}", "README.md": "not taken"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model("llama"), tmp_path_factory.mktemp("checkpoint") / "tiny-llama", files=SMALL)


@pytest.fixture
def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())} | {"original/x.safetensors": b"no"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, bytes]) -> Iterator[FakeHub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits before it tries again
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # of a cut download, whole chunks are kept
    close_session()
    with serve(FakeHub({REPO: files})) as fake:
        _point_at(fake.url, monkeypatch)
        yield fake
    close_session()


def _point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def nothing_listens(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        _point_at(f"http://127.0.0.1:{bound.getsockname()[1]}", monkeypatch)
        yield


def _shards(files: dict[str, bytes]) -> list[str]:
    return [name for name in files if name.endswith(".safetensors") and "/" not in name]


def _cached(files: dict[str, bytes], suffix: str = ".safetensors") -> set[str]:
    """The shards of which the cache holds the content."""
    blobs = {path.name for path in Path(constants.HF_HUB_CACHE).glob("models--*/blobs/*")}
    return {name for name, data in files.items() if name.endswith(suffix) and hashlib.sha256(data).hexdigest() in blobs}


def _assert_same(source: Source, local: Source) -> None:
    ours, theirs = DenseModel(source), DenseModel(local)
    assert list(ours.tensors) == list(theirs.tensors)
    for name, info in theirs.tensors.items():
        assert (ours.tensors[name].dtype, ours.tensors[name].shape) == (info.dtype, info.shape)
        assert ours.tensors[name].shard.name == info.shard.name
        assert source.sha256(ours.tensors[name].shard) == local.sha256(info.shard)
        np.testing.assert_array_equal(read_tensor(ours, name), read_tensor(theirs, name))
    assert source.files == local.files


def _refused(error: type[CheckpointError], *words: str, repo: str = REPO, **kwargs: Any) -> str:
    """Asserts that a repository is refused with one line that has its name and these words."""
    with pytest.raises(error) as caught:
        source = open_hub(repo, kwargs.pop("revision", None), **kwargs)
        for name in source.tensors:
            read_tensor(source, name)
    text = str(caught.value)
    assert "\n" not in text
    for word in (repo, *words):
        assert word in text
    return text


def test_sharded_safetensors_are_those_of_the_directory(server: FakeHub, directory: Path) -> None:
    source = open_source(REPO)
    assert source.label == REPO
    assert source.name == "tiny-llama"
    assert source.origin == {"source": REPO, "revision": SHA, "format": "safetensors"}
    assert set(source.files) == {"config.json", "generation_config.json", "LICENSE", "tokenizer.json"}
    _assert_same(source, open_local(directory, "local"))


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
    assert len(_shards(files)) >= 4
    assert not _cached(files)
    for file in _shards(files):
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
        assert _cached(files) == {info.shard.name}
    source.release(info.shard)
    assert _cached(files) == {info.shard.name}
    assert [seen.range for seen in server.content_requests(info.shard.name)] == ["bytes=0-100000", None]


def test_low_disk_keeps_one_shard_and_what_was_there(server: FakeHub, files: dict[str, bytes], directory: Path) -> None:
    kept = _shards(files)[1]
    hf_hub_download(REPO, kept, revision=SHA)
    source = open_hub(REPO, None, low_disk=True)
    model, local = DenseModel(source), DenseModel(open_local(directory, "local"))
    used = set()
    for name in model.tensors:
        np.testing.assert_array_equal(read_tensor(model, name), read_tensor(local, name))
        used |= _cached(files) - {kept}
        assert len(_cached(files) - {kept}) <= 1
        for shard in model.shards_done_after(name):
            source.release(shard)
    assert used == set(_shards(files)) - {kept}
    assert _cached(files) == {kept}
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
    file = max(_shards(files), key=lambda name: len(files[name]))
    cut = len(files[file]) // 2
    server.reset, server.cut = reset, {file: cut}
    _assert_same(open_hub(REPO, None), open_local(directory, "local"))
    assert not server.cut
    _, first, second = server.content_requests(file)
    assert first.range is None and first.sent == cut
    if reset:  # huggingface_hub begins again after this one
        assert second.range is None
    else:
        assert second.range == f"bytes={cut // 1024 * 1024}-"


def test_a_download_that_never_succeeds(server: FakeHub, files: dict[str, bytes]) -> None:
    server.refuse = lambda method, path: (503, {}) if "/cdn/" in path and server.seen[-1].range is None else None
    _refused(HubUnreachableError, "503", "try again later")
    assert len(server.content_requests(_shards(files)[0])) == 1 + hub.ATTEMPTS
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


def test_a_server_in_trouble_after_the_start(server: FakeHub) -> None:
    server.refuse = lambda method, path: (500, {}) if method == "HEAD" and path.endswith(".safetensors") else None
    _refused(HubUnreachableError, "answers 500 for model-0", "try again later")


def _gated(method: str, path: str) -> Answer | None:
    return (403, {"X-Error-Code": "GatedRepo"}) if "/resolve/" in path else None


def test_gated(server: FakeHub) -> None:
    server.refuse = _gated
    _refused(HubError, f"{server.url}/{REPO}", "licence", "hf auth login", "HF_TOKEN")


@pytest.mark.parametrize("status", [401, 404])
def test_missing_repository(status: int, server: FakeHub) -> None:
    server.refuse = lambda method, path: (status, {"X-Error-Code": "RepoNotFound"})
    _refused(HubError, "no such model", "private", "hf auth login", repo="org/nothing")


def test_refused_token(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_stale")
    server.refuse = lambda method, path: (401, {"X-Error-Message": "Invalid credentials in Authorization header"})
    _refused(HubError, "401", "Invalid credentials", "HF_TOKEN")
    assert server.seen[-1].authorization == "Bearer hf_stale"


def test_missing_revision(server: FakeHub) -> None:
    _refused(HubError, "no revision 'v9'", f"{server.url}/{REPO}/tree/main", revision="v9")


def test_a_name_that_the_hub_forbids(server: FakeHub) -> None:
    _refused(HubError, "org/name", repo="org/two--dashes")
    assert not server.seen


def test_missing_shard(server: FakeHub, files: dict[str, bytes]) -> None:
    missing = _shards(files)[2]
    del files[missing]
    _refused(HubError, "1 of the", missing, "another revision")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_in_trouble(status: int, server: FakeHub) -> None:
    server.refuse = lambda method, path: (status, {})
    _refused(HubUnreachableError, str(status), "try again later")


def test_a_server_that_does_not_answer(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    server.stall = threading.Event()
    _refused(HubUnreachableError, "ReadTimeout", "check the network")


def test_a_server_that_is_not_the_hub(server: FakeHub) -> None:
    server.refuse = lambda method, path: (200, {"Content-Type": "text/html"})
    _refused(HubUnreachableError, "HF_ENDPOINT")


def test_nothing_listens(nothing_listens: None) -> None:
    _refused(HubUnreachableError, "ConnectError", "not in the cache", "check the network", "HF_ENDPOINT")


def test_offline_and_nothing_cached(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _refused(HubUnreachableError, "HF_HUB_OFFLINE", "not in the cache", "unset")
    assert not server.seen


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
        _point_at("http://127.0.0.1:1", monkeypatch)
    cached = open_hub(REPO, None, low_disk=True)
    assert (cached.origin, cached.name, cached.files) == (online.origin, online.name, online.files)
    _assert_same(cached, open_local(directory, "local"))
    for info in cached.tensors.values():
        cached.release(info.shard)
    assert _cached(files) == set(_shards(files))


def test_a_part_in_the_cache_will_not_do(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    open_hub(REPO, None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _refused(HubUnreachableError, "HF_HUB_OFFLINE", "unset", "shards are missing")


def test_a_damaged_shard(server: FakeHub, files: dict[str, bytes], directory: Path) -> None:
    file = _shards(files)[0]
    server.damaged = {file: files[file][:-1] + bytes([files[file][-1] ^ 1])}
    text = _refused(CorruptShardError, file, "sha256", "run the command again")
    server.damaged = {}
    _refused(CorruptShardError, file)  # it is in the cache now
    Path(text.partition("delete ")[2].partition(" and run")[0]).unlink()
    _assert_same(open_hub(REPO, None), open_local(directory, "local"))


@pytest.mark.filterwarnings("ignore:Not enough free disk space")  # huggingface_hub warns and goes on
def test_no_room_for_a_shard(server: FakeHub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    _refused(HubError, _shards(files)[0], "10 left", "HF_HOME", "--low-disk")
    assert not _cached(files)


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
    _refused(HubError, "config.json", "Read-only", "HF_HOME")


def test_quantised_is_refused_before_anything_large(server: FakeHub, files: dict[str, bytes]) -> None:
    files["config.json"] = json.dumps({"quantization_config": {"quant_method": "gptq"}}).encode()
    _refused(UnsupportedCheckpointError, "gptq", "unquantised")
    assert not any("/cdn/" in seen.path or "tokenizer" in seen.path for seen in server.seen)


def test_an_index_that_contradicts_the_shards(server: FakeHub, files: dict[str, bytes]) -> None:
    index = json.loads(files[SAFETENSORS_INDEX])
    index["weight_map"]["lm_head.weight"], other = _shards(files)[0], index["weight_map"]["lm_head.weight"]
    index["weight_map"]["model.embed_tokens.weight"] = other
    files[SAFETENSORS_INDEX] = json.dumps(index).encode()
    _refused(CorruptShardError, "lacks the tensor")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 1}', '{"weight_map": {"a": []}}'])
def test_an_index_that_is_none(text: str, server: FakeHub, files: dict[str, bytes]) -> None:
    files[SAFETENSORS_INDEX] = text.encode()
    _refused(CorruptShardError, "not a checkpoint index")


@pytest.mark.parametrize("data", [b"", b"\xff" * 100, (20).to_bytes(8, "little") + b"not JSON" * 3])
def test_a_file_that_is_no_safetensors(data: bytes, server: FakeHub, files: dict[str, bytes]) -> None:
    server.repos["org/bad"] = {"config.json": files["config.json"], "model.safetensors": data}
    _refused(CorruptShardError, "model.safetensors", "safetensors file", repo="org/bad")


def test_a_dtype_that_is_not_supported(server: FakeHub, files: dict[str, bytes]) -> None:
    header = json.dumps({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    data = len(header).to_bytes(8, "little") + header + b"0"
    server.repos["org/bad"] = {"config.json": files["config.json"], "model.safetensors": data}
    _refused(UnsupportedCheckpointError, "F4", repo="org/bad")


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
    _assert_same(source, open_local(local, "local"))
    _refused(UnsupportedCheckpointError, "--low-disk", "safetensors", repo="org/old", low_disk=True)


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
    _refused(UnsupportedCheckpointError, "--low-disk", repo="org/ggufs", low_disk=True)


def test_several_ggufs(server: FakeHub) -> None:
    server.repos["org/ggufs"] = {"a.Q8_0.gguf": b"8", "a.Q4_0.gguf": b"4"}
    _refused(HubError, "a.Q4_0.gguf, a.Q8_0.gguf", "hf download org/ggufs a.Q4_0.gguf", repo="org/ggufs")


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
    _refused(HubError, *words, repo="org/part")


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
