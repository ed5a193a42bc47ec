"""A server that speaks what the Hugging Face Hub and plain file servers speak, with the faults that networks have."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "8eba874cbccfd4f5815f3c8dcb10959a6fc7dcf0"


@dataclass
class Hub:
    """What it serves, and how.

    Attributes:
        files: By name, of the one repository `org/name`; addresses `/files/NAME` give them, too.
        gated: Whoever asks without the token `secret` is told that the repository is gated.
        cut: After so many bytes of a larger file the connection ends, that often.
        digests: What it says of a file's SHA-256, where that is another than it has.
        kinds: Content-Type of an address.
        redirects: From a path to another address.
        announces: Whether it says how long an answer is.
        version: The ETag of all addresses.
        status: What it answers to everything, where that is not 200.
        asked: The requests, as `METHOD PATH`, and the range.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    gated: bool = False
    cut: tuple[int, int] = (0, 0)
    digests: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    announces: bool = True
    version: str | None = '"1"'
    status: int = 200
    asked: list[str] = field(default_factory=list)
    url: str = ""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that leaves early is part of the tests."""


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serves in a thread, at `hub.url`, until the block ends."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with _Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield hub
        finally:
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        asked = f"{self.command} {path} {self.headers.get('Range', '')}".strip()
        self.hub.asked.append(asked)
        if self.hub.status != 200:
            self._refuse(self.hub.status, "")
        elif path in self.hub.redirects:
            self._send(302, {"Location": self.hub.redirects[path]})
        elif path.startswith("/files/"):
            self._send_address(path.removeprefix("/files/"))
        else:
            self._send_hub(path, body=body)

    def _send_hub(self, path: str, *, body: bool) -> None:
        parts = path.strip("/").split("/")
        api = parts[0] == "api"
        repository = "/".join(parts[2:4] if api else parts[:2])
        revision = (parts[5] if len(parts) > 5 else "main") if api else parts[3]
        if repository != "org/name":
            self._refuse(401, "RepoNotFound")
        elif self.hub.gated and self.headers.get("Authorization") != "Bearer secret":
            self._refuse(401, "GatedRepo")
        elif revision not in ("main", "v1", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif api:
            listed = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.hub.files]}
            self._send(200, {"Content-Type": "application/json"}, json.dumps(listed).encode())
        elif (name := "/".join(parts[4:])) not in self.hub.files:
            self._refuse(404, "EntryNotFound")
        else:
            self._send_file(name, body=body)

    def _send_file(self, name: str, *, body: bool) -> None:
        data = self.hub.files[name]
        headers = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if name.endswith(".json"):
            headers["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
        else:  # as Git LFS has it
            headers["ETag"] = '"of the store"'
            headers["X-Linked-Etag"] = f'"{self.hub.digests.get(name) or hashlib.sha256(data).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(data))
        self._send_range(data, headers, body=body)

    def _send_address(self, name: str) -> None:
        version = self.hub.version
        if name not in self.hub.files:
            return self._refuse(404, "")
        if version is not None and self.headers.get("If-None-Match") == version:
            return self._send(304, {})
        headers = {} if version is None else {"ETag": version}
        if "If-Range" in self.headers and self.headers["If-Range"] != version:
            del self.headers["Range"]
        headers["Content-Type"] = self.hub.kinds.get(name, "application/octet-stream")
        return self._send_range(self.hub.files[name], headers, body=True)

    def _send_range(self, data: bytes, headers: dict[str, str], *, body: bool) -> None:
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            if start >= len(data):
                return self._send(416, headers)
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        length, times = self.hub.cut
        short = body and times > 0 and len(data) - start > length
        if short:
            self.hub.cut = (length, times - 1)
        part = data[start:]
        return self._send(206 if start else 200, headers, part, sent=part[:length] if short else part, body=body)

    def _send(
        self, status: int, headers: dict[str, str], data: bytes = b"", *, sent: bytes | None = None, body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.hub.announces:
            self.send_header("Content-Length", str(len(data)))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(data if sent is None else sent)
        if sent is not None and len(sent) < len(data):
            self.close_connection = True

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, {"X-Error-Code": code, "X-Error-Message": f"no: {code}", "X-Repo-Commit": COMMIT})
