"""A file from an address, into the cache folder: resumed, bounded, whole or not at all."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..errors import CheckpointError
from .cache import cache_folder
from .output import PendingOutput, explain_os_errors, locked, put_in_place, settle, sha256_file, write_text

logger = logging.getLogger(__name__)
MOST_BYTES = 8 << 30
"""The largest file that is fetched: the largest RepVGG of float32, with two averages and its optimizer, is half."""
_LOCAL = ("localhost", "127.0.0.1", "::1")
_BLOCK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 30.0
_FRUITLESS = 3
_UNSAFE = re.compile(r"[^\w.+-]")
Fetched = Callable[[int, int], None]
"""Is told the bytes that are there, and those in all (0 where the server does not say)."""


def show_address(url: str) -> str:
    """An address without what may be a secret: name, password, query and fragment."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def name_of_address(url: str) -> str:
    """The name of the file at an address, as any disk takes it."""
    return _UNSAFE.sub("_", unquote(urlsplit(url).path).rpartition("/")[2])[-100:].lstrip(".") or "checkpoint"


def download(url: str, *, progress: Fetched | None = None, most_bytes: int = MOST_BYTES) -> tuple[Path, str]:
    """Fetches a file into the cache, and gives it with its hexadecimal SHA-256.

    A file that is there already is fetched again only where the server has another. An interrupted download goes on
    where it ended, in this call or the next; where the server cannot be reached, what is there serves. Proxies are
    those of the environment (`https_proxy`, `no_proxy`).

    Args:
        url: `https://…`; `http://` for this machine alone.
        progress: See `Fetched`.
        most_bytes: A larger file is refused.

    Raises:
        CheckpointError: It is not secure, not there, not whole, too large, a web page, or cannot be reached.
        ArtifactError: The cache cannot be written.
        InputError: There is no folder for the cache.
    """
    _require_secure(url)
    target = cache_folder() / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:16] / name_of_address(url)
    with explain_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        return _Download(url, target, progress or _silent, most_bytes).run()


def _silent(done: int, total: int) -> None:
    """No progress wanted."""


def _require_secure(url: str) -> None:
    try:
        parts = urlsplit(url)
        host, named = parts.hostname, parts.username is not None
    except ValueError as error:
        raise CheckpointError(f"{url}: is no address: {error}", remedy="give https://HOST/PATH") from error
    shown = show_address(url)
    if not host:
        raise CheckpointError(f"{shown}: names no host", remedy="give https://HOST/PATH")
    if parts.scheme != "https" and not (parts.scheme == "http" and host in _LOCAL):
        remedy = "give its https:// address, or fetch it yourself and give the file with the SHA-256 compared"
        raise CheckpointError(f"{shown}: is not encrypted, so that anyone on the way could change it", remedy=remedy)
    if named:
        remedy = f"fetch it with curl -L -u NAME -O {shown}, then give the file"
        raise CheckpointError(f"{shown}: has a name or password in its address", remedy=remedy)


class _Secure(urllib.request.BaseHandler):
    """Looks at every request, also at those to which the server redirects."""

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        _require_secure(request.full_url)
        return request

    https_request = ftp_request = http_request


class _Interrupted(Exception):  # noqa: N818
    """The connection ended before the file did."""


