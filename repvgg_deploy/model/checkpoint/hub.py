"""A checkpoint by name → a file on this machine, and what is known of it: `locate`.

`hf-hub:ORG/NAME[/FILE][@REVISION]` is a repository of the Hugging Face Hub, as timm names it; huggingface_hub fetches
it, so that its cache, tokens, proxies and `HF_*` variables are as everywhere. `https://…` is one file, which
`files.download` fetches. A digest that is known is compared before anything of the file is read.
Source: the layout of the cache, https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urldefrag

from ...errors import CheckpointError, InputError, explain_missing
from ...files.download import Fetched, download, name_of_address, show_address
from ...files.output import sha256_file
from ...specs.zoo import find_card_by_name
from .lazy import listing, printable
from .places import read_index
from .told import Told, read_config

_NAME = re.compile(r"hf[-_]hub:(?P<rest>.*)", re.IGNORECASE | re.DOTALL)
_ADDRESS = re.compile(r"(?P<scheme>https?):/+(?P<rest>.*)", re.IGNORECASE | re.DOTALL)  # pathlib leaves one slash
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SAFE = ("model.safetensors", "model.safetensors.index.json")
_PICKLE = "pytorch_model.bin"
_SUFFIXES = (".tar", ".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".pdparams")
_PUBLISHED = ("A0", "A1", "A2", "B0", "B1", "B1g4", "B2", "B2g4", "B3", "B3g4", "D2se")


@dataclass(frozen=True, slots=True)
class Located:
    """A checkpoint that is on this machine.

    Attributes:
        path: The file.
        origin: The name that gives the same file again: its revision is a commit, or its SHA-256 stands behind it; None
            for a file that was given as one. An address is without its query, which may hold a secret.
        told: What stands beside it.
    """

    path: Path
    origin: str | None = None
    told: Told | None = None


def is_name(given: Path | str) -> bool:
    """Whether a checkpoint is given by a name that is to be fetched, not as a file."""
    text = str(given)
    return bool(_NAME.fullmatch(text) or _ADDRESS.fullmatch(text)) and not os.path.lexists(text)


def name_pretrained(variant: str) -> str:
    """The name of timm's weights of a published variant.

    Raises:
        InputError: timm publishes none.
    """
    if variant not in _PUBLISHED:
        raise InputError(
            f"timm publishes no weights of {variant}, only of {', '.join(_PUBLISHED)}",
            remedy="give --ckpt a file: the README of https://github.com/DingXiaoH/RepVGG links the others",
        )
    return f"hf-hub:timm/repvgg_{variant.lower()}.rvgg_in1k"


def default_onnx(given: Path | str) -> Path:
    """The ONNX beside a checkpoint; of one that is given by name, in this folder.

    Raises:
        InputError: The path has no file name.
    """
    text = str(given)
    if not is_name(given):
        return _output_beside(Path(given))
    if match := _NAME.fullmatch(text):
        parts = match["rest"].partition("@")[0].split("/")
        file = parts[-1] if len(parts) > 2 else f"{(parts[1:] or parts)[0]}.safetensors"
        return _output_beside(Path(file))
    return _output_beside(Path(name_of_address(text)))


def _output_beside(checkpoint: Path) -> Path:
    """The ONNX beside a checkpoint: its name with the checkpoint's suffixes replaced by `.onnx`."""
    if not checkpoint.name:
        raise InputError(f"{str(checkpoint)!r} is no file", remedy="give --ckpt a checkpoint file")
    output = checkpoint
    while output.suffix.lower() in _SUFFIXES:
        output = output.with_suffix("")
    return output.with_name(f"{output.name}.onnx")


def locate(given: Path | str | Located, *, progress: Fetched | None = None) -> Located:
    """Finds a checkpoint, and fetches it where it is given by name.

    Args:
        given: A file; `hf-hub:ORG/NAME`, with `/FILE` for one of its files and `@REVISION` for a branch, tag or commit;
            or `https://…`, with `#sha256=…` where its digest is known.
        progress: Of a file from an address, the bytes that are there and those in all.

    Raises:
        CheckpointError: There is no such repository, revision or file, no leave to read it, no network; the digest is
            another than the hub, the card or the address says. (Whether a file that was given exists is not looked at.)
        MissingDependencyError: huggingface_hub is not installed.
        ArtifactError: The cache cannot be written.
    """
    if isinstance(given, Located):
        return given
    text = str(given)
    if not is_name(given):
        return Located(Path(given))
    if match := _NAME.fullmatch(text):
        return _from_hub(match["rest"])
    address = _ADDRESS.fullmatch(text)
    assert address is not None
    url, fragment = urldefrag(f"{address['scheme'].lower()}://{address['rest']}")
    stated = parse_qs(fragment).get("sha256", [None])[0]
    path, sha256 = download(url, progress=progress)
    _require_digest(path, sha256, stated and stated.lower(), "the address")
    _require_card(path, path.name, sha256)
    return Located(path, f"{show_address(url)}#sha256={sha256}")


