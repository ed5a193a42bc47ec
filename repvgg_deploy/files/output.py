"""Files that appear whole or not at all, alone or two together, whatever interrupts; and digests of files."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import filecmp
import gc
import hashlib
import logging
import os
import re
import shlex
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import ArtifactError, InputError

logger = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 20
_NAME_BYTES = 100
_PARTIAL = ".partial"
_ABANDONED_SECONDS = 3600.0
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
"""What file systems without locks answer; EBADF is NFS, of a file that was opened for reading only."""


@dataclass(slots=True)
class PendingOutput:
    """An output under construction.

    Attributes:
        target: Where it will stand.
        partial: The hidden file beside it to write to.
        status: `pending`, then `written` or `up to date` (an identical file stood there already).
        left: Whether the hidden file stays at the end if it has not been renamed, for the next command to finish.
    """

    target: Path
    partial: Path
    status: Literal["pending", "written", "up to date"] = "pending"
    left: bool = False


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
        if _is_same(output):
            output.status = "up to date"
            return
        require_replaceable(output, force=force)
        settle(output)
        put_in_place(output)


@contextlib.contextmanager
def pending_output(target: Path) -> Iterator[PendingOutput]:
    """Gives a hidden file beside `target`, which the caller renames; if it is still there at the end, it is removed.

    Raises:
        ArtifactError: The folder is missing or not writable, or the disk is full.
    """
    partial, handle = _create_partial(target)
    output = PendingOutput(target, partial)
    try:
        _clear_leftovers(target, os.fstat(handle).st_mtime)
        with explain_os_errors(target):
            yield output
    except ArtifactError as error:
        if str(partial) not in error.message:
            raise
        # Of a writer that took the hidden file for its target: nobody knows that name.
        raise ArtifactError(error.message.replace(str(partial), str(target)), remedy=error.remedy) from error
    finally:
        os.close(handle)  # first: NFS keeps what is removed while it is open
        if not output.left:
            with contextlib.suppress(OSError):  # what cannot be removed is found by a later writer
                partial.unlink()


def write_text(target: Path, text: str, *, force: bool = False) -> PendingOutput:
    """Writes a UTF-8 text file atomically.

    Raises:
        ArtifactError: As `atomic_output`.
    """
    with atomic_output(target, force=force) as output:
        output.partial.write_text(text, encoding="utf-8")
    return output


def require_writable(target: Path) -> None:
    """Finds out before long work, not after it, that an output cannot be written.

    Raises:
        ArtifactError: The folder is missing or not writable, or the target is no ordinary file.
    """
    partial, handle = _create_partial(target)
    os.close(handle)
    partial.unlink()


def require_distinct(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    """Refuses an output that is an input or another output: `--force` is no leave to replace the only copy of a file.

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
    if output.target.exists() and not force and not _is_same(output):
        raise ArtifactError(
            f"{output.target}: exists and differs from what would be written",
            remedy="give --force to replace it, or another --out",
        )


def refuse_stdout(target: Path) -> None:
    """Refuses `-`, by which other programs mean standard output: a model must not land in a file of that name.

    Raises:
        ArtifactError: It is `-`.
    """
    if target.name == "-":
        raise ArtifactError(
            "-: nothing is written to standard output, because what is written is verified as a file",
            remedy="give a file name, such as --out model.onnx",
        )


def _create_partial(target: Path) -> tuple[Path, int]:
    """A hidden file beside the target, and its handle, which holds its lock: see `_remove_if_dead`."""
    refuse_stdout(target)
    with explain_os_errors(target):
        if target.is_dir():
            raise ArtifactError(
                f"{target}: is a folder, expected a file name", remedy=f"give a file, such as {target / 'model.onnx'}"
            )
        if target.exists() and not target.is_file():
            remedy = "give the name of an ordinary file"
            raise ArtifactError(f"{target}: is a device or pipe, expected a file", remedy=remedy)
        if not target.parent.is_dir():
            remedy = f"mkdir -p {shlex.quote(str(target.parent))}"
            raise ArtifactError(f"{target}: the folder {target.parent} does not exist", remedy=remedy)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=_hidden_name(target.name, "."), suffix=_PARTIAL)
    _try_lock(handle)
    return Path(name), handle


