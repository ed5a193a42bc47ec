"""Two files that belong together put in their places as one: neither another process nor Ctrl-C comes between. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from .artifacts import PendingOutput, explain_os_errors, hidden_name, is_same, put_in_place, settle

logger = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
"""What file systems without locks answer; EBADF is NFS, of a file that was opened for reading only."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lets one thread of one process at a time into the block, by a hidden file beside `path`; others wait.

    The file is gone afterwards. That of a killed process stays, empty, and locks nothing: the lock went with its process. Where the file system
    has no locks the block is entered all the same, which is logged.

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
            with contextlib.suppress(OSError):  # of another user, or a file system that removes no open file: it locks nothing any more
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
        logger.warning("%s: this file system has no locks (%s): two that write the same file at once are not kept apart", name.parent, error.strerror)
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

    The old paper goes before the new main file comes, so that no moment, not even that of a power cut, has one beside the paper of another. What
    could fail for want of space is done before; where the main file cannot be replaced all the same, the old paper comes back.

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
