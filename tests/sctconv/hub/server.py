"""A Hub on this machine: as much of its HTTP interface as huggingface_hub 2.4 uses to read model repositories."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

SHA = "5c7a0cc1d3b0e2f4a6978b1c2d3e4f5061728394"
LARGE = (".safetensors", ".bin", ".gguf")
"""Kinds of files kept in LFS: their ETag is a sha256, and the Hub redirects to another host for their content."""

Answer = tuple[int, dict[str, str]]


@dataclass
class Seen:
    """A request and what was sent for it."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    sent: int = 0


@dataclass
class FakeHub:
    """The repositories and behaviour of a server; `seen` is what was asked of it.

    Attributes:
        repos: repository -> file name -> content.
        refuse: looks at (method, path) and gives the status and headers of a refusal, or None.
        cut: file name -> bytes after which the next answer with its content breaks off.
        reset: whether a cut connection is reset instead of closed.
        damaged: file name -> content that is sent in place of the right one.
        stall: if set, answers to the API wait for it.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refuse: Callable[[str, str], Answer | None] = lambda method, path: None
    cut: dict[str, int] = field(default_factory=dict)
    reset: bool = False
    damaged: dict[str, bytes] = field(default_factory=dict)
    stall: threading.Event | None = None
    seen: list[Seen] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def content_requests(self, file: str) -> list[Seen]:
        """The requests for the content of a large file."""
        shas = {hashlib.sha256(files[file]).hexdigest() for files in self.repos.values() if file in files}
        return [seen for seen in self.seen if seen.method == "GET" and seen.path.rpartition("/")[2] in shas]


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Serves until the end of the block."""

    class Bound(_Handler):
        pass

    Bound.hub = hub
    server = _Server(("127.0.0.1", hub.port), Bound)
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        if hub.stall:
            hub.stall.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of clients that went away; whatever else goes wrong here shows in what the test expects."""


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.seen = Seen(self.command, path, self.headers.get("Range"), self.headers.get("Authorization"))
        self.hub.seen.append(self.seen)
        if refusal := self.hub.refuse(self.command, path):
            self._send(*refusal, json.dumps({"error": "no"}).encode())
        elif path.startswith("/api/models/"):
            self._model_info(path.removeprefix("/api/models/"))
        elif path.startswith("/cdn/"):
            self._content(path.removeprefix("/cdn/"))
        elif "/resolve/" in path:
            repo, _, rest = path[1:].partition("/resolve/")
            self._resolve(repo, *rest.split("/", 1))
        else:
            self._send(404, {})

    def _model_info(self, path: str) -> None:
        if self.hub.stall:
            self.hub.stall.wait()
        repo, _, revision = path.partition("/revision/")
        if repo not in self.hub.repos:
            self._send(404, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("", "main", SHA):
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            siblings = [_sibling(name, data) for name, data in self.hub.repos[repo].items()]
            info = {"_id": "0", "id": repo, "sha": SHA, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}
            self._send(200, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def _resolve(self, repo: str, revision: str, file: str) -> None:
        data = self.hub.repos[repo].get(file)
        if data is None:
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
        elif file.endswith(LARGE):
            sha = hashlib.sha256(data).hexdigest()
            headers = {
                "Location": f"http://localhost:{self.hub.port}/cdn/{sha}",  # another host than 127.0.0.1
                "X-Repo-Commit": SHA,
                "X-Linked-Etag": f'"{sha}"',
                "X-Linked-Size": str(len(data)),
            }
            self._send(302, headers)
        else:
            self._send(200, {"X-Repo-Commit": SHA, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data)

    def _content(self, sha: str) -> None:
        everything = {name: data for files in self.hub.repos.values() for name, data in files.items()}
        file = next(name for name, data in everything.items() if hashlib.sha256(data).hexdigest() == sha)
        data = self.hub.damaged.get(file, everything[file])
        if self.seen.range is None:
            self._send(200, {}, data, self.hub.cut.pop(file, None))
            return
        first, _, last = self.seen.range.removeprefix("bytes=").partition("-")
        end = min(int(last) + 1, len(data)) if last else len(data)
        headers = {"Content-Range": f"bytes {first}-{end - 1}/{len(data)}"}
        self._send(206, headers, data[int(first) : end])

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"", cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[:cut])
        self.seen.sent = len(body[:cut])
        if cut is not None:
            self.close_connection = True
            if self.hub.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()


def _sibling(name: str, data: bytes) -> dict[str, Any]:
    item: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
    if name.endswith(LARGE):
        item["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
    return item