def find_partials(target: Path) -> list[Path]:
    """The hidden files that were to become `target`, of writers that are at work or were killed."""
    prefix = _hidden_name(target.name, ".")
    pattern = re.compile(re.escape(prefix) + r"[a-z0-9_]{8}\.partial(\.old)?")
    try:
        return sorted(target.with_name(name) for name in os.listdir(target.parent) if pattern.fullmatch(name))
    except OSError:
        return []


def _clear_leftovers(target: Path, now: float) -> None:
    """Removes hidden files of the dead, which are an hour old at `now`, the file system's clock, in seconds.

    Containers share folders and not process ids, so that age and a lock decide.
    """
    for path in find_partials(target):
        with contextlib.suppress(OSError):
            if now - path.stat().st_mtime > _ABANDONED_SECONDS:
                _remove_if_dead(path)


def _remove_if_dead(path: Path) -> None:
    """Removes a hidden file if its lock can be taken; where there are no locks, nothing is removed."""
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if _try_lock(handle) and _is_file(handle, path):
            path.unlink()
            logger.info("%s: left by a process that was killed: removed", path)
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    """Takes the lock of a file, unless another holds it or there are no locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def read_umask() -> int:
    """The mask of this process, without changing it where the system tells it: setting it is heard by all threads."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("Umask:")), 8)
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _hidden_name(name: str, suffix: str) -> str:
    """`.NAME` and the suffix, cut so that a disk takes it: most allow 255 bytes, which are 85 Chinese characters."""
    return f".{name.encode('utf-8', 'surrogateescape')[:_NAME_BYTES].decode('utf-8', 'ignore')}{suffix}"


def _is_same(output: PendingOutput) -> bool:
    return output.target.exists() and filecmp.cmp(output.target, output.partial, shallow=False)


def settle(output: PendingOutput) -> None:
    """Brings what was written to the disk, with the mode of a file that others may read: only a rename is left then.

    Raises:
        OSError: The disk is full.
    """
    with output.partial.open("rb+") as file:
        os.fsync(file.fileno())
    # mkstemp made the file private, and a model is for everyone who may read the folder.
    os.chmod(output.partial, 0o666 & ~read_umask())


def exchange(one: Path, other: Path) -> bool:
    """Two files or folders change their names at once; False, and nothing has changed, where the system cannot.

    Source: renameat2(2) with RENAME_EXCHANGE, Linux 3.15 and glibc 2.28.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return int(rename(here, os.fsencode(one), here, os.fsencode(other), both)) == 0


def put_in_place(output: PendingOutput) -> None:
    """Replaces the target.

    Raises:
        OSError: The operating system refuses.
    """
    rename(output.partial, output.target)
    output.status = "written"


def rename(source: Path, target: Path) -> None:
    """`os.replace`; no error where it was done all the same: NFS asks again where the answer was lost, in vain then.

    Raises:
        OSError: The operating system refuses.
    """
    before = os.lstat(source)
    try:
        os.replace(source, target)
    except OSError:
        if os.path.lexists(source) or not (target.is_file() and os.path.samestat(before, os.lstat(target))):
            raise


@contextlib.contextmanager
def explain_os_errors(target: Path) -> Iterator[None]:
    """Turns a full disk, a missing permission and other operating system errors into ArtifactError.

    They are said of `target`; but of another file, such as an input, where the error names one.

    Raises:
        ArtifactError: The operating system refused.
    """
    try:
        yield
    except ArtifactError:
        raise
    except (OSError, RuntimeError) as raised:
        error: BaseException | None = raised
        while error is not None and not isinstance(error, OSError):
            error = error.__context__  # of torch.save, which says that a position is unexpected where a disk is full
        if error is None:
            raise
        other = _other_file(error, target)
        if other is not None:
            raise ArtifactError(f"{other}: {error.strerror}", remedy="check the path, and its permissions") from raised
        remedy = "look at the message of the operating system, or write elsewhere with --out"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free some space, or write to another disk with --out"
        elif error.errno in (errno.EACCES, errno.EPERM):
            remedy = f"make {target.parent} writable, or write elsewhere with --out"
        elif error.errno in (errno.EROFS, errno.EBUSY, errno.EXDEV):  # busy: a mount of its own, as Docker's -v makes
            remedy = "write to another disk with --out, or mount the folder around it, writable"
        raise ArtifactError(f"{target}: cannot be written: {error.strerror or error}", remedy=remedy) from raised


def _other_file(error: OSError, target: Path) -> str | None:
    """The file that an error is about, if that is neither the target, nor in it, nor a hidden file beside it."""
    if not isinstance(error.filename, (str, bytes)) or error.errno in (errno.ENOSPC, errno.EDQUOT):
        return None
    named, own = os.fsdecode(error.filename), _hidden_name(target.name, "").lstrip(".")
    return None if any(part.lstrip(".").startswith(own) for part in Path(named).parts) else named


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Lets one thread of one process at a time into the block, by a hidden file beside `path`; others wait.

    Gives whether it is so: False where the file system has no locks.

    The file is gone afterwards. That of a killed process stays, empty, and locks nothing. Where the file system has no
    locks the block is entered all the same, which is logged.

    Raises:
        ArtifactError: The folder is missing or not writable.
    """
    name = path.with_name(_hidden_name(path.name, ".lock"))
    with explain_os_errors(path):
        handle, held = _acquire(name)
    try:
        yield held
    finally:
        try:
            # It may be another user's, or the file system removes no open file: it stays then, and locks nothing.
            with contextlib.suppress(OSError):
                name.unlink()
        finally:
            os.close(handle)


