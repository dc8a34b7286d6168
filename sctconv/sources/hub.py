"""A model repository on the Hugging Face Hub as a checkpoint.

The revision is resolved to a commit once, and every file is of that commit. Of safetensors shards only the headers are
read at first; a shard is downloaded, into the Hub's own cache, when a tensor in it is first asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionResolutionError
from huggingface_hub.hf_api import RepoSibling

from sctconv.formats.checkpoint import TensorInfo, tensor_info
from sctconv.formats.dtypes import DTYPES
from sctconv.formats.errors import CorruptShardError, MissingFileError, UnsupportedCheckpointError
from sctconv.formats.safetensors_dir import SafetensorsTensors

from .base import NOTICE, SMALL_FILES, Source, read_small_files
from .hub_errors import MAKE_ROOM, NOT_SOUND, HubError, HubUnreachableError, explained
from .local import BIN_INDEX, SAFETENSORS_INDEX, open_local, refuse_quantised

ATTEMPTS: Final = 3
"""How often a download is begun; huggingface_hub resumes most broken connections by itself, but not one that is reset."""

_HEADERS_AT_ONCE: Final = 8
_MOST_LISTED: Final = 12


def open_hub(repo: str, revision: str | None, *, low_disk: bool = False) -> Source:
    """Opens a model repository.

    Without a connection it is opened from the cache, if all of it is there.

    Args:
        repo: `org/name`.
        revision: branch, tag or commit; None for the repository's main branch.
        low_disk: remove each shard from the cache after use, unless it was there before.

    Raises:
        HubError: the repository, the revision or a file is missing, gated, or cannot be downloaded.
        CheckpointError: the checkpoint is damaged or of a kind that is not supported.
    """
    label = f"{repo}@{revision}" if revision else repo
    try:
        commit = _find_commit(repo, revision)
    except HubUnreachableError as error:
        return _open_cached(repo, revision, label, error)
    start = _choose_checkpoint(commit)
    if ".safetensors" not in start:
        return _open_whole(commit, start, label, low_disk)
    files = _small_files(commit, label)
    weight_map = _read_index(commit, start) if start == SAFETENSORS_INDEX else None
    return HubSource(commit, label, HubTensors(commit, start, weight_map), files, low_disk)


@dataclass(frozen=True)
class _Commit:
    """A repository at one commit. `files` are those at its top level."""

    repo: str
    sha: str
    files: Mapping[str, RepoSibling]

    def sha256(self, file: str) -> str | None:
        """What the sha256 of a file must be, if the Hub says so."""
        lfs = self.files[file].lfs
        return lfs.sha256 if lfs else None

    def download(self, file: str) -> Path:
        """The file in the cache, downloaded unless it is there."""
        for _ in range(ATTEMPTS - 1):
            with contextlib.suppress(HubUnreachableError):
                return self._download_once(file)
        return self._download_once(file)

    def _download_once(self, file: str) -> Path:
        with explained(self.repo, file):
            return Path(hf_hub_download(self.repo, file, revision=self.sha))

    def download_shard(self, file: str) -> tuple[Path, bool]:
        """As `download`, with room looked for and the sha256 checked; and whether the shard was not in the cache."""
        with explained(self.repo, file):
            plan = hf_hub_download(self.repo, file, revision=self.sha, dry_run=True)
        if plan.will_download:
            self._check_room(file, plan.file_size or 0)
        path = self.download(file)
        self._check_sha256(file, path)
        return path, plan.will_download

    def _check_room(self, file: str, size: int) -> None:
        cache = Path(constants.HF_HUB_CACHE)
        free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
        if free < size:
            raise HubError(f"{self.repo}: {file} takes {size:,} bytes and {cache} has {free:,} left; {MAKE_ROOM}")

    def _check_sha256(self, file: str, path: Path) -> None:
        expected = self.sha256(file)
        if expected is None:
            return
        with path.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != expected:
            raise CorruptShardError(
                f"{self.repo}: {file} is damaged (sha256 {found[:12]}…, not {expected[:12]}…); "
                f"delete {path.resolve()} and run the command again"
            )


@dataclass(frozen=True)
class _Shard:
    path: Path
    dense: SafetensorsTensors
    downloaded: bool


class HubTensors:
    """The tensors of safetensors shards on the Hub.

    Args:
        commit: the repository.
        start: the only shard, where there is no index.
        weight_map: tensor name -> file, from the index.

    Raises:
        CheckpointError: a header cannot be read, or the index contradicts it.
    """

    def __init__(self, commit: _Commit, start: str, weight_map: Mapping[str, str] | None) -> None:
        self._commit = commit
        self._shards: dict[str, _Shard] = {}
        self.tensors: Final[dict[str, TensorInfo]] = {}
        files = sorted(set(weight_map.values())) if weight_map else [start]
        with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
            for header in pool.map(lambda file: _read_header(commit, file), files):
                self._add(header)
        for name, file in (weight_map or {}).items():
            if name not in self.tensors or self.tensors[name].shard.name != file:
                raise CorruptShardError(f"{commit.repo}: {file} lacks the tensor {name} of the index; {NOT_SOUND}")

    def _add(self, header: dict[str, TensorInfo]) -> None:
        for name, info in header.items():
            if name in self.tensors:
                other = self.tensors[name].shard.name
                raise CorruptShardError(f"{info.shard}: tensor {name} is also in {other}; {NOT_SOUND}")
            self.tensors[name] = info

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Consecutive flat pieces of a tensor; downloads its shard if need be."""
        return self.shard(self.tensors[name].shard.name).dense.chunks(name)

    def shard(self, file: str) -> _Shard:
        """A shard, downloaded if need be."""
        if file not in self._shards:
            path, downloaded = self._commit.download_shard(file)
            self._shards[file] = _Shard(path, SafetensorsTensors([path]), downloaded)
        return self._shards[file]

    def forget(self, file: str) -> _Shard | None:
        """The shard, if it was in use."""
        return self._shards.pop(file, None)