def _require_digest(path: Path, sha256: str, wanted: str | None, who: str) -> None:
    if wanted is not None and sha256 != wanted:
        raise CheckpointError(
            f"{path}: has the SHA-256 {sha256}, {who} says {wanted}",
            remedy=f"rm {shlex.quote(str(path.resolve()))}, and give the command again; if it is so again, tell those "
            f"who publish it",
        )


def _require_card(path: Path, name: str, sha256: str) -> None:
    """A file with the name of a published checkpoint must be that one."""
    card = find_card_by_name(name)
    if card is not None and card.sha256 is not None and card.sha256 != sha256:
        raise CheckpointError(
            f"{path}: has the name of {card.summary()}, and the SHA-256 {sha256}; its card says {card.sha256}",
            remedy=f"take it from {card.source}; where it is meant to be another, give the file: --ckpt "
            f"{shlex.quote(str(path))}",
        )


def _from_hub(rest: str) -> Located:
    names, at, revision = rest.partition("@")
    parts = names.split("/", 2)
    if len(parts) < 2 or not all(parts) or (at and not revision):
        raise CheckpointError(
            f"hf-hub:{printable(rest)}: names no repository",
            remedy="give hf-hub:ORG/NAME, such as hf-hub:timm/repvgg_a0.rvgg_in1k, with @REVISION behind it if need be",
        )
    hub = _Hub(f"{parts[0]}/{parts[1]}", revision or "main")
    config = hub.fetch("config.json")
    file = parts[2] if len(parts) > 2 else hub.choose_weights()
    path = hub.fetch(file)
    if path is None:
        raise hub.explain_lack(file)
    told = None if config is None else read_config(config, hub.repository)
    chosen = f"/{file}" if len(parts) > 2 else ""
    return Located(path, f"hf-hub:{hub.repository}{chosen}@{hub.revision}", told)