def _acquire(name: Path) -> tuple[int, bool]:
    """The open file, and whether its lock is held."""
    while True:
        handle = _open(name)
        try:
            held = _lock(handle, name)
            if not held or _is_file(handle, name):
                return handle, held
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its last holder has removed it: it is no longer the file that others lock


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
        said = "%s: this file system has no locks (%s): two that write the same file at once are not kept apart"
        logger.warning(said, name.parent, error.strerror)
        return False
    return True


def _is_file(handle: int, name: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), name.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Ctrl-C and requests to end that arrive in the block are delivered after it."""
    arrived: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other thread hears signals or may set handlers
        known = (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP"))
        handlers = {number: signal.getsignal(number) for number in known if number is not None}
        before = {number: heard for number, heard in handlers.items() if heard not in (None, signal.SIG_IGN)}
    try:
        for number in before:
            signal.signal(number, lambda number, _: arrived.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in arrived:
            signal.raise_signal(number)


def publish_pair(main: PendingOutput, passport: PendingOutput) -> None:
    """Puts two files in their places; for one process at a time, see `locked`.

    The old passport goes before the new main file comes, so that no moment, not even that of a power cut, has a main
    file beside the passport of another. What could fail for want of space is done before; where the main file cannot be
    replaced all the same, the old passport comes back.

    Args:
        main: Replaces what stands there, unless that is the same.
        passport: Describes `main`, and names it by its digest.

    Raises:
        OSError: The operating system refuses; nothing has changed.
    """
    settle(main)
    settle(passport)
    same = _is_same(main)
    with signals_deferred():
        if same:
            main.status = "up to date"
        else:
            _replace_main(main, passport)
        if same and _is_same(passport):
            passport.status = "up to date"
        else:
            passport.left = True  # where it cannot be put in place, the next command does it
            put_in_place(passport)


def _replace_main(main: PendingOutput, passport: PendingOutput) -> None:
    aside = passport.partial.with_name(f"{passport.partial.name}.old")
    try:
        with contextlib.suppress(FileNotFoundError):
            rename(passport.target, aside)
        put_in_place(main)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            rename(aside, passport.target)
        raise
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file.

    Raises:
        OSError: The file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def release_freed_memory() -> None:
    """Collects reference cycles, and has glibc return freed memory to the system; other C libraries are not asked.

    glibc keeps freed blocks of up to 32 MiB for itself. Between two stages that hold the weights in turn, that would be
    one more copy of them.
    Source: malloc_trim(3).
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
