"""A repository on a Hub on this machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from tests.models import save, tiny_model

from .checks import REPO, point_at
from .server import FakeHub, serve

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
        point_at(fake.url, monkeypatch)
        yield fake
    close_session()


@pytest.fixture
def nothing_listens(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        point_at(f"http://127.0.0.1:{bound.getsockname()[1]}", monkeypatch)
        yield