class _Hub:
    """One revision of a repository; after the first file that is found, its commit."""

    def __init__(self, repository: str, revision: str) -> None:
        self.repository, self.revision = repository, revision
        try:
            self._library: Any = importlib.import_module("huggingface_hub")
            self._errors: Any = importlib.import_module("huggingface_hub.errors")
            self._constants: Any = importlib.import_module("huggingface_hub.constants")
        except ImportError as error:
            raise (explain_missing(error) or error) from error

    @property
    def _shown(self) -> str:
        return f"hf-hub:{self.repository}@{self.revision}"

    def choose_weights(self) -> str:
        """Which file has the weights: safetensors wherever there is one.

        Raises:
            CheckpointError: It is not clear which.
        """
        for name in _SAFE:
            if self.fetch(name) is not None:
                return name
        files = self.list_files()
        if files is None:
            return _PICKLE  # without a network: what is in the cache
        safe = [name for name in files if name.endswith(".safetensors")]
        if len(safe) == 1:
            return safe[0]
        if not safe and _PICKLE in files:
            return _PICKLE
        others = safe or [
            name for name in files if name.endswith((".pth", ".pt", ".tar", ".bin", ".ckpt", ".pdparams"))
        ]
        if len(others) == 1:
            return others[0]
        example = others[0] if others else "FILE"
        raise CheckpointError(
            f"{self._shown}: has {listing(others) if others else 'no file of weights'}, expected one file of weights",
            remedy=f"name the file, such as hf-hub:{self.repository}/{example}",
        )

    def list_files(self) -> list[str] | None:
        """The files of the repository; None where the hub cannot be asked."""
        try:
            found = self._library.HfApi().model_info(self.repository, revision=self.revision)
        except (self._errors.HTTPError, self._errors.OfflineModeIsEnabled, OSError):
            return None
        return [entry.rfilename for entry in found.siblings or ()]

    def fetch(self, file: str) -> Path | None:
        """A file of the repository, and of an index its shards, as the hub says they are; None where it has none such.

        Raises:
            CheckpointError: It cannot be had, or is not whole.
        """
        errors = self._errors
        try:
            found = self._library.hf_hub_download(
                self.repository, file, revision=self.revision, library_name="repvgg-deploy"
            )
        except errors.LocalEntryNotFoundError as error:
            if self._is_known_to_lack(file):
                return None
            raise self._explain_unreachable(file, error) from error
        except errors.EntryNotFoundError:
            return None
        except errors.HFValidationError as error:
            remedy = "give hf-hub:ORG/NAME, such as hf-hub:timm/repvgg_a0.rvgg_in1k"
            raise CheckpointError(f"{self._shown}: {_one_line(error)}", remedy=remedy) from error
        except (errors.HTTPError, OSError) as error:
            raise self._explain(file, error) from error
        # …/snapshots/COMMIT/FILE: what comes next is of the same commit.
        path = Path(found)
        self.revision = path.parents[file.count("/")].name
        self._compare(path, file)
        if file.endswith(".index.json"):
            for shard in read_index(path):
                if self.fetch(shard) is None:
                    raise self.explain_lack(shard)
        return path

    def explain_lack(self, file: str) -> CheckpointError:
        """The error for a file that is not there."""
        files = self.list_files()
        named = "" if files is None else f"; it has {listing(files)}"
        remedy = f"look at {self._page} for its files, and give hf-hub:{self.repository}/FILE"
        return CheckpointError(f"{self._shown}: has no file {printable(file)}{named}", remedy=remedy)

    @property
    def _page(self) -> str:
        return f"{self._constants.ENDPOINT}/{self.repository}"

    def _is_known_to_lack(self, file: str) -> bool:
        """Whether the cache remembers that this revision has no such file."""
        found = self._library.try_to_load_from_cache(self.repository, file, revision=self.revision)
        return found is self._library._CACHED_NO_EXIST

    def _compare(self, path: Path, file: str) -> None:
        """The digest with the hub's own, which is the name of what the cache's link leads to, and with a card's."""
        sha256 = sha256_file(path)
        blob = Path(os.readlink(path)).name if path.is_symlink() else self._ask_digest(file)
        wanted = blob if _SHA256.fullmatch(blob) else None  # of small files it is git's, a SHA-1
        _require_digest(path, sha256, wanted, "the hub")
        _require_card(path, Path(file).name, sha256)

    def _ask_digest(self, file: str) -> str:
        """From the hub, where the cache has no links; empty where it cannot be asked."""
        url = self._library.hf_hub_url(self.repository, file, revision=self.revision)
        try:
            return self._library.get_hf_file_metadata(url).etag or ""
        except (self._errors.HTTPError, self._errors.OfflineModeIsEnabled, OSError):
            return ""

    def _explain(self, file: str, error: Exception) -> CheckpointError:
        errors, login = self._errors, "hf auth login, or set HF_TOKEN"
        if isinstance(error, errors.GatedRepoError):
            what = "is gated: its owner decides who may read it"
            return CheckpointError(f"{self._shown}: {what}", remedy=f"ask for access at {self._page}, then {login}")
        if isinstance(error, errors.RepositoryNotFoundError):
            what = "there is no such repository, or it is private"
            return CheckpointError(f"{self._shown}: {what}", remedy=f"compare the name; of a private one, {login}")
        if isinstance(error, errors.RevisionNotFoundError):
            remedy = f"give a branch, tag or commit that {self._page} has, or leave @{self.revision} out"
            return CheckpointError(f"{self._shown}: has no such revision", remedy=remedy)
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            remedy = f"{login}, with a token that may read it"
            return CheckpointError(
                f"{self._shown}: {printable(file)} may not be read: {_one_line(error)}", remedy=remedy
            )
        return CheckpointError(
            f"{self._shown}: {printable(file)} cannot be fetched: {_one_line(error)}",
            remedy="look at the network, its proxy and the disk, and give the command again",
        )

    def _explain_unreachable(self, file: str, error: Exception) -> CheckpointError:
        cause = error.__cause__
        if isinstance(cause, (self._errors.RevisionNotFoundError, self._errors.GatedRepoError)):
            return self._explain(file, cause)
        if self._constants.HF_HUB_OFFLINE:
            problem, remedy = "and HF_HUB_OFFLINE is set", "fetch it once without HF_HUB_OFFLINE, or give a file"
        else:
            problem = f"and the hub cannot be reached ({_one_line(_innermost(cause or error))})"
            remedy = "look at the network and its proxy (https_proxy, HF_ENDPOINT), or give a file"
        return CheckpointError(f"{self._shown}: {printable(file)} is not in the cache, {problem}", remedy=remedy)


def _innermost(error: BaseException) -> BaseException:
    """What the system said, where a library wrapped it; what a server said stays."""
    while not hasattr(error, "response") or error.response is None:
        inner = error.__cause__ or error.__context__
        if inner is None:
            break
        error = inner
    return error


def _one_line(error: BaseException) -> str:
    return printable(" ".join(str(error).split()) or type(error).__name__)