class HubSource(Source):
    """A safetensors checkpoint on the Hub, whose shards come one at a time."""

    def __init__(self, commit: _Commit, label: str, dense: HubTensors, files: dict[str, bytes], low_disk: bool) -> None:
        super().__init__(label, _bare_name(commit.repo), files, dense, _origin(commit.repo, commit.sha, "safetensors"))
        self._commit = commit
        self._hub = dense
        self._low_disk = low_disk

    def sha256(self, shard: Path) -> str:
        return self._commit.sha256(shard.name) or super().sha256(self._hub.shard(shard.name).path)

    def fingerprint(self, shard: Path) -> str:
        """Of the commit, so that nothing is downloaded for it."""
        return self._commit.sha256(shard.name) or self._commit.sha

    def release(self, shard: Path) -> None:
        used = self._hub.forget(shard.name)
        if used and used.downloaded and self._low_disk:
            _remove(used.path)


def _find_commit(repo: str, revision: str | None) -> _Commit:
    api = HfApi()
    with explained(repo, f"revision {revision or constants.DEFAULT_REVISION!r}"):
        info = api.model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT, files_metadata=True)
    if info.sha is None or info.siblings is None:
        raise HubError(f"{repo}: {constants.ENDPOINT} does not answer as the Hub does; check HF_ENDPOINT")
    with contextlib.suppress(Exception):
        # Downloads by commit leave no trace of the branch in the cache, and it is looked up there without a connection.
        api.resolve_revision(repo, revision=revision)
    return _Commit(repo, info.sha, {file.rfilename: file for file in info.siblings if "/" not in file.rfilename})


def _choose_checkpoint(commit: _Commit) -> str:
    """The file where the checkpoint starts: an index or the only shard."""
    singles = sorted(file for file in commit.files if file.endswith(".safetensors"))
    ggufs = sorted(file for file in commit.files if file.endswith(".gguf"))
    for file in (SAFETENSORS_INDEX, "model.safetensors"):
        if file in commit.files:
            return file
    if len(singles) > 1:
        raise HubError(
            f"{commit.repo}: {len(singles)} .safetensors files ({_listed(singles)}), but no {SAFETENSORS_INDEX} to join "
            f"them; run `hf download {commit.repo} --local-dir DIRECTORY`, keep those of one model, and name the directory"
        )
    for file in (*singles, BIN_INDEX, "pytorch_model.bin"):
        if file in commit.files:
            return file
    if len(ggufs) > 1:
        raise HubError(
            f"{commit.repo}: {len(ggufs)} GGUF files ({_listed(ggufs)}); run "
            f"`hf download {commit.repo} {ggufs[0]} --local-dir .` with the one that you want, and name that file"
        )
    if ggufs:
        return ggufs[0]
    raise HubError(
        f"{commit.repo}: no checkpoint there (looked for {SAFETENSORS_INDEX}, *.safetensors, {BIN_INDEX}, "
        "pytorch_model.bin, *.gguf); name the repository of the weights"
    )


