"""Files that appear whole or not at all, and their digests. Standard library only.

Two files that belong together put in their places as one: neither another process nor Ctrl-C comes between. Standard
library only.

Giving memory back to the operating system. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import filecmp
import gc
import hashlib
import logging
import os
import shlex
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import ArtifactError, InputError

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
        ArtifactError: The folder is missing or not writable, the disk is full, or a different file stands there
            already.
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
                raise InputError(
                    f"{output}: would replace {other}, which is an input or another output",
                    remedy="give each output a name of its own",
                )


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
    return ArtifactError(
        f"{target}: exists and differs from what would be written",
        remedy="give --force to replace it, or another --out",
    )


def _create_partial(target: Path) -> Path:
    if target.is_dir():
        raise ArtifactError(
            f"{target}: is a folder, expected a file name", remedy=f"give a file, such as {target / 'model.onnx'}"
        )
    if target.exists() and not target.is_file():
        raise ArtifactError(
            f"{target}: is a device or pipe, expected a file", remedy="give the name of an ordinary file"
        )
    if not target.parent.is_dir():
        raise ArtifactError(
            f"{target}: the folder {target.parent} does not exist", remedy=f"mkdir -p {shlex.quote(str(target.parent))}"
        )
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
    # The mask can only be read by setting it; mkstemp made the file private, and a model is for everyone who may read
    # the folder.
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


logger = logging.getLogger(__name__)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
"""What file systems without locks answer; EBADF is NFS, of a file that was opened for reading only."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lets one thread of one process at a time into the block, by a hidden file beside `path`; others wait.

    The file is gone afterwards. That of a killed process stays, empty, and locks nothing: the lock went with its
    process. Where the file system has no locks the block is entered all the same, which is logged.

    Raises:
        ArtifactError: The folder is missing or not writable.
    """
    name = path.with_name(hidden_name(path.name, ".lock"))
    with explain_os_errors(path):
        handle = _acquire(name)
    try:
        yield
    finally:
        try:
            with contextlib.suppress(
                OSError
            ):  # of another user, or a file system that removes no open file: it locks nothing any more
                name.unlink()
        finally:
            os.close(handle)


def _acquire(name: Path) -> int:
    while True:
        handle = _open(name)
        try:
            if not _lock(handle, name) or _is_file(handle, name):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # who held it before has removed it: it is no longer the file that others lock


def _open(name: Path) -> int:
    try:
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError as error:
        try:  # it may be another user's
            return os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            raise error from None


def _lock(handle: int, name: Path) -> bool:
    """Waits for the lock; False where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: another process writes here: waiting for it", name)
            fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning(
            "%s: this file system has no locks (%s): two that write the same file at once are not kept apart",
            name.parent,
            error.strerror,
        )
        return False
    return True


def _is_file(handle: int, name: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), name.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Ctrl-C and requests to end that arrive in the block are heard after it."""
    arrived: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other thread hears any, or may set who does
        known = (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP"))
        before = {number: signal.getsignal(number) for number in known if number is not None}
    try:
        for number, handler in before.items():
            if handler not in (None, signal.SIG_IGN):
                signal.signal(number, lambda number, _: arrived.append(number))
        yield
    finally:
        for number, handler in before.items():
            if handler not in (None, signal.SIG_IGN):
                signal.signal(number, handler)
        for number in arrived:
            signal.raise_signal(number)


def publish_pair(main: PendingOutput, paper: PendingOutput) -> None:
    """Puts two files in their places; for one process at a time, see `locked`.

    The old paper goes before the new main file comes, so that no moment, not even that of a power cut, has one beside
    the paper of another. What could fail for want of space is done before; where the main file cannot be replaced all
    the same, the old paper comes back.

    Args:
        main: Replaces what stands there, unless that is the same.
        paper: Speaks of `main`, by its digest.

    Raises:
        OSError: The operating system refuses; nothing has changed.
    """
    settle(main)
    settle(paper)
    same = is_same(main)
    aside = paper.partial.with_name(f"{paper.partial.name}.old")
    with signals_deferred():
        if same:
            main.status = "up to date"
        else:
            _replace_main(main, paper.target, aside)
        if same and is_same(paper):
            paper.status = "up to date"
        else:
            put_in_place(paper)


def _replace_main(main: PendingOutput, paper: Path, aside: Path) -> None:
    try:
        with contextlib.suppress(FileNotFoundError):
            os.rename(paper, aside)
        put_in_place(main)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.rename(aside, paper)
        raise
    finally:
        aside.unlink(missing_ok=True)


def release_freed_memory() -> None:
    """Collects reference cycles and asks the C library to return freed heap memory, where it can (glibc); does nothing elsewhere.

    glibc keeps freed blocks of up to 32 MiB for itself. Between two stages that hold the weights in turn, that would be
    one more copy of them.
    Source: malloc_trim(3).
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