@dataclass(slots=True)
class _Download:
    url: str
    target: Path
    progress: Fetched
    most_bytes: int
    known: dict[str, str] = field(default_factory=dict)

    def run(self) -> tuple[Path, str]:
        """Asks until the file is whole; a connection that brings nothing three times in turn is the end."""
        self.known = self._state(self.target)
        fruitless, most = 0, self._begun()
        while True:
            try:
                return self._ask()
            except _Interrupted as error:
                has = self._begun()
                fruitless, most = (0 if has > most else fruitless + 1), max(has, most)
                if fruitless >= _FRUITLESS:
                    return self._fall_back(f"was interrupted after {has:,} bytes ({error})")
                logger.info("%s: interrupted after %d bytes (%s): going on", self._shown, has, error)
            except urllib.error.HTTPError as error:
                error.close()
                if error.code == 304:
                    return self.target, self.known["sha256"]
                if error.code == 416 and self._begun():  # the server has fewer bytes than were there
                    self._part.unlink()
                    continue
                return self._refuse(error)
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                return self._fall_back(f"cannot be reached ({reason})")

    @property
    def _shown(self) -> str:
        return show_address(self.url)

    @property
    def _part(self) -> Path:
        return self.target.with_name(f"{self.target.name}.part")

    def _begun(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0

    def _refuse(self, error: urllib.error.HTTPError) -> tuple[Path, str]:
        said = f"the server says {error.code} {error.reason}"
        if error.code in (401, 403, 407):
            remedy = "fetch it with its own program or your browser, where you are logged in, and give the file"
        elif error.code in (404, 410):
            remedy = "compare the address with the page that names it"
        else:
            return self._fall_back(f"cannot be fetched: {said}")
        raise CheckpointError(f"{self._shown}: {said}", remedy=remedy) from error

    def _fall_back(self, problem: str) -> tuple[Path, str]:
        if self.known:
            logger.warning("%s: %s; the file that was fetched before is taken", self._shown, problem)
            return self.target, self.known["sha256"]
        remedy = "look at the network and its proxy (https_proxy), or give a file"
        if self._begun():
            remedy = "give the command again: it goes on from there"
        raise CheckpointError(f"{self._shown}: {problem}", remedy=remedy)

    def _ask(self) -> tuple[Path, str]:
        headers = {"User-Agent": "repvgg-deploy", "Accept-Encoding": "identity"}
        begun, known = self._begun(), self._state(self._part).get("version")
        if begun and known:
            headers |= {"Range": f"bytes={begun}-", "If-Range": known}
        elif tag := self.known.get("version"):
            headers["If-None-Match" if tag.startswith('"') else "If-Modified-Since"] = tag
        opener = urllib.request.build_opener(_Secure)
        with opener.open(urllib.request.Request(self.url, headers=headers), timeout=_TIMEOUT_SECONDS) as answer:
            return self._take(answer, begun)

    def _take(self, answer: Any, begun: int) -> tuple[Path, str]:
        """The rest of the file, or all of it where the server begins anew."""
        length = answer.headers.get("Content-Length", "")
        total = int(length) if length.isdecimal() else 0
        goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {begun}-")
        if answer.headers.get_content_type() == "text/html":
            remedy = "give the address of the file itself; of a repository of Hugging Face, hf-hub:ORG/NAME"
            raise CheckpointError(f"{self._shown}: is a web page, expected a checkpoint", remedy=remedy)
        begun = begun if goes_on else 0
        total = begun + total if total else 0
        self._bound(max(total, begun))
        with explain_os_errors(self.target):
            if not goes_on:
                tag = answer.headers.get("ETag", "")
                version = tag if tag.startswith('"') else answer.headers.get("Last-Modified", "")
                self._keep(self._part, {"version": version})
            with self._part.open("ab" if goes_on else "wb") as file:
                while block := _read(answer):
                    begun += len(block)
                    self._bound(begun)
                    file.write(block)
                    self.progress(begun, total)
        if begun < total:
            raise _Interrupted(f"{total:,} were announced")
        return self._finish()

    def _bound(self, size: int) -> None:
        if size > self.most_bytes:
            self._part.unlink(missing_ok=True)
            raise CheckpointError(
                f"{self._shown}: has {size:,} bytes or more, at most {self.most_bytes:,} are fetched",
                remedy="no RepVGG is as large: compare the address, or fetch it yourself and give the file",
            )

    def _finish(self) -> tuple[Path, str]:
        state = {"version": self._state(self._part).get("version", ""), "sha256": sha256_file(self._part)}
        output = PendingOutput(self.target, self._part, left=True)
        with explain_os_errors(self.target):
            settle(output)
            self._keep(self.target, state)  # before the file: what it describes is compared by its digest
            put_in_place(output)
            self._beside(self._part).unlink(missing_ok=True)
        return self.target, state["sha256"]

    def _beside(self, path: Path) -> Path:
        return path.with_name(f"{path.name}.json")

    def _keep(self, path: Path, state: dict[str, str]) -> None:
        write_text(self._beside(path), json.dumps(state), force=True)

    def _state(self, path: Path) -> dict[str, str]:
        """What is known of a file here; nothing where it is missing or has changed since."""
        try:
            state = json.loads(self._beside(path).read_text(encoding="utf-8"))
            kept = {name: value for name, value in state.items() if isinstance(value, str)}
            whole = "sha256" not in kept or kept["sha256"] == sha256_file(path)
            return kept if path.exists() and whole else {}
        except (OSError, ValueError, AttributeError):
            return {}


def _read(answer: Any) -> bytes:
    try:
        block: bytes = answer.read(_BLOCK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(str(error) or type(error).__name__) from error
    return block