def _listed(files: list[str]) -> str:
    return ", ".join(files[:_MOST_LISTED]) + (", …" if len(files) > _MOST_LISTED else "")


def _small_files(commit: _Commit, label: str) -> dict[str, bytes]:
    """Configuration, tokenizer and notices. The configuration comes first: it may say that the rest is not wanted."""
    if "config.json" not in commit.files:
        raise HubError(f"{commit.repo}: has no config.json; name the repository of the whole model")
    config = commit.download("config.json")
    refuse_quantised(config.read_bytes(), label)
    for file in sorted(commit.files):
        if file in SMALL_FILES or NOTICE.fullmatch(file):
            commit.download(file)
    return read_small_files(config.parent)


def _read_index(commit: _Commit, index: str) -> dict[str, str]:
    """The `weight_map` of an index, every file of which is there."""
    path = commit.download(index)
    try:
        weight_map = dict(json.loads(path.read_bytes())["weight_map"])
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptShardError(f"{commit.repo}: {index} is not a checkpoint index ({error!r}); {NOT_SOUND}") from None
    if missing := [file for file in files if file not in commit.files]:
        raise HubError(
            f"{commit.repo}: {len(missing)} of the {len(files)} shards that {index} names are not there, the first "
            f"{missing[0]}; {NOT_SOUND}"
        )
    return weight_map


def _read_header(commit: _Commit, file: str) -> dict[str, TensorInfo]:
    """What is in a shard, in the order of its data, at the cost of its header."""
    with explained(commit.repo, f"the header of {file}"):
        header = HfApi().parse_safetensors_file_metadata(commit.repo, file, revision=commit.sha).tensors
    shard = Path(commit.repo) / file
    for name, item in header.items():
        if item.dtype not in DTYPES:
            raise UnsupportedCheckpointError(f"{shard}: tensor {name!r:.80} is {item.dtype}, which is not supported")
    in_order = sorted(header.items(), key=lambda pair: pair[1].data_offsets)
    return {name: tensor_info(name, item.dtype, item.shape, shard) for name, item in in_order}


def _open_whole(commit: _Commit, start: str, label: str, low_disk: bool) -> Source:
    """Opens what cannot be read before all of it is here: torch .bin and GGUF."""
    if low_disk:
        raise UnsupportedCheckpointError(
            f"{label}: --low-disk needs safetensors, and {start} is all there is; leave the option out"
        )
    if not start.endswith(".gguf"):
        _small_files(commit, label)
    shards = sorted(set(_read_index(commit, start).values())) if start == BIN_INDEX else [start]
    paths = [commit.download_shard(file)[0] for file in shards]
    source = open_local(paths[0] if start.endswith(".gguf") else paths[0].parent, label)
    return _as_of_hub(source, commit.repo, commit.sha)


def _open_cached(repo: str, revision: str | None, label: str, unreachable: HubUnreachableError) -> Source:
    """Opens what an earlier download left in the cache."""
    try:
        sha = HfApi().resolve_revision(repo, revision=revision, local_files_only=True).resolved
        folder = snapshot_download(repo, revision=sha, local_files_only=True, allow_patterns="config.json")
    except (RevisionResolutionError, LocalEntryNotFoundError):
        raise unreachable from unreachable.__cause__
    try:
        return _as_of_hub(open_local(Path(folder), label), repo, sha)
    except MissingFileError as error:
        rest = str(error).removeprefix(f"{folder}: ")
        raise HubUnreachableError(f"{unreachable} (a part of commit {sha[:12]} is: {rest})") from None


def _as_of_hub(source: Source, repo: str, sha: str) -> Source:
    origin = {**source.origin, **_origin(repo, sha, source.origin["format"])}
    return replace(source, name=_bare_name(repo), origin=origin)


def _origin(repo: str, sha: str, kind: str) -> dict[str, Any]:
    return {"source": repo, "revision": sha, "format": kind}


def _bare_name(repo: str) -> str:
    return repo.rpartition("/")[2]


def _remove(path: Path) -> None:
    """Removes a file from the cache, with all links on the way to it: a blob may itself be a link to a shared one."""
    while path.is_symlink():
        link, path = path, path.parent / path.readlink()
        link.unlink()
    path.unlink(missing_ok=True)
