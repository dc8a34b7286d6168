"""What tests of the Hub ask again and again."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

from sctconv.formats.checkpoint import read_tensor
from sctconv.formats.errors import CheckpointError
from sctconv.sources import Source
from sctconv.sources.hub import open_hub
from sctconv.sources.weights import DenseModel

REPO = "org/tiny-llama"


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def shards(files: dict[str, bytes]) -> list[str]:
    return [name for name in files if name.endswith(".safetensors") and "/" not in name]


def cached(files: dict[str, bytes], suffix: str = ".safetensors") -> set[str]:
    """The shards of which the cache holds the content."""
    blobs = {path.name for path in Path(constants.HF_HUB_CACHE).glob("models--*/blobs/*")}
    return {name for name, data in files.items() if name.endswith(suffix) and hashlib.sha256(data).hexdigest() in blobs}


def assert_same(source: Source, local: Source) -> None:
    ours, theirs = DenseModel(source), DenseModel(local)
    assert list(ours.tensors) == list(theirs.tensors)
    for name, info in theirs.tensors.items():
        assert (ours.tensors[name].dtype, ours.tensors[name].shape) == (info.dtype, info.shape)
        assert ours.tensors[name].shard.name == info.shard.name
        assert source.sha256(ours.tensors[name].shard) == local.sha256(info.shard)
        np.testing.assert_array_equal(read_tensor(ours, name), read_tensor(theirs, name))
    assert source.files == local.files


def refused(error: type[CheckpointError], *words: str, repo: str = REPO, **kwargs: Any) -> str:
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
