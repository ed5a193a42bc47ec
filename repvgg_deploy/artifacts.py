"""Files that appear whole or not at all, and their digests. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import hashlib
import os
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .errors import ArtifactError, InputError

_CHUNK_BYTES = 1 << 20
_NAME_BYTES = 100


@dataclass(slots=True)
class PendingOutput:
    """An output under construction.

    Attributes:
        target: Where it will stand.
        partial: The hidden file beside it to write to.
        status: `pending`, then `written` or `up to date` (an identical file stood there already).
    """

    target: Path
    partial: Path
    status: Literal["pending", "written", "up to date"] = "pending"


@contextlib.contextmanager
def atomic_output(target: Path, *, force: bool = False) -> Iterator[PendingOutput]:
    """Gives a hidden file beside `target` and renames it when the block ends well; removes it on any error or Ctrl-C.

    Args:
        target: The output.
        force: Replace a different file that stands there.

    Raises:
        ArtifactError: The folder is missing or not writable, the disk is full, or a different file stands there already.
    """
    with pending_output(target) as output:
        yield output
        _commit(output, force)


@contextlib.contextmanager
def pending_output(target: Path) -> Iterator[PendingOutput]:
    """Gives a hidden file beside `target`, for who renames it himself; what is left of it at the end of the block is removed.

    Raises:
        ArtifactError: The folder is missing or not writable, or the disk is full.
    """
    output = PendingOutput(target, _create_partial(target))
    try:
        with explain_os_errors(target):
            yield output
    finally:
        output.partial.unlink(missing_ok=True)


def require_writable(target: Path) -> None:
    """Finds out before long work, not after it, that an output cannot be written.

    Raises:
        ArtifactError: The folder is missing or not writable, or the target is no ordinary file.
    """
    _create_partial(target).unlink()


def require_distinct(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    """Refuses outputs that are one another, or an input: `--force` is leave to replace a result, not the only copy of the weights.

    Raises:
        InputError: Two of the paths are the same file.
    """
    for index, output in enumerate(outputs):
        for other in (*inputs, *outputs[:index]):
            same = os.path.realpath(output) == os.path.realpath(other)
            if same or (output.exists() and other.exists() and output.samefile(other)):
                raise InputError(f"{output}: would replace {other}, which is an input or another output", remedy="give each output a name of its own")


def require_replaceable(output: PendingOutput, *, force: bool) -> None:
    """Refuses to go on when what was written to `partial` may not replace what stands at `target`.

    For a caller with two outputs, so that both are written or none.

    Raises:
        ArtifactError: A different file stands there, and `force` is not given.
    """
    if output.target.exists() and not force and not is_same(output):
        raise _exists(output.target)


def hidden_name(name: str, suffix: str) -> str:
    """`.NAME` and the suffix, cut so that a disk takes it: most allow 255 bytes, which are 85 Chinese characters."""
    return f".{name.encode('utf-8', 'surrogateescape')[:_NAME_BYTES].decode('utf-8', 'ignore')}{suffix}"


def _exists(target: Path) -> ArtifactError:
    return ArtifactError(f"{target}: exists and differs from what would be written", remedy="give --force to replace it, or another --out")


def _create_partial(target: Path) -> Path:
    if target.is_dir():
        raise ArtifactError(f"{target}: is a folder, expected a file name", remedy=f"give a file, such as {target / 'model.onnx'}")
    if target.exists() and not target.is_file():
        raise ArtifactError(f"{target}: is a device or pipe, expected a file", remedy="give the name of an ordinary file")
    if not target.parent.is_dir():
        raise ArtifactError(f"{target}: the folder {target.parent} does not exist", remedy=f"mkdir -p {shlex.quote(str(target.parent))}")
    with explain_os_errors(target):
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=hidden_name(target.name, "."), suffix=".partial")
        os.close(handle)
    return Path(name)


def _commit(output: PendingOutput, force: bool) -> None:
    if is_same(output):
        output.status = "up to date"
        return
    if output.target.exists() and not force:
        raise _exists(output.target)
    settle(output)
    put_in_place(output)


def is_same(output: PendingOutput) -> bool:
    """Whether an identical file stands at the target already."""
    return output.target.exists() and filecmp.cmp(output.target, output.partial, shallow=False)


def settle(output: PendingOutput) -> None:
    """Brings what was written to the disk and gives it the mode of a file that others may read: then only a rename is left.

    Raises:
        OSError: The disk is full.
    """
    with output.partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.chmod(output.partial, 0o666 & ~_umask())


def put_in_place(output: PendingOutput) -> None:
    """Replaces the target.

    Raises:
        OSError: The operating system refuses.
    """
    os.replace(output.partial, output.target)
    output.status = "written"


def _umask() -> int:
    # The mask can only be read by setting it; mkstemp made the file private, and a model is for everyone who may read the folder.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def explain_os_errors(target: Path) -> Iterator[None]:
    """Turns a full disk, a missing permission and other operating system errors on `target` into ArtifactError.

    Raises:
        ArtifactError: The operating system refused.
    """
    try:
        yield
    except ArtifactError:
        raise
    except OSError as error:
        remedy = {
            errno.ENOSPC: "free some space, or write to another disk with --out",
            errno.EDQUOT: "free some space, or write to another disk with --out",
            errno.EACCES: f"make {target.parent} writable, or write elsewhere with --out",
            errno.EPERM: f"make {target.parent} writable, or write elsewhere with --out",
            errno.EROFS: "write to another disk with --out",
        }.get(error.errno or 0, "look at the message of the operating system, or write elsewhere with --out")
        raise ArtifactError(f"{target}: cannot be written: {error.strerror or error}", remedy=remedy) from error


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        return hash_stream(hashlib.sha256(), file, None).hexdigest()


def hash_stream(digest: hashlib._Hash, file: object, size: int | None) -> hashlib._Hash:
    """Feeds `size` bytes of a binary file (all for None) to `digest`, a chunk at a time."""
    left = size
    while left is None or left > 0:
        block = file.read(_CHUNK_BYTES if left is None else min(_CHUNK_BYTES, left))  # type: ignore[attr-defined]
        if not block:
            break
        digest.update(block)
        left = None if left is None else left - len(block)
    return digest


def write_text(target: Path, text: str, *, force: bool = False) -> PendingOutput:
    """Writes a UTF-8 text file atomically.

    Raises:
        ArtifactError: As `atomic_output`.
    """
    with atomic_output(target, force=force) as output:
        output.partial.write_text(text, encoding="utf-8")
    return output


_CHECKPOINT_SUFFIXES = (".tar", ".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".pdparams")


def default_output(checkpoint: Path) -> Path:
    """The ONNX beside a checkpoint: its name with the checkpoint's suffixes replaced by `.onnx`.

    Raises:
        InputError: The path has no file name.
    """
    if not checkpoint.name:
        raise InputError(f"{str(checkpoint)!r} is no file", remedy="give --ckpt a checkpoint file")
    output = checkpoint
    while output.suffix.lower() in _CHECKPOINT_SUFFIXES:
        output = output.with_suffix("")
    return output.with_name(f"{output.name}.onnx")
